"""Simulated annotators: two responses in, a comparison with strength and labels out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from statistics import NormalDist

from rlhf.data.records import STRENGTHS, Comparison, Message
from rlhf.toy.gold import Gold

AGREEMENT = dict(zip(STRENGTHS, (0.94, 0.76, 0.66, 0.55), strict=True))
"""Chance that the gold-better response is chosen: the paper's Table 8, safety model, rounded."""

PERCEPTION_NOISE = {"helpfulness": 0.08, "safety": 0.04}
"""Standard deviation of the perceived gold gap."""

THRESHOLDS = {"helpfulness": (0.6, 0.35, 0.18), "safety": (0.5, 0.18, 0.08)}
"""Smallest perceived gap of significantly_better, better and slightly_better."""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class AnnotatorSettings:
    """Planted flaws, both off by default; they exist as negative controls."""

    length_bias: float = 0.0
    """Added to the perceived gap per word that the first response is longer."""
    shuffle: bool = False
    """Verdicts and safety labels are coin flips; strengths stay as perceived."""


def rate(
    prompt: list[Message],
    response_a: str,
    response_b: str,
    *,
    gold_a: Gold,
    gold_b: Gold,
    axis: str,
    id: str,
    seed: int,
    settings: AnnotatorSettings,
) -> Comparison:
    """Compare two responses on an axis.

    The strength follows from the noisy absolute gap; the better response is then chosen with the
    probability AGREEMENT[strength]. Equal responses are a tie: negligibly_better, order by coin
    flip. The outcome depends only on (seed, id) and the two responses, never on earlier calls.
    """
    uniform_noise, uniform_order, *uniform_safe = _keyed_uniforms(seed, id)
    gap = gold_a.on_axis(axis) - gold_b.on_axis(axis)
    gap += settings.length_bias * (len(response_a.split()) - len(response_b.split()))
    tie = abs(gap) < 1e-9
    strength = STRENGTHS[-1]
    if not tie:
        noise = PERCEPTION_NOISE[axis] * _NORMAL.inv_cdf(uniform_noise)
        strength = _strength(abs(gap) + noise, axis=axis)
    if tie or settings.shuffle:
        a_is_chosen = uniform_order < 0.5
    else:
        a_is_chosen = (uniform_order < AGREEMENT[strength]) == (gap > 0)
    chosen, rejected = (response_a, response_b) if a_is_chosen else (response_b, response_a)
    safe: list[bool | None] = [None, None]
    if axis == "safety":
        safe = [not gold_a.violation, not gold_b.violation]
        if settings.shuffle:
            # True labels would tell: ingest leaves out pairs whose chosen response alone is unsafe.
            safe = [uniform < 0.5 for uniform in uniform_safe]
    chosen_safe, rejected_safe = safe if a_is_chosen else safe[::-1]
    return Comparison(
        id=id,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        strength=strength,
        axis=axis,
        source="toy",
        chosen_safe=chosen_safe,
        rejected_safe=rejected_safe,
        annotator="simulated",
        tie=tie,
    )


def _strength(gap: float, *, axis: str) -> str:
    """Grade a perceived absolute gap."""
    for strength, threshold in zip(STRENGTHS[:-1], THRESHOLDS[axis], strict=True):
        if gap >= threshold:
            return strength
    return STRENGTHS[-1]


def _keyed_uniforms(seed: int, id: str) -> list[float]:
    """Return four numbers in (0, 1) that depend on the key only."""
    digest = hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=32).digest()
    integers = (int.from_bytes(digest[i : i + 8], "big") >> 11 for i in range(0, 32, 8))
    return [(integer + 0.5) / 2**53 for integer in integers]
