"""Two-sample tests for rows that are clustered by prompt, from sums that can be merged.

Rows that share a prompt are not independent, so a plain chi-square or Kolmogorov-Smirnov test calls
chance a change. Everything here rests on one quadratic form: Q = d' M d, where d is the difference
of two mean vectors and V its covariance between clusters. Under equal populations Q is distributed
as sum_i lambda_i chi2_1 with lambda the eigenvalues of M V; its first two moments give the F test
of Rao and Scott (1984, second-order correction) with the denominator of Thomas and Rao (1987). The
metric M decides what is looked for: `categorical_metric` gives Pearson's chi-square,
`ordered_metric` Anderson and Darling's statistic on bins, the identity a distance of means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]

CELLS_AT_ONCE = 1 << 20
"""Cells of the cluster-by-category table that are held at a time."""


@dataclass(frozen=True, slots=True)
class ClusterSums:
    """Sums over clusters c of the vectors y_c [K] (sums over the cluster's rows) and sizes n_c."""

    rows: float
    """sum n_c"""
    clusters: float
    squares: float
    """sum n_c^2"""
    sums: Floats
    """sum y_c, [K]"""
    cross: Floats
    """sum n_c y_c, [K]"""
    products: Floats
    """sum y_c y_c', [K, K]"""

    @property
    def mean(self) -> Floats:
        """Return the mean per row, [K]; for categories their shares."""
        return self.sums / self.rows

    def covariance(self, center: Floats) -> Floats:
        """Return the covariance [K, K] of the mean, from the clusters' residuals y_c - n_c center.

        C / (C - 1) / n^2 sum_c (y_c - n_c m)(y_c - n_c m)', which is linearisation of the ratio.
        """
        residuals = self.products - np.outer(self.cross, center) - np.outer(center, self.cross)
        residuals += self.squares * np.outer(center, center)
        return residuals * (self.clusters / (self.clusters - 1)) / self.rows**2


class Test(NamedTuple):
    """A test statistic, distributed as F(freedom, error_freedom) under equal populations."""

    statistic: float
    p_value: float
    freedom: float
    error_freedom: float


def category_sums(codes: Labels, clusters: Labels, *, num_categories: int) -> ClusterSums:
    """Sum one category per row: `codes` [N] in 0..K-1 and any integer label `clusters` [N].

    Fastest where the rows are sorted by cluster.
    """
    numbers, sizes = _number(clusters)
    if not _is_sorted(numbers):
        order = np.argsort(numbers, kind="stable")
        codes, numbers = codes[order], numbers[order]
    products = np.zeros((num_categories, num_categories))
    block = max(1, CELLS_AT_ONCE // num_categories)
    for first in range(0, len(sizes), block):
        count = min(block, len(sizes) - first)
        start, stop = np.searchsorted(numbers, (first, first + count))
        cells = (numbers[start:stop] - first).astype(np.int64) * num_categories
        cells += codes[start:stop]
        table = np.bincount(cells, minlength=count * num_categories).astype(np.float64)
        table = table.reshape(count, num_categories)
        products += table.T @ table
    return category_sums_of(
        np.bincount(codes, minlength=num_categories).astype(np.float64),
        products,
        clusters=len(sizes),
    )


def category_sums_of(counts: Floats, products: Floats, *, clusters: float) -> ClusterSums:
    """Complete the sums of categories, whose counts add up to the cluster's size."""
    return ClusterSums(
        rows=float(counts.sum()),
        clusters=float(clusters),
        squares=float(products.sum()),
        sums=counts,
        cross=products.sum(axis=1),
        products=products,
    )


def vector_sums(vectors: Floats, clusters: Labels) -> ClusterSums:
    """Sum one vector per row: `vectors` [N, K], `clusters` [N]."""
    numbers, sizes = _number(clusters)
    totals = np.zeros((len(sizes), vectors.shape[1]))
    np.add.at(totals, numbers, vectors)
    return ClusterSums(
        rows=float(len(vectors)),
        clusters=float(len(sizes)),
        squares=float((sizes**2).sum()),
        sums=totals.sum(axis=0),
        cross=sizes @ totals,
        products=totals.T @ totals,
    )


def categorical_metric(shares: Floats) -> Floats:
    """Return diag(1 / p), [K, K]: the quadratic form is then Pearson's chi-square per row."""
    return np.diag(1.0 / shares)


def ordered_metric(shares: Floats) -> Floats:
    """Return Anderson and Darling's metric on ordered bins with pooled shares h, [K, K].

    d' M d = sum_j h_j (F1_j - F2_j)^2 / (F_j (1 - F_j)) over the bins but the last, with F the
    cumulated shares (Scholz and Stephens 1987, Eq. 6). It sees shifts and changes of spread.
    """
    cumulated = np.cumsum(shares)[:-1]
    weights = shares[:-1] / (cumulated * (1.0 - cumulated))
    lower = np.tril(np.ones((len(shares), len(shares))))[:-1]
    return (lower.T * weights) @ lower


def independent_spread(metric: Floats, shares: Floats) -> float:
    """Return tr(M (diag p - p p')): the mean of Q times n for independent rows of categories."""
    return float(np.diag(metric) @ shares - shares @ metric @ shares)


def difference_test(
    first: ClusterSums,
    second: ClusterSums,
    metric: Floats,
    *,
    spread: float,
    repeats: float = 1.0,
) -> Test:
    """Test whether two samples of clusters have the same mean vector.

    The pooled mean is the center of both covariances, as in a score test. `spread` is tr(M S) with
    S the covariance of a single row. A small sample may miss a rare category and then seems to vary
    less than it does, so each side varies at least as much as clusters of its sizes do whose rows
    are as alike as in both samples together (`_likeness`), and never less than independent rows.
    `repeats` is how often a cluster of the second sample stands in its sums on average: it then
    holds that many clusters less. Needs two clusters on each side.
    """
    sides = (first, second)
    assert min(side.clusters for side in sides) >= 2, "a test needs two clusters on each side"
    difference = first.mean - second.mean
    quadratic = float(difference @ metric @ difference)
    if quadratic <= 0.0 or spread <= 0.0:
        return Test(0.0, 1.0, 1.0, 1.0)
    center = (first.sums + second.sums) / (first.rows + second.rows)
    parts = [metric @ first.covariance(center), repeats * metric @ second.covariance(center)]
    both = parts[0] + parts[1]
    freedom = float(np.trace(both) ** 2 / (both * both.T).sum())
    likeness = _likeness(sides, metric, center, spread)
    least = [
        spread / side.rows * (1.0 + (side.squares / side.rows - 1.0) * likeness) for side in sides
    ]
    traces = [
        max(float(np.trace(parts[0])), least[0]),
        max(float(np.trace(parts[1])), repeats * least[1]),
    ]
    clusters = (first.clusters, max(2.0, second.clusters / repeats))
    weakest = sum(part**2 / (count - 1) for part, count in zip(traces, clusters, strict=True))
    error_freedom = freedom * sum(traces) ** 2 / weakest
    statistic = quadratic / sum(traces)
    return Test(statistic, f_tail(statistic, freedom, error_freedom), freedom, error_freedom)


def _likeness(sides: Sequence[ClusterSums], metric: Floats, center: Floats, spread: float) -> float:
    """Return the correlation of two rows of one cluster, over both samples; 0 to 1.

    From trace_g = spread / n_g (1 + (m_g - 1) rho) with m_g = sum n_c^2 / n_g (Kish 1965), weighed
    by the number of clusters.
    """
    found = total = 0.0
    for side in sides:
        size = side.squares / side.rows
        if size > 1.0:
            effect = float(np.trace(metric @ side.covariance(center))) * side.rows / spread
            found += side.clusters * (effect - 1.0) / (size - 1.0)
            total += side.clusters
    return min(1.0, max(0.0, found / total)) if total else 0.0


def shares_test(
    first: ClusterSums, second: ClusterSums, *, ordered: bool = False, repeats: float = 1.0
) -> Test:
    """Test whether two samples have the same shares of K categories, or of K ordered bins.

    Categories that neither sample has play no part.
    """
    kept = np.flatnonzero(first.sums + second.sums)
    if len(kept) < 2:
        return Test(0.0, 1.0, 1.0, 1.0)
    one, other = (
        category_sums_of(side.sums[kept], side.products[np.ix_(kept, kept)], clusters=side.clusters)
        for side in (first, second)
    )
    shares = (one.sums + other.sums) / (one.rows + other.rows)
    metric = ordered_metric(shares) if ordered else categorical_metric(shares)
    spread = independent_spread(metric, shares)
    return difference_test(one, other, metric, spread=spread, repeats=repeats)


class Difference(NamedTuple):
    """A difference of two means inside strata, its standard error and the degrees of freedom."""

    value: float
    error: float
    p_value: float
    freedom: float


def stratified_difference(
    values: Floats, is_first: NDArray[np.bool_], strata: Labels, clusters: Labels
) -> Difference | None:
    """Compare the mean of the first group with the others', inside strata and clustered.

    value = sum_s w_s (mean_1s - mean_0s) / sum_s w_s with w_s = n_1s n_0s / (n_1s + n_0s), the
    weights of Mantel and Haenszel. Its variance is C / (C - 1) times the sum over clusters of the
    squared sum of influences, around the stratum's pooled mean; clusters may have rows in both
    groups. Never below the variance of independent rows. All arguments are [N], values in [0, 1].
    None where no stratum has rows of both groups.
    """
    numbers, _ = _number(strata)
    sizes = np.stack(
        [np.bincount(numbers[mask], minlength=numbers.max() + 1) for mask in (~is_first, is_first)]
    ).astype(np.float64)
    both = sizes.sum(axis=0)
    weights = sizes[0] * sizes[1] / both
    if weights.sum() == 0.0:
        return None
    weights /= weights.sum()
    means = np.bincount(numbers, weights=values) / both
    residuals = values - means[numbers]
    own = sizes[is_first.astype(np.int64), numbers]
    used = weights[numbers] > 0.0
    scale = np.where(used, weights[numbers] / np.maximum(own, 1.0), 0.0)
    influences = np.where(is_first, scale, -scale) * residuals
    labels, _ = _number(clusters[used])
    totals = np.bincount(labels, weights=influences[used])
    count = len(totals)
    spread = np.bincount(numbers, weights=residuals**2) / both
    shared = weights > 0.0
    independent = float(
        (weights[shared] ** 2 * spread[shared] * (1.0 / sizes[:, shared]).sum(axis=0)).sum()
    )
    variance = max(independent, float((totals**2).sum()) * count / max(count - 1, 1))
    value = float(influences[used].sum())
    if variance == 0.0:
        return Difference(0.0, 0.0, 1.0, float(count - 1))
    first_clusters = len(np.unique(clusters[used & is_first]))
    freedom = max(1.0, float(min(first_clusters, count - first_clusters or count) - 1))
    error = math.sqrt(variance)
    return Difference(value, error, f_tail((value / error) ** 2, 1.0, freedom), freedom)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being one of several, in the order given (Holm 1979).

    adjusted_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), for any dependence.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted


def f_tail(statistic: float, freedom: float, error_freedom: float) -> float:
    """Return the chance that F(freedom, error_freedom) exceeds the statistic."""
    from scipy.special import fdtrc

    return float(fdtrc(freedom, error_freedom, statistic))


def _number(labels: Labels) -> tuple[Labels, Floats]:
    """Return a number in 0..C-1 for every row and the size of every cluster."""
    if _is_sorted(labels):
        starts = np.concatenate([[True], labels[1:] != labels[:-1]])[: len(labels)]
        numbers = np.cumsum(starts, dtype=np.int32) - 1
    else:
        numbers = np.unique(labels, return_inverse=True)[1].astype(np.int32)
    return numbers, np.bincount(numbers).astype(np.float64)


def _is_sorted(labels: Labels) -> bool:
    return bool((labels[1:] >= labels[:-1]).all())
