"""The reference's Python snippet under its own names: `initialize_megatron`, `get_args`, `GPTModel(config, ...)`.

    from modellink.compat import GPTModel, core_transformer_config_from_args, get_args, initialize_megatron

    def model_provider(pre_process=True, post_process=True):
        config = core_transformer_config_from_args(get_args())
        return GPTModel(config, parallel_output=False, pre_process=pre_process, post_process=post_process)

    initialize_megatron(args_defaults={"no_load_rng": True, "no_load_optim": True})
    model = GPTModel.from_pretrained(model_provider=model_provider, pretrained_model_name_or_path=get_args().load)
    print(model.generate("how are you?"))

Only scripts written for the reference need this module; nothing else in the package reads the arguments it keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink.config.flags import by_name
from modellink.config.load import ResolvedConfig, load_config
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.infer import model as infer
from modellink.models.decoder import Decoder

__all__ = ["GPTModel", "core_transformer_config_from_args", "get_args", "initialize_megatron"]


class Arguments:
    """A resolved configuration read by the names of its flags: `args.micro_batch_size`, `args.no_load_rng`."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        self.resolved = resolved

    def __getattr__(self, name: str) -> Any:
        table = by_name(self.resolved.program)
        flag = table.get("--" + name.replace("_", "-")) or table.get(f"--{name}")
        if flag is None or flag.path is None or flag.path.startswith("source."):
            raise AttributeError(f"there is no option {name!r} with a value")
        value = self.resolved.get(flag.path)
        return (not value) if "--" + name.replace("_", "-") in flag.negatives else value


_session: list[Arguments] = []


def initialize_megatron(
    extra_args_provider: Any = None,
    args_defaults: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
    **ignored: Any,
) -> None:
    """Read the command line (or `argv`) as `modellink generate` does; flags win over `args_defaults`.

    `extra_args_provider` is refused: an option that no code here reads would change nothing. Other keywords of the
    reference are accepted.
    """
    if extra_args_provider is not None:
        raise ModelLinkError("extra_args_provider is refused: read further options with a parser of your own.")
    given = list(sys.argv[1:] if argv is None else argv)
    defaults: list[str] = []
    for name, value in (args_defaults or {}).items():
        flag = "--" + name.replace("_", "-")
        if value is not False and value is not None:
            defaults += [flag] if value is True else [flag, str(value)]
    _session[:] = [Arguments(load_config([*defaults, *given], "generate"))]


def get_args() -> Arguments:
    """The arguments that `initialize_megatron` read."""
    if not _session:
        raise ModelLinkError("get_args() was called before initialize_megatron().")
    return _session[0]


def core_transformer_config_from_args(args: Arguments) -> ModelConfig:
    """The architecture of these arguments; the vocabulary is the tokenizer's where no flag or folder gives it."""
    return args.resolved.config.model


class GPTModel(infer.GPTModel):
    """`modellink.GPTModel` with the reference's constructor and loader."""

    def __init__(
        self, config: Any, *positional: Any, pre_process: bool = True, post_process: bool = True, **keywords: Any
    ):
        if isinstance(config, Decoder):
            super().__init__(config, *positional, **keywords)
            return
        if not (pre_process and post_process):
            raise ModelLinkError("a model object is whole: pipeline stages are made by `modellink train`.")
        model = config.resolve()
        if model.padded_vocab_size is None:
            model.padded_vocab_size = keywords.get("vocab_size") or model.vocab_size
        if model.padded_vocab_size is None:
            raise ModelLinkError("the vocabulary is not known: give --vocab-size or --padded-vocab-size.")
        if model.vocab_size is None:
            model.vocab_size = model.padded_vocab_size
        super().__init__(Decoder(model))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path | None = None,
        *,
        model_provider: Callable[..., Any] | None = None,
        pretrained_model_name_or_path: str | Path | None = None,
        dtype: str | None = None,
        **keywords: Any,
    ) -> infer.GPTModel:
        """Load a folder; it states the architecture, so `model_provider` is not called.

        The dtype follows --bf16 and --fp16 when a command line was read, else it is bfloat16.
        """
        folder = path or pretrained_model_name_or_path
        if folder is None:
            raise ModelLinkError("from_pretrained needs pretrained_model_name_or_path, a folder with weights.")
        if dtype is None:
            dtype = _session[0].resolved.config.optimizer.dtype if _session else "bfloat16"
        return infer.GPTModel.from_pretrained(folder, dtype=dtype, **keywords)
