"""What a section of the page is made of: figures, tables, and notes about what is not there."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

from rlhf.report.view.charts import Panel
from rlhf.report.view.refs import Ref, number, text


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table: what is shown, and what it is sorted and filtered by."""

    shown: Markup
    key: float | str | None = None


def cell(ref: Ref | str, form: str = "") -> Cell:
    """Return a cell: a number with `form`, else text."""
    if isinstance(ref, str):
        return Cell(escape(ref), ref)
    if not form:
        return Cell(text(ref), str(ref.value))
    return Cell(number(ref, form), ref.value)


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title; numbers are ranged right, and a column may have a filter."""

    title: str
    numeric: bool = True
    filter: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table; `rows` hold as many cells as there are columns."""

    id: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str | Markup = ""
    open: bool = True
    """Whether it is shown at once; else behind its title."""

    kind: str = field(default="table", init=False)

    def options(self, position: int) -> list[str]:
        """Return the distinct values of a column with a filter, in order of appearance."""
        return list(dict.fromkeys(str(row[position].key) for row in self.rows))


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of one or more panels, its legend, and its data as a CSV link."""

    id: str
    title: str
    panels: Sequence[Panel]
    note: str | Markup = ""

    kind: str = field(default="figure", init=False)

    def legend(self) -> list[tuple[str, str, str]]:
        """Return (name, colour class, shape) of the series, each name once, in order."""
        found: dict[str, tuple[str, str, str]] = {}
        for panel in self.panels:
            for mark in panel.marks:
                if mark.name:
                    found.setdefault(mark.name, (mark.name, mark.colour, mark.shape))
        return list(found.values())

    def csv(self) -> str:
        """Return the figure's data: one row per mark, with the pointer it is read from."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["panel", "series", "x", "y", "low", "high", "report_json"])
        for panel in self.panels:
            for mark in panel.marks:
                for row in mark.rows():
                    names = map(no_formula, (panel.title, mark.name or mark.label))
                    writer.writerow([*names, *row])
        return out.getvalue()

    def link(self) -> str:
        """Return the CSV as a data link, which needs no network and no script."""
        return "data:text/csv;charset=utf-8," + quote(self.csv())


@dataclass(frozen=True, slots=True)
class Note:
    """Something said in words: why a section is empty, a verdict, a definition."""

    body: str | Markup
    level: str = "empty"

    kind: str = field(default="note", init=False)


@dataclass(frozen=True, slots=True)
class Examples:
    """Answers of two versions side by side, of one round."""

    id: str
    title: str
    names: tuple[str, str]
    """The old and the new version."""
    items: Sequence[dict[str, Any]]
    note: str | Markup = ""
    open: bool = True

    kind: str = field(default="examples", init=False)


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks behind a title: earlier rounds, further findings."""

    id: str
    title: str
    blocks: Sequence[Figure | Table | Note]

    kind: str = field(default="folded", init=False)


Block = Figure | Table | Note | Examples | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A section: what a reader learns, what is healthy, and the blocks."""

    id: str
    title: str
    lead: str
    blocks: Sequence[Block]


def no_formula(text: str) -> str:
    """Return a text that no spreadsheet carries out: one that begins like a formula is quoted."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def slug(*parts: object) -> str:
    """Return an element id made of words."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")
