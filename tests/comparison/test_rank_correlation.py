"""Rankings, against scipy's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layercut.comparison.rank_correlation import ranks, spearman

VALUES = st.integers(-3, 3).map(float)


def test_equal_values_share_their_mean_rank():
    assert ranks([5.0, 1.0, 5.0, 3.0]) == [2.5, 0.0, 2.5, 1.0]


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=12))
def test_correlation_is_scipys(pairs: list[tuple[float, float]]):
    first, second = map(list, zip(*pairs, strict=True))
    found = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
