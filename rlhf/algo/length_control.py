"""How much of a gain in score is left among responses of equal length (Singhal et al. 2310.03716).

A reward model that likes length pays for longer responses. The candidate's and the promoted
version's responses are therefore put into buckets of similar length, and only responses in the
same bucket are compared. With n_b responses of both versions and means c_b and p_b in bucket b,

    within = sum of n_b (c_b - p_b) / sum of n_b    over the buckets that both versions reach.

Where all buckets are reached and both versions have as many responses, gain = within + the part
that moving between buckets earns (Oaxaca's decomposition with pooled weights), so share =
within / gain is the paper's non-length share: about 1 if length earns nothing, about 0 if it earns
everything. Shapes: P prompts, B buckets, C clusters.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.algo.intervals import (
    DRAWS_AT_ONCE,
    NOTHING,
    Interval,
    interval_json,
    paired_clustered_bootstrap,
)

Floats = NDArray[np.float64]

NUM_BUCKETS = 10
"""Buckets at most: of equal mass over both versions' lengths; equal lengths stay together."""
MIN_PER_BUCKET = 10
"""Responses per bucket at least, on average; with room for fewer than two, nothing is measured."""


def length_controlled(
    candidate_scores: Sequence[float],
    promoted_scores: Sequence[float],
    candidate_tokens: Sequence[int],
    promoted_tokens: Sequence[int],
    clusters: Sequence[Hashable],
    *,
    level: float,
    num_draws: int,
    seed: int,
    num_buckets: int = NUM_BUCKETS,
    min_per_bucket: int = MIN_PER_BUCKET,
) -> dict[str, Any]:
    """Return gain, gain within buckets, their ratio and the buckets, as evaluation.json holds them.

    All inputs [P], row i of both versions answering the same prompt; raw scores of one reward
    model. Intervals are percentile bootstraps over clusters with the buckets of the whole sample.
    `within_buckets.n` counts responses in buckets that both versions reach. `share` and its limits
    are None unless the gain's interval leaves out 0: a share of nothing means nothing. Too few
    responses for two buckets: all but the gain is None or empty.
    """
    room = 2 * len(clusters) // min_per_bucket
    gain = paired_clustered_bootstrap(
        candidate_scores, promoted_scores, clusters, num_draws=num_draws, seed=seed, level=level
    )
    found: dict[str, Any] = {"gain": interval_json(gain, len(clusters))}
    if room < 2:
        nothing = dict.fromkeys(("share", "share_low", "share_high"))
        return {**found, "within_buckets": interval_json(NOTHING, 0), **nothing, "buckets": []}
    tables = _Tables(
        np.asarray([candidate_scores, promoted_scores], dtype=np.float64),
        np.asarray([candidate_tokens, promoted_tokens], dtype=np.int64),
        clusters,
        num_buckets=min(num_buckets, room),
    )
    within, share = tables.bootstrap(num_draws=num_draws, seed=seed, level=level)
    found["within_buckets"] = interval_json(within, tables.num_comparable())
    has_share = gain.low > 0 or gain.high < 0
    ratio = interval_json(share, 0) if has_share else dict.fromkeys(("mean", "low", "high"))
    found["share"] = ratio["mean"]
    found["share_low"], found["share_high"] = ratio["low"], ratio["high"]
    found["buckets"] = tables.rows()
    return found


def buckets(tokens: NDArray[np.int64], *, num_buckets: int) -> NDArray[np.int64]:
    """Return the bucket of each length, numbered from 0 without gaps; same shape as `tokens`."""
    ordered = np.sort(tokens, axis=None)
    rank = np.searchsorted(ordered, tokens, side="left")
    wanted = rank * num_buckets // ordered.size
    return np.unique(wanted, return_inverse=True)[1].reshape(tokens.shape)


class _Tables:
    """Per cluster, version and bucket: number of responses and sum of scores, [C, 2, B]."""

    def __init__(
        self,
        scores_2P: Floats,
        tokens_2P: NDArray[np.int64],
        clusters: Sequence[Hashable],
        *,
        num_buckets: int,
    ) -> None:
        numbers: dict[Hashable, int] = {}
        cluster_P = [numbers.setdefault(label, len(numbers)) for label in clusters]
        bucket_2P = buckets(tokens_2P, num_buckets=num_buckets)
        self._tokens_2P, self._bucket_2P = tokens_2P, bucket_2P
        size = int(bucket_2P.max()) + 1
        self.counts_C2B = np.zeros((len(numbers), 2, size))
        self.sums_C2B = np.zeros_like(self.counts_C2B)
        for version in (0, 1):
            where = (cluster_P, version, bucket_2P[version])
            np.add.at(self.counts_C2B, where, 1.0)
            np.add.at(self.sums_C2B, where, scores_2P[version])

    def num_comparable(self) -> int:
        """Return how many responses lie in buckets that both versions reach."""
        counts_2B = self.counts_C2B.sum(0)
        return int(counts_2B[:, (counts_2B > 0).all(0)].sum())

    def bootstrap(self, *, num_draws: int, seed: int, level: float) -> tuple[Interval, Interval]:
        """Return the gain within buckets and its share of the whole gain, with limits."""
        num_clusters = len(self.counts_C2B)
        mean = _within_and_share(self.counts_C2B.sum(0)[None], self.sums_C2B.sum(0)[None])
        rng = np.random.default_rng(seed)
        blocks = []
        for start in range(0, num_draws, DRAWS_AT_ONCE):
            block = min(DRAWS_AT_ONCE, num_draws - start)
            drawn = rng.integers(num_clusters, size=(block, num_clusters))
            # How often each cluster is drawn, so that no [draws, C, 2, B] table is ever made.
            times_DC = np.stack([np.bincount(row, minlength=num_clusters) for row in drawn])
            blocks.append(
                _within_and_share(
                    np.tensordot(times_DC, self.counts_C2B, 1),
                    np.tensordot(times_DC, self.sums_C2B, 1),
                )
            )
        within_D, share_D = np.concatenate(blocks, axis=1)
        return (
            Interval(float(mean[0, 0]), *_limits(within_D, level)),
            Interval(float(mean[1, 0]), *_limits(share_D, level)),
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return each bucket's lengths, responses and gain (None where a version is missing)."""
        counts_2B, sums_2B = self.counts_C2B.sum(0), self.sums_C2B.sum(0)
        found = []
        for bucket in range(counts_2B.shape[1]):
            tokens = self._tokens_2P[self._bucket_2P == bucket]
            counts_2 = counts_2B[:, bucket]
            gain = None
            if counts_2.all():
                candidate, promoted = (sums_2B[:, bucket] / counts_2).tolist()
                gain = candidate - promoted
            found.append(
                {
                    "low_tokens": int(tokens.min()),
                    "high_tokens": int(tokens.max()),
                    "n": int(counts_2.sum()),
                    "n_candidate": int(counts_2[0]),
                    "n_promoted": int(counts_2[1]),
                    "gain": gain,
                }
            )
        return found


def _within_and_share(counts_D2B: Floats, sums_D2B: Floats) -> Floats:
    """Return gain within buckets and its share of each draw, [2, D]; NaN where undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        means_D2B = sums_D2B / counts_D2B
        gains_DB = means_D2B[:, 0] - means_D2B[:, 1]
        weights_DB = np.where((counts_D2B > 0).all(1), counts_D2B.sum(1), 0.0)
        gains_DB = np.where(weights_DB > 0, gains_DB, 0.0)
        within_D = (weights_DB * gains_DB).sum(1) / weights_DB.sum(1)
        totals_D2 = sums_D2B.sum(2) / counts_D2B.sum(2)
        whole_D = totals_D2[:, 0] - totals_D2[:, 1]
        found: Floats = np.stack([within_D, within_D / whole_D])
    return found


def _limits(draws_D: Floats, level: float) -> tuple[float, float]:
    """Return percentile limits; NaN where the draws say nothing about the spread."""
    known = draws_D[np.isfinite(draws_D)]
    if len(known) == 0 or float(np.ptp(known)) <= 1e-12 * max(1.0, float(np.abs(known).max())):
        return math.nan, math.nan
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(known, [tail, 1.0 - tail]).tolist()
    return low, high
