"""Values of the report that know their place in it, and the one way in which numbers are written.

Every number of the page is an element that carries `data-path`, a JSON pointer into report.json,
and `data-format`, so that a reader or a test can hold it against the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlhf.report.gather.sources import pointer

NOTHING = "\u2013"
"""What stands for a value that is not there: an en dash."""

MINUS = "\u2212"
THIN = "\u2009"
"""A thin space, between groups of three digits and before a unit."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the report and its JSON pointer; indexing goes one level down."""

    value: Any
    path: str = ""

    def __getitem__(self, key: str | int) -> Ref:
        """Return a part of the value; a missing key of an object is None."""
        if isinstance(key, str):
            inner = None if self.value is None else self.value.get(key)
        else:
            inner = self.value[key]
        return Ref(inner, self.path + pointer(key))

    def __iter__(self) -> Iterator[Ref]:
        """Return the parts of an array, none for None."""
        for position in range(len(self.value or ())):
            yield self[position]

    def __len__(self) -> int:
        """Return the length of an array or object; 0 for None."""
        return len(self.value or ())

    def __bool__(self) -> bool:
        """Tell whether there is a value: neither None nor empty."""
        return self.value is not None and self.value not in ([], {}, "")

    def fields(self) -> list[str]:
        """Return the keys of an object that are not about where it comes from."""
        return [key for key in (self.value or {}) if key not in ("from", "how")]

    def where(self, **wanted: Any) -> list[Ref]:
        """Return the parts of an array whose fields have these values."""
        return [
            part
            for part in self
            if all(part.value.get(name) == value for name, value in wanted.items())
        ]


def written(value: float | None, form: str) -> str:
    """Return a number as the page writes it.

    Forms: `d` whole; `i` whole without groups, for seeds; `f0` to `f4` digits after the point; `p0`
    to `p2` per cent; `g` four significant digits; `s` signed with three digits.
    """
    if value is None:
        return NOTHING
    if form == "d":
        text = f"{round(value):,}"
    elif form == "i":
        text = f"{value:d}"
    elif form[0] == "f":
        text = f"{value:,.{form[1]}f}"
    elif form[0] == "p":
        text = f"{100 * value:.{form[1]}f}{THIN}%"
    elif form == "s":
        text = f"{value:+.3f}"
    else:
        text = f"{value:,.4g}"
    if text.lstrip("-").strip("0.,%" + THIN) == "":
        text = text.lstrip("-+") if form != "s" else text.lstrip("-")
    return text.replace(",", THIN).replace("-", MINUS)


def number(ref: Ref, form: str = "f3") -> Markup:
    """Return a number as an element that names its place; a dash where there is none."""
    if ref.value is None:
        return Markup('<span class="none">{}</span>').format(NOTHING)
    return Markup('<span data-path="{}" data-format="{}">{}</span>').format(
        ref.path, form, written(ref.value, form)
    )


def text(ref: Ref) -> Markup:
    """Return a string of the report as an element that names its place, escaped."""
    if ref.value is None:
        return Markup('<span class="none">{}</span>').format(NOTHING)
    return Markup('<span data-path="{}">{}</span>').format(ref.path, str(ref.value))


def interval(ref: Ref, form: str = "f3", *, middle: str = "mean") -> Markup:
    """Return `0.612 [0.571, 0.652]`, limits in grey; without limits the value alone."""
    if not ref or ref[middle].value is None:
        return Markup('<span class="none">{}</span>').format(NOTHING)
    value = number(ref[middle], form)
    if ref["low"].value is None or ref["high"].value is None:
        return value
    return Markup('{} <span class="limits">[{}, {}]</span>').format(
        value, number(ref["low"], form), number(ref["high"], form)
    )
