"""What the next batch of comparisons is worth: reward accuracy against their number (Figure 6).

    accuracy(n) = a - b n^-c          n: own-axis training comparisons, all batches so far

fitted by weighted least squares over the rounds, weights 1 / variance from the accuracy's interval.
For a given c the best a and b are known in closed form, so that the fit is a search over c alone:
a dense grid, then ever finer grids around its best point. It therefore ends at the minimum, not
where an optimiser stops, and it cannot be caught in a local one. The loss is the weighted sum of
squares: a mean would shrink every interval made from it. Both mistakes made the published
confidence intervals of Chinchilla's third approach too narrow (Besiroglu et al. 2024).

Intervals are parametric bootstraps: new accuracies are drawn around the fitted curve with the
points' own standard errors, widened where the points scatter more than those say, and fitted anew.
The errors are taken as independent, although rounds share held-out prompts; shared errors move all
points together and say little about the gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_POINTS = 4
"""Three parameters need a fourth point that could contradict them."""
EXPONENTS = (0.02, 2.0)
"""Smallest and largest c: nearly a logarithm, and a curve that is flat after its second point."""
GRID = 48
ZOOMS, ZOOM_POINTS = 14, 9
"""Refinements of c, each four times finer."""
CURVE_POINTS = 40
WIDE = 0.1
"""Width of the interval of a from which on the limit of the curve counts as unknown."""


class Fit(NamedTuple):
    """Parameters of one curve or, as arrays, of many."""

    a: Floats
    b: Floats
    c: Floats
    loss: Floats

    def at(self, n: Floats) -> Floats:
        """Return the accuracy at n; shapes broadcast."""
        return self.a - self.b * n**-self.c


def fit_power_law(
    n: Sequence[float],
    accuracy: Sequence[float],
    *,
    low: Sequence[float],
    high: Sequence[float],
    next_n: float | None = None,
    level: float = 0.95,
    num_draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit the curve to one point per round and forecast the next one.

    `low` and `high` are each accuracy's confidence limits at `level`. `next_n` defaults to a batch
    as large as the newest. Returns a, b, c, `curve` (n, accuracy, low, high) and `next`: limits of
    the true accuracy there, of what will be measured with an error like the newest point's, and of
    the gain over the curve's value now. `warnings` says what the points cannot tell. Fewer than
    MIN_POINTS different n give no fit: the parameters and `next` are None, and `reason` says why.
    """
    sizes = np.asarray(n, dtype=np.float64)
    values = np.asarray(accuracy, dtype=np.float64)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    errors = (np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64)) / (2 * z)
    assert len(sizes) == len(values) == len(errors), "one accuracy with two limits per n"
    if len(set(sizes.tolist())) < MIN_POINTS:
        return _refusal(len(set(sizes.tolist())))
    assert bool((sizes > 0).all()), "n counts comparisons and must be positive"
    assert bool((errors > 0).all()), "an interval without width cannot weigh a point"
    order = np.argsort(sizes, kind="stable")
    sizes, values, errors = sizes[order], values[order], errors[order]
    target = next_n or sizes[-1] + (sizes[-1] - sizes[-2])
    best = fit(sizes, values[None, :], errors)
    scatter = max(1.0, math.sqrt(float(best.loss[0, 0]) / (len(sizes) - 3)))
    rng = np.random.default_rng(seed)
    drawn = best.at(sizes) + scatter * errors * rng.standard_normal((num_draws, len(sizes)))
    fits = fit(sizes, drawn, errors)
    tails = [(1 - level) / 2, (1 + level) / 2]
    noise = scatter * errors[-1] * rng.standard_normal(num_draws)
    return {
        "a": float(best.a[0, 0]),
        "b": float(best.b[0, 0]),
        "c": float(best.c[0, 0]),
        "points": len(sizes),
        "scatter": scatter,
        "curve": _curve(best, fits, np.geomspace(sizes[0], target, CURVE_POINTS), tails),
        "next": _next(best, fits, sizes[-1], float(target), noise, tails),
        "warnings": _warnings(best, fits, tails),
        "reason": "",
    }


def fit(sizes: Floats, values_DP: Floats, errors: Floats) -> Fit:
    """Fit D sets of accuracies at the same P sizes; the parameters have shape [D, 1]."""
    log_sizes = np.log(sizes / sizes[-1])
    weights = 1 / errors**2
    grid = np.broadcast_to(np.geomspace(*EXPONENTS, GRID), (len(values_DP), GRID))
    best = _best(_solve(grid, log_sizes, values_DP, weights))
    step = math.log(EXPONENTS[1] / EXPONENTS[0]) / (GRID - 1)
    offsets = np.linspace(-1, 1, ZOOM_POINTS)
    for _ in range(ZOOMS):
        near = np.clip(best.c * np.exp(step * offsets), *EXPONENTS)
        best = _best(_solve(near, log_sizes, values_DP, weights))
        step /= (ZOOM_POINTS - 1) / 2
    # b was fitted with n in units of the newest size.
    return best._replace(b=best.b * sizes[-1] ** best.c)


def _solve(c_DC: Floats, log_sizes: Floats, values_DP: Floats, weights: Floats) -> Fit:
    """Return the best a and b for given exponents, shapes [D, C], within b >= 0 and a <= 1."""
    x_DCP = np.exp(-c_DC[:, :, None] * log_sizes)
    y_DCP = values_DP[:, None, :]
    share = weights / weights.sum()
    mean_x, mean_y = x_DCP @ share, np.broadcast_to(values_DP @ share, c_DC.T.shape).T
    centered = x_DCP - mean_x[:, :, None]
    slope = (centered * (y_DCP - mean_y[:, :, None])) @ share / (centered**2 @ share)
    b = np.maximum(-slope, 0.0)
    a = mean_y + b * mean_x
    # Beyond a = 1 the best curve has a = 1; b then follows alone.
    bound_b = np.maximum((x_DCP * (1.0 - y_DCP)) @ share / (x_DCP**2 @ share), 0.0)
    b, a = np.where(a > 1.0, bound_b, b), np.minimum(a, 1.0)
    loss = (y_DCP - a[:, :, None] + b[:, :, None] * x_DCP) ** 2 @ weights
    return Fit(a, b, np.asarray(c_DC), loss)


def _best(fits: Fit) -> Fit:
    index = fits.loss.argmin(axis=1)[:, None]
    return Fit(*(np.take_along_axis(part, index, axis=1) for part in fits))


def _curve(best: Fit, fits: Fit, sizes: Floats, tails: Sequence[float]) -> list[dict[str, float]]:
    middle = best.at(sizes)[0]
    limits = np.quantile(fits.at(sizes), tails, axis=0)
    return [
        {
            "n": float(size),
            "accuracy": float(value),
            "low": min(float(low), float(value)),
            "high": max(float(high), float(value)),
        }
        for size, value, low, high in zip(sizes, middle, *limits, strict=True)
    ]


def _next(
    best: Fit, fits: Fit, now: float, target: float, noise: Floats, tails: Sequence[float]
) -> dict[str, float]:
    there, here = np.array([target]), np.array([now])
    value, current = float(best.at(there)[0, 0]), float(best.at(here)[0, 0])
    drawn = fits.at(there)[:, 0]
    gains = drawn - fits.at(here)[:, 0]
    low, high = np.quantile(drawn, tails).tolist()
    measured_low, measured_high = np.quantile(drawn + noise, tails).tolist()
    gain_low, gain_high = np.quantile(gains, tails).tolist()
    return {
        "n": target,
        "accuracy": value,
        "low": min(low, value),
        "high": max(high, value),
        "measured_low": min(measured_low, value),
        "measured_high": max(measured_high, value),
        "gain": value - current,
        "gain_low": min(gain_low, value - current),
        "gain_high": max(gain_high, value - current),
    }


def _warnings(best: Fit, fits: Fit, tails: Sequence[float]) -> list[str]:
    found = []
    a, b, c = float(best.a[0, 0]), float(best.b[0, 0]), float(best.c[0, 0])
    if b == 0.0:
        return ["no growth is seen: the curve is flat, and more of the same data promises nothing"]
    if c <= EXPONENTS[0] * 1.01:
        found.append("the points still rise like a logarithm: no limit is in sight")
    if c >= EXPONENTS[1] * 0.99:
        found.append("all growth lies between the first points: the exponent is not known")
    if a >= 1.0 - 1e-9:
        found.append("the limit is only bounded by accuracy 1: do not read a as a ceiling")
    width = float(np.diff(np.quantile(fits.a, tails))[0])
    if width > WIDE and not found:
        found.append(f"weakly identified: the interval of the limit a is {width:.2f} wide")
    return found


def _refusal(num_points: int) -> dict[str, Any]:
    return {
        "a": None,
        "b": None,
        "c": None,
        "points": num_points,
        "scatter": None,
        "curve": [],
        "next": None,
        "warnings": [],
        "reason": f"{num_points} points cannot show a curve of three parameters: "
        f"it takes {MIN_POINTS} rounds with different numbers of comparisons",
    }
