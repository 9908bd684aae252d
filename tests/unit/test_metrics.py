"""docs/metrics.md lists exactly the metric names there are."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf import metrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
NAME = re.compile(r"[a-z]+/[a-z_]+")


def names() -> list[str]:
    return [value for key, value in vars(metrics).items() if key.isupper()]


def test_every_name_has_one_row_and_every_row_a_name() -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    rows = [re.match(r"\| `([^`]+)` \|", line) for line in lines]
    documented = [row[1] for row in rows if row and NAME.fullmatch(row[1])]
    assert sorted(documented) == sorted(names())


def test_every_row_has_formula_range_and_meaning() -> None:
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| `[a-z]+/[a-z_]+` \|", line):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 4, line
            assert all(cells), line


def test_names_are_distinct_and_well_formed() -> None:
    assert len(set(names())) == len(names())
    assert all(NAME.fullmatch(name) for name in names())
