"""Section: what PPO did, and whether it over-optimised its reward models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from rlhf import metrics
from rlhf.data.records import AXES
from rlhf.report.view.blocks import Block, Cell, Column, Figure, Folded, Note, Section, Table, cell
from rlhf.report.view.charts import Panel
from rlhf.report.view.common import AXIS_COLOURS, badge
from rlhf.report.view.marks import Line, Mark, Point, Rule
from rlhf.report.view.refs import Ref, interval, number, text
from rlhf.report.view.scales import Axis, Values, axis

LEAD = (
    "How PPO moved the policy, iteration by iteration. Healthy: score and held-out score rise "
    "together, KL grows slowly, clipfrac stays small, explained variance climbs, responses keep "
    "their length and end with EOS; and the canary, which PPO never sees, rises with the models "
    "that it does see."
)

CURVES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "score",
        (
            metrics.ROLLOUT_SCORE,
            metrics.ROLLOUT_SCORE_HELPFULNESS,
            metrics.ROLLOUT_SCORE_SAFETY,
        ),
        "f2",
    ),
    ("reward after KL", (metrics.ROLLOUT_REWARD,), "f2"),
    ("KL to the start, nats", (metrics.ROLLOUT_KL_TO_START,), "f2"),
    ("entropy, nats per token", (metrics.PPO_ENTROPY,), "f3"),
    ("clipfrac", (metrics.PPO_CLIPFRAC,), "f3"),
    ("explained variance", (metrics.PPO_EXPLAINED_VARIANCE,), "f2"),
    ("finished with EOS", (metrics.ROLLOUT_FINISHED_FRACTION,), "f3"),
    ("tokens per response", (metrics.ROLLOUT_RESPONSE_LENGTH,), "f1"),
)

FROM_ZERO = frozenset({"ppo/clipfrac", "rollout/kl_to_start", "ppo/entropy"})


def section(report: Ref) -> Section:
    """Return the section."""
    if not report["ppo"]:
        empty = Note("No PPO yet. Rounds run it where `rounds.schedule` says ppo.")
        blocks: list[Block] = [empty]
    else:
        blocks = [
            *_verdicts(report["over_optimisation"]),
            *_newest_first("ppo", _all_curves(report["ppo"])),
            *_against_kl(report["over_optimisation"]),
            *_changes(report["over_optimisation"]),
            _table(report["ppo"]),
        ]
    return Section("ppo", "PPO and over-optimisation", LEAD, [*blocks, *_length(report)])


def _newest_first(name: str, figures: Sequence[Figure]) -> Iterator[Block]:
    """Yield the newest round's figure, and those of earlier rounds folded."""
    yield from figures[-1:]
    if len(figures) > 1:
        yield Folded(f"earlier-{name}", "Earlier rounds", figures[-2::-1])


def _verdicts(rows: Ref) -> Iterator[Block]:
    for row in rows:
        verdict = row["verdict"]
        body = Markup("{} Round {}: {}.").format(
            badge(verdict.value["verdict"]), number(row["round"], "d"), text(verdict["text"])
        )
        yield Note(body, level="verdict")


def _all_curves(rows: Ref) -> list[Figure]:
    return [_curves(row) for row in rows if row["curves"]["step"]]


def _curves(row: Ref) -> Figure:
    curves = row["curves"]
    steps = curves["step"]
    iterations = axis("iteration", [], limits=(0.0, float(max(steps.value))), form="d")
    panels: list[Panel] = []
    for title, names, form in CURVES:
        marks: list[Mark] = []
        values: list[float] = []
        for name in names:
            if not curves[name]:
                continue
            colour, series = "c1", ""
            if len(names) > 1:
                axis_of = name.rpartition("_")[2]
                colour = AXIS_COLOURS.get(axis_of, "c0")
                series = (
                    f"score: {axis_of}"
                    if axis_of in AXIS_COLOURS
                    else "score that the gate selects"
                )
            ys = Values.of(curves[name])
            marks.append(Line(name=series, colour=colour, xs=Values.of(steps), ys=ys))
            values += [value for value in ys.values if value is not None]
        if not marks:
            continue
        zero = (0.0,) if names[0] in FROM_ZERO else ()
        least = 0.0 if zero else None
        most = 1.0 if names[0] == metrics.ROLLOUT_FINISHED_FRACTION else None
        y = axis("", values, include=zero, least=least, most=most, form=form)
        panels.append(Panel(title, iterations, y, marks))
    panels[1:1] = _heldout(row, iterations)
    number_ = row.value["round"]
    return Figure(f"ppo-{number_}", f"PPO of round {number_}, by iteration", panels)


def _heldout(row: Ref, iterations: Axis) -> Iterator[Panel]:
    """Yield the held-out score that decides which policy is kept, if there is any."""
    points = row["heldout"]
    if not points:
        return
    ys = Values.of(points, "score")
    marks: list[Mark] = [Line(xs=Values.of(points, "iteration"), ys=ys)]
    marks += [Point(x=point["iteration"], y=point["score"]) for point in points]
    if row["best_iteration"].value is not None:
        marks.append(Rule(at=row["best_iteration"], along="x", label="kept"))
    yield Panel("held-out score, sd above the start", iterations, axis("", ys.values), marks)


def _against_kl(checks: Ref) -> Iterator[Block]:
    """Score against sqrt(KL): used, canary and gold, each as gain over the start."""
    if not checks:
        yield Note(
            "Score against the root of KL with the canary: nothing yet. The evaluation of a round "
            "with PPO writes over_optimisation.json; an older release did not."
        )
    figures = [figure for check in checks for figure in _against_kl_of(check)]
    yield from _newest_first("kl", figures)


def _against_kl_of(check: Ref) -> Iterator[Figure]:
    """Yield one round's figure, if anything was scored."""
    points = check["points"]
    panels = [
        _kl_panel(points, name)
        for name in AXES
        if any(point["used"][name].value is not None for point in points)
    ]
    if points and points[0]["gold"]:
        panels.append(_gold_panel(points))
    if not panels:
        return
    k = check.value["round"]
    yield Figure(
        f"over-optimisation-{k}",
        f"Score against the root of KL, round {k}",
        panels,
        Markup(
            "Raw scores, each on its own model's scale: read the direction, not the height. "
            "{} Where used scores rise and the canary or gold falls, PPO is exploiting its "
            "reward models."
        ).format(text(check["canary"]["text"])),
    )


def _kl_panel(points: Ref, name: str) -> Panel:
    marks: list[Mark] = []
    values: list[float | None] = []
    series = (("used", "used by PPO", "c1"), ("canary", "canary", "c4"))
    for field, title, colour in series:
        found = Values.of(points, field, name)
        values += found.values
        xs = Values.of(points, "sqrt_kl")
        marks.append(Line(name=title, colour=colour, xs=xs, ys=found, dashed=field == "canary"))
        for point in points:
            limits = point["intervals"][field][name]
            values += [limits["low"].value, limits["high"].value]
            marks.append(
                Point(
                    label=title,
                    colour=colour,
                    shape="diamond" if field == "canary" else "dot",
                    x=point["sqrt_kl"],
                    y=point[field][name],
                    low=limits["low"],
                    high=limits["high"],
                )
            )
    xs_ = [point["sqrt_kl"].value for point in points]
    return Panel(name, axis("root of KL", xs_, form="f2"), axis("score", values, form="f2"), marks)


def _gold_panel(points: Ref) -> Panel:
    marks: list[Mark] = []
    values: list[float | None] = []
    series = (
        ("helpfulness", "gold helpfulness", "c3"),
        ("violation_rate", "gold violations", "c2"),
    )
    for field, title, colour in series:
        found = Values.of(points, "gold", field)
        values += found.values
        marks.append(Line(name=title, colour=colour, xs=Values.of(points, "sqrt_kl"), ys=found))
        marks += [
            Point(label=title, colour=colour, x=point["sqrt_kl"], y=point["gold"][field])
            for point in points
        ]
    xs = [point["sqrt_kl"].value for point in points]
    y = axis("gold", values, include=(0.0,), least=0.0, most=1.0, form="f3")
    return Panel("gold, toy world only", axis("root of KL", xs, form="f2"), y, marks)


def _changes(checks: Ref) -> Iterator[Table]:
    """Yield what the verdicts rest on: both scores since the canary's best scoring."""
    rows = []
    for check in checks:
        axes = check["verdict"]["axes"]
        for name in axes.fields():
            part = axes[name]
            rows.append(
                [
                    cell(check["round"], "d"),
                    cell(name),
                    cell(part["verdict"]),
                    cell(part["since"], "d"),
                    cell(part["best_iteration"], "d"),
                    cell(part["last_iteration"], "d"),
                    Cell(interval(part["used_change"], "s"), part["used_change"]["mean"].value),
                    Cell(interval(part["canary_change"], "s"), part["canary_change"]["mean"].value),
                    cell(part["n"], "d"),
                ]
            )
    columns = [
        Column("round"),
        Column("axis", numeric=False),
        Column("verdict", numeric=False),
        Column("since"),
        Column("canary best at"),
        Column("last"),
        Column("used, change"),
        Column("canary, change"),
        Column("prompts"),
    ]
    if rows:
        note = (
            "Changes run from the iteration where the canary scores best to the last one. The used "
            "score up and the canary surely down is over-optimisation."
        )
        yield Table("over-optimisation", "What the verdict rests on", columns, rows, note)


def _table(rows: Ref) -> Table:
    columns = [
        Column("round"),
        Column("stopped by", numeric=False),
        Column("iterations"),
        Column("kept"),
        Column("held-out gain, sd"),
        Column("KL to start"),
        Column("alarms", numeric=False),
    ]
    found = []
    for row in rows:
        best = next(
            (
                part
                for part in row["heldout"]
                if part.value["iteration"] == row.value["best_iteration"]
            ),
            Ref(None),
        )
        alarms = ", ".join(alarm["kind"] for alarm in row.value["alarms"]) or "none"
        found.append(
            [
                cell(row["round"], "d"),
                cell(row["stopped"]),
                cell(row["iterations"], "d"),
                cell(row["best_iteration"], "d"),
                cell(best["score"], "f3"),
                cell(best["kl_to_start"], "f2"),
                cell(alarms),
            ]
        )
    note = "Held-out gain is in standard deviations of the scores before the first iteration."
    return Table("ppo-table", "Outcome", columns, found, note)


def _length(report: Ref) -> Iterator[Block]:
    rows = [row for row in report["evaluations"] if row["length_controlled"]]
    if not rows:
        yield Note(
            "Length-controlled gain: nothing yet. The evaluation of a round writes it; an older "
            "release did not."
        )
        return
    columns = [
        Column("version", numeric=False),
        Column("axis", numeric=False),
        Column("gain"),
        Column("inside length buckets"),
        Column("share left"),
        Column("prompts"),
    ]
    table: list[list[Cell]] = []
    for row in rows:
        for name in AXES:
            part = row["length_controlled"][name]
            if part:
                table.append(
                    [
                        cell(row["candidate"]),
                        cell(name),
                        Cell(interval(part["gain"], "s"), part["gain"]["mean"].value),
                        Cell(
                            interval(part["within_buckets"], "s"),
                            part["within_buckets"]["mean"].value,
                        ),
                        cell(part["share"], "p0"),
                        cell(part["gain"]["n"], "d"),
                    ]
                )
    note = (
        "Gain in the judge's score over the promoted version, and the gain left when only "
        "responses of similar length are compared. A small share left means that length was bought."
    )
    yield Table("length-controlled", "Length-controlled gain", columns, table, note)
    newest = rows[-1]
    panels = [
        _buckets(newest, name) for name in AXES if newest["length_controlled"][name]["buckets"]
    ]
    if panels:
        note = "A gain that grows with the number of tokens is a gain in length."
        yield Figure("length-buckets", "Gain by length, newest version", panels, note)


def _buckets(row: Ref, name: str) -> Panel:
    buckets = row["length_controlled"][name]["buckets"]
    marks: list[Mark] = [Rule(at=0.0)]
    marks.append(
        Line(
            colour=AXIS_COLOURS[name],
            xs=Values.of(buckets, "low_tokens"),
            ys=Values.of(buckets, "gain"),
        )
    )
    marks += [
        Point(colour=AXIS_COLOURS[name], x=part["low_tokens"], y=part["gain"]) for part in buckets
    ]
    xs = [part["low_tokens"].value for part in buckets]
    y = axis("gain", [part["gain"].value for part in buckets], include=(0.0,))
    title = f"{row.value['candidate']}: {name}"
    return Panel(title, axis("tokens from", xs, form="d"), y, marks)
