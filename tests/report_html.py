"""Read a report page as a tree, and hold what is visible on it against the report's JSON."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from report_tracing import follow

VIEW = Path(__file__).parents[1] / "rlhf" / "report"
VOID = {"meta", "link", "input", "br", "img"}
HIDDEN = {"style", "script", "head"}
THIN, MINUS = "\u2009", "\u2212"


@dataclass
class Node:
    tag: str
    attrs: dict[str, str] = field(default_factory=dict)
    parent: Node | None = None
    children: list[Node | str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return self.attrs.get("class", "").split()

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def up(self) -> Iterator[Node]:
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def all(self, tag: str = "", cls: str = "") -> list[Node]:
        return [
            node
            for node in self.walk()
            if (not tag or node.tag == tag) and (not cls or cls in node.classes)
        ]


class Reader(HTMLParser):
    """Builds the tree; a page whose tags do not close in order is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Node("root")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            last = self.at.children[-1]
            assert isinstance(last, Node)
            self.at = last

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.children.append(Node(tag, {k: v or "" for k, v in attrs}, self.at))

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)


def read_page(html: str) -> Node:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.at is reader.root
    return reader.root


def written(value: float, form: str) -> str:
    """Write a number as the page should, by decimal arithmetic."""
    if form == "g":
        text = f"{value:.4g}"
        whole, _, rest = text.partition(".")
        text = grouped(whole) + ("." + rest if rest else "") if "e" not in text else text
    elif form == "i":
        text = str(value)
    else:
        digits = 3 if form == "s" else 0 if form == "d" else int(form[1])
        exact = Decimal(value * 100 if form[0] == "p" else value)
        rounded = exact.quantize(Decimal(1).scaleb(-digits))
        sign = "-" if rounded < 0 else "+" if form == "s" else ""
        whole, _, rest = str(abs(rounded)).partition(".")
        text = sign + grouped(whole) + ("." + rest if rest else "")
        text += THIN + "%" if form[0] == "p" else ""
    return text.replace("-", MINUS)


def grouped(whole: str) -> str:
    sign, digits = whole[: len(whole) - len(whole.lstrip("-"))], whole.lstrip("-")
    while re.search(r"\d{4}", digits):
        digits = re.sub(r"(\d)(\d{3})(?!\d)", rf"\1{THIN}\2", digits, count=1)
        if not re.search(r"^\d{4}", digits):
            break
    return sign + digits


def wrong_numbers(root: Node, report: Any) -> tuple[int, list[str]]:
    """Return how many elements name a place of the report, and those that show something else."""
    checked, wrong = 0, []
    for node in root.walk():
        place = node.attrs.get("data-path")
        if "data-count" in node.attrs:
            shown, expected = node.text, str(len(follow(report, node.attrs["data-count"])))
        elif place is not None:
            value = follow(report, place)
            form = node.attrs.get("data-format")
            shown = node.text
            expected = written(value, form) if form else str(value)
            if "digest" in node.classes:
                assert node.attrs["title"] == expected
                expected = expected[:8]
        else:
            continue
        checked += 1
        if shown != expected:
            wrong.append(f"{place}: {shown!r} is not {expected!r}")
    return checked, wrong


def loose_numbers(root: Node, report: Any) -> list[str]:
    """Return visible texts with a digit that are neither of the report nor fixed words.

    Names that the report holds (versions, batches, nodes) may stand in a sentence; ticks, titles of
    points and options of filters are checked elsewhere.
    """
    # A string that is a bare number is no name: it would hide any number.
    named = {s for s in strings(report) if re.search(r"\d", s) and re.search("[A-Za-z]", s)}
    names = sorted(named, key=len, reverse=True)
    rounds = {str(item["round"]) for item in of_reports(report, "batches")}
    temperatures = {
        f"{row['temperature']:g}"
        for sweep in of_reports(report, "temperature")
        for row in sweep["temperatures"]
    }
    fixed = fixed_words()
    loose = []
    for node in root.walk():
        chain = list(node.up())
        if any(n.tag in HIDDEN or "data-path" in n.attrs or "data-count" in n.attrs for n in chain):
            continue
        if node.tag in ("title", "option") or "tick" in node.classes:
            continue
        for text in (child for child in node.children if isinstance(child, str)):
            left = text
            for name in names:
                left = left.replace(name, "")
            left = re.sub(r"\b[Rr]ound (\d+)", lambda m: "" if m[1] in rounds else m[0], left)
            left = re.sub(r"T = ([\d.]+)", lambda m: "" if m[1] in temperatures else m[0], left)
            if re.search(r"\d", left) and text.strip() not in fixed:
                loose.append(text.strip())
    return loose


def of_reports(report: Any, field_: str) -> list[Any]:
    reports = report["reports"].values() if "reports" in report else [report]
    return [item for single in reports for item in single[field_]]


def strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
        yield tree.removeprefix("round-")
        yield tree.replace("_", " ")
        yield tree.partition("#")[0]
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield key.replace("_", " ")
            yield from strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)


def fixed_words() -> str:
    """Return every string that the page's code and template spell out."""
    found = [path.read_text(encoding="utf-8") for path in (VIEW / "templates").glob("*.html")]
    for path in VIEW.glob("view/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


# Charts: pixels back to numbers.


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    start: float
    end: float

    def back(self, pixel: float) -> float:
        return self.low + (pixel - self.start) / (self.end - self.start) * (self.high - self.low)

    def close(self, pixel: float, value: float, *, pixels: float = 0.011) -> bool:
        return abs(self.back(pixel) - value) <= pixels * abs(
            (self.high - self.low) / (self.end - self.start)
        )


def expand(report: Any, pattern: str) -> list[Any]:
    """Return the values of a pattern: `/a/*/b` is b of every part of /a."""
    head, _, tail = pattern.partition("/*")
    count = len(follow(report, head))
    return [follow(report, f"{head}/{i}{tail}") for i in range(count)]


def wrong_marks(root: Node, report: Any) -> tuple[int, list[str]]:
    """Return how many values are drawn, and the marks that lie elsewhere."""
    checked, wrong = 0, []
    for svg in root.all("svg", "panel"):
        scales = [Scale(*map(float, svg.attrs[f"data-{name}"].split())) for name in "xy"]
        for node in svg.walk():
            pairs = list(drawn(node, report, *scales))
            checked += len(pairs)
            wrong += [
                f"{svg.attrs['aria-label']}: {node.attrs} {scale.back(pixel)} is not {value}"
                for scale, pixel, value, tolerance in pairs
                if not scale.close(pixel, value, pixels=tolerance)
            ]
    return checked, wrong


Drawn = tuple[Scale, float, float, float]


def drawn(node: Node, report: Any, x: Scale, y: Scale) -> Iterator[Drawn]:
    """Yield (scale, pixel, value, tolerance in pixels) of what an element draws."""
    if "point" in node.classes:
        yield from drawn_point(node, report, x, y)
    elif node.tag == "polyline":
        xs = values_of(node, "data-xs", report)
        ys = expand(report, node.attrs["data-ys"])
        xs = xs if xs is not None else [i + 1.0 for i in range(len(ys))]
        known = [(a, b) for a, b in zip(xs, ys, strict=True) if a is not None and b is not None]
        points = pairs_of(node.attrs["points"])
        assert len(points) == len(known)
        for (px, py), (a, b) in zip(points, known, strict=True):
            yield x, px, a, 0.011
            yield y, py, b, 0.011
    elif node.tag == "polygon":
        xs, lows, highs = (
            expand(report, node.attrs[f"data-{name}"]) for name in ("xs", "lows", "highs")
        )
        expected = [*zip(xs, highs, strict=True), *reversed(list(zip(xs, lows, strict=True)))]
        for (px, py), (a, b) in zip(pairs_of(node.attrs["points"]), expected, strict=True):
            yield x, px, a, 0.011
            yield y, py, b, 0.011
    elif "steps" in node.classes and "data-counts" in node.attrs:
        edges, counts = (expand(report, node.attrs[f"data-{name}"]) for name in ("edges", "counts"))
        total = follow(report, node.attrs["data-total"])
        steps = re.findall(r"V([-\d.]+)H([-\d.]+)", node.attrs["d"])
        for count, edge, (height, right) in zip(counts, edges[1:], steps, strict=True):
            yield x, float(right), edge, 0.011
            yield y, float(height), count / total, 0.011
    elif "dots" in node.classes:
        xs, ys = (expand(report, node.attrs[f"data-{name}"]) for name in ("xs", "ys"))
        points = pairs_of(node.attrs["d"].replace("M", " ").replace("h0", ""))
        for (px, py), a, b in zip(points, xs, ys, strict=True):
            yield x, px, a, 0.051
            yield y, py, b, 0.051
    elif "rule" in node.classes:
        (ax, ay), _ = pairs_of(node.attrs["d"].replace("M", "").replace("L", " "))
        for name, scale, pixel in (("x", x, ax), ("y", y, ay)):
            if f"data-{name}" in node.attrs:
                yield scale, pixel, follow(report, node.attrs[f"data-{name}"]), 0.011


def drawn_point(node: Node, report: Any, x: Scale, y: Scale) -> Iterator[Drawn]:
    symbols = node.all(cls="symbol")
    if not any(name.startswith("data-") for name in node.attrs):
        return
    [symbol] = symbols
    shift = float(node.attrs.get("data-shift", 0))
    place = [symbol.attrs.get(f"data-{n}", symbol.attrs.get(n)) for n in ("cx", "cy")]
    for name, scale, pixel, moved in (("x", x, place[0], shift), ("y", y, place[1], 0.0)):
        if f"data-{name}" in node.attrs:
            assert pixel is not None
            value = follow(report, node.attrs[f"data-{name}"])
            yield scale, float(pixel) - moved, value, 0.011
    for bar in node.all(cls="bar"):
        ends = pairs_of(bar.attrs["d"].replace("M", "").replace("L", " "))
        across = ends[0][1] == ends[1][1]
        for name, (px, py) in zip(("low", "high"), ends, strict=True):
            value = follow(report, node.attrs[f"data-{name}"])
            yield (x, px, value, 0.011) if across else (y, py, value, 0.011)


def values_of(node: Node, name: str, report: Any) -> list[Any] | None:
    return expand(report, node.attrs[name]) if node.attrs.get(name) else None


def pairs_of(text: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in text.split()]  # type: ignore[misc]


def wrong_titles(root: Node, report: Any) -> list[str]:
    """Return what hovering shows and the report does not say."""
    wrong = []
    forms = ("d", "g", "p0", "p1", "s", *(f"f{i}" for i in range(5)))
    for title in root.all("title"):
        point = title.parent
        if point is None or "point" not in point.classes:
            continue
        places = [
            value
            for name, value in point.attrs.items()
            if name in ("data-x", "data-y", "data-low", "data-high")
        ]
        allowed = {written(follow(report, place), form) for place in places for form in forms}
        _, _, shown = title.text.partition(";")
        numbers = re.findall(rf"[{MINUS}+]?\d[\d.{THIN}]*", shown)
        wrong += [f"{title.text}: {n}" for n in numbers if n.rstrip(THIN) not in allowed]
    return wrong


def wrong_ticks(root: Node) -> list[str]:
    """Return ticks whose text is a number other than the one at their place."""
    wrong = []
    for svg in root.all("svg", "panel"):
        x, y = (Scale(*map(float, svg.attrs[f"data-{name}"].split())) for name in "xy")
        for node in svg.all("text", "tick"):
            text = node.text.replace(THIN, "").replace(MINUS, "-")
            if not re.fullmatch(r"-?[\d.]+%?", text):
                continue
            value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
            is_x = node.attrs["text-anchor"] == "middle"
            scale, pixel = (x, node.attrs["x"]) if is_x else (y, node.attrs["y"])
            if not math.isclose(scale.back(float(pixel)), value, rel_tol=1e-3, abs_tol=1e-3):
                wrong.append(f"{svg.attrs['aria-label']}: {text} at {scale.back(float(pixel))}")
    return wrong
