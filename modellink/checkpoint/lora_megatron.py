"""LoRA adapters in checkpoints of Megatron, Core and Legacy: pairs of factors for its fused, sharded modules.

    ...linear_qkv.lora_A.default.weight    ...linear_qkv.lora_B.default.weight    ...linear_qkv.base_layer.weight

lie in one file per tensor-parallel rank and pipeline stage, like the weights of any checkpoint. Modules whose outputs
are split hold A whole and the rows of B as their own rows are split; modules whose inputs are split hold the columns of
A, and B whole. Core saves the base beside the adapters, Legacy the embedding and the output matrix alone; the base is
read from its own folder in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modellink.checkpoint.hf import expected_shapes
from modellink.checkpoint.lora_parts import (
    EMBEDDING,
    FACTOR,
    VOCABULARY,
    Change,
    Changes,
    Stored,
    check_agrees,
    check_alpha,
    check_complete,
    check_pair,
    check_shape,
    check_targets,
)
from modellink.checkpoint.megatron import MegatronFolder
from modellink.checkpoint.megatron_names import Place, Row, find_place, join
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.registry import suggest

_WHOLE = ("whole", "stack")  # cuts under which every tensor-parallel rank holds all
_SAMPLE = 1024  # rows of the embedding that are compared, of each rank
_DRIFT = 0.01  # relative: casts on the way to and from half precision move the embedding a little


class AdaptedFolder(MegatronFolder):
    """A step of Megatron's with adapters in it: they are in `pairs`, and all that is read as the model is the base."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pairs: dict[str, dict[str, list[Stored]]] = {}
        for name in list(self._shares):
            match = FACTOR.fullmatch(name)
            if match is None:
                base = name.replace(".base_layer.", ".")
                self._shares[base] = self._shares.pop(name)
                if name in self._copies:
                    self._copies[base] = self._copies.pop(name)
                continue
            pair = self.pairs.setdefault(match[1], {})
            if match[3] in pair:
                raise ModelLinkError(f"{self.step} holds more than one adapter, one is {name!r}: save one alone.")
            pair[match[3]] = [Stored(share.file, name, share.shape, share.read) for share in self._shares.pop(name)]
            self._copies.pop(name, None)

    @property
    def upstream(self) -> bool:
        """Whether latent attention is spelled as Megatron itself does."""
        return self._upstream

    def shares(self, name: str) -> list[Tensor]:
        """What each tensor-parallel rank holds of a tensor of the base; empty where the files lack it."""
        return [share.read() for share in self._shares.get(name, ())]


class MegatronAdapter:
    """An adapter in a checkpoint of Megatron; see `open_adapter` for the arguments."""

    def __init__(self, folder: Path, rank: int | None, alpha: float | None, targets: Sequence[str] | None) -> None:
        self.folder, self._files = folder, AdaptedFolder(folder)
        self._step, options = self._files.step, self._files.arguments
        if not self._files.pairs:
            raise ModelLinkError(f"{self._step} holds no adapter: none of its tensors is called lora_A or lora_B.")
        check_agrees(self._step, "lora_r", options.get("lora_r"), "--lora-r", rank)
        check_agrees(self._step, "lora_alpha", options.get("lora_alpha"), "--lora-alpha", alpha)
        self._rank = rank
        self._alpha = check_alpha(self._step, alpha if alpha is not None else options.get("lora_alpha"))
        for module, pair in self._files.pairs.items():
            check_pair(module, {key: shares[0] for key, shares in pair.items()})
        if targets is not None:
            check_targets(folder, targets, self._files.pairs)

    def changes(self, config: ModelConfig) -> Changes:
        self._check_sizes(config)
        shapes = expected_shapes(config)
        modules = self._modules(config, shapes)
        changes: Changes = {}
        for module, pair in self._files.pairs.items():
            if module not in modules:
                raise ModelLinkError(
                    f"{self._step}: the adapter of {module!r} fits nowhere in this model of {config.num_layers} layers."
                    f"{suggest(module, modules)}"
                )
            place, expert = modules[module]
            full = [shapes[ours][expert is not None :] for ours in place.ours]
            rank = self._check_shapes(config, place.row, pair, full)
            for number, canonical in enumerate(place.ours):
                factors = _factors(config, place.row, pair["A"], pair["B"], number)
                changes.setdefault(canonical, {})[expert] = Change(factors=factors, scale=self._alpha / rank)
        check_complete(self._step, self._files.pairs, modules)
        return changes

    def check(self, config: ModelConfig, canonical: str, tensor: Tensor) -> None:
        """The embedding is saved with the adapter, and training leaves it as it is: it tells one base from another."""
        if canonical != EMBEDDING:
            return
        before = 0
        for share in self._files.shares(find_place(config, canonical, self._files.dialect).name):
            base = tensor[: config.vocab_size][before : before + len(share)]
            before += len(share)
            step = max(1, len(base) // _SAMPLE)
            own, base = share[: len(base) : step].float(), base[::step].float()
            if own.shape != base.shape or (own - base).norm() > _DRIFT * base.norm():
                raise ModelLinkError(
                    f"{self._step}: the embedding beside the adapter is not that of the base: it was trained on other"
                    " weights."
                )

    def _modules(self, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[Place, int | None]]:
        """Every module of the model in the files' dialect -> where its weight lies, and of which expert it is."""
        found = {}
        for canonical in shapes:
            place = find_place(config, canonical, self._files.dialect, self._files.upstream)
            for number, name in enumerate(place.names):
                module, _, parameter = name.rpartition(".")
                if parameter == "weight":
                    found[module] = (place, None if place.experts is None else number)
        return found

    def _check_sizes(self, config: ModelConfig) -> None:
        """Fused rows of other heads may have the same shapes."""
        for name in ("num_layers", "hidden_size", "num_attention_heads"):
            stated, needed = self._files.arguments.get(name), getattr(config, name)
            if stated is not None and stated != needed:
                raise ModelLinkError(
                    f"{self._step}: the adapter belongs to a model with {name} {stated}, but the base has {needed}."
                )

    def _check_shapes(
        self, config: ModelConfig, row: Row, pair: dict[str, list[Stored]], full: list[tuple[int, ...]]
    ) -> int:
        """The rank of factors, once every tensor-parallel rank holds its share of them for matrices `full`."""
        first, ranks = pair["A"][0], self._files.tensor_parallel
        if row.cut == "either" or any(len(shape) != 2 for shape in full):
            raise ModelLinkError(f"{self._step}: {first.name!r} belongs to a module whose adapters are not merged.")
        rank = first.shape[0] if first.shape else 0
        if self._rank not in (None, rank):
            raise ModelLinkError(f"{first.file}: {first.name!r} has rank {rank}, not the {self._rank} of --lora-r.")
        rows, columns = sum(shape[0] for shape in full), full[0][1]
        matrix = (rows, columns)
        if _is_vocabulary(row) and pair["B"][0].shape:
            padded = pair["B"][0].shape[0] * ranks  # as the layout of that run asked
            rows = padded if padded >= (config.vocab_size or rows) else rows
        if row.cut == "columns":
            columns //= ranks
        elif row.cut not in _WHOLE:
            rows //= ranks
        for a, b in zip(pair["A"], pair["B"], strict=True):
            check_shape(a, (rank, columns), matrix)
            check_shape(b, (rows, rank), matrix)
        return rank


def _factors(
    config: ModelConfig, row: Row, a: list[Stored], b: list[Stored], number: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Factors of number `number` of the tensors that `row` fuses, from what every tensor-parallel rank holds."""

    def read() -> tuple[Tensor, Tensor]:
        shares_a, shares_b = [share.read() for share in a], [share.read() for share in b]
        if row.cut == "columns":
            return _shared(b, shares_b), torch.cat(shares_a, dim=1)
        if row.cut in _WHOLE:
            _shared(b, shares_b)
        up = join(row, shares_b, config)[number]
        return up[: config.vocab_size] if _is_vocabulary(row) else up, _shared(a, shares_a)

    return read


def _shared(stored: list[Stored], shares: list[Tensor]) -> Tensor:
    """The factor that all ranks hold alike."""
    for other, share in zip(stored, shares, strict=True):
        if not torch.equal(share, shares[0]):
            raise ModelLinkError(
                f"{other.file}: {other.name!r} differs from that of {stored[0].file}, though tensor-parallel ranks"
                " share it: files were mixed up."
            )
    return shares[0]


def _is_vocabulary(row: Row) -> bool:
    return f"{row.ours[0]}.".startswith(VOCABULARY)
