"""Several token files as one dataset, mixed by weight, and the one function that builds what a run trains on.

Mixing is greedy: sample i comes from the part whose share w_d * max(i, 1) is furthest ahead of what it has given so
far, the first such part on ties. That is a loop in which every step needs the one before, so for speed the row of
samples is cut into chunks that are walked side by side. Where each chunk starts from is guessed and then walked for a
few steps: the greedy rule forgets its start quickly. A chunk whose start turns out not to be the end of the one before
it is walked again, so the result is exactly that of the plain loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modellink.data.gpt import SPLITS, GPTDataset, GPTOptions
from modellink.data.mock import MockDataset
from modellink.errors import ModelLinkError

# A part is asked for half a percent more than its share, because the greedy rule may overshoot it a little.
SURPLUS = 0.005
_WARM_UP = 256
Triple = tuple["Dataset | None", "Dataset | None", "Dataset | None"]


class Dataset(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]: ...


def blend_indices(weights: Sequence[float], size: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Return, for each of `size` samples, the part it comes from and its number within that part.

    `weights` must add up to 1. Equal to Megatron-Core's `build_blending_indices`.
    """
    shares = np.asarray(weights, np.float64)
    part, number = np.zeros(size, np.int16), np.zeros(size, np.int64)
    length = max(_WARM_UP, min(4096, math.isqrt(size)))
    begins = np.arange(0, size, length)
    starts = _guess(shares, np.maximum(begins - _WARM_UP, 0))
    warm = _walk(shares, starts, np.maximum(begins - _WARM_UP, 0), _WARM_UP)
    starts = np.where(begins[:, None] > 0, warm, 0)
    ends = np.zeros_like(starts)
    wrong = np.ones(len(begins), bool)
    while wrong.any():
        ends[wrong] = _walk(shares, starts[wrong], begins[wrong], length, part, number)
        wrong[0] = False
        wrong[1:] = (starts[1:] != ends[:-1]).any(axis=1)
        starts[1:][wrong[1:]] = ends[:-1][wrong[1:]]
    return part, number


def _guess(shares: npt.NDArray[np.float64], steps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How much each part has probably given after `steps`: rounded down, the rest to the largest remainders. [C, D]"""
    exact = shares * steps[:, None]
    taken = np.floor(exact).astype(np.int64)
    order = np.argsort(np.argsort(taken - exact, axis=1, kind="stable"), axis=1)
    return taken + (order < (steps - taken.sum(axis=1))[:, None])


def _walk(
    shares: npt.NDArray[np.float64],
    starts: npt.NDArray[np.int64],
    begins: npt.NDArray[np.int64],
    length: int,
    part: npt.NDArray[np.int16] | None = None,
    number: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Walk `length` greedy steps from every (begin, taken so far) at once; returns what was taken then. [C, D]"""
    taken = starts.copy()
    rows = np.arange(len(begins))
    for step in range(length):
        now = begins + step
        chosen = (shares * np.maximum(now, 1)[:, None] - taken).argmax(axis=1)
        if part is not None and number is not None:
            inside = now < len(part)
            part[now[inside]] = chosen[inside]
            number[now[inside]] = taken[rows, chosen][inside]
        taken[rows, chosen] += 1
    return taken


class BlendedDataset:
    """`size` samples drawn from `datasets` by weight.

    Without `weights` the parts count by their lengths, and the blend ends where the first of them runs out.
    Raises ModelLinkError when a weighted part has fewer samples than the blend draws from it.
    """

    def __init__(
        self, datasets: Sequence[Dataset], weights: Sequence[float] | None, size: int | None, names: Sequence[str] = ()
    ) -> None:
        self.datasets = list(datasets)
        lengths = [len(dataset) for dataset in self.datasets]
        shares = np.asarray(lengths if weights is None else weights, np.float64)
        total = sum(lengths) if size is None else size
        if weights is None:
            total = min(total, sum(lengths))
        self.part, self.number = blend_indices((shares / shares.sum()).tolist(), total)
        short = self.number >= np.asarray(lengths)[self.part]
        if short.any():
            first = int(short.argmax())
            if weights is None:
                self.part, self.number = self.part[:first], self.number[:first]
            else:
                which = int(self.part[first])
                name = names[which] if names else f"number {which}"
                raise ModelLinkError(
                    f"data set {name} of the blend has {lengths[which]:,} samples, {int((self.part == which).sum()):,} "
                    f"are drawn from it; give it a smaller weight in --data-path"
                )

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        return self.datasets[int(self.part[index])][int(self.number[index])]


def parse_data_path(paths: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Split the values of --data-path, `prefix`, `prefix prefix ...` or `weight prefix weight prefix ...`."""

    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:
            return None

    weights = [number(text) for text in paths[::2]]
    if len(paths) % 2 or all(weight is None for weight in weights):
        return list(paths), None
    given = [weight for weight in weights if weight is not None]
    if len(given) != len(weights) or min(given) < 0 or not sum(given):
        raise ModelLinkError(
            f"--data-path {' '.join(paths)} mixes weights and prefixes; write `weight prefix weight prefix ...` with "
            f"weights that are not negative, or prefixes alone"
        )
    return list(paths[1::2]), given


def build_datasets(
    num_samples: Sequence[int | None],
    options: GPTOptions,
    *,
    data_path: Sequence[str] | None = None,
    train_data_path: Sequence[str] | None = None,
    valid_data_path: Sequence[str] | None = None,
    test_data_path: Sequence[str] | None = None,
    split: str = "969,30,1",
    mock: bool = False,
) -> Triple:
    """Return the (train, valid, test) datasets of a run; None where there is no data for a split.

    `num_samples` says how many samples each must have (None: one pass). With `data_path` each file is divided by
    `split`; the three other paths give every split files of its own instead. `mock` needs neither.
    """
    own = (train_data_path, valid_data_path, test_data_path)
    if mock:
        mocks = [MockDataset(n or 0, name, options) for n, name in zip(num_samples, SPLITS, strict=True)]
        return mocks[0], mocks[1], mocks[2]
    if data_path and any(own):
        raise ModelLinkError(
            "--data-path and --train-data-path, --valid-data-path, --test-data-path exclude each other"
        )
    if data_path:
        return _blend_files(data_path, split, num_samples, options)
    if not train_data_path:
        raise ModelLinkError("no training data: give --data-path, --train-data-path or --mock-data")
    found: list[Dataset | None] = [None, None, None]
    for i, paths in enumerate(own):
        if paths:
            only = ",".join("1" if j == i else "0" for j in range(3))
            found[i] = _blend_files(paths, only, num_samples, options)[i]
    return found[0], found[1], found[2]


def _blend_files(paths: Sequence[str], split: str, num_samples: Sequence[int | None], options: GPTOptions) -> Triple:
    prefixes, weights = parse_data_path(paths)
    if len(prefixes) == 1 and weights is None:
        return GPTDataset.build(prefixes[0], split=split, num_samples=num_samples, options=options)
    shares = None if weights is None else (np.array(weights) / np.sum(weights)).tolist()
    parts = []
    for i, prefix in enumerate(prefixes):
        wanted = [None if n is None or shares is None else _asked(n, shares[i]) for n in num_samples]
        parts.append(GPTDataset.build(prefix, split=split, num_samples=wanted, options=options))
    blends: list[Dataset | None] = []
    for j, count in enumerate(num_samples):
        kept = [(part[j], prefix, i) for i, (part, prefix) in enumerate(zip(parts, prefixes, strict=True))]
        there = [(dataset, prefix, i) for dataset, prefix, i in kept if dataset is not None]
        if not there or (shares is not None and not any(shares[i] for _, _, i in there)):
            blends.append(None)
            continue
        datasets, names = [dataset for dataset, _, _ in there], [prefix for _, prefix, _ in there]
        if shares is None:
            blends.append(BlendedDataset(datasets, None, count, names))
            continue
        if count is None:
            raise ModelLinkError(
                "a weighted --data-path needs the number of samples; give --train-iters or --train-samples"
            )
        size = sum(math.ceil(count * shares[i]) for _, _, i in there)
        blends.append(BlendedDataset(datasets, [shares[i] for _, _, i in there], size, names))
    return blends[0], blends[1], blends[2]


def _asked(count: int, share: float) -> int:
    return math.ceil(math.ceil(count * share) * (1 + SURPLUS))
