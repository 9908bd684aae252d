"""What sections share: names as the page writes them, colours, and how a round is named."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from rlhf.data.records import STRENGTHS
from rlhf.report.view.refs import Ref, number

AXIS_COLOURS = {"helpfulness": "c1", "safety": "c2"}

STRENGTH_NAMES: dict[str | None, str] = {
    **{name: name.removesuffix("_better") for name in STRENGTHS},
    "better": "better",
    "ungraded": "ungraded",
    None: "all",
}
"""Strengths as figures and tables name them."""

SERIES = ("c1", "c2", "c3", "c4", "c5", "c6")
"""Colours of series without an order."""

VERDICT_CLASS = {
    "as expected": "ok",
    "look": "look",
    "stop": "stop",
    "no sign": "ok",
    "cannot tell": "look",
    "over-optimising": "stop",
}


def ramp(position: int, length: int) -> str:
    """Return a colour class for one of several rounds or versions: the newest is the strongest."""
    step = 2 if length <= 3 else 1
    return f"r{max(0, 5 - step * (length - 1 - position))}"


def strength_name(name: str | None) -> str:
    """Return a strength as the page names it."""
    return STRENGTH_NAMES.get(name, str(name))


def words(name: str) -> str:
    """Return a field's name as words."""
    return name.replace("_", " ")


def sentence(template: str, /, **parts: Ref | Markup | str) -> Markup:
    """Fill a sentence with numbers of the report; strings are escaped."""
    shown = {
        name: number(part, "g") if isinstance(part, Ref) else part for name, part in parts.items()
    }
    return Markup(template).format(**shown)


def prose(text: str | Markup) -> Markup:
    """Return text in which `code` between backticks is marked as such; strings are escaped."""
    pieces = escape(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if i % 2 else piece
        for i, piece in enumerate(pieces)
    )


def badge(verdict: str) -> Markup:
    """Return a verdict as a coloured word; the word alone says all that the colour does."""
    return Markup('<span class="badge {}">{}</span>').format(
        VERDICT_CLASS.get(verdict, "ok"), verdict
    )


def distinct(parts: Sequence[Ref], name: str) -> list[object]:
    """Return the distinct values of a field, in order of appearance."""
    return list(dict.fromkeys(part.value[name] for part in parts))
