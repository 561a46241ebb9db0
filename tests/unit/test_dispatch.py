"""The parts of expert dispatch that need no other rank: orders of rows, and gradients against plain indexing."""

from __future__ import annotations

import pytest
import torch

from modellink.models.moe import sort_by_expert, take_rows, weighted_sum
from modellink.parallel.expert import by_expert


@pytest.mark.parametrize(("ranks", "experts"), [(1, 3), (4, 1), (2, 2), (3, 5)])
def test_arriving_rows_are_regrouped_without_sorting(ranks: int, experts: int) -> None:
    counts_Ne = torch.randint(0, 4, (ranks, experts), generator=torch.Generator().manual_seed(ranks))
    expert_R = torch.arange(experts).expand(ranks, -1).flatten().repeat_interleave(counts_Ne.flatten())
    order = by_expert(counts_Ne, len(expert_R))
    if order is None:
        assert torch.equal(expert_R, expert_R.sort().values)
    else:
        assert torch.equal(order, expert_R.argsort(stable=True))


def test_no_rows_at_all_are_regrouped() -> None:
    order = by_expert(torch.zeros(2, 3, dtype=torch.int64), 0)
    assert order is not None and order.shape == (0,)


def test_dropped_choices_come_last() -> None:
    pairs_P, sorted_P, counts_E = sort_by_expert(torch.tensor([2, 3, 0, 3, 2, 0]), 3)
    assert sorted_P.tolist() == [0, 0, 2, 2, 3, 3]
    assert pairs_P.tolist() == [2, 5, 0, 4, 1, 3]
    assert counts_E.tolist() == [2, 0, 2]


@pytest.mark.parametrize("kept", [12, 7])
def test_rows_and_weighted_sums_against_plain_indexing(kept: int) -> None:
    """Six tokens with two choices each, of which `kept` are not dropped; values and gradients in float64."""
    generator = torch.Generator().manual_seed(kept)
    pairs_R = torch.randperm(12, generator=generator)[:kept]
    x_TD, y_RD = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (6, kept))
    weights_Tk = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x_TD, y_RD, weights_Tk)]

    ours = weighted_sum(take_rows(x_TD, pairs_R, 2) * y_RD, pairs_R, weights_Tk)
    rows_RD = x_TD[pairs_R // 2] * y_RD * weights_Tk.flatten()[pairs_R][:, None]
    plain = torch.zeros_like(x_TD).index_add(0, pairs_R // 2, rows_RD)
    torch.testing.assert_close(ours, plain)
    weigh = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weigh).sum(), inputs),
        torch.autograd.grad((plain * weigh).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
