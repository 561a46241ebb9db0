"""Do something on one rank or on all of them so that every rank learns the outcome, success or failure.

A rank that raises alone leaves the others waiting in the next collective until it times out. Here the failure travels
instead of the result, and every rank raises it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from modellink.errors import ModelLinkError, RunFailure

T = TypeVar("T")


def _attempt(work: Callable[[], Any], rank: int) -> Any:
    try:
        return work()
    except ModelLinkError as error:
        return error
    except Exception as error:  # any failure must reach the other ranks; the cause keeps the traceback
        failure = RunFailure(f"rank {rank} failed: {type(error).__name__}: {error}.")
        failure.__cause__ = error
        return failure


def everywhere(group: dist.ProcessGroup | None, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank of `group` (None: this process alone) and return the results in rank order.

    The results travel as objects and should be small. When any rank fails, every rank raises the failure of the lowest.
    """
    rank = dist.get_rank(group) if group is not None else 0
    own = _attempt(work, rank)
    outcomes = [own]
    if group is not None:
        outcomes = [None] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, own, group=group)
        outcomes[rank] = own  # the original knows its cause, a copy that travelled does not
    for outcome in outcomes:
        if isinstance(outcome, ModelLinkError):
            raise outcome
    return outcomes


def together(group: dist.ProcessGroup | None, work: Callable[[], T]) -> T:
    """Run `work` on every rank and return this rank's own result, of any size; a failure is raised on every rank."""
    result: list[T] = []
    everywhere(group, lambda: result.append(work()))
    return result[0]


def on_first(group: dist.ProcessGroup | None, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 of `group` (None: this process); every rank returns its result or raises its failure."""
    first = group is None or dist.get_rank(group) == 0
    own = _attempt(work, 0) if first else None
    outcome: list[Any] = [own]
    if group is not None:
        dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
    result: Any = own if first else outcome[0]
    if isinstance(result, ModelLinkError):
        raise result
    return result
