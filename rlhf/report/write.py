"""Write the report of a run, or of two: the numbers as JSON, the page, tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rlhf.artifacts import write_json, write_text
from rlhf.report.compare import SIDES, compare
from rlhf.report.gather import Row, gather
from rlhf.report.page import comparison_page, page
from rlhf.report.tables import tables

REPORT = "report.json"
PAGE = "report.html"
MIN_WIDTH = 120
"""Columns of a report that is written to a file or a pipe, whose width rich cannot know."""


def write_report(
    run_dir: Path, console: Console | None = None, *, store: Path | None = None
) -> Row:
    """Write report.json and report.html, print tables where there is a console; return the report.

    Works on an unfinished run: what is not there yet is left out. `store` is the folder of all
    streams, by default the one that the run was started with. A console that is no terminal is
    widened to MIN_WIDTH.
    """
    report = gather(run_dir, store=store)
    write_json(run_dir / REPORT, report)
    write_text(run_dir / PAGE, page(report, data_file=REPORT))
    if console is not None:
        if not console.is_terminal:
            console.width = max(console.width, MIN_WIDTH)
        for table in tables(report):
            console.print(table, soft_wrap=False)
            console.print()
        _say(console, f"numbers: {run_dir / REPORT}")
        _say(console, f"all of this and more: {run_dir / PAGE}")
    return report


def write_comparison(folders: Sequence[Path], console: Console | None = None) -> Row:
    """Write compare-A-B.json and compare-A-B.html beside the first run's folder; return the data.

    Nothing is written into either run.
    """
    comparison = compare(folders)
    stem = "-".join(["compare", *(folder.resolve().name for folder in folders)])
    target = folders[0].resolve().parent / stem
    data = target.with_name(f"{stem}.json")
    html = target.with_name(f"{stem}.html")
    write_json(data, comparison)
    write_text(html, comparison_page(comparison, data_file=data.name))
    if console is not None:
        names = " and ".join(comparison["names"][side] for side in SIDES)
        _say(console, f"{names} compared: {html} (numbers: {data})")
    return comparison


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
