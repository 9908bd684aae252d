"""Charts as SVG: drawn once, sharp at every size and in print, coloured by the page's style sheet.

A panel is small enough for a telephone and repeats beside others on a desk. It carries its scales,
so that a test can turn pixels back into the numbers that its marks point to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rlhf.report.view.marks import Axes, Mark
from rlhf.report.view.scales import Axis, Scale

WIDTH = 360
HEIGHT = 230
TOP, RIGHT, BOTTOM, LEFT = 28, 18, 42, 44
ROW = 24
"""Height of a row that has a name."""

LETTER = 5.9
"""Width of a letter, about; names of rows get the room they need."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: a title, two axes and what is drawn between them."""

    title: str
    x: Axis
    y: Axis
    marks: Sequence[Mark]
    named_rows: bool = False
    """Whether y has names instead of numbers."""
    row_height: int = ROW

    def svg(self) -> Markup:
        """Return the panel as an SVG element."""
        left, height = LEFT, HEIGHT
        if self.named_rows:
            left = round(12 + LETTER * max(len(name) for _, name in self.y.ticks))
            height = TOP + BOTTOM + self.row_height * len(self.y.ticks)
        x = Scale(self.x.low, self.x.high, left, WIDTH - RIGHT)
        y = Scale(self.y.low, self.y.high, height - BOTTOM, TOP)
        marks = Markup("").join(mark.draw(x, y, Axes(self.x, self.y)) for mark in self.marks)
        return Markup(
            '<svg class="panel" viewBox="0 0 {} {}" role="img" aria-label="{}"'
            ' data-x="{} {} {} {}" data-y="{} {} {} {}">{}{}</svg>'
        ).format(
            WIDTH,
            height,
            self.title,
            *(x.low, x.high, x.start, x.end),
            *(y.low, y.high, y.start, y.end),
            self._frame(x, y),
            marks,
        )

    def _frame(self, x: Scale, y: Scale) -> Markup:
        """Return title, axes, ticks and grid."""
        parts = [Markup('<text class="title" x="2" y="13">{}</text>').format(self.title)]
        for value, text in self.x.ticks:
            at = x(value)
            parts.append(
                Markup(
                    '<path class="grid" d="M{0:.2f},{1:.2f}V{2:.2f}"/>'
                    '<text class="tick" x="{0:.2f}" y="{3:.2f}" text-anchor="middle">{4}</text>'
                ).format(at, y.start, y.end, y.start + 16, text)
            )
        for value, text in self.y.ticks:
            parts.append(
                Markup(
                    '<path class="grid" d="M{1:.2f},{0:.2f}H{2:.2f}"/>'
                    '<text class="{5}" x="{3:.2f}" y="{0:.2f}" dy="0.34em" text-anchor="end">{4}'
                    "</text>"
                ).format(
                    y(value), x.start, x.end, x.start - 6, text,
                    "row" if self.named_rows else "tick",
                )
            )  # fmt: skip
        bottom = y.start + 33
        parts.append(
            Markup('<text class="label" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>').format(
                x.end, bottom, self.x.label
            )
        )
        if self.y.label:
            parts.append(
                Markup('<text class="label" x="2" y="{:.1f}">{}</text>').format(
                    bottom, "\u2191 " + self.y.label
                )
            )
        return Markup("").join(parts)
