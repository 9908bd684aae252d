"""Section: do the reward models agree with the annotators, and what would the next batch add."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from rlhf.data.records import AXES
from rlhf.report.view.blocks import Block, Cell, Column, Figure, Note, Section, Table, cell
from rlhf.report.view.charts import ROW, Panel
from rlhf.report.view.common import AXIS_COLOURS, ramp, sentence, strength_name
from rlhf.report.view.marks import Band, Line, Mark, Point, Rule
from rlhf.report.view.refs import Ref, interval, number, text
from rlhf.report.view.scales import Values, axis, categories, whole

LEAD = (
    "How often each reward model prefers the response that annotators chose, on held-out "
    "comparisons. Healthy: accuracy rises with strength, its interval lies clear of "
    "\u201clonger wins\u201d, the swapped control mirrors it (the two add up to one), and accuracy "
    "on arrival is not far below accuracy after training."
)


def section(report: Ref) -> Section:
    """Return the section."""
    rows = report["reward_accuracy"]
    if not rows:
        empty = Note(
            "No reward model is finished yet. `rlhf run` trains them, one per axis and round."
        )
        return Section("reward", "Reward models", LEAD, [empty])
    blocks: list[Block] = [
        _by_strength(rows),
        *_by_source(report["reward_by_source"]),
        on_arrival(report),
        *_curves(report["reward_curves"]),
        _table(report),
    ]
    return Section("reward", "Reward models", LEAD, blocks)


def _by_strength(rows: Ref) -> Figure:
    panels = []
    for name in AXES:
        own = rows.where(axis=name)
        if own:
            panels.append(dot_panel(name, own))
    note = (
        "Bars are intervals clustered by prompt. The upright stroke is the accuracy of \u201cthe "
        "longer response wins\u201d, the cross that of the pass with both responses exchanged, "
        "both for the newest round. A hollow dot rests on few prompts."
    )
    return Figure("accuracy-by-strength", "Held-out accuracy by strength", panels, note)


def dot_panel(title: str, rows: Sequence[Ref]) -> Panel:
    """Return accuracies of one axis by strength: a row per strength, in it a dot per round."""
    names = list(dict.fromkeys(strength_name(row.value["strength"]) for row in rows))
    y = categories(names)
    places = {text: value for value, text in y.ticks}
    rounds = sorted({row.value["round"] for row in rows})
    marks: list[Mark] = []
    for row in rows:
        if row.value["accuracy"] is None:
            continue
        position = rounds.index(row.value["round"])
        # Later rounds lie below earlier ones inside a row.
        offset = ((len(rounds) - 1) / 2 - position) * 0.7 / len(rounds)
        place = places[strength_name(row.value["strength"])] + offset
        marks.append(
            Point(
                name=f"round {rounds[position]}",
                label=strength_name(row.value["strength"]),
                colour=ramp(position, len(rounds)),
                x=row["accuracy"],
                y=place,
                low=row["low"],
                high=row["high"],
                across=True,
                hollow=row.value["few"],
            )
        )
        if position == len(rounds) - 1:
            marks += _controls(row, place)
    values = [mark.x.value for mark in marks if isinstance(mark, Point) and isinstance(mark.x, Ref)]
    x = axis("accuracy", values, include=(0.4, 1.0), form="f3")
    height = max(ROW, 12 + 9 * len(rounds))
    return Panel(title, x, y, [Rule(at=0.5, along="x"), *marks], named_rows=True, row_height=height)


def _controls(row: Ref, place: float) -> Iterator[Mark]:
    shapes = {"control_longer": ("longer wins", "tick"), "control_swapped": ("swapped", "cross")}
    for field, (name, shape) in shapes.items():
        if row[field].value is not None:
            yield Point(name=name, shape=shape, colour="c0", x=row[field], y=place)


def _by_source(rows: Ref) -> Iterator[Block]:
    """One panel per axis and source of the newest round, where there are several sources."""
    newest = max((row.value["round"] for row in rows), default=0)
    panels = []
    for name in AXES:
        own = rows.where(axis=name, round=newest)
        sources = list(dict.fromkeys(row.value["source"] for row in own))
        if len(sources) < 2:
            continue
        for source in sources:
            found = [row for row in own if row.value["source"] == source]
            panels.append(dot_panel(f"{name}: {source}", found))
    if panels:
        yield Figure(
            "accuracy-by-source",
            "The newest models by source",
            panels,
            "Sources with few prompts have wide intervals: read the interval, not the dot.",
        )


def on_arrival(report: Ref) -> Block:
    """Return accuracy per round: of the new model, and of the old one on the new batch."""
    before = [row for row in report["reward_accuracy_before"] if row.value["strength"] is None]
    if not before:
        return Note(
            "On arrival: nothing yet. From the second round on, the previous round's model is "
            "scored on the new batches before it is trained on them."
        )
    panels = []
    for name in AXES:
        after = [
            row
            for row in report["reward_accuracy"].where(axis=name)
            if row.value["strength"] is None
        ]
        marks: list[Mark] = [
            *_line("after training, all batches", after, AXIS_COLOURS[name], "dot"),
            *_line(
                "on arrival, new batches",
                [row for row in before if row.value["axis"] == name],
                "c5",
                "diamond",
            ),
        ]
        values = [
            place.value
            for mark in marks
            if isinstance(mark, Point)
            for place in (mark.y, mark.low, mark.high)
            if isinstance(place, Ref)
        ]
        rounds = sorted({row.value["round"] for row in report["reward_accuracy"]})
        y = axis("accuracy", values, include=(0.5,), most=1.0)
        panels.append(Panel(name, whole("round", rounds), y, marks))
    return Figure(
        "on-arrival",
        "On arrival and after training",
        panels,
        "On arrival is the honest number: the model of the round before, on comparisons that "
        "neither it nor its policy has seen.",
    )


def _line(name: str, rows: Sequence[Ref], colour: str, shape: str) -> Iterator[Mark]:
    for row in rows:
        if row.value["accuracy"] is not None:
            yield Point(
                name=name,
                colour=colour,
                shape=shape,
                x=row["round"],
                y=row["accuracy"],
                low=row["low"],
                high=row["high"],
                shift=-4.0 if shape == "dot" else 4.0,
            )


def _curves(curves: Ref) -> Iterator[Block]:
    panels, notes = [], []
    for curve in curves:
        name = curve.value["axis"]
        forecast = curve["forecast"]
        marks: list[Mark] = []
        if forecast["curve"]:
            xs = Values.of(forecast["curve"], "n")
            limits = (Values.of(forecast["curve"], limit) for limit in ("low", "high"))
            lows, highs = limits
            marks.append(Band(xs=xs, lows=lows, highs=highs, colour=AXIS_COLOURS[name]))
            ys = Values.of(forecast["curve"], "accuracy")
            marks.append(Line(name="fitted", xs=xs, ys=ys, colour=AXIS_COLOURS[name]))
        marks += [
            Point(
                name=f"measured, {name}",
                label=f"round {point.value['round']}",
                colour=AXIS_COLOURS[name],
                x=point["trained"]["num_own"],
                y=point["accuracy"],
                low=point["low"],
                high=point["high"],
            )
            for point in curve["points"]
        ]
        if forecast["next"]:
            following = forecast["next"]
            marks.append(
                Point(
                    name="expected of the next batch",
                    shape="diamond",
                    colour="c4",
                    x=following["n"],
                    y=following["accuracy"],
                    low=following["low"],
                    high=following["high"],
                )
            )
        panels.append(_curve_panel(name, marks))
        notes.append(_verdict(name, forecast))
    if panels:
        yield Figure(
            "accuracy-curve",
            "Accuracy over comparisons, and what the next batch is worth",
            panels,
            Markup(" ").join(notes),
        )


def _curve_panel(name: str, marks: Sequence[Mark]) -> Panel:
    xs: list[float] = []
    ys: list[float] = []
    for mark in marks:
        for x, y, low, high, _ in mark.rows():
            xs.append(x)
            ys += [value for value in (y, low, high) if value not in ("", None)]
    return Panel(
        name,
        axis("own comparisons trained on", xs, form="d", ticks=4),
        axis("accuracy", ys, most=1.0),
        marks,
    )


def _verdict(name: str, forecast: Ref) -> Markup:
    following = forecast["next"]
    if not following:
        return Markup("{}: no forecast, {}.").format(name.capitalize(), text(forecast["reason"]))
    warnings = Markup("").join(
        Markup(" ({})").format(text(warning)) for warning in forecast["warnings"]
    )
    return sentence(
        "{name}: one more batch takes accuracy to an expected {value}, a gain of {gain} "
        "[{low}, {high}]{warnings}.",
        name=name.capitalize(),
        value=interval(following, middle="accuracy"),
        gain=number(following["gain"], "s"),
        low=number(following["gain_low"], "s"),
        high=number(following["gain_high"], "s"),
        warnings=warnings,
    )


COLUMNS = (
    Column("model", numeric=False, filter=True),
    Column("round", filter=True),
    Column("axis", numeric=False, filter=True),
    Column("source", numeric=False, filter=True),
    Column("strength", numeric=False, filter=True),
    Column("n"),
    Column("prompts"),
    Column("accuracy"),
    Column("longer wins"),
    Column("minus longer"),
    Column("swapped"),
    Column("gap"),
)


def _table(report: Ref) -> Table:
    rows: list[list[Cell]] = []
    kinds = {
        "reward_accuracy": "reward",
        "reward_accuracy_before": "on arrival",
        "judge_accuracy": "judge",
    }
    for field, model in kinds.items():
        rows += [_cells(row, model, source="all") for row in report[field]]
    by_source = report["reward_by_source"]
    if len({row.value["source"] for row in by_source}) > 1:
        rows += [_cells(row, "reward", source=row.value["source"]) for row in by_source]
    return Table(
        "accuracy-table",
        "All accuracies: strength, axis, source and round",
        COLUMNS,
        rows,
        Markup(
            "n leaves ties out. \u201cminus longer\u201d is accuracy minus \u201clonger "
            "wins\u201d with a paired interval; where a cell holds few prompts it is shown in grey "
            "and compared with nothing."
        ),
    )


FEW = Markup('<span class="none">few</span>')
"""What stands where a cell of few prompts would be compared."""


def greyed(row: Ref, shown: Markup) -> Markup:
    """Return what is shown of a cell, in grey where it holds few prompts."""
    return Markup('<span class="few">{}</span>').format(shown) if row.value["few"] else shown


def _cells(row: Ref, model: str, *, source: str) -> list[Cell]:
    accuracy = greyed(row, interval(row, middle="accuracy"))
    compared = FEW if row.value["few"] else interval(row["longer_difference"], "s")
    return [
        cell(model),
        cell(row["round"], "d"),
        cell(row["axis"]),
        cell(source),
        cell(strength_name(row.value["strength"])),
        cell(row["n"], "d"),
        cell(row["prompts"], "d"),
        Cell(accuracy, row.value["accuracy"]),
        cell(row["control_longer"], "f3"),
        Cell(compared, row["longer_difference"]["mean"].value),
        cell(row["control_swapped"], "f3"),
        cell(row["gap"], "f2"),
    ]
