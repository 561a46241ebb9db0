"""Which rank works on which matrix: fair, the same on all ranks, and independent of matrices that others hold."""

from __future__ import annotations

from modellink.optim.owners import Split, owners_of


def split(ranks: tuple[int, ...], rows: int, columns: int) -> Split:
    size = rows // len(ranks)
    boxes = tuple((slice(i * size, (i + 1) * size), slice(0, columns)) for i in range(len(ranks)))
    return Split(ranks, boxes, (rows, columns))


def loads(splits: list[Split]) -> dict[int, int]:
    found: dict[int, int] = {}
    for each, owner in zip(splits, owners_of(splits), strict=True):
        assert owner in each.ranks
        found[owner] = found.get(owner, 0) + each.cost
    return found


def test_work_is_shared_evenly() -> None:
    layer = [split((0, 1, 2, 3), 64, 64)] * 4 + [split((0, 1, 2, 3), 192, 64)] * 3
    shares = loads(layer * 4)
    assert set(shares) == {0, 1, 2, 3}
    assert max(shares.values()) < 1.1 * sum(shares.values()) / 4


def test_a_stack_of_matrices_costs_each_of_them() -> None:
    one = Split((0, 1), ((slice(0, 8), slice(0, 4)),) * 2, (8, 8))
    stack = Split((0, 1), ((slice(0, 3), slice(0, 8), slice(0, 4)),) * 2, (3, 8, 8))
    assert stack.cost == 3 * one.cost
    assert stack.numel(0) == 96


def test_what_others_hold_changes_no_owner() -> None:
    """Ranks 0 and 1 share matrices, and experts with 2 and with 3, of which the other of them knows nothing."""
    shared = [split((0, 1), 64, 64), split((0, 1), 64, 32), split((0, 1), 32, 32)]
    mixed = [split((0, 2), 128, 128), shared[0], split((0, 2), 96, 96), shared[1], shared[2]]
    kept = [owner for each, owner in zip(mixed, owners_of(mixed), strict=True) if each.ranks == (0, 1)]
    assert kept == owners_of(shared)
