"""Agreement of rankings: scores of different methods share no scale."""

from __future__ import annotations

from collections.abc import Sequence


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of every value from 0, the lowest; equal values share their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    mean_ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for index in order[start:stop]:
            mean_ranks[index] = (start + stop - 1) / 2
        start = stop
    return mean_ranks


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks; ``None`` where one side has only equal values."""
    assert len(first) == len(second), "scores of different layers"
    mean = (len(first) - 1) / 2
    a = [rank - mean for rank in ranks(first)]
    b = [rank - mean for rank in ranks(second)]
    spread = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    if spread == 0:
        return None
    return sum(x * y for x, y in zip(a, b, strict=True)) / float(spread)
