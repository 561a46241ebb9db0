"""How blocks go through their matrices: into a block, several matrices read one input; out of it, there is one.

Attention and MLP call `enter` and `leave`, so that tensor parallelism can join the products with the communication that
stands before or after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Enter = Callable[[Tensor, Sequence[nn.Linear]], Sequence[Tensor]]  # into a block: one input, several matrices
Leave = Callable[[Tensor, nn.Linear], Tensor]  # out of it


def separately(x: Tensor, linears: Sequence[nn.Linear]) -> list[Tensor]:
    """One product after the other."""
    return [linear(x) for linear in linears]


def by_itself(x: Tensor, linear: nn.Linear) -> Tensor:
    """The plain product."""
    return linear(x)


def wanted(ctx: Any) -> list[bool]:
    """For each tensor that a `Function` was given, whether this backward pass goes on from it.

    `ctx.needs_input_grad` says whether any could. The two differ where gradients of inputs and of weights are computed
    in separate passes (zero-bubble pipelines). Torch does not say it of a leaf: pass shards or views of parameters.
    """
    nodes = (node for node, _ in ctx.next_functions)
    return [node is not None and torch._C._will_engine_execute_node(node) for node in nodes]
