"""What is drawn in a chart. Every mark that stands for values of the report carries their pointers.

Patterns with `*` name the parts of an array. Colours are classes of the page's style sheet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlhf.report.view.refs import Ref, written
from rlhf.report.view.scales import Axis, Scale, Values

Place = Ref | float | None


@dataclass(frozen=True, slots=True)
class Axes:
    """The two axes that a mark is drawn on."""

    x: Axis
    y: Axis


def value_of(place: Place) -> float | None:
    """Return the number of a place."""
    return place.value if isinstance(place, Ref) else place


def attributes(**places: Place) -> Markup:
    """Return data attributes with the pointers of the places that are values of the report."""
    return Markup("").join(
        Markup(' data-{}="{}"').format(name, place.path)
        for name, place in places.items()
        if isinstance(place, Ref)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something drawn: `name` is its series in the legend, `label` what hovering adds."""

    name: str = ""
    label: str = ""
    colour: str = "c1"
    shape: str = "line"

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Return (x, y, low, high, pointer) of every value, for the figure's CSV."""
        return iter(())

    def draw(self, x: Scale, y: Scale, axes: Axes) -> Markup:
        """Return the mark as SVG."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Line(Mark):
    """A line through values; missing ones are passed over."""

    xs: Values
    ys: Values
    dashed: bool = False

    def rows(self) -> Iterator[tuple[Any, ...]]:
        for i, (x, y) in enumerate(zip(self.xs.values, self.ys.values, strict=True)):
            if x is not None and y is not None:
                yield x, y, "", "", self.ys.at(i)

    def draw(self, x: Scale, y: Scale, axes: Axes) -> Markup:
        pairs = zip(self.xs.values, self.ys.values, strict=True)
        points = [f"{x(a):.2f},{y(b):.2f}" for a, b in pairs if a is not None and b is not None]
        return Markup('<polyline class="line {}{}" data-xs="{}" data-ys="{}" points="{}"/>').format(
            self.colour,
            " dashed" if self.dashed else "",
            self.xs.pattern,
            self.ys.pattern,
            " ".join(points),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Band(Mark):
    """An area between lower and upper limits."""

    xs: Values
    lows: Values
    highs: Values
    shape: str = "band"

    def rows(self) -> Iterator[tuple[Any, ...]]:
        for i, x in enumerate(self.xs.values):
            yield x, "", self.lows.values[i], self.highs.values[i], self.lows.at(i)

    def draw(self, x: Scale, y: Scale, axes: Axes) -> Markup:
        there = [(x(a), y(b)) for a, b in _known(self.xs, self.highs)]
        back = [(x(a), y(b)) for a, b in reversed(_known(self.xs, self.lows))]
        points = " ".join(f"{a:.2f},{b:.2f}" for a, b in [*there, *back])
        return Markup(
            '<polygon class="band {}" data-xs="{}" data-lows="{}" data-highs="{}" points="{}"/>'
        ).format(self.colour, self.xs.pattern, self.lows.pattern, self.highs.pattern, points)


def _known(xs: Values, ys: Values) -> list[tuple[float, float]]:
    pairs = zip(xs.values, ys.values, strict=True)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point(Mark):
    """One value with its interval; `across` when the interval lies along x."""

    x: Place
    y: Place
    low: Ref | None = None
    high: Ref | None = None
    across: bool = False
    shift: float = 0.0
    """Pixels to the right of its place, so that two series do not hide each other."""
    shape: str = "dot"
    hollow: bool = False
    """Whether it rests on too little to be compared with anything."""

    def rows(self) -> Iterator[tuple[Any, ...]]:
        limits = [value_of(place) for place in (self.low, self.high)]
        paths = [place.path for place in (self.x, self.y) if isinstance(place, Ref)]
        yield value_of(self.x), value_of(self.y), *limits, " ".join(paths)

    def draw(self, x: Scale, y: Scale, axes: Axes) -> Markup:
        a, b = value_of(self.x), value_of(self.y)
        if a is None or b is None:
            return Markup("")
        bar = Markup("")
        low, high = value_of(self.low), value_of(self.high)
        if low is not None and high is not None:
            place = x(a) + self.shift
            ends = (x(low), y(b), x(high), y(b)) if self.across else (place, y(low), place, y(high))
            bar = Markup('<path class="bar" d="M{:.2f},{:.2f}L{:.2f},{:.2f}"/>').format(*ends)
        shift = Markup(' data-shift="{}"').format(self.shift) if self.shift else Markup("")
        return Markup('<g class="point {} {}{}"{}{}>{}{}<title>{}</title></g>').format(
            self.colour,
            self.shape,
            " hollow" if self.hollow else "",
            shift,
            attributes(x=self.x, y=self.y, low=self.low, high=self.high),
            bar,
            _symbol(self.shape, x(a) + self.shift, y(b)),
            self._title(axes),
        )

    def _title(self, axes: Axes) -> str:
        """Return what hovering shows: the series, then every value of the report."""
        parts = [" ".join(filter(None, (self.name, self.label, "(few)" if self.hollow else "")))]
        for place, of in ((self.x, axes.x), (self.y, axes.y)):
            if isinstance(place, Ref):
                parts.append(f"{of.label} {written(place.value, of.form)}".strip())
        if self.low is not None and self.high is not None:
            form = (axes.x if self.across else axes.y).form
            limits = (written(place.value, form) for place in (self.low, self.high))
            parts.append(f"[{', '.join(limits)}]")
        return "; ".join(filter(None, parts))


def _symbol(shape: str, x: float, y: float) -> Markup:
    if shape == "cross":
        path = f"M{x - 3:.2f},{y - 3:.2f}l6,6m0,-6l-6,6"
    elif shape == "tick":
        path = f"M{x:.2f},{y - 6:.2f}v12"
    elif shape == "diamond":
        path = f"M{x:.2f},{y - 5:.2f}l5,5l-5,5l-5,-5z"
    elif shape == "square":
        path = f"M{x - 3.4:.2f},{y - 3.4:.2f}h6.8v6.8h-6.8z"
    elif shape == "up":
        path = f"M{x:.2f},{y - 4.6:.2f}l4.4,7.6h-8.8z"
    elif shape == "down":
        path = f"M{x:.2f},{y + 4.6:.2f}l4.4,-7.6h-8.8z"
    else:
        return Markup('<circle class="symbol" cx="{:.2f}" cy="{:.2f}" r="3.6"/>').format(x, y)
    return Markup('<path class="symbol" data-cx="{:.2f}" data-cy="{:.2f}" d="{}"/>').format(
        x, y, path
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Thread(Mark):
    """A thin line from point to point of one series."""

    points: Sequence[Point]

    def draw(self, x: Scale, y: Scale, axes: Axes) -> Markup:
        places = [(value_of(point.x), value_of(point.y), point.shift) for point in self.points]
        found = [
            f"{x(a) + shift:.2f},{y(b):.2f}"
            for a, b, shift in places
            if a is not None and b is not None
        ]
        return Markup('<path class="thread {}" d="M{}"/>').format(self.colour, "L".join(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps(Mark):
    """A histogram: counts between edges, as shares of `total` where it is given."""

    edges: Values
    counts: Values
    total: Ref | None = None
    filled: bool = False
    dashed: bool = False
    shape: str = "bar"

    def heights(self) -> list[float]:
        """Return the height of every bin."""
        over = 1 if self.total is None else self.total.value
        return [(count or 0) / over for count in self.counts.values]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        edges = self.edges.values
        for i, count in enumerate(self.counts.values):
            yield edges[i], count, edges[i], edges[i + 1], self.counts.at(i)

    def draw(self, x: Scale, y: Scale, axes: Axes) -> Markup:
        edges = [edge or 0.0 for edge in self.edges.values]
        path = f"M{x(edges[0]):.2f},{y(0):.2f}"
        for i, height in enumerate(self.heights()):
            path += f"V{y(height):.2f}H{x(edges[i + 1]):.2f}"
        path += f"V{y(0):.2f}"
        classes = [self.colour, *["filled"] * self.filled, *["dashed"] * self.dashed]
        return Markup('<path class="steps {}" data-edges="{}" data-counts="{}"{} d="{}"/>').format(
            " ".join(classes),
            self.edges.pattern,
            self.counts.pattern,
            attributes(total=self.total),
            path,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dots(Mark):
    """Many points as one path: a scatter."""

    xs: Values
    ys: Values
    shape: str = "dot"

    def rows(self) -> Iterator[tuple[Any, ...]]:
        for i, (x, y) in enumerate(zip(self.xs.values, self.ys.values, strict=True)):
            yield x, y, "", "", self.ys.at(i)

    def draw(self, x: Scale, y: Scale, axes: Axes) -> Markup:
        path = "".join(f"M{x(a):.1f},{y(b):.1f}h0" for a, b in _known(self.xs, self.ys))
        return Markup('<path class="dots {}" data-xs="{}" data-ys="{}" d="{}"/>').format(
            self.colour, self.xs.pattern, self.ys.pattern, path
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(Mark):
    """A thin line across the panel at a value: a limit, a start, or the diagonal."""

    at: Place = None
    along: str = "y"
    """The axis that `at` is on: x or y; `diagonal` for x = y."""
    colour: str = "rule"

    def draw(self, x: Scale, y: Scale, axes: Axes) -> Markup:
        value = value_of(self.at)
        if self.along == "diagonal":
            low, high = max(axes.x.low, axes.y.low), min(axes.x.high, axes.y.high)
            ends = (x(low), y(low), x(high), y(high))
        elif value is None:
            return Markup("")
        elif self.along == "x":
            ends = (x(value), y.start, x(value), y.end)
        else:
            ends = (x.start, y(value), x.end, y(value))
        label = Markup("")
        if self.label:
            # Text stands inside the panel, at the side where there is room.
            is_right = self.along == "y" or ends[0] > (x.start + x.end) / 2
            spot = (ends[0] + (-3 if is_right else 3), y.start - 4)
            spot = spot if self.along == "x" else (ends[2], ends[3] - 4)
            anchor = "end" if is_right else "start"
            label = Markup('<text class="ruled" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
            label = label.format(*spot, anchor, self.label)
        line = Markup('<path class="rule"{} d="M{:.2f},{:.2f}L{:.2f},{:.2f}"/>').format(
            attributes(**{self.along: self.at}), *ends
        )
        return line + label
