"""Keys and values of earlier tokens, kept between decoding steps."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, grown in place: full storage doubles, so appending costs O(1) amortised."""

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return views of all so far, [B, G, T, K] each."""
        end = self.length + k_BGSK.shape[2]
        if self._keys is None or end > self._keys.shape[2]:
            self._keys = self._grow(self._keys, k_BGSK, end)
            self._values = self._grow(self._values, v_BGSK, end)
        self._keys[:, :, self.length : end] = k_BGSK
        self._values[:, :, self.length : end] = v_BGSK
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _grow(self, old: Tensor | None, like: Tensor, needed: int) -> Tensor:
        capacity = max(self.capacity, needed, 0 if old is None else 2 * old.shape[2])
        new = like.new_empty(like.shape[0], like.shape[1], capacity, like.shape[3])
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def select_rows(self, rows: Tensor) -> None:
        """Keep (and reorder to) these batch rows, int [B']: finished rows leave, beams branch."""
        if self._keys is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]


class KVCache:
    """The caches of all layers of a model."""

    def __init__(self, num_layers: int, capacity: int = 64) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens stored so far."""
        return self.layers[0].length if self.layers else 0

    def select_rows(self, rows: Tensor | list[int]) -> None:
        """Keep these batch rows in every layer."""
        index = torch.as_tensor(rows)
        for layer in self.layers:
            layer.select_rows(index)
