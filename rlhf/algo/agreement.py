"""Agreement between annotators on ordinal levels, corrected for chance.

Gwet's AC2 (Gwet 2008, "Computing inter-rater reliability and its variance in the presence of high
agreement"; with weights and missing ratings: Gwet 2014, Handbook of Inter-Rater Reliability, 4th
edition, chapters 3 and 5) takes any number of annotators and gaps between them. It stays stable
where nearly all ratings are alike, and there Cohen's kappa does not. Cohen's weighted kappa (Cohen
1968, "Weighted kappa") is for two annotators; of more, the mean over pairs is taken (Light 1971).

Levels are numbered from 0. `ratings` has one row per item and in it the levels of those who rated
it, in any order: nobody's absence counts. With identity weights AC2 is AC1 and kappa Cohen's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Weights = Literal["identity", "linear", "quadratic"]


def weight_table(num_levels: int, weights: Weights) -> Floats:
    """Return w_kl, [levels, levels]: 1 on the diagonal, 0 for the farthest levels.

    Linear: 1 - |k - l| / (q - 1); quadratic: 1 - (k - l)^2 / (q - 1)^2 (Gwet 2014, 3.5.1).
    """
    assert num_levels >= 2, f"{num_levels} levels leave nothing to agree on"
    levels = np.arange(num_levels, dtype=np.float64)
    apart = np.abs(levels[:, None] - levels[None, :]) / (num_levels - 1)
    if weights == "identity":
        return np.eye(num_levels)
    return 1.0 - (apart if weights == "linear" else apart**2)


def gwet_ac2(
    ratings: Sequence[Sequence[int]], *, num_levels: int, weights: Weights = "quadratic"
) -> float:
    """Return AC2 = (p_a - p_e) / (1 - p_e); NaN where no item has two ratings.

    With r_ik the number of annotators who gave item i level k, r_i their sum over k and
    r*_ik = sum over l of w_kl r_il:
    p_a = mean over items with r_i >= 2 of sum over k of r_ik (r*_ik - 1) / (r_i (r_i - 1)),
    p_e = (sum of all w_kl) / (q (q - 1)) * sum over k of pi_k (1 - pi_k),
    pi_k = mean over all rated items of r_ik / r_i.
    """
    counts = _counts(ratings, num_levels)
    totals = counts.sum(axis=1)
    shared = counts[totals >= 2]
    if not len(shared):
        return math.nan
    table = weight_table(num_levels, weights)
    sizes = shared.sum(axis=1)
    agreeing = (shared * (shared @ table - 1.0)).sum(axis=1)
    observed = float((agreeing / (sizes * (sizes - 1.0))).mean())
    pi = (counts / totals[:, None]).mean(axis=0)
    by_chance = float(table.sum() / (num_levels * (num_levels - 1)) * (pi * (1.0 - pi)).sum())
    return (observed - by_chance) / (1.0 - by_chance)


def cohen_kappa(
    first: Sequence[int],
    second: Sequence[int],
    *,
    num_levels: int,
    weights: Weights = "quadratic",
) -> float:
    """Return Cohen's weighted kappa of two annotators on the items that both rated.

    With p_kl the share of items of level k by the first and l by the second:
    kappa = (p_o - p_e) / (1 - p_e), p_o = sum of w_kl p_kl, p_e = sum of w_kl p_k+ p_+l (Cohen
    1968). NaN without items, and where both gave one and the same level throughout: chance alone
    would agree then, too.
    """
    assert len(first) == len(second), f"{len(first)} and {len(second)} ratings cannot be paired"
    if not len(first):
        return math.nan
    joint = np.zeros((num_levels, num_levels))
    np.add.at(joint, (np.asarray(first), np.asarray(second)), 1.0 / len(first))
    table = weight_table(num_levels, weights)
    observed = float((table * joint).sum())
    by_chance = float((table * np.outer(joint.sum(axis=1), joint.sum(axis=0))).sum())
    return math.nan if 1.0 - by_chance < 1e-12 else (observed - by_chance) / (1.0 - by_chance)


def mean_kappa(
    ratings: Sequence[Mapping[str, int]],
    *,
    num_levels: int,
    weights: Weights = "quadratic",
) -> float:
    """Return the mean of Cohen's kappa over all pairs of annotators, weighted by common items.

    `ratings` has one row per item: annotator to level. Light (1971) weights all pairs alike, which
    suits the case that everybody rated everything. Pairs whose kappa is NaN are left out.
    """
    common: dict[tuple[str, str], list[tuple[int, int]]] = {}
    places = {name: i for i, name in enumerate(dict.fromkeys(n for row in ratings for n in row))}
    for row in ratings:
        for one, other in combinations(sorted(row, key=lambda name: places[name]), 2):
            common.setdefault((one, other), []).append((row[one], row[other]))
    total = rows = 0.0
    for levels in common.values():
        first, second = zip(*levels, strict=True)
        kappa = cohen_kappa(first, second, num_levels=num_levels, weights=weights)
        if not math.isnan(kappa):
            total, rows = total + len(levels) * kappa, rows + len(levels)
    return total / rows if rows else math.nan


def _counts(ratings: Sequence[Sequence[int]], num_levels: int) -> Floats:
    """Return r_ik, [items, levels], of the items that somebody rated."""
    rated = [row for row in ratings if len(row)]
    counts = np.zeros((len(rated), num_levels))
    for i, row in enumerate(rated):
        for level in row:
            assert 0 <= level < num_levels, f"level {level} is not below {num_levels}"
            counts[i, level] += 1.0
    return counts
