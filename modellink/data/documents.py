"""Documents that lie one after another in a sample: which token belongs to which, and where each begins."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def number_documents(tokens: npt.NDArray[Any], eod: int) -> Ids:
    """int64, as `tokens` [..., S]: the number of each token's document; a new one begins after each `eod`."""
    ended = np.zeros(tokens.shape, np.int64)
    ended[..., 1:] = tokens[..., :-1] == eod
    return ended.cumsum(-1)


def restart_positions(tokens: npt.NDArray[Any], eod: int) -> Ids:
    """int64, as `tokens` [..., S]: positions that begin at 0 in every document."""
    place = np.arange(tokens.shape[-1])
    begins = np.zeros(tokens.shape, np.int64)
    begins[..., 1:] = np.where(tokens[..., :-1] == eod, place[1:], 0)
    return place - np.maximum.accumulate(begins, -1)
