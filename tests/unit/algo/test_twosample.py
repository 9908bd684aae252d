"""Two-sample tests against hand-worked tables, slow second implementations and scipy's tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlhf.algo.twosample import (
    ClusterSums,
    categorical_metric,
    category_sums,
    difference_test,
    f_tail,
    holm,
    independent_spread,
    ordered_metric,
    shares_test,
    stratified_difference,
    vector_sums,
)


def drawn(num_clusters: int, shares: list[float], *, alike: bool, seed: int) -> ClusterSums:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, size=num_clusters)
    clusters = np.repeat(np.arange(num_clusters), sizes)
    codes = rng.choice(len(shares), size=num_clusters, p=shares)[clusters]
    if not alike:
        codes = rng.choice(len(shares), size=len(clusters), p=shares)
    return category_sums(codes, clusters, num_categories=len(shares))


def compared(first: ClusterSums, second: ClusterSums, *, ordered: bool = False) -> float:
    return shares_test(first, second, ordered=ordered).p_value


def test_sums_of_three_clusters_by_hand() -> None:
    # Cluster 7: codes 0, 1; cluster 3: 1, 1, 1; cluster 9: 2.
    sums = category_sums(
        np.array([0, 1, 1, 2, 1, 1]), np.array([7, 3, 7, 9, 3, 3]), num_categories=3
    )
    assert (sums.rows, sums.clusters) == (6, 3)
    assert sums.sums.tolist() == [1, 4, 1]
    assert sums.products.tolist() == [[1, 1, 0], [1, 10, 0], [0, 0, 1]]
    assert sums.squares == 2**2 + 3**2 + 1**2
    assert sums.cross.tolist() == [2, 2 + 9, 1]


@pytest.mark.parametrize("order", ["as drawn", "sorted"])
def test_sums_equal_a_loop_over_clusters(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.algo.twosample.CELLS_AT_ONCE", 40)
    rng = np.random.default_rng(1)
    codes, clusters = rng.integers(5, size=300), rng.integers(60, size=300)
    if order == "sorted":
        clusters = np.sort(clusters)
    sums = category_sums(codes, clusters, num_categories=5)
    vectors = vector_sums(np.eye(5)[codes], clusters)
    products, cross, squares = np.zeros((5, 5)), np.zeros(5), 0
    for label in set(clusters.tolist()):
        counts = np.array([sum((codes == k) & (clusters == label)) for k in range(5)])
        products += np.outer(counts, counts)
        cross += counts.sum() * counts
        squares += counts.sum() ** 2
    for found in (sums, vectors):
        np.testing.assert_allclose(found.products, products)
        np.testing.assert_allclose(found.cross, cross)
        assert found.squares == squares
        assert found.clusters == len(set(clusters.tolist()))
        assert found.sums.tolist() == np.bincount(codes, minlength=5).tolist()


def test_covariance_equals_the_residuals_written_out() -> None:
    rng = np.random.default_rng(2)
    codes, clusters = rng.integers(3, size=80), rng.integers(20, size=80)
    sums = category_sums(codes, clusters, num_categories=3)
    center = np.array([0.5, 0.3, 0.2])
    expected = np.zeros((3, 3))
    for label in range(20):
        counts = np.bincount(codes[clusters == label], minlength=3)
        residual = counts - counts.sum() * center
        expected += np.outer(residual, residual)
    np.testing.assert_allclose(sums.covariance(center), expected * 20 / 19 / 80**2)


def test_without_clusters_it_is_pearsons_chi_square() -> None:
    tables = np.array([[30, 50, 20], [60, 45, 45]])
    first, second = (
        category_sums(np.repeat(np.arange(3), row), np.arange(row.sum()), num_categories=3)
        for row in tables
    )
    shares = tables.sum(axis=0) / tables.sum()
    metric = categorical_metric(shares)
    spread = independent_spread(metric, shares)
    assert spread == pytest.approx(2)  # K - 1
    found = difference_test(first, second, metric, spread=spread)
    pearson = stats.chi2_contingency(tables, correction=False)
    assert found.statistic * 2 == pytest.approx(pearson.statistic, rel=0.02)
    assert found.p_value == pytest.approx(pearson.pvalue, rel=0.2)


def test_the_ordered_metric_is_anderson_and_darlings_sum() -> None:
    shares, difference = np.array([0.1, 0.4, 0.3, 0.2]), np.array([0.1, -0.2, 0.05, 0.05])
    # F: 0.1, 0.5, 0.8; cumulated difference: 0.1, -0.1, -0.05.
    by_hand = 0.1 * 0.01 / 0.09 + 0.4 * 0.01 / 0.25 + 0.3 * 0.0025 / 0.16
    assert difference @ ordered_metric(shares) @ difference == pytest.approx(by_hand)


def test_a_row_said_five_times_says_nothing_more() -> None:
    rng = np.random.default_rng(3)
    p_values = []
    for times in (1, 5):
        sides = []
        for seed_shares in ([0.5, 0.5], [0.35, 0.65]):
            codes = np.random.default_rng(7).choice(2, size=120, p=seed_shares)
            labels = np.repeat(np.arange(120), times)
            order = rng.permutation(len(labels))
            sides.append(category_sums(codes[labels][order], labels[order], num_categories=2))
        p_values.append(compared(*sides))
    assert 1e-4 < p_values[0] < 0.2
    assert p_values[1] == pytest.approx(p_values[0], rel=1e-6)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("first", "second"), [(15, 15), (15, 500), (150, 150)])
def test_chance_is_called_a_change_no_more_often_than_said(
    first: int, second: int, ordered: bool
) -> None:
    shares = [0.5, 0.3, 0.1, 0.06, 0.04]
    found = [
        compared(
            drawn(first, shares, alike=True, seed=2 * seed),
            drawn(second, shares, alike=True, seed=2 * seed + 1),
            ordered=ordered,
        )
        for seed in range(400)
    ]
    assert sum(p < 0.05 for p in found) <= 30  # 20 expected, 30 is two standard deviations more
    assert sum(p < 0.005 for p in found) <= 7


def test_a_rare_category_that_a_small_sample_misses_is_no_change() -> None:
    many = drawn(600, [0.9, 0.1], alike=True, seed=1)
    missing = category_sums(np.zeros(60, int), np.repeat(np.arange(15), 4), num_categories=2)
    assert compared(missing, many) > 0.05


def test_a_real_change_is_found() -> None:
    few = drawn(80, [0.5, 0.5], alike=True, seed=1)
    assert compared(few, drawn(400, [0.2, 0.8], alike=True, seed=2)) < 1e-3
    assert compared(few, drawn(400, [0.2, 0.8], alike=True, seed=2), ordered=True) < 1e-3
    assert compared(few, few) == 1.0


def test_prompts_that_came_back_count_once() -> None:
    first = drawn(60, [0.5, 0.5], alike=True, seed=1)
    second = drawn(60, [0.3, 0.7], alike=True, seed=2)
    once, twice = (shares_test(first, second, repeats=repeats) for repeats in (1.0, 2.0))
    assert twice.p_value > once.p_value
    # Q / statistic is t1 + t2, and with repeats t1 + 2 t2; the other way round 2 t1 + t2.
    turned = shares_test(second, first, repeats=2.0)
    assert 1 / twice.statistic + 1 / turned.statistic == pytest.approx(3 / once.statistic)


def test_f_tail_by_table() -> None:
    assert f_tail(4.9646, 1, 10) == pytest.approx(0.05, rel=1e-3)
    assert f_tail(2.8661, 4, 20) == pytest.approx(0.05, rel=1e-3)


def test_holm_by_hand() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.2 * 1; none below the one before.
    assert holm([0.02, 0.2, 0.01, 0.03]) == pytest.approx([0.06, 0.2, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_inside_strata_is_not_fooled_by_their_mix() -> None:
    # Stratum 0: both groups 0.2; stratum 1: both 0.8; the first group sits in stratum 1.
    groups = [(True, 0, 10), (True, 1, 40), (False, 0, 40), (False, 1, 10)]
    first = np.concatenate([np.full(n, is_first) for is_first, _, n in groups])
    strata = np.concatenate([np.full(n, s) for _, s, n in groups])
    values = np.concatenate([np.arange(n) < n * (0.2, 0.8)[s] for _, s, n in groups]).astype(float)
    found = stratified_difference(values, first, strata, np.arange(100))
    assert found is not None
    assert values[first].mean() - values[~first].mean() == pytest.approx(0.36)
    assert found.value == pytest.approx(0.0)
    assert found.p_value == pytest.approx(1.0)


def test_a_stratified_difference_equals_a_loop() -> None:
    rng = np.random.default_rng(5)
    first, strata = rng.random(200) < 0.4, rng.integers(3, size=200)
    clusters, values = rng.integers(40, size=200), rng.choice([0.0, 0.5, 1.0], size=200)
    value, total, influence = 0.0, 0.0, dict.fromkeys(range(40), 0.0)
    for s in range(3):
        a, b = values[first & (strata == s)], values[~first & (strata == s)]
        total += len(a) * len(b) / (len(a) + len(b))
    for s in range(3):
        inside = strata == s
        a, b = values[first & inside], values[~first & inside]
        weight = len(a) * len(b) / (len(a) + len(b)) / total
        value += weight * (a.mean() - b.mean())
        for i in np.flatnonzero(inside):
            sign = 1 / len(a) if first[i] else -1 / len(b)
            influence[clusters[i]] += weight * sign * (values[i] - values[inside].mean())
    error = math.sqrt(sum(x * x for x in influence.values()) * 40 / 39)
    found = stratified_difference(values, first, strata, clusters)
    assert found is not None
    assert found.value == pytest.approx(value)
    assert found.error >= error - 1e-12
    assert found.error == pytest.approx(error, rel=0.15)


def test_groups_that_share_no_stratum_cannot_be_compared() -> None:
    first = np.array([True, True, False, False])
    assert stratified_difference(np.ones(4), first, first.astype(int), np.arange(4)) is None
