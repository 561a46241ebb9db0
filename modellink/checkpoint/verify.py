"""Proof that a conversion kept the model: the written tensors are read back, and logits compared.

The files are read again by the same code that will load them later, and every tensor's digest is compared with that of
the tensor that was sent. On the way source and target, each as its own configuration describes it, compute the fp32
logits of a fixed prompt, matrix by matrix: a matrix is read when its turn comes, some rows of it are cast to fp32 at a
time, and it is dropped, so this too needs the memory of the largest tensor and not of the model. Experts are the
exception: all of one layer are multiplied at once, so where they are too large for the memory that is free, the
comparison is left out and the report says so.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modellink.checkpoint.digest import digest
from modellink.checkpoint.hf import without_padding
from modellink.checkpoint.pump import SMALL, Part, Pump, Room, digests, progress_bar
from modellink.checkpoint.skeleton import skeleton
from modellink.checkpoint.source import Source
from modellink.errors import RunFailure
from modellink.models.decoder import Decoder
from modellink.models.layers import NormalizedLinear

PROMPT_LENGTH = 8
TOLERANCE = 1e-4  # of the largest logit: the same numbers go through the same operations
_ROWS = 2 << 20  # bytes of fp32 that a matrix is cast to at a time


def verify_written(
    source: Source, pump: Pump, dtypes: Mapping[str, torch.dtype], sent: Mapping[str, str], where: str
) -> tuple[float | None, str | None]:
    """Compare what was written, the source of `pump`, with `source` and with the digests `sent` of what was written.

    Returns (largest absolute difference of the fp32 logits of a fixed prompt, None), or (None, why they were not
    computed). The source's weights are cast to `dtypes` first, so rounding does not count. RunFailure names the first
    tensor that is not the one that was written, or says by how much the logits differ.
    """
    found: dict[str, str] = {}
    needed, free = 2 * _largest_module(source), _free_memory()
    results, skipped = [], None
    if free is not None and needed > free // 2:
        skipped = f"the experts of one layer need {needed >> 20} MiB in fp32, more than half of the free memory"
    else:
        results = _all_logits(source, pump, dtypes, found)
    _read_back(pump, found)
    wrong = [name for name, written in sent.items() if found.get(name) != written]
    if wrong or len(found) != len(sent):
        name = wrong[0] if wrong else next(iter(found.keys() - sent.keys()))
        raise RunFailure(
            f"verification failed: the tensor {name!r} read back from {where} is not the one that was written "
            f"({len(wrong)} differ); nothing was put there: check the disk and run the conversion again."
        )
    if not results:
        return None, skipped
    if torch.equal(*results):
        return 0.0, None
    difference, scale = float((results[0] - results[1]).abs().max()), float(results[0].abs().max())
    if not difference <= TOLERANCE * max(scale, 1.0):
        raise RunFailure(
            f"verification failed: the logits of {source.folder} and of what was written differ by {difference:.3g}: "
            "the configuration of one of them does not say all of the architecture; nothing was written."
        )
    return difference, None


def _read_back(pump: Pump, found: dict[str, str]) -> None:
    """Add the digests of the tensors that are not in `found` yet."""
    groups = [list(group) for group in pump.source.groups if not group.keys() <= found.keys()]
    parts = [Part(str(number), groups[number :: pump.workers]) for number in range(pump.workers)]
    lock = threading.Lock()

    def check(part: Part, tensors: Iterator[dict[str, Tensor]]) -> None:
        mine: dict[str, str] = {}
        for _ in digests(tensors, mine):
            pass
        with lock:
            found.update(mine)

    if groups:
        pump.run([part for part in parts if part.groups], check, "Verifying tensors")


def _all_logits(source: Source, pump: Pump, dtypes: Mapping[str, torch.dtype], found: dict[str, str]) -> list[Tensor]:
    """Logits of `source` and of the source of `pump`, at the same time; the digests of the latter's tensors."""
    room = Room(SMALL)
    readers = [_Reader(source, dtypes, room, None), _Reader(pump.source, dtypes, room, found)]
    room.size = max(SMALL, *(size for reader in readers for size in reader.sizes.values()))
    with progress_bar(not pump.progress) as bar, ThreadPoolExecutor(2) as pool:
        counts = [len(reader.sizes) for reader in readers]
        task = bar.add_task("Verifying", total=2 * pump.size(readers[0].sizes), tensors=0, of=sum(counts))
        seen = itertools.count(1)
        for reader in readers:
            reader.moved = lambda name: bar.update(task, advance=pump.size([name]), tensors=next(seen))
        return list(pool.map(_logits, readers))


@torch.no_grad()
def _logits(reader: _Reader) -> Tensor:
    """fp32 logits [S, V] of the fixed prompt, V without padding."""
    config = without_padding(reader.source.config)
    model = skeleton(config).eval()
    _stream(model, reader)
    vocab, length = config.vocab_size or 1, min(PROMPT_LENGTH, config.max_position_embeddings or PROMPT_LENGTH)
    tokens_BS = torch.tensor([[(7919 * place + 11) % vocab for place in range(length)]])
    logits_BSV: Tensor = model(tokens_BS)
    return logits_BSV[0]


class _Reader:
    """The tensors of a source by name; those that are read together with one are kept until they are asked for.

    Digests of everything that is read go into `found`, where there is one.
    """

    def __init__(
        self, source: Source, dtypes: Mapping[str, torch.dtype], room: Room, found: dict[str, str] | None
    ) -> None:
        self.source, self.dtypes, self.room, self.found = source, dtypes, room, found
        self.held: dict[str, Tensor] = {}
        self.moved: Callable[[str], object] = len
        shapes = source.shapes
        self.sizes = {
            name: sum(math.prod(shapes[each]) * dtypes[each].itemsize for each in group)
            for group in source.groups
            for name in group
        }

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Tensor]:
        with self.room.take(self.sizes[name]):
            yield self.take(name)

    def take(self, name: str) -> Tensor:
        if name not in self.held:
            self.held = self.source.read([name])
            if self.found is not None:
                self.found |= {each: digest(tensor) for each, tensor in self.held.items() if each not in self.found}
        self.moved(name)
        return self.held.pop(name).to(self.dtypes[name])


class _Matrix(nn.Module):
    """A linear layer or an embedding whose weight is read anew for every call, and cast to fp32 some rows at a time."""

    def __init__(self, original: nn.Module, reader: _Reader, weight: str, bias: str | None) -> None:
        super().__init__()
        self.reader, self.names = reader, (weight, bias)
        self.embeds, self.normalises = isinstance(original, nn.Embedding), isinstance(original, NormalizedLinear)
        self.weight = original.weight  # on the meta device, for those who ask for its dtype

    def forward(self, x: Tensor) -> Tensor:
        with self.reader.open(self.names[0]) as weight_VD:
            y = weight_VD[x].float() if self.embeds else self._multiply(x, weight_VD)
            del weight_VD
        return y if self.names[1] is None else y + self.reader.take(self.names[1]).float()

    def _multiply(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        pieces = weight_VD.split(max(1, _ROWS // (4 * weight_VD.shape[1])))
        buffer_RD = torch.empty(pieces[0].shape)  # one for all: it stays in the cache
        outputs = []
        for piece_RD in pieces:
            rows_RD = buffer_RD[: len(piece_RD)].copy_(piece_RD)
            outputs.append(F.linear(x, F.normalize(rows_RD) if self.normalises else rows_RD))
        return torch.cat(outputs, -1)


def _stream(model: Decoder, reader: _Reader) -> None:
    """Let every module of `model`, which is on the meta device, read its parameters when it is called."""
    for prefix, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            name = f"{prefix}.{child_name}".removeprefix(".")
            if type(child) in (nn.Linear, nn.Embedding, NormalizedLinear):
                weight = model.canonical_name(f"{name}.weight")
                bias = f"{name}.bias" if getattr(child, "bias", None) is not None else None
                setattr(module, child_name, _Matrix(child, reader, weight, bias))
    for prefix, module in model.named_modules():
        own = {} if isinstance(module, _Matrix) else dict(module.named_parameters(recurse=False))
        if own:
            names = {name: f"{prefix}.{name}".removeprefix(".") for name in own}
            module.register_forward_pre_hook(functools.partial(_fill, reader=reader, names=names))
            module.register_forward_hook(functools.partial(_empty, parameters=own))


def _fill(module: nn.Module, inputs: Any, *, reader: _Reader, names: Mapping[str, str]) -> None:
    for name, canonical in names.items():
        setattr(module, name, nn.Parameter(reader.take(canonical).float(), requires_grad=False))


def _empty(module: nn.Module, inputs: Any, output: Any, *, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        setattr(module, name, parameter)


def _largest_module(source: Source) -> int:
    """Bytes in fp32 of the largest set of parameters that is in memory at once, matrices apart."""
    streamed = (nn.Linear, nn.Embedding, NormalizedLinear)
    return max(
        sum(4 * parameter.numel() for parameter in module.parameters(recurse=False))
        for module in skeleton(without_padding(source.config)).modules()
        if type(module) not in streamed
    )


def _free_memory() -> int | None:
    """Bytes that a process can still take without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
