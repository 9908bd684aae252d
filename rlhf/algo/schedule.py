"""Learning-rate schedule of the reward models and of SFT (section 3.2.2)."""

from __future__ import annotations

import math


def warmup_steps(total_steps: int, *, fraction: float = 0.03, minimum: int = 5) -> int:
    """Return max(minimum, ceil(fraction * total_steps))."""
    # 0.07 * 100 is 7.000000000000001 in floating point; that must not become 8 steps.
    return max(minimum, math.ceil(round(fraction * total_steps, 9)))


def cosine_with_floor(
    step: int, *, total_steps: int, warmup_steps: int, floor: float = 0.1
) -> float:
    """Return the factor on the maximal learning rate for optimizer step `step` (from 0).

    Linear warm-up that reaches 1 at the last warm-up step, then half a cosine that reaches `floor`
    at the last step and stays there. The first step is never wasted at 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
