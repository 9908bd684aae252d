"""Is a policy over-optimising: the used score still rises while another one falls.

Gao et al. (2210.10760) plot scores against sqrt(KL) to the start: the optimised proxy keeps rising,
the true score rises, has its maximum and falls. The canary stands for the true score here: a reward
model that was not optimised against (the paper tracks one trained on open data, section 3.4.2).
Pure NumPy. Shapes: I scorings of the same P held-out prompts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.algo.intervals import Interval, clustered_mean, interval_json

Floats = NDArray[np.float64]

MIN_PROMPTS = 20
"""Distinct prompts below which nothing is said: the interval of fewer is not to be trusted."""

OVER, NO_SIGN, CANNOT_TELL = "over-optimising", "no sign", "cannot tell"


@dataclass(frozen=True, slots=True)
class Curve:
    """One axis: raw scores of its two models, each on its own scale, on the prompts of the axis."""

    iterations: Sequence[int]
    """Iteration of each scoring, rising; the first one is the start's."""
    used_IP: Floats
    canary_IP: Floats
    clusters: Sequence[Hashable]
    """Label of each prompt."""


def judge_curve(curve: Curve, *, level: float) -> dict[str, Any]:
    """Return the verdict about one axis and what it rests on.

    With m the scoring of the canary's highest mean, scoring i > m shows over-optimisation if

        mean(used_i) > mean(used_m)  and  upper limit of mean(canary_i - canary_m) < 0,

    the difference paired by prompt, its interval Student's over clusters. The maximum may be at any
    of the I - 1 scorings before the last, so the level is 1 - (1 - level) / (I - 1) (Bonferroni).
    `since` is the first scoring from which on every one shows it, the last included: one bad
    scoring in the middle is no sign. `used_change` and `canary_change` compare the last with m.
    """
    iterations = list(curve.iterations)
    num_clusters, num_scorings = len(set(curve.clusters)), len(iterations)
    nothing = {"verdict": CANNOT_TELL, "since": None, "n": num_clusters}
    if num_scorings < 2 or num_clusters < MIN_PROMPTS:
        return nothing
    strict = 1.0 - (1.0 - level) / (num_scorings - 1)
    best = int(curve.canary_IP.mean(1).argmax())

    def change(table_IP: Floats, scoring: int, *, level: float) -> Interval:
        differences = (table_IP[scoring] - table_IP[best]).tolist()
        return clustered_mean(differences, curve.clusters, level=level)

    def is_sign(scoring: int) -> bool:
        used = change(curve.used_IP, scoring, level=level)
        return used.mean > 0 and change(curve.canary_IP, scoring, level=strict).high < 0

    since = None
    for scoring in range(num_scorings - 1, best, -1):
        if not is_sign(scoring):
            break
        since = iterations[scoring]
    last = num_scorings - 1
    return {
        "verdict": NO_SIGN if since is None else OVER,
        "since": since,
        "n": num_clusters,
        "best_iteration": iterations[best],
        "last_iteration": iterations[last],
        "used_change": interval_json(change(curve.used_IP, last, level=level), num_clusters),
        "canary_change": interval_json(change(curve.canary_IP, last, level=strict), num_clusters),
    }


def judge_curves(curves: Mapping[str, Curve], *, level: float) -> dict[str, Any]:
    """Return the verdict over all axes: the worst one that could be told.

    `since` is the earliest iteration of an axis that over-optimises. What cannot be told about one
    axis does not change the verdict about the other; `text` names it.
    """
    axes = {axis: judge_curve(curve, level=level) for axis, curve in curves.items()}
    found = {name: [a for a in axes if axes[a]["verdict"] == name] for name in (OVER, CANNOT_TELL)}
    since = min((axes[axis]["since"] for axis in found[OVER]), default=None)
    if found[OVER]:
        verdict = OVER
        text = (
            f"over-optimising since iteration {since}: on {' and '.join(found[OVER])} the used "
            "score rises while the canary's falls from its maximum"
        )
    elif len(found[CANNOT_TELL]) == len(axes):
        verdict = CANNOT_TELL
        text = (
            f"cannot tell: under {MIN_PROMPTS} held-out prompts per axis or fewer than 2 scorings"
        )
    else:
        verdict = NO_SIGN
        text = "no sign of over-optimisation"
    if found[CANNOT_TELL] and verdict != CANNOT_TELL:
        text += f" (cannot tell about {' and '.join(found[CANNOT_TELL])}: too few prompts)"
    return {"verdict": verdict, "since": since, "text": text, "axes": axes}
