"""Section: what rejection sampling gains, at which temperature, and where winners come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from rlhf.data.records import AXES
from rlhf.report.view.blocks import Block, Cell, Column, Figure, Folded, Note, Section, Table, cell
from rlhf.report.view.charts import Panel
from rlhf.report.view.common import ramp, words
from rlhf.report.view.marks import Band, Line, Mark, Point, Rule
from rlhf.report.view.refs import Ref, interval, number
from rlhf.report.view.scales import Axis, Values, axis

LEAD = (
    "What sampling several responses per prompt and keeping the best one gains. Healthy: the best "
    "of N keeps rising while the median stays flat, the chosen temperature is inside the sweep "
    "rather than at its end, and winners are neither all long nor all alike."
)


def section(report: Ref) -> Section:
    """Return the section."""
    if not report["rejection"]:
        empty = Note(
            "No rejection sampling yet. Rounds sample where `rounds.schedule` says rejection."
        )
        return Section("sampling", "Rejection sampling", LEAD, [empty])
    selections = list(report["rejection"])
    blocks: list[Block] = [
        _against_n(selections[-1:], "best-of-n"),
        *_temperature(report["temperature"]),
        *_diversity(report["rejection"]),
        *_winners(selections[-1:], "winners"),
        _counts(report["rejection"]),
    ]
    if len(selections) > 1:
        older = [
            _against_n(selections[:-1], "earlier-best-of-n"),
            *_winners(selections[:-1], "earlier-winners"),
        ]
        blocks.append(Folded("earlier-sampling", "Earlier rounds", older))
    return Section("sampling", "Rejection sampling", LEAD, blocks)


def _against_n(selections: Sequence[Ref], id: str) -> Figure:
    panels = []
    for selection in selections:
        for name in AXES:
            curve = selection["against_n"][name]
            if curve:
                title = f"round {selection.value['round']}: {name}"
                panels.append(_curve_panel(title, curve, "c1"))
    return Figure(
        id,
        "Best and median of N samples",
        panels,
        "Expected raw score of the round's reward model. The distance between the two lines is "
        "what selection can gain.",
    )


def _curve_panel(title: str, curve: Ref, colour: str) -> Panel:
    # N is the position in the list, counted from one.
    count = len(curve["max"])
    numbers = Values("", [float(n) for n in range(1, count + 1)])
    best, median = Values.of(curve["max"]), Values.of(curve["median"])
    marks: list[Mark] = [
        Line(name="best", colour=colour, xs=numbers, ys=best),
        Line(name="median", colour="c0", dashed=True, xs=numbers, ys=median),
    ]
    if count <= 10:
        marks += [
            Point(label=f"{name} of {n}", colour=shade, x=float(n), y=curve[field][n - 1])
            for field, name, shade in (("max", "best", colour), ("median", "median", "c0"))
            for n in range(1, count + 1)
        ]
    return Panel(title, _n_axis(count), axis("score", [*best.values, *median.values]), marks)


def _n_axis(count: int) -> Axis:
    found = axis("samples N", [1.0, float(count)], limits=(1.0, float(max(count, 2))), form="d")
    ticks = [tick for tick in found.ticks if tick[0] == int(tick[0])]
    if not any(value == 1 for value, _ in ticks):
        ticks = [(1.0, "1"), *ticks]
    return Axis(found.label, found.low, found.high, ticks, "d")


def _temperature(sweeps: Ref) -> Iterator[Block]:
    if not sweeps:
        yield Note(
            "Temperature sweep: none. `rejection.temperatures=[...]` tries several in every round "
            "and picks the best."
        )
        return
    made = [list(_sweep(sweep)) for sweep in sweeps]
    yield from made[-1]
    if len(made) > 1:
        older = [block for blocks in reversed(made[:-1]) for block in blocks]
        yield Folded("earlier-sweeps", "Earlier temperature sweeps", older)


def _sweep(sweep: Ref) -> Iterator[Figure | Table]:
    """Yield the figure and the table of one sweep."""
    rows = sweep["temperatures"]
    xs = Values.of(rows, "temperature")
    title = f"round {sweep.value['round']}"
    score: list[Mark] = [
        Band(
            xs=xs,
            lows=Values.of(rows, "low"),
            highs=Values.of(rows, "high"),
            colour="c1",
        ),
        Line(name="best of K", colour="c1", xs=xs, ys=Values.of(rows, "score")),
        Rule(at=sweep["chosen"], along="x", label="chosen"),
    ]
    score += [
        Point(colour="c1", x=row["temperature"], y=row["score"], low=row["low"], high=row["high"])
        for row in rows
    ]
    panels = [Panel(f"{title}: score", _temperatures(rows), _limits("score", rows), score)]
    panels.append(_self_bleu(title, rows, sweep["chosen"]))
    panels.append(_by_n(title, rows))
    yield Figure(
        f"temperature-{sweep.value['round']}",
        f"Temperature sweep of {sweep.value['version']}",
        panels,
        Markup(
            "{} samples for each of {} prompts at every temperature. Self-BLEU compares the "
            "samples of one prompt with each other: lower is more diverse."
        ).format(number(sweep["num_samples"], "d"), number(sweep["prompts"], "d")),
    )
    yield _temperature_table(sweep)


def _temperatures(rows: Ref) -> Axis:
    return axis("temperature", [row["temperature"].value for row in rows], form="f1")


def _limits(label: str, rows: Ref | Sequence[Ref]) -> Axis:
    values = [row[name].value for row in rows for name in ("low", "high", "score")]
    return axis(label, values)


def _self_bleu(title: str, rows: Ref, chosen: Ref) -> Panel:
    bleu = [row["self_bleu"] for row in rows]
    marks: list[Mark] = [
        Line(
            name="self-BLEU",
            colour="c4",
            xs=Values.of(rows, "temperature"),
            ys=Values.of(rows, "self_bleu", "mean"),
        ),
        Rule(at=chosen, along="x", label="chosen"),
    ]
    marks += [
        Point(
            colour="c4",
            x=row["temperature"],
            y=row["self_bleu"]["mean"],
            low=row["self_bleu"]["low"],
            high=row["self_bleu"]["high"],
        )
        for row in rows
    ]
    values = [part[name].value for part in bleu for name in ("mean", "low", "high")]
    return Panel(f"{title}: self-BLEU", _temperatures(rows), axis("self-BLEU", values), marks)


def _by_n(title: str, rows: Ref) -> Panel:
    """Best of N per temperature: the paper's figure, for helpfulness where there is any."""
    name = next(axis for axis in AXES if rows[0]["axes"][axis])
    curves = [row["axes"][name]["max"] for row in rows]
    count = len(curves[0])
    numbers = Values("", [float(n) for n in range(1, count + 1)])
    marks: list[Mark] = [
        Line(
            name=f"T = {row.value['temperature']:g}",
            colour=ramp(i, len(curves)),
            xs=numbers,
            ys=Values.of(curve),
        )
        for i, (row, curve) in enumerate(zip(rows, curves, strict=True))
    ]
    values = [value for curve in curves for value in curve.value]
    return Panel(f"{title}: best of N, {name}", _n_axis(count), axis("score", values), marks)


def _temperature_table(sweep: Ref) -> Table:
    columns = [Column(name) for name in ("temperature", "score", "self-BLEU", "tokens", "finished")]
    columns.append(Column("chosen", numeric=False))
    rows = [
        [
            cell(row["temperature"], "f2"),
            Cell(interval(row, middle="score"), row.value["score"]),
            Cell(interval(row["self_bleu"], "f2"), row["self_bleu"]["mean"].value),
            cell(row["response_length"], "f1"),
            cell(row["finished_fraction"], "f3"),
            cell("chosen" if row.value["chosen"] else ""),
        ]
        for row in sweep["temperatures"]
    ]
    name = f"Temperatures of round {sweep.value['round']}"
    return Table(f"temperatures-{sweep.value['round']}", name, columns, rows, open=False)


def _diversity(selections: Ref) -> Iterator[Block]:
    rows = [row for row in selections if row["diversity"]]
    if not rows:
        yield Note(
            "Diversity and origin of winners: nothing yet; an older release wrote this round's "
            "selection.json."
        )
        return
    columns = [
        Column("sampled version", numeric=False),
        Column("round"),
        Column("temperature"),
        Column("self-BLEU"),
        Column("prompts"),
    ]
    table = [
        [
            cell(row["version"]),
            cell(row["round"], "d"),
            cell(row["temperature"], "f2"),
            Cell(interval(row["diversity"]["self_bleu"], "f2"), None),
            cell(row["diversity"]["self_bleu"]["n"], "d"),
        ]
        for row in rows
    ]
    note = "Self-BLEU among the samples of one prompt: lower is more diverse."
    yield Table("diversity", "Diversity of the sampled versions", columns, table, note)


def _winners(selections: Sequence[Ref], id: str) -> Iterator[Figure]:
    panels = []
    for selection in selections:
        winners = selection["winners_from"]
        if not winners:
            continue
        title = f"round {selection.value['round']}"
        for field, label in (
            ("length_rank", "rank by length, longest last"),
            ("sample_index", "number of the sample"),
        ):
            panels.append(_counts_panel(f"{title}: {words(field)}", label, winners[field]))
    if panels:
        yield Figure(
            id,
            "Where winners come from",
            panels,
            "Winners by the rank of their length among the samples of their prompt, and by the "
            "order in which samples were drawn. All weight at the longest is a taste for length; "
            "the second falls only where samples are equal, because the first of them wins.",
        )


def _counts_panel(title: str, label: str, counts: Ref) -> Panel:
    marks = [
        Point(label=f"{i + 1}", colour="c1", x=float(i + 1), y=counts[i])
        for i in range(len(counts))
    ]
    numbers = Values("", [float(i + 1) for i in range(len(counts))])
    line = Line(colour="c1", xs=numbers, ys=Values.of(counts))
    y = axis("winners", counts.value, include=(0.0,), form="d")
    found = _n_axis(len(counts))
    return Panel(title, Axis(label, found.low, found.high, found.ticks, "d"), y, [line, *marks])


def _counts(selections: Ref) -> Table:
    groups = {
        "prompts": ("sampled", "is_safety", "without_usable_sample"),
        "responses": ("sampled", "unfinished", "below_threshold"),
        "fine_tuning": ("winners", "pool", "demonstrations", "over_long"),
    }
    names = [(group, field) for group, fields in groups.items() for field in fields]
    columns = [
        Column("round"),
        *(Column(f"{words(group)}: {words(field)}") for group, field in names),
    ]
    rows = [
        [
            cell(selection["round"], "d"),
            *(cell(selection[group][field], "d") for group, field in names),
        ]
        for selection in selections
    ]
    return Table("rejection-counts", "Prompts, responses and what was trained on", columns, rows)
