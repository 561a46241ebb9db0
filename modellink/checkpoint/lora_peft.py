"""LoRA adapters saved by PEFT: adapter_config.json with adapter_model.safetensors, or .bin, of which nothing is run.

Names are those of the family's Hugging Face code, so the family's row says which of our tensors a matrix holds. Rank
and alpha may differ by module; the scale may be rank-stabilised; whole tensors (modules_to_save, trained biases) take
the place of the model's. Factors always belong to [out, in] matrices, however the base stores its own, so PEFT's
fan_in_fan_out says nothing new.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from modellink.checkpoint.hf import expected_shapes
from modellink.checkpoint.lora_parts import (
    EMBEDDING,
    FACTOR,
    HEAD,
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
from modellink.checkpoint.mapping import HFTensor, layout_of, to_hf
from modellink.checkpoint.megatron_files import FileTensor, read_torch_file
from modellink.config.schema import ModelConfig
from modellink.errors import ModelLinkError
from modellink.models.families import FAMILIES
from modellink.registry import suggest

PEFT_CONFIG, _SAFE, _TORCH = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# what PEFT wraps a module in, and the adapter's name, which it leaves out of the files it saves
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.[^.]+(?=\.))?)(?=\.)")
# settings under which the merged weight is another one than W + scale * B A
_VARIANTS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "trainable_token_indices"),
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave the base as it was
# the experts of a layer as one module with one tensor per projection, as transformers holds those of every family
_STACKED = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?experts(?:\.base_layer)*")
_GATE, _UP, _DOWN = (f"layers.{{}}.mlp.experts.{part}_proj" for part in ("gate", "up", "down"))
_Place = tuple[HFTensor, int | None]  # a tensor of the files, the number of its expert


class PeftAdapter:
    """An adapter saved by PEFT; see `open_adapter` for the arguments."""

    def __init__(self, folder: Path, rank: int | None, alpha: float | None, targets: Sequence[str] | None) -> None:
        self.folder, self._file = folder, folder / PEFT_CONFIG
        self._settings = settings = _read_settings(self._file)
        for name, flag, given in (("r", "--lora-r", rank), ("lora_alpha", "--lora-alpha", alpha)):
            check_agrees(self._file, name, settings.get(name), flag, given)
            settings[name] = settings.get(name, given)
        self._pairs: dict[str, dict[str, Stored]] = {}
        self._values: dict[str, Stored] = {}
        for stored in _open(folder):
            self._sort(stored)
        if not self._pairs and not self._values:
            raise ModelLinkError(f"{folder} holds no weights of an adapter.")
        for module, pair in self._pairs.items():
            check_pair(module, pair)
        if targets is not None:
            check_targets(folder, targets, self._pairs)

    def _sort(self, stored: Stored) -> None:
        name = stored.name.removeprefix("base_model.model.")
        match = FACTOR.fullmatch(name)
        if match is None:
            self._values[_WRAPPER.sub("", name)] = stored
            return
        pair = self._pairs.setdefault(match[1], {})
        if pair.setdefault(f"{match[2] or ''}{match[3]}", stored) is not stored:
            raise ModelLinkError(f"{stored.file} holds more than one adapter, one is {stored.name!r}: save one alone.")

    def changes(self, config: ModelConfig) -> Changes:
        layout = layout_of(config, expected_shapes(config))
        places: dict[str, _Place] = {
            name: (tensor, None if tensor.experts is None else number)
            for tensor in layout.values()
            for number, name in enumerate(tensor.names)
        }
        changes: Changes = {}
        for name, stored in self._values.items():
            if place := self._place(config, places, name, stored):
                tensor, expert = place
                for canonical in tensor.parts:
                    value = _value(config, tensor, canonical, stored)
                    changes.setdefault(canonical, {})[expert] = Change(value)
        changed = []
        for module, pair in self._pairs.items():
            if self._settings.get("target_parameters") and (match := _STACKED.fullmatch(module)):
                self._add_stacked(changes, layout, int(match[1]), pair)
            elif place := self._place(config, places, f"{module}.weight", next(iter(pair.values()))):
                tensor, expert = place
                changed.append(tensor.name)
                rank, up, down = self._factors(config, module, pair, tensor)
                for canonical in tensor.parts:
                    of_tensor = changes.setdefault(canonical, {})
                    of_tensor[expert] = dataclasses.replace(
                        of_tensor.get(expert, Change()),
                        factors=_factors(tensor, canonical, up, down),
                        scale=self._scale(module, rank),
                    )
        if config.tie_word_embeddings and EMBEDDING in changes and not self._settings.get("ensure_weight_tying"):
            raise self._untied()
        self._check_complete(changed, layout)
        return changes

    def check(self, config: ModelConfig, canonical: str, tensor: Tensor) -> None:
        """Nothing in such a folder repeats the base."""

    def _place(self, config: ModelConfig, places: Mapping[str, _Place], name: str, stored: Stored) -> _Place | None:
        """Where the tensor `name` of the base lies; None for the output matrix that repeats the embedding."""
        family = FAMILIES.get(config.family)
        for known in (name, family.prefix + name):
            if known in places:
                return places[known]
        if config.tie_word_embeddings and name == to_hf(family, HEAD):
            if self._settings.get("ensure_weight_tying"):
                return None
            raise self._untied()
        raise ModelLinkError(
            f"{stored.file}: {stored.name!r} fits nowhere in a {family.name} model of {config.num_layers} layers."
            f"{suggest(name, places)}"
        )

    def _factors(
        self, config: ModelConfig, module: str, pair: Mapping[str, Stored], tensor: HFTensor
    ) -> tuple[int, Stored, Stored]:
        """The rank, and the factors that hold rows and columns: of an embedding, stored [in, out], A holds the rows."""
        if len(tensor.shape) != 2:
            raise ModelLinkError(f"{self.folder}: {module!r} is no matrix, so it cannot have such an adapter.")
        rows, columns = tensor.shape[::-1] if tensor.transposed else tensor.shape
        embedding = "embedding_A" in pair
        a, b = (pair["embedding_A"], pair["embedding_B"]) if embedding else (pair["A"], pair["B"])
        rank = a.shape[0] if a.shape else 0
        self._check_rank(a, module, rank)
        up, down = (a, b) if embedding else (b, a)
        if len(up.shape) == 2 and _is_vocabulary(tensor):
            rows = _rows_within(config, rows, up.shape[embedding])
        check_shape(up, (rank, rows) if embedding else (rows, rank), tensor.shape)
        check_shape(down, (columns, rank) if embedding else (rank, columns), tensor.shape)
        return rank, up, down

    def _add_stacked(
        self, changes: Changes, layout: Mapping[str, HFTensor], layer: int, pair: Mapping[str, Stored]
    ) -> None:
        """Factors for all experts of a layer at once: A [E * r, in], expert by expert, B [out, r * E], rank by rank."""
        gate, up, down = (name.format(layer) for name in (_GATE, _UP, _DOWN))
        a, b = pair.get("A"), pair.get("B")
        if down not in layout or gate not in layout or a is None or b is None:
            held = next(iter(pair.values()))
            raise ModelLinkError(f"{held.file}: {held.name!r} belongs to gated experts, which layer {layer} lacks.")
        hidden, width = layout[down].parts[down][-2:]
        experts = layout[down].experts or layout[down].parts[down][0]
        fused = b.shape[:1] == (2 * width,) and a.shape[1:] == (hidden,)
        rows, columns = (2 * width, hidden) if fused else (hidden, width)
        rank = a.shape[0] // experts if a.shape else 0
        check_shape(a, (rank * experts, columns), (experts, rows, columns))
        check_shape(b, (rows, rank * experts), (experts, rows, columns))
        name = "gate_up_proj" if fused else "down_proj"
        module = f"model.layers.{layer}.mlp.experts.{name}"
        self._check_rank(a, module, rank)
        whole = HFTensor(name, dict.fromkeys((gate, up), (width, hidden)), 0)
        if fused and len(layout[gate].parts) == 2:  # the family's own order of rows
            whole = dataclasses.replace(whole, groups=layout[gate].groups)
        for canonical in (gate, up) if fused else (down,):
            factors = _stacked_factors(whole if fused else None, canonical, a, b, experts)
            changes.setdefault(canonical, {})[None] = Change(factors=factors, scale=self._scale(module, rank))

    def _check_rank(self, a: Stored, module: str, rank: int) -> None:
        stated = self._by_module("rank_pattern", module, self._settings.get("r"))
        if stated is not None and stated != rank:
            raise ModelLinkError(f"{a.file}: {a.name!r} has rank {rank}, but should have {stated} (r of {self._file}).")

    def _scale(self, module: str, rank: int) -> float:
        alpha = check_alpha(self._file, self._by_module("alpha_pattern", module, self._settings.get("lora_alpha")))
        return alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def _by_module(self, name: str, module: str, default: Any) -> Any:
        """The value of the first pattern, a regular expression for the end of a module's name, that fits."""
        patterns = self._settings.get(name) or {}
        if not isinstance(patterns, dict):
            raise ModelLinkError(f"{self._file}: {name} is {patterns!r}, not a dictionary.")
        for pattern, value in patterns.items():
            try:
                if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                    return value
            except re.error as error:
                raise ModelLinkError(
                    f"{self._file}: {name} holds {pattern!r}, which is no regular expression ({error})."
                ) from None
        return default

    def _check_complete(self, changed: list[str], layout: Mapping[str, HFTensor]) -> None:
        """A list of targets holds for every layer, unless another setting chooses layers."""
        targets = self._settings.get("target_modules")
        chosen = any(self._settings.get(name) not in (None, []) for name in ("layers_to_transform", "exclude_modules"))
        if not isinstance(targets, list) or chosen:
            return
        modules = {tensor.name.removesuffix(".weight"): tensor.name for tensor in layout.values() if not tensor.experts}
        meant = [name for module, name in modules.items() if any(f".{module}".endswith(f".{end}") for end in targets)]
        check_complete(self.folder, changed, meant)

    def _untied(self) -> ModelLinkError:
        return ModelLinkError(
            f"{self.folder} changes the embedding or the output matrix of a model that shares one for both: merged, it"
            " would no longer be one; set tie_word_embeddings to false and store both in the base model."
        )


def _is_vocabulary(tensor: HFTensor) -> bool:
    return next(iter(tensor.parts)).startswith(VOCABULARY)


def _rows_within(config: ModelConfig, rows: int, stored: int) -> int:
    """The base's vocabulary may be padded, the adapter's less so."""
    return stored if (config.vocab_size or rows) <= stored <= rows else rows


def _factors(tensor: HFTensor, canonical: str, up: Stored, down: Stored) -> Callable[[], tuple[Tensor, Tensor]]:
    """Factors of the tensor `canonical` of ours, from those of the whole `tensor`."""
    flat = dataclasses.replace(tensor, transposed=False, experts=None)
    embedding = ".lora_embedding_" in up.name

    def read() -> tuple[Tensor, Tensor]:
        rows, columns = (up.read().mT, down.read().mT) if embedding else (up.read(), down.read())
        return flat.view([rows], canonical)[slice(None), slice(None)], columns

    return read


def _stacked_factors(
    whole: HFTensor | None, canonical: str, a: Stored, b: Stored, experts: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    """[E, rows, r] and [E, r, columns] of the tensor `canonical`, whose rows are some of those of `whole`."""

    def read() -> tuple[Tensor, Tensor]:
        down, up = a.read().unflatten(0, (experts, -1)), b.read()
        if whole is not None:
            up = whole.view([up], canonical)[slice(None), slice(None)]
        return up.unflatten(1, (-1, experts)).permute(2, 0, 1), down

    return read


def _value(config: ModelConfig, tensor: HFTensor, canonical: str, stored: Stored) -> Callable[[], Tensor]:
    """The tensor `canonical` of ours out of a stored one that takes the place of all of `tensor`."""
    shape = tensor.shape
    if stored.shape and _is_vocabulary(tensor):
        shape = (_rows_within(config, shape[0], stored.shape[0]), *shape[1:])
    if stored.shape[1:] == shape[1:] and stored.shape != shape and _is_vocabulary(tensor):
        raise ModelLinkError(
            f"{stored.file}: {stored.name!r} has {stored.shape[0]} rows, the base's vocabulary {shape[0]}: give the"
            " base model with its vocabulary resized as it was for training."
        )
    check_shape(stored, shape, tensor.shape)
    one = dataclasses.replace(tensor, experts=None)
    return lambda: one.view([stored.read()], canonical)[(slice(None),) * len(shape)]


def _read_settings(file: Path) -> dict[str, Any]:
    """adapter_config.json, once it is sure to describe plain LoRA."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLinkError(f"{file} is no JSON ({error}); fetch the file again.") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise ModelLinkError(f"{file}: an adapter of the kind {kind} is not merged, only one of LORA is.")
    for name in _VARIANTS:
        if settings.get(name):
            what = "DoRA" if name == "use_dora" else "this variant of LoRA"
            raise ModelLinkError(f"{file} sets {name}: {what} is not merged; merge the adapter with peft first.")
    start = settings.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ModelLinkError(
            f"{file}: init_lora_weights {start!r} changed the base's weights too; save the adapter as plain LoRA, with"
            " peft's path_initial_model_for_weight_conversion."
        )
    return dict(settings)


def _open(folder: Path) -> Iterator[Stored]:
    """The tensors of the adapter's file, from its headers."""
    file = folder / _SAFE
    if file.is_file():
        try:
            handle = safe_open(file, framework="pt", device="cpu")
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in sorted(handle.keys())}
        except (SafetensorError, OSError) as error:
            raise ModelLinkError(f"{file} is damaged or cut short ({error}); fetch the file again.") from None
        for name, shape in shapes.items():
            yield Stored(file, name, shape, lambda name=name: handle.get_tensor(name))  # type: ignore[misc]
        return
    file = folder / _TORCH
    if not file.is_file():
        raise ModelLinkError(f"{folder} holds {PEFT_CONFIG}, but neither {_SAFE} nor {_TORCH}.")
    content = read_torch_file(file)
    if not isinstance(content, dict) or not all(isinstance(value, FileTensor) for value in content.values()):
        raise ModelLinkError(f"{file} does not hold a plain dictionary of tensors.")
    for name, value in content.items():
        yield Stored(file, str(name), value.shape, value.read)
