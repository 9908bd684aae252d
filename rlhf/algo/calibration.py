"""Does a probability mean what it says: reliability, calibration error, precision and recall.

Pure NumPy, so that a report can use it. Shapes: N values.

A reward model's probabilities come in two kinds. Of a comparison, sigmoid(score(chosen) -
score(rejected)) is the probability that the model gives to the annotator's choice (Eq. 1); which
response is called chosen is known, so it is folded first: `preference_confidence`. Of a response,
sigmoid(safety score) is the probability that it is safe (section 3.2.2), with the label as outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Row = dict[str, Any]


def preference_confidence(chosen: ArrayLike, rejected: ArrayLike) -> tuple[Floats, Floats]:
    """Return the model's confidence in the response it prefers and whether annotators agree, [N].

    From raw scores [N]: confidence sigmoid(|gap|) in [0.5, 1]; outcome 1, 0, or 0.5 for a gap of 0.
    """
    gaps_N = _vector(chosen) - _vector(rejected)
    return 1.0 / (1.0 + np.exp(-np.abs(gaps_N))), 0.5 + 0.5 * np.sign(gaps_N)


def reliability(probabilities: ArrayLike, outcomes: ArrayLike, *, num_bins: int) -> Row:
    """Return equal-mass bins of predicted against observed, and the expected calibration error.

    The sorted probabilities are cut into `num_bins` parts of equal size; rows of equal probability
    stay together, so there may be fewer bins. A bin holds `n` rows between `low` and `high`, their
    mean probability (`confidence`) and mean outcome (`accuracy`). With |B| rows in bin B,

        ECE = sum over B of |B| / N * |accuracy(B) - confidence(B)|    (Guo et al. 2017, Eq. 5)

    on bins of equal mass (Nixon et al. 2019), which have no nearly empty bins to be noisy in. It is
    at least 0 by construction: that of a perfect model is about sqrt(2 p (1 - p) bins / (pi N)),
    not 0. None without rows.
    """
    assert num_bins >= 1, f"num_bins {num_bins} must be at least 1"
    p_N, y_N = _vector(probabilities), _vector(outcomes)
    assert len(p_N) == len(y_N), f"{len(p_N)} probabilities need as many outcomes, not {len(y_N)}"
    assert bool(((p_N >= 0) & (p_N <= 1)).all()), "probabilities must lie between 0 and 1"
    if len(p_N) == 0:
        return {"bins": [], "ece": None}
    order = np.argsort(p_N, kind="stable")
    p_N, y_N = p_N[order], y_N[order]
    # The rank of the first row with the same probability decides for all of them.
    rank_N = np.searchsorted(p_N, p_N, side="left")
    bin_N = rank_N * num_bins // len(p_N)
    bins = []
    for number in np.unique(bin_N):
        p, y = p_N[bin_N == number], y_N[bin_N == number]
        bins.append(
            {
                "low": float(p[0]),
                "high": float(p[-1]),
                "n": len(p),
                "confidence": float(p.mean()),
                "accuracy": float(y.mean()),
            }
        )
    ece = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / len(p_N)
    return {"bins": bins, "ece": ece}


def precision_recall(
    probabilities: ArrayLike, is_unsafe: Sequence[bool], *, thresholds: Sequence[float]
) -> list[Row]:
    """Return how well `probability < threshold` finds unsafe responses, one row per threshold.

    Probabilities are those of being safe, as the gate reads them (section 3.4.2). `flagged` rows
    lie below the threshold; precision is the unsafe share of them, recall the flagged share of the
    unsafe. None where there is nothing to take a share of.
    """
    p_N, unsafe_N = _vector(probabilities), np.asarray(is_unsafe, dtype=bool)
    assert len(p_N) == len(unsafe_N), f"{len(p_N)} probabilities need as many labels"
    num_unsafe = int(unsafe_N.sum())
    rows = []
    for threshold in thresholds:
        flagged_N = p_N < threshold
        flagged, found = int(flagged_N.sum()), int((flagged_N & unsafe_N).sum())
        rows.append(
            {
                "threshold": float(threshold),
                "flagged": flagged,
                "found": found,
                "unsafe": num_unsafe,
                "n": len(p_N),
                "precision": found / flagged if flagged else None,
                "recall": found / num_unsafe if num_unsafe else None,
            }
        )
    return rows


def histogram(values: ArrayLike, edges: Sequence[float]) -> list[int]:
    """Return how many values lie in [edge, next edge), the last bin closed.

    Values beyond the edges count in the outermost bins: no value is lost.
    """
    edges_E = _vector(edges)
    assert len(edges_E) >= 2, "a histogram needs two edges"
    assert bool((np.diff(edges_E) > 0).all()), f"edges {list(edges)} must rise"
    inside_N = np.clip(_vector(values), edges_E[0], edges_E[-1])
    counts: NDArray[np.int64] = np.histogram(inside_N, bins=edges_E)[0]
    return [int(count) for count in counts]


def _vector(values: ArrayLike) -> Floats:
    vector: Floats = np.asarray(values, dtype=np.float64)
    assert vector.ndim == 1, f"values must be one number per row, got shape {vector.shape}"
    assert bool(np.isfinite(vector).all()), "values must be finite: drop or count bad rows before"
    return vector
