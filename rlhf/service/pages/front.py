"""The front page of a run: how often its reward models agree with people, by strength and time.

A pure function of the run's report; figures are the report's own, of the newest round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf.data.records import AXES, STRENGTHS
from rlhf.report.gather.reward import strength_order
from rlhf.report.view.blocks import Block, Cell, Column, Figure, Note, Table, cell
from rlhf.report.view.charts import Panel
from rlhf.report.view.common import AXIS_COLOURS, strength_name
from rlhf.report.view.marks import Mark, Point, Rule, Thread
from rlhf.report.view.refs import Ref, interval, number
from rlhf.report.view.reward import FEW, dot_panel, greyed, on_arrival
from rlhf.report.view.scales import Axis, axis, batches_axis, whole

STYLES: dict[str | None, tuple[str, str]] = {
    **dict(
        zip(
            STRENGTHS,
            (("r5", "dot"), ("r4", "square"), ("r2", "up"), ("r0", "down")),
            strict=True,
        )
    ),
    None: ("c0", "diamond"),
}
"""Colour and shape of a strength's series, the same in every panel: the strongest is darkest."""
OTHER = ("c5", "cross")
"""Of comparisons without a strength."""
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
    return [
        _by_strength(rows),
        _table(rows),
        _trend(rows),
        _trend_table(rows),
        on_arrival(report),
        *_arrival(report["reward_accuracy_before"]),
        *_by_batch(report),
    ]


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
            made.append(
                [
                    cell(name),
                    cell(strength_name(strength)),
                    Cell(greyed(row, interval(row, middle="accuracy")), row.value["accuracy"]),
                    cell(row["n"], "d"),
                    cell(row["prompts"], "d"),
                    cell(row["control_longer"], "f3"),
                    cell(row["control_swapped"], "f3"),
                    _compared(row, before),
                ]
            )
    title = "The same as numbers, with the controls"
    note = "n leaves ties out. What rests on few prompts is grey and compared with nothing."
    return Table("front-table", title, columns, made, note, open=False)


def _compared(row: Ref, before: Sequence[Ref]) -> Cell:
    """Return the accuracy of the round before, where both rest on enough prompts."""
    if not before:
        return cell(Ref(None), "f3")
    if row.value["few"] or before[0].value["few"]:
        return Cell(FEW)
    return cell(before[0]["accuracy"], "f3")


def _trend(rows: Ref) -> Figure:
    note = (
        "Every round's newest models on all held-out comparisons so far. A strength whose accuracy "
        "falls while the others rise is a sign of annotators who judge differently, or of a new "
        "kind of prompt. Hollow marks rest on few prompts."
    )
    title = "Accuracy by strength, round after round"
    return Figure("front-trend", title, _panels(rows), note)


def _trend_table(rows: Ref) -> Table:
    """Return the trend as numbers: a row per strength, a column per round."""
    rounds = sorted({row.value["round"] for row in rows})
    columns = [Column("axis", numeric=False), Column("strength", numeric=False)]
    columns += [Column(f"round {round_}") for round_ in rounds]
    made: list[list[Cell]] = []
    for name in AXES:
        for strength in _strengths(rows.where(axis=name)):
            cells = [cell(name), cell(strength_name(strength))]
            for round_ in rounds:
                found = rows.where(axis=name, strength=strength, round=round_)
                cells.append(
                    Cell(greyed(found[0], number(found[0]["accuracy"])), found[0].value["accuracy"])
                    if found
                    else cell(Ref(None), "f3")
                )
            made.append(cells)
    note = "What rests on few prompts is grey."
    return Table("front-trend-table", "The trend as numbers", columns, made, note, open=False)


def _arrival(rows: Ref) -> Iterator[Figure]:
    """Yield the accuracy of every strength on each round's new batches alone."""
    if rows:
        yield Figure(
            "front-arrival",
            "Accuracy on arrival by strength",
            _panels(rows),
            "Each round's new batches alone, judged by the model of the round before: every point "
            "is of other comparisons. A strength that falls here is where the new batch differs, "
            "in its annotators or its prompts. Hollow marks rest on few prompts.",
        )


def _panels(rows: Ref) -> list[Panel]:
    """Return a panel per axis, in it a series per strength over the rounds."""
    rounds = sorted({row.value["round"] for row in rows})
    strengths = _strengths(list(rows))
    panels = []
    for name in AXES:
        marks: list[Mark] = []
        for i, strength in enumerate(strengths):
            found = rows.where(axis=name, strength=strength)
            shift = (i - (len(strengths) - 1) / 2) * SHIFT
            marks += _series(found, strength, shift if len(rounds) <= MOST_BARS else None)
        if marks:
            panels.append(Panel(name, whole("round", rounds), _accuracy(marks), [HALF, *marks]))
    return panels


def _strengths(rows: Sequence[Ref]) -> list[str | None]:
    """Return the strengths of rows: strongest first, at the end all together."""
    return sorted({row.value["strength"] for row in rows}, key=strength_order)


def _series(rows: Sequence[Ref], strength: str | None, shift: float | None) -> Iterator[Mark]:
    """Yield a strength's points and the line through them; without `shift` they have no bars."""
    colour, shape = STYLES.get(strength, OTHER)
    points = [
        Point(
            name=strength_name(strength),
            colour=colour,
            shape=shape,
            x=row["round"],
            y=row["accuracy"],
            low=row["low"] if shift is not None else None,
            high=row["high"] if shift is not None else None,
            shift=shift or 0.0,
            hollow=row.value["few"],
        )
        for row in rows
        if row.value["accuracy"] is not None
    ]
    if len(points) > 1:
        yield Thread(points=points, colour=colour)
    yield from points


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
                hollow=row.value["few"],
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
            "neighbours deserves a look at its drift verdict and its annotators. Hollow dots rest "
            "on few prompts.",
        )
