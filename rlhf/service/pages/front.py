"""The front page of a run: how often its reward models agree with people, by strength and time.

A pure function of the run's report; figures are the report's own, of the newest round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf.data.records import AXES
from rlhf.report.view.blocks import Block, Cell, Column, Figure, Note, Table, cell
from rlhf.report.view.charts import Panel
from rlhf.report.view.common import AXIS_COLOURS, strength_name
from rlhf.report.view.marks import Mark, Point, Rule
from rlhf.report.view.refs import Ref, interval
from rlhf.report.view.reward import dot_panel, on_arrival
from rlhf.report.view.scales import Axis, axis, batches_axis, whole

COLOURS = {None: "c0", "ungraded": "c5"}
"""Colours of what is no strength; strengths run from dark, the strongest, to light."""
RAMP = ("r5", "r4", "r2", "r0")
MOST_BARS = 8
"""Rounds up to which the intervals of several series can be told apart."""
SHIFT = 7.0
"""Pixels between the series of one round."""

NONE_YET = (
    "No reward model is finished yet. As soon as one is, this page shows how often it prefers the "
    "response that annotators chose, for every strength of preference."
)


def front(report: Ref) -> list[Block]:
    """Return what a run's front page shows first."""
    rows = report["reward_accuracy"]
    if not rows:
        return [Note(NONE_YET, "empty big")]
    return [_by_strength(rows), _table(rows), _trend(rows), on_arrival(report), *_by_batch(report)]


def newest(rows: Ref, axis_: str) -> list[Ref]:
    """Return the rows of an axis's newest round."""
    own = rows.where(axis=axis_)
    last = max((row.value["round"] for row in own), default=0)
    return [row for row in own if row.value["round"] == last]


def _by_strength(rows: Ref) -> Figure:
    panels = []
    for name in AXES:
        own = newest(rows, name)
        if own:
            panels.append(dot_panel(f"{name}, round {own[0].value['round']}", own))
    note = (
        "How often the newest reward model prefers the response that annotators chose, on held-out "
        "comparisons. Bars are intervals clustered by prompt. It should rise with strength and lie "
        "clear of the upright stroke (\u201cthe longer response wins\u201d); the cross, with both "
        "responses exchanged, should mirror it."
    )
    return Figure("accuracy-by-strength", "Reward accuracy by preference strength", panels, note)


def _table(rows: Ref) -> Table:
    columns = [
        Column("axis", numeric=False),
        Column("strength", numeric=False),
        Column("accuracy"),
        Column("n"),
        Column("prompts"),
        Column("longer wins"),
        Column("swapped"),
        Column("round before"),
    ]
    made: list[list[Cell]] = []
    for name in AXES:
        for row in newest(rows, name):
            strength, round_ = row.value["strength"], row.value["round"]
            before = rows.where(axis=name, strength=strength, round=round_ - 1)
            old = before[0] if before else Ref(None)
            made.append(
                [
                    cell(name),
                    cell(strength_name(strength)),
                    Cell(interval(row, middle="accuracy"), row.value["accuracy"]),
                    cell(row["n"], "d"),
                    cell(row["prompts"], "d"),
                    cell(row["control_longer"], "f3"),
                    cell(row["control_swapped"], "f3"),
                    cell(old["accuracy"], "f3"),
                ]
            )
    title = "The same as numbers, with the controls"
    return Table("front-table", title, columns, made, "n leaves ties out.", open=False)


def _trend(rows: Ref) -> Figure:
    rounds = sorted({row.value["round"] for row in rows})
    panels = []
    for name in AXES:
        own = rows.where(axis=name)
        strengths = list(dict.fromkeys(row.value["strength"] for row in own))
        marks: list[Mark] = []
        graded = [strength for strength in strengths if strength not in COLOURS]
        for i, strength in enumerate(strengths):
            colour = COLOURS.get(strength) or RAMP[min(graded.index(strength), len(RAMP) - 1)]
            shift = (i - (len(strengths) - 1) / 2) * SHIFT
            found = [row for row in own if row.value["strength"] == strength]
            marks += _series(found, strength_name(strength), colour, shift, len(rounds))
        panels.append(Panel(name, whole("round", rounds), _accuracy(marks), [HALF, *marks]))
    note = (
        "Every round's newest models on all held-out comparisons so far. A strength whose accuracy "
        "falls while the others rise is a sign of annotators who judge differently, or of a new "
        "kind of prompt."
    )
    return Figure("front-trend", "Accuracy by strength, round after round", panels, note)


def _series(
    rows: Sequence[Ref], name: str, colour: str, shift: float, rounds: int
) -> Iterator[Mark]:
    for row in rows:
        if row.value["accuracy"] is not None:
            has_bar = rounds <= MOST_BARS
            yield Point(
                name=name,
                colour=colour,
                shape="diamond" if colour == COLOURS[None] else "dot",
                x=row["round"],
                y=row["accuracy"],
                low=row["low"] if has_bar else None,
                high=row["high"] if has_bar else None,
                shift=shift if has_bar else 0.0,
            )


HALF = Rule(at=0.5, along="y")


def _accuracy(marks: Sequence[Mark]) -> Axis:
    """Return an axis of accuracies that holds the marks and one half."""
    points = [mark for mark in marks if isinstance(mark, Point)]
    places = [place for mark in points for place in (mark.y, mark.low, mark.high)]
    values = [place.value for place in places if isinstance(place, Ref)]
    return axis("accuracy", values, include=(0.5,), most=1.0)


def _by_batch(report: Ref) -> Iterator[Block]:
    """Yield the newest models' accuracy on every batch's held-out comparisons."""
    rows = report["reward_by_batch"]
    ids = [batch.value["id"] for batch in report["batches"]]
    panels = []
    for name in AXES:
        own = [row for row in newest(rows, name) if row.value["batch"] in ids]
        marks: list[Mark] = [
            Point(
                name=f"newest model, {name}",
                label=row.value["batch"],
                colour=AXIS_COLOURS[name],
                x=float(ids.index(row.value["batch"])),
                y=row["accuracy"],
                low=row["low"],
                high=row["high"],
            )
            for row in own
            if row.value["accuracy"] is not None
        ]
        if marks:
            panels.append(Panel(name, batches_axis(ids), _accuracy(marks), [HALF, *marks]))
    if panels:
        yield Figure(
            "front-batches",
            "Accuracy batch by batch",
            panels,
            "The newest models on the held-out comparisons of every batch. A batch far below its "
            "neighbours deserves a look at its drift verdict and its annotators.",
        )
