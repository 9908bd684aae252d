"""Axes and scales of charts, and lists of values that know their places in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf.report.view.refs import Ref, written

MOST_TICKS = 10
"""Whole numbers up to which each has a tick."""


@dataclass(frozen=True, slots=True)
class Values:
    """A list of values and the pattern of their pointers."""

    pattern: str
    values: Sequence[float | None]

    @classmethod
    def of(cls, ref: Ref, *keys: str) -> Values:
        """Return the parts of an array, or one field of each of its objects."""
        parts = list(ref)
        for key in keys:
            parts = [part[key] for part in parts]
        return cls("/".join([ref.path, "*", *keys]), [part.value for part in parts])

    def at(self, position: int) -> str:
        """Return the pointer of one value."""
        return self.pattern.replace("*", str(position))


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale with its label and ticks; `form` is how its values are written."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    form: str = "f3"


def axis(
    label: str,
    values: Iterable[float | None],
    *,
    include: Sequence[float] = (),
    limits: tuple[float, float] | None = None,
    least: float | None = None,
    most: float | None = None,
    form: str = "f3",
    ticks: int = 5,
) -> Axis:
    """Return an axis around values, ending on ticks; `limits` fixes its ends.

    `least` and `most` are the smallest and largest values there can be, such as 0 and 1 of a share.
    """
    known = [value for value in values if value is not None] + list(include)
    low, high = limits or (min(known, default=0.0), max(known, default=1.0))
    if high - low < 1e-9:
        room = max(0.1 * abs(low), 0.05)
        low, high = low - room, high + room
    low = low if least is None else max(low, least)
    step = nice_step((high - low) / ticks)
    if limits is None:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        low = low if least is None else max(low, least)
        high = high if most is None else min(high, most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    marks = [round(k * step, 12) for k in range(first, last + 1)]
    return Axis(label, low, high, [(mark, tick_text(mark, step, form)) for mark in marks], form)


def nice_step(rough: float) -> float:
    """Return 1, 2 or 5 times a power of 10, not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= rough * (1 - 1e-9))


def tick_text(value: float, step: float, form: str) -> str:
    """Return a tick's text, with the digits that its step needs."""
    if form[0] == "p":
        return written(value, "p0" if step >= 0.0099 else "p1")
    if form == "d" or step >= 1:
        return written(value, "d")
    return written(value, f"f{min(4, max(0, -math.floor(math.log10(step) + 1e-9)))}")


def whole(label: str, numbers: Sequence[int]) -> Axis:
    """Return an axis of whole numbers, such as rounds; of many, only round ones have a tick."""
    low, high = min(numbers), max(numbers)
    every = max(1, round(nice_step((high - low + 1) / MOST_TICKS)))
    ticks = [(float(number), str(number)) for number in range(low, high + 1) if number % every == 0]
    return Axis(label, low - 0.4, high + 0.4, ticks, "d")


def batches_axis(ids: Sequence[str]) -> Axis:
    """Return an axis of batches; of many, only some are named."""
    every = -(-len(ids) // 5)
    ticks = [(float(i), name) for i, name in enumerate(ids) if i % every == 0]
    return Axis("batch", -0.4, len(ids) - 0.6, ticks, "d")


def categories(names: Sequence[str]) -> Axis:
    """Return a vertical axis with one row per name, the first on top."""
    last = len(names) - 1
    return Axis("", -0.6, last + 0.6, [(last - i, name) for i, name in enumerate(names)])


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)
