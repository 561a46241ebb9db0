"""How a model is cut over Megatron's files: the folders of a step, and what each rank's file holds.

    DIR/latest_checkpointed_iteration.txt                  "1", or the word release
    DIR/iter_0000001/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

TT is the tensor-parallel rank, PPP the pipeline stage where there are several, EEE the expert-parallel rank where there
are several. A file holds `args` (the options of the run) and `model`, or `model0`, `model1`, ... with an interleaved
pipeline. Layers count from 0 in each of these chunks, experts from 0 in each expert-parallel rank, which holds
neighbouring ones; all else is the same in the files of all expert-parallel ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from modellink.checkpoint.megatron_names import MCORE
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
STEP = "iter_0000001"
# a step that Megatron-Core's distributed checkpointing wrote: its index, and everything that is no tensor
INDEX, COMMON = ".metadata", "common.pt"
RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")


class Rank(NamedTuple):
    """One file: tensor-parallel rank, pipeline stage, expert-parallel rank."""

    tensor: int
    stage: int = 0
    expert: int = 0

    def folder(self, stages: int, experts: int) -> str:
        name = f"mp_rank_{self.tensor:02d}"
        return name + (f"_{self.stage:03d}" if stages > 1 else "") + (f"_{self.expert:03d}" if experts > 1 else "")


def find_step(folder: Path) -> Path | None:
    """The step folder of Megatron's that `folder` is or tracks; None when there is none."""
    tracker = folder / TRACKER
    names = []
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        names = [f"iter_{int(text):07d}" if text.isdigit() else "release"]
    for step in (folder, *(folder / name for name in names)):
        if is_distributed(step) or (step.is_dir() and any(RANK.fullmatch(path.name) for path in step.iterdir())):
            return step
    return None


def is_distributed(step: Path) -> bool:
    """Whether Megatron-Core's distributed checkpointing wrote the step folder (format torch_dist)."""
    return (step / INDEX).is_file() and (step / COMMON).is_file()


@dataclass(frozen=True)
class Layout:
    """How the files are cut: `dialect` "mcore" or "legacy", sizes, and which layers each stage holds.

    `grouped_experts`: the experts of a rank are one tensor per projection, not one for each of them.
    """

    dialect: str = MCORE
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    layers_per_chunk: int | None = None
    vocab_multiple: int = 1
    expert_parallel: int = 1
    grouped_experts: bool = False

    def chunks(self, layers: int) -> list[list[range]]:
        """The layers of every stage's model chunks (one, unless the pipeline is interleaved)."""
        stages, counts = self.pipeline_parallel, self.layers_per_stage
        if counts is not None:
            if self.layers_per_chunk is not None:
                raise ModelLinkError("a list of layers per stage and an interleaved pipeline exclude each other.")
            if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
                raise ModelLinkError(
                    f"the layers per stage {','.join(map(str, counts))} must be {stages} numbers of at least 1 that "
                    f"sum to the model's {layers} layers."
                )
            return [[range(sum(counts[:stage]), sum(counts[: stage + 1]))] for stage in range(stages)]
        size = self.layers_per_chunk or layers // stages
        if size < 1 or layers % (size * stages) or (self.layers_per_chunk and stages == 1):
            raise ModelLinkError(
                f"{layers} layers do not divide into {stages} pipeline stages"
                + (f" of chunks of {size} layers" if self.layers_per_chunk else "")
                + ": change the sizes, or give the layers of each stage."
            )
        starts = range(0, layers, size)
        return [[range(start, start + size) for start in starts[stage::stages]] for stage in range(stages)]

    def check(self, config: ModelConfig) -> None:
        """Raise unless tensor and expert parallelism divide what they cut."""
        sizes = {"query heads": config.num_attention_heads}
        if not config.multi_head_latent_attention:
            sizes["key/value heads"] = config.num_key_value_heads
        if not all(map(config.layer_has_experts, range(config.num_layers or 0))):
            sizes["MLP width"] = config.ffn_hidden_size
        if config.num_experts:
            sizes["expert width"] = config.moe_ffn_hidden_size
        for what, size in sizes.items():
            if self.tensor_parallel < 1 or (size or 0) % self.tensor_parallel:
                raise ModelLinkError(
                    f"tensor parallel size {self.tensor_parallel} does not divide the {what} ({size}): use one that"
                    " does."
                )
        if self.expert_parallel > 1 and not config.num_experts:
            raise ModelLinkError(
                f"expert parallel size {self.expert_parallel} needs a model with experts, and this one is dense: "
                "leave it out."
            )
        if self.expert_parallel < 1 or (config.num_experts or 0) % self.expert_parallel:
            raise ModelLinkError(
                f"expert parallel size {self.expert_parallel} does not divide the experts ({config.num_experts}): use "
                "one that does."
            )
        if self.grouped_experts and config.num_experts and config.mlp_bias:
            raise ModelLinkError("grouped experts have no place for biases: write them one by one.")

    def padded(self, vocabulary: int) -> int:
        """Rows of the vocabulary matrices in the files."""
        multiple = self.vocab_multiple * self.tensor_parallel
        return -(-vocabulary // multiple) * multiple
