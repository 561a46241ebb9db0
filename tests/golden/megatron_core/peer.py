"""Megatron-Core reads folders of checkpoints on the CPU: its own model for every rank, strictly loaded, and its logits.

Run as `python peer.py jobs.json`; the file holds a list of `{"folder", "tokens", "logits"}`. The model of each rank is
a GPTModel of the local spec, with the options that the rank's file states. A folder of one rank also runs: the fp32
logits [batch, sequence, vocabulary] of `tokens` are written to `logits` (.npy). The last line printed is JSON: for each
job, the folders of the ranks that were loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore


def grouped_matmul(rows: Tensor, weights: Tensor, counts: Tensor, trans_b: bool) -> Tensor:
    """`counts[i]` rows [N, K] times `weights[i]` [K, M], as the kernel of the package grouped_gemm computes it."""
    assert not trans_b
    pairs = zip(rows.split(counts.tolist()), weights, strict=True)
    return torch.cat([part @ weight for part, weight in pairs])


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """What Megatron-Core 0.16 asks of an accelerator or of packages that exist only with one, answered for the CPU.

    None of it computes: where tensors are made, waiting, a side stream, the random state of dropout (which is 0). Two
    exceptions: without Transformer Engine its router looks for a name that only Transformer Engine defines (absent, it
    multiplies matrices with torch), and its grouped experts take their product from a package that needs CUDA.
    """
    with contextlib.ExitStack() as stack:
        for name, value in (("current_device", "cpu"), ("synchronize", None), ("Stream", None)):
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value, **__: value))
        stack.enter_context(mock.patch.object(Tensor, "cuda", lambda self, *_, **__: self))

        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        from megatron.core.transformer.moe import grouped_gemm_util, moe_utils

        kernels = SimpleNamespace(ops=SimpleNamespace(gmm=grouped_matmul))
        stack.enter_context(mock.patch.multiple(grouped_gemm_util, grouped_gemm=kernels, ops=kernels.ops))
        stack.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))
        stack.enter_context(mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext()))
        yield


def transformer_config(args: argparse.Namespace) -> Any:
    """Megatron's configuration from the options of a run: those of the same name, and the few that are called otherwise
    (as Megatron's own training program translates them)."""
    from megatron.core.transformer import TransformerConfig

    given = vars(args)
    fields = [field.name for field in dataclasses.fields(TransformerConfig) if field.init and field.name in given]
    values = {name: given[name] for name in fields if given[name] is not None}
    assert args.swiglu and args.normalization == "RMSNorm"
    return TransformerConfig(
        **values
        | {
            "num_moe_experts": args.num_experts or None,
            "num_query_groups": args.num_query_groups if args.group_query_attention else args.num_attention_heads,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "moe_router_load_balancing_type": "none",  # a loss of training; says nothing about logits
            "moe_use_legacy_grouped_gemm": bool(given.get("moe_grouped_gemm")),
            "params_dtype": torch.float32,
            "pipeline_dtype": torch.float32,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "use_cpu_initialization": True,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
        }
    )


def load_rank(file: Path, stages: tuple[bool, bool]) -> Any:
    """Megatron's model of one rank, whose stage is (the first, the last), with every weight of `file` and no other."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, weights_only=True)
    args, config = content["args"], transformer_config(content["args"])
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=stages[0],
        post_process=stages[1],
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
    )
    # the gate of the shared experts came to Megatron-Core later, under another name than in the folders of this layout
    weights = {
        name.replace("shared_expert_gate.weight", "shared_experts.gate_weight"): value
        for name, value in content["model"].items()
    }
    model.load_state_dict(weights, strict=True)
    return model.eval()


def compute(model: Any, tokens_BS: Tensor) -> Tensor:
    """Logits [B, S, V] of one rank that holds everything."""
    model.config.bf16 = True  # the grouped experts insist on it; nothing is cast, the weights are fp32
    length = tokens_BS.shape[1]
    hidden_from = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        return model(tokens_BS, torch.arange(length).expand_as(tokens_BS), hidden_from)


def run(job: dict[str, Any]) -> list[str]:
    """Load every rank of a folder, one after the other in this process, under a process group that only counts."""
    from megatron.core import parallel_state

    step = next(Path(job["folder"]).glob("iter_*"))
    ranks = sorted(path.name for path in step.iterdir())
    with torch.serialization.safe_globals([argparse.Namespace]):
        args = torch.load(step / ranks[0] / "model_optim_rng.pt", weights_only=True)["args"]
    tensor, pipeline, expert = (
        getattr(args, f"{kind}_model_parallel_size", None) or 1 for kind in ("tensor", "pipeline", "expert")
    )
    loaded = []
    for rank in range(tensor * pipeline * expert):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tensor * pipeline * expert)
        parallel_state.initialize_model_parallel(
            tensor,
            pipeline,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=tensor,
            create_gloo_process_groups=False,
        )
        name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}" if pipeline > 1 else ""
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}" if expert > 1 else ""
        stages = (parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())
        model = load_rank(step / name / "model_optim_rng.pt", stages)
        if len(ranks) == 1:
            np.save(job["logits"], compute(model, torch.tensor(job["tokens"])).numpy())
        loaded.append(name)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return sorted(loaded)


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with on_cpu():
        print(json.dumps([run(job) for job in jobs]))


if __name__ == "__main__":
    main()
