"""Best-of-n selection and its curves. Shapes: P prompts, K sampled responses per prompt."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.errors import StageError


def best_of_n(scores: Sequence[float]) -> int:
    """Return the index of the highest score; the first of equal ones (section 3.4.1).

    Raises StageError for no scores at all and for NaN.
    """
    if len(scores) == 0:
        raise StageError("no scores to choose from: every prompt needs at least one response")
    if any(math.isnan(score) for score in scores):
        raise StageError(f"a score is NaN among {list(scores)}: check the reward models")
    return max(range(len(scores)), key=lambda index: scores[index])


def max_and_median_against_n(scores_PK: ArrayLike) -> tuple[list[float], list[float]]:
    """Return the mean over prompts of the expected maximum and median of n scores, n = 1..K.

    Fig. 7. For each n the expectation runs over all subsets of n of the K scores, which is unbiased
    and has no sampling noise: the j-th smallest of a random n-subset is the i-th smallest of all K
    with probability C(i-1, j-1) C(K-i, n-j) / C(K, n). The median of an even n is the mean of the
    two middle scores. Both lists have length K.
    """
    sorted_PK: NDArray[np.float64] = np.sort(np.asarray(scores_PK, dtype=np.float64), axis=1)
    assert sorted_PK.size > 0, "scores must hold at least one prompt and one response"
    if np.isnan(sorted_PK).any():
        raise StageError("a score is NaN: check the reward models")
    mean_by_rank_K = sorted_PK.mean(axis=0)
    num_samples = len(mean_by_rank_K)
    maxima, medians = [], []
    for n in range(1, num_samples + 1):
        lower, upper = (n + 1) // 2, n // 2 + 1
        maxima.append(float(_rank_weights(num_samples, n, n) @ mean_by_rank_K))
        middle = _rank_weights(num_samples, n, lower) + _rank_weights(num_samples, n, upper)
        medians.append(float(0.5 * middle @ mean_by_rank_K))
    return maxima, medians


def sweep_scores(values_TP: ArrayLike, axis_P: Sequence[Hashable]) -> NDArray[np.float64]:
    """Return each prompt's score at each of T temperatures on one scale, shape [T, P].

    Prompt p is valued by the reward model of its axis a, and scores of two models are on different
    scales. So each axis is standardised by itself, over all its prompts and all temperatures:

        z[t, p] = (value[t, p] - mean_a) / sd_a

    The mean of a row over all prompts then weighs the axes by their prompts. An axis whose values
    are all equal says nothing and gets 0.
    """
    values: NDArray[np.float64] = np.asarray(values_TP, dtype=np.float64)
    assert values.ndim == 2, f"values must be [temperatures, prompts], got {values.shape}"
    assert values.shape[1] == len(axis_P), f"{values.shape[1]} prompts need as many axes"
    if not np.isfinite(values).all():
        raise StageError("a score is NaN or infinite: check the reward models")
    scores = np.zeros_like(values)
    for axis in dict.fromkeys(axis_P):
        columns = [index for index, found in enumerate(axis_P) if found == axis]
        own = values[:, columns]
        spread = float(own.std())
        if spread > 1e-12 * max(1.0, float(np.abs(own).max())):
            scores[:, columns] = (own - own.mean()) / spread
    return scores


def best_temperature(temperatures: Sequence[float], scores: Sequence[float]) -> int:
    """Return the index of the highest score; of equal ones, to 1e-9, the lowest temperature."""
    highest = max(scores)
    equal = [index for index, score in enumerate(scores) if score >= highest - 1e-9]
    return min(equal, key=lambda index: temperatures[index])


def kl_best_of_n(n: int) -> float:
    """Return KL(best-of-n || policy) = log n - (n - 1) / n in nats (Gao et al. 2022)."""
    assert n >= 1, f"n {n} must be at least 1"
    return math.log(n) - (n - 1) / n


def _rank_weights(num_samples: int, n: int, j: int) -> NDArray[np.float64]:
    subsets = math.comb(num_samples, n)
    return np.array(
        [
            math.comb(i - 1, j - 1) * math.comb(num_samples - i, n - j) / subsets
            for i in range(1, num_samples + 1)
        ]
    )
