"""Whole-folder conversion between Hugging Face and native checkpoints, tensor by tensor.

Nothing is computed: names are mapped, rows of vocabulary padding come or go, bytes are copied. Megatron's formats are
spoken by
their own module; asking for them here is an error that says so.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from modellink.checkpoint.hf import expected_shapes, is_hf_folder, load_hf, read_config, read_extras, save_hf
from modellink.checkpoint.store import CheckpointStore, is_native_step, load_full, read_tensor_names
from modellink.config.architecture import read_native
from modellink.config.load import dump_config, load_config
from modellink.errors import ModelLinkError
from modellink.models.decoder import Decoder

FORMATS = ("hf", "native")


def _stored_dtype(folder: Path) -> torch.dtype:
    """Type of the weights in a Hugging Face folder, from its first tensor."""
    from modellink.checkpoint.hf_files import HFWeights

    weights = HFWeights(folder)
    return weights[next(iter(weights))].dtype


def hf_to_native(source: Path, target: Path) -> None:
    """Write step 1 of a native checkpoint with the weights of a Hugging Face folder, in their own dtype."""
    config = read_config(source)
    config.padded_vocab_size = config.padded_vocab_size or config.vocab_size
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(_stored_dtype(source)).to_empty(device="cpu")  # where files are read
    model.tie_weights()
    load_hf(model, source)
    tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    resolved = load_config(["--hf-path", str(source)], program="generate")
    resolved.program = "train"  # what is written describes a run
    resolved.set("model.padded_vocab_size", config.padded_vocab_size, "converted weights")
    extra = {"progress": {}, "layout": {}, "hf_extras": read_extras(source)}
    CheckpointStore(target, local=True).save(1, tensors, extra=extra, per_rank={}, config_text=dump_config(resolved))


def native_to_hf(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write a Hugging Face folder from the newest complete step (or the step folder) `source`."""
    step = source if is_native_step(source) else CheckpointStore(source, local=True).resolve()
    config = read_native(step / "modellink.yaml").resolve()
    config.padded_vocab_size = read_tensor_names(step)["model.embed_tokens.weight"].shape[0]
    config.vocab_size = config.vocab_size or config.padded_vocab_size
    tokenizer = _tokenizer_folder(step)
    names = [f"model.{name}" for name in expected_shapes(config)]
    tensors = ((name.removeprefix("model."), tensor) for name, tensor in load_full(step, names))
    save_hf(target, tensors, config, tokenizer_from=tokenizer, dtype=dtype)


def _tokenizer_folder(step: Path) -> Path | None:
    named = read_native(step / "modellink.yaml", section="tokenizer").tokenizer_name_or_path
    return Path(named) if named and Path(named).is_dir() else None


def convert(
    load_dir: str | Path,
    save_dir: str | Path,
    to: str,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Convert the checkpoint in `load_dir` to format `to` ("hf" or "native") in `save_dir`.

    A native checkpoint loads at every layout, so the parallel sizes matter to Megatron's formats only. `dtype` casts
    the weights of a Hugging Face folder that is written (default: as stored). Raises ModelLinkError for what does not
    exist
    or cannot be expressed; nothing is left half-written.
    """
    source, target = Path(load_dir), Path(save_dir)
    if to not in FORMATS or tensor_parallel != 1 or pipeline_parallel != 1:
        raise ModelLinkError(
            f"converting to {to} with tensor parallel {tensor_parallel} and pipeline parallel {pipeline_parallel} is "
            f"not built yet: give one of {', '.join(FORMATS)} with parallel sizes 1."
        )
    if not source.is_dir():
        raise ModelLinkError(f"no checkpoint at {source}: give a Hugging Face or native checkpoint folder.")
    if is_hf_folder(source):
        if to == "hf":
            raise ModelLinkError(f"{source} already is a Hugging Face folder: copy it, or convert to native.")
        hf_to_native(source, target)
    elif to == "native":
        raise ModelLinkError(f"{source} already is native: it loads at every layout.")
    else:
        native_to_hf(source, target, dtype)
