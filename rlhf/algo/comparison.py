"""Two versions on the same prompts, measured: win rates, refusals, score shifts, length, KL.

Every comparison is made inside one reward model; scores of different reward models are never
subtracted. Shapes: P prompts, one response per prompt and version. All rates and shifts come with
intervals clustered by prompt, as `{"mean", "low", "high", "n"}`; None where there are no prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.intervals import (
    clustered_bootstrap,
    interval_json,
    paired_clustered_bootstrap,
    proportion_interval,
)
from rlhf.algo.length_control import length_controlled
from rlhf.algo.promotion import Measurements
from rlhf.algo.rewards import below_threshold, judge_prefers

PAIRS = {"judge": "judge", "used": "reward"}
"""The pairs of reward models, and how the roles of their two models begin."""

Measured = dict[str, Any]
"""One measured value for JSON: mean, low, high and n."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is known of the P prompts."""

    is_safety: Sequence[bool]
    is_benign: Sequence[bool]
    """Harmless prompts that look adversarial."""
    clusters: Sequence[Hashable]
    """Label of each prompt; rows with the same label are not independent."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What is known of one version's P responses."""

    num_tokens: Sequence[int]
    finished: Sequence[bool]
    refused: Sequence[bool]
    candidate_logprobs: Sequence[float]
    """Log-probability that this version gives to the *candidate's* response, in nats."""
    scores: Mapping[str, Tensor]
    """Raw scores [P] by role: judge_ and reward_, each with helpfulness and safety."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Confidence level, bootstrap and the two thresholds on the safety probability."""

    level: float
    num_draws: int
    seed: int
    gate_threshold: float
    unsafe_threshold: float


def compare(
    asked: Asked, candidate: Answered, promoted: Answered, settings: Settings
) -> dict[str, Any]:
    """Measure the candidate against the promoted version; the keys are those of evaluation.json."""
    versions = {"candidate": candidate, "promoted": promoted}
    return {
        "win_rate": {
            pair: _win_rates(asked, candidate, promoted, prefix=prefix, settings=settings)
            for pair, prefix in PAIRS.items()
        },
        "violation_rate": {
            name: _violation_rate(asked, version, settings) for name, version in versions.items()
        },
        "over_refusal_rate": {
            name: rate(version.refused, asked.clusters, asked.is_benign, level=settings.level)
            for name, version in versions.items()
        },
        "scores": {
            role: _score_shift(asked, scores, promoted.scores[role], settings)
            for role, scores in candidate.scores.items()
        },
        "response_length": {name: _mean(version.num_tokens) for name, version in versions.items()},
        "finished_fraction": {name: _mean(version.finished) for name, version in versions.items()},
        "kl": sequence_kl(candidate.candidate_logprobs, promoted.candidate_logprobs),
    }


def length_controlled_gains(
    asked: Asked, candidate: Answered, promoted: Answered, settings: Settings
) -> dict[str, Any]:
    """Return by axis how much of the judge's gain is left among responses of equal length.

    Each judge counts on the prompts of its axis.
    """
    found = {}
    for axis in ("helpfulness", "safety"):
        rows = [i for i, safety in enumerate(asked.is_safety) if safety == (axis == "safety")]
        new, old = (v.scores[f"judge_{axis}"].double() for v in (candidate, promoted))
        found[axis] = length_controlled(
            new[rows].tolist(),
            old[rows].tolist(),
            [candidate.num_tokens[i] for i in rows],
            [promoted.num_tokens[i] for i in rows],
            [asked.clusters[i] for i in rows],
            level=settings.level,
            num_draws=settings.num_draws,
            seed=settings.seed,
        )
    return found


def measurements(compared: Mapping[str, Any]) -> Measurements:
    """Pick what the promotion rule looks at out of `compare`'s result."""
    length = compared["response_length"]
    return Measurements(
        win_rate_low=compared["win_rate"]["judge"]["all"]["low"],
        win_rate_gap=_win_rate_gap(compared["win_rate"]),
        violation_increase=_increase(compared["violation_rate"]),
        over_refusal_increase=_increase(compared["over_refusal_rate"]),
        length_ratio=length["candidate"] / length["promoted"],
        kl=compared["kl"],
        finished_fraction=compared["finished_fraction"]["candidate"],
    )


def sequence_kl(own_logprobs: Sequence[float], other_logprobs: Sequence[float]) -> float:
    """Estimate KL(own || other) in nats from own responses: the mean of the summed log ratio.

    Unbiased (k1), and may therefore be slightly negative for versions that hardly differ.
    """
    return _mean([a - b for a, b in zip(own_logprobs, other_logprobs, strict=True)])


def rate(
    values: Sequence[float], clusters: Sequence[Hashable], counts: Sequence[bool], *, level: float
) -> Measured:
    """Return the share of the rows that count, with its interval."""
    kept = [(v, c) for v, c, ok in zip(values, clusters, counts, strict=True) if ok]
    interval = proportion_interval([v for v, _ in kept], [c for _, c in kept], level=level)
    return interval_json(interval, len(kept))


def mean_value(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    counts: Sequence[bool],
    *,
    settings: Settings,
) -> Measured:
    """Return the mean of the rows that count, with its bootstrap interval."""
    kept = [(v, c) for v, c, ok in zip(values, clusters, counts, strict=True) if ok]
    interval = clustered_bootstrap(
        [v for v, _ in kept],
        [c for _, c in kept],
        num_draws=settings.num_draws,
        seed=settings.seed,
        level=settings.level,
    )
    return interval_json(interval, len(kept))


def _win_rates(
    asked: Asked, candidate: Answered, promoted: Answered, *, prefix: str, settings: Settings
) -> dict[str, Measured]:
    """Return the candidate's win rates under one pair; a tie counts half.

    `all`: each prompt is judged by one model of the pair, as the gate would choose it. Per axis:
    that axis's model alone, on the prompts of that axis. `longer` and `not_longer` split `all` by
    length, because a win rate that only length earns is no improvement.
    """
    axes = [f"{prefix}_helpfulness", f"{prefix}_safety"]
    helpfulness_a_P, safety_a_P = (candidate.scores[role] for role in axes)
    helpfulness_b_P, safety_b_P = (promoted.scores[role] for role in axes)
    verdict_P = judge_prefers(
        helpfulness_a_B=helpfulness_a_P,
        helpfulness_b_B=helpfulness_b_P,
        safety_a_B=safety_a_P,
        safety_b_B=safety_b_P,
        is_safety_B=torch.tensor(asked.is_safety),
        threshold=settings.gate_threshold,
    ).tolist()
    longer = [a > b for a, b in zip(candidate.num_tokens, promoted.num_tokens, strict=True)]
    groups: dict[str, tuple[list[float], list[bool]]] = {
        "all": (verdict_P, [True] * len(longer)),
        "helpfulness": (_wins(helpfulness_a_P, helpfulness_b_P), [not s for s in asked.is_safety]),
        "safety": (_wins(safety_a_P, safety_b_P), list(asked.is_safety)),
        "longer": (verdict_P, longer),
        "not_longer": (verdict_P, [not value for value in longer]),
    }
    return {
        name: rate(values, asked.clusters, counts, level=settings.level)
        for name, (values, counts) in groups.items()
    }


def _wins(scores_a_P: Tensor, scores_b_P: Tensor) -> list[float]:
    """Return 1 where a scores higher, 0.5 for a tie, else 0."""
    return (0.5 + 0.5 * torch.sign(scores_a_P - scores_b_P)).tolist()


def _violation_rate(asked: Asked, version: Answered, settings: Settings) -> Measured:
    """Return the share of safety prompts whose response the safety judge calls unsafe."""
    unsafe_P = below_threshold(
        version.scores["judge_safety"], threshold=settings.unsafe_threshold
    ).tolist()
    return rate(unsafe_P, asked.clusters, asked.is_safety, level=settings.level)


def _score_shift(
    asked: Asked, candidate_P: Tensor, promoted_P: Tensor, settings: Settings
) -> dict[str, Any]:
    """Return both versions' mean score under one reward model and the paired difference."""
    a, b = candidate_P.double().tolist(), promoted_P.double().tolist()
    shift = paired_clustered_bootstrap(
        a,
        b,
        asked.clusters,
        num_draws=settings.num_draws,
        seed=settings.seed,
        level=settings.level,
    )
    return {"candidate": _mean(a), "promoted": _mean(b), "shift": interval_json(shift, len(a))}


def _win_rate_gap(win_rate: Mapping[str, Mapping[str, Measured]]) -> float | None:
    """Return how far the used pair's win rate exceeds the judge pair's, on the worse axis."""
    judge, used = win_rate["judge"], win_rate["used"]
    measured = [axis for axis in ("helpfulness", "safety") if judge[axis]["n"]]
    gaps = [used[axis]["mean"] - judge[axis]["mean"] for axis in measured]
    return max(gaps) if gaps else None


def _increase(rates: Mapping[str, Measured]) -> float | None:
    if rates["candidate"]["n"] == 0:
        return None
    increase: float = rates["candidate"]["mean"] - rates["promoted"]["mean"]
    return increase


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
