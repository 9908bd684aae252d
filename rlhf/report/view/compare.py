"""The sections of a page that compares two runs: A in blue, B in orange, on the same axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from rlhf import metrics
from rlhf.data.records import AXES
from rlhf.report.view.blocks import Block, Cell, Column, Figure, Note, Section, Table, cell
from rlhf.report.view.charts import Panel
from rlhf.report.view.common import badge, strength_name, words
from rlhf.report.view.marks import Line, Mark, Point, Rule
from rlhf.report.view.refs import Ref, interval, number, text
from rlhf.report.view.scales import Values, axis, categories
from rlhf.report.view.summary import at

COLOURS = {"a": "c1", "b": "c2"}
SHAPES = {"a": "dot", "b": "diamond"}
OFFSETS = {"a": 0.14, "b": -0.14}
SIDES = tuple(COLOURS)

PPO_CURVES = (
    ("KL to the start, nats", metrics.ROLLOUT_KL_TO_START, "f2"),
    ("entropy, nats per token", metrics.PPO_ENTROPY, "f3"),
    ("clipfrac", metrics.PPO_CLIPFRAC, "f3"),
    ("explained variance", metrics.PPO_EXPLAINED_VARIANCE, "f2"),
    ("finished with EOS", metrics.ROLLOUT_FINISHED_FRACTION, "f3"),
    ("tokens per response", metrics.ROLLOUT_RESPONSE_LENGTH, "f1"),
)


class Pair:
    """Both runs' reports and how they are called."""

    def __init__(self, root: Ref) -> None:
        self.root = root
        self.reports = {side: root["reports"][side] for side in SIDES}
        self.names = {side: str(root["names"][side].value) for side in SIDES}

    def newest(self, side: str, field: str) -> Ref:
        """Return the last part of an array of a run's report; an empty value without any."""
        rows = self.reports[side][field]
        return rows[len(rows) - 1] if rows else Ref(None)

    def columns(self) -> list[Column]:
        """Return a column per run."""
        return [Column(self.names[side]) for side in SIDES]


def sections(root: Ref) -> list[Section]:
    """Return the sections of a comparison."""
    pair = Pair(root)
    return [_summary(pair), _reward(pair), _ppo(pair), _versions(pair), _cost(pair)]


def _summary(pair: Pair) -> Section:
    lead = (
        "What the two runs are, where their settings differ, and what each report finds. Scores of "
        "different runs are on different scales and are never subtracted here."
    )
    rows: list[list[Cell]] = []
    for title, made in (
        ("recipe", lambda report, side: cell(report["recipe"])),
        ("nodes done", lambda report, side: cell(report["nodes_done"], "d")),
        ("nodes planned", lambda report, side: cell(report["nodes_planned"], "d")),
        ("promoted", lambda report, side: _names(report, "promoted")),
        ("refused", lambda report, side: _names(report, "refused")),
    ):
        rows.append([cell(title), *(made(pair.reports[side], side) for side in SIDES)])
    blocks: list[Block] = [
        Table("runs", "The two runs", [Column("", numeric=False), *pair.columns()], rows)
    ]
    for side in SIDES:
        blocks += list(_findings(pair, side))
    blocks.append(_settings(pair))
    return Section("summary", "Summary", lead, blocks)


def _names(report: Ref, state: str) -> Cell:
    found = report["versions"].where(state=state)
    shown = Markup(", ").join(text(version["name"]) for version in found)
    return Cell(shown or Markup('<span class="none">none</span>'), None)


def _findings(pair: Pair, side: str) -> Iterator[Note]:
    for finding in list(pair.reports[side]["summary"]["findings"])[:3]:
        yield Note(
            Markup('{} {}: {} <span class="none">round {}</span>').format(
                badge(finding.value["level"]),
                pair.names[side],
                text(finding["text"]),
                number(at(pair.reports[side], finding["about"])["round"], "d"),
            ),
            "finding",
        )


def _settings(pair: Pair) -> Block:
    settings = pair.root["settings"]
    if not settings:
        return Note("The settings of both runs are the same, or were not kept.", "quiet")
    rows = [
        [cell(row["key"]), *(_setting(row[side]["value"]) for side in SIDES)] for row in settings
    ]
    columns = [Column("setting", numeric=False), *pair.columns()]
    return Table("settings", "Settings that differ", columns, rows)


def _setting(value: Ref) -> Cell:
    if isinstance(value.value, bool | str) or value.value is None:
        return cell(value)
    if isinstance(value.value, int | float):
        return cell(value, "g")
    return Cell(Markup(", ").join(cell(part, "g").shown for part in value), None)


def _reward(pair: Pair) -> Section:
    lead = (
        "The newest reward models of both runs. Panels show each run's own held-out comparisons; "
        "the table compares both on the comparisons that they share, pair by pair."
    )
    panels = [panel for name in AXES if (panel := _accuracy_panel(pair, name)) is not None]
    blocks: list[Block] = []
    if panels:
        blocks.append(Figure("accuracy", "Held-out accuracy by strength", panels))
    paired = pair.root["paired_accuracy"]
    rows = [
        [
            cell(row["axis"]),
            cell(row["shared"], "d"),
            *(cell(row["only"][side], "d") for side in SIDES),
            *(cell(row["accuracy"][side], "f3") for side in SIDES),
            Cell(interval(row["difference"], "s"), row["difference"]["mean"].value),
        ]
        for row in paired
        if row["shared"].value
    ]
    columns = [
        Column("axis", numeric=False),
        Column("shared"),
        *(Column(f"only {pair.names[side]}") for side in SIDES),
        *(Column(f"accuracy {pair.names[side]}") for side in SIDES),
        Column("second minus first"),
    ]
    if rows:
        note = "The difference has a paired interval, clustered by prompt."
        blocks.append(Table("paired-accuracy", "On the same comparisons", columns, rows, note))
    else:
        blocks.append(Note("The two runs' reward models share no held-out comparison."))
    return Section("reward", "Reward models", lead, blocks)


def _accuracy_panel(pair: Pair, name: str) -> Panel | None:
    found: dict[str, list[Ref]] = {}
    for side in SIDES:
        rows = pair.reports[side]["reward_accuracy"].where(axis=name)
        newest = max((row.value["round"] for row in rows), default=0)
        found[side] = [row for row in rows if row.value["round"] == newest]
    labels = list(
        dict.fromkeys(strength_name(r.value["strength"]) for rows in found.values() for r in rows)
    )
    if not labels:
        return None
    y = categories(labels)
    places = {label: value for value, label in y.ticks}
    marks: list[Mark] = [Rule(at=0.5, along="x")]
    for side, rows in found.items():
        for row in rows:
            label = strength_name(row.value["strength"])
            marks.append(
                Point(
                    name=pair.names[side],
                    label=label,
                    colour=COLOURS[side],
                    shape=SHAPES[side],
                    x=row["accuracy"],
                    y=places[label] + OFFSETS[side],
                    low=row["low"],
                    high=row["high"],
                    across=True,
                )
            )
    values = [
        row[limit].value for rows in found.values() for row in rows for limit in ("low", "high")
    ]
    return Panel(
        name, axis("accuracy", values, include=(0.5,), most=1.0), y, marks, named_rows=True
    )


def _ppo(pair: Pair) -> Section:
    lead = (
        "The newest PPO of both runs. Scores are left out: they belong to different reward models."
    )
    newest = {side: pair.newest(side, "ppo") for side in SIDES}
    if not any(newest.values()):
        return Section("ppo", "PPO", lead, [Note("Neither run has finished PPO.")])
    panels = []
    for title, metric, form in PPO_CURVES:
        marks: list[Mark] = []
        xs: list[float] = []
        ys: list[float | None] = []
        for side, row in newest.items():
            if row and row["curves"][metric]:
                steps, values = Values.of(row["curves"]["step"]), Values.of(row["curves"][metric])
                marks.append(Line(name=pair.names[side], colour=COLOURS[side], xs=steps, ys=values))
                xs += [value for value in steps.values if value is not None]
                ys += values.values
        if marks:
            x = axis("iteration", [], limits=(0.0, max(xs)), form="d")
            panels.append(Panel(title, x, axis("", ys, form=form), marks))
    blocks: list[Block] = [Figure("ppo-curves", "PPO by iteration", panels)] if panels else []
    for side in SIDES:
        check = pair.newest(side, "over_optimisation")
        if check:
            verdict = check["verdict"]
            body = Markup("{} {}: {}.").format(
                badge(verdict.value["verdict"]), pair.names[side], text(verdict["text"])
            )
            blocks.append(Note(body, "verdict"))
    return Section("ppo", "PPO", lead, blocks)


def _versions(pair: Pair) -> Section:
    lead = (
        "Every version against the one before it, in its own run and by its own judges. Gold, "
        "where it is known, is one scale for both runs."
    )
    golds = ("helpfulness", "violation_rate", "over_refusal_rate")
    panels = [panel for field in golds if (panel := _gold_panel(pair, field)) is not None]
    blocks: list[Block] = []
    if panels:
        blocks.append(Figure("gold", "Gold of every version, toy world", panels))
    columns = [
        Column("run", numeric=False, filter=True),
        Column("version", numeric=False),
        Column("against", numeric=False),
        Column("decision", numeric=False),
        Column("win rate, judges"),
        Column("win rate, used"),
        Column("violations"),
        Column("false refusals"),
        Column("tokens"),
        Column("KL"),
    ]
    rows = [
        [cell(pair.names[side]), *_evaluation(evaluation)]
        for side in SIDES
        for evaluation in pair.reports[side]["evaluations"]
    ]
    if rows:
        blocks.append(Table("evaluations", "Evaluations", columns, rows))
    else:
        blocks.append(Note("Neither run has finished an evaluation."))
    return Section("versions", "Versions", lead, blocks)


def _gold_panel(pair: Pair, field: str) -> Panel | None:
    marks: list[Mark] = []
    values: list[float | None] = []
    longest: Sequence[str] = ()
    for side in SIDES:
        versions = pair.reports[side]["versions"]
        names = [str(version.value["name"]) for version in versions]
        longest = max(longest, names, key=len)
        for i, version in enumerate(versions):
            gold = version["gold"][field]
            if gold:
                values += [gold[name].value for name in ("mean", "low", "high")]
                marks.append(
                    Point(
                        name=pair.names[side],
                        label=names[i],
                        colour=COLOURS[side],
                        shape=SHAPES[side],
                        x=i - OFFSETS[side] / 2,
                        y=gold["mean"],
                        low=gold["low"],
                        high=gold["high"],
                    )
                )
    if not marks:
        return None
    ticks = [(float(i), name) for i, name in enumerate(longest)]
    x = axis("version", [], limits=(-0.4, len(longest) - 0.6), form="d")
    x = type(x)(x.label, x.low, x.high, ticks, x.form)
    return Panel(f"gold {words(field)}", x, axis(words(field), values, least=0.0, most=1.0), marks)


def _evaluation(evaluation: Ref) -> list[Cell]:
    rates = evaluation["win_rate"]
    return [
        cell(evaluation["candidate"]),
        cell(evaluation["promoted"]),
        cell("promoted" if evaluation["decision"].value["promoted"] else "refused"),
        *(
            Cell(interval(rates[pair]["all"]), rates[pair]["all"]["mean"].value)
            for pair in ("judge", "used")
        ),
        *(
            Cell(
                interval(evaluation[name]["candidate"]), evaluation[name]["candidate"]["mean"].value
            )
            for name in ("violation_rate", "over_refusal_rate")
        ),
        cell(evaluation["response_length"]["candidate"], "f1"),
        cell(evaluation["kl"], "f2"),
    ]


def _cost(pair: Pair) -> Section:
    lead = "What both runs took. A total is left out unless every finished node has it."
    names = {
        "wall_seconds": ("wall time, s", "f0"),
        "device_hours": ("device-hours", "g"),
        "kwh": ("energy at the device, kWh", "g"),
        "co2_kg": ("CO2, kg", "g"),
    }
    rows = [
        [
            cell(title),
            *(cell(pair.reports[side]["cost"]["actual"][name], form) for side in SIDES),
        ]
        for name, (title, form) in names.items()
    ]
    table = Table("costs", "Cost", [Column("total", numeric=False), *pair.columns()], rows)
    return Section("cost", "Cost", lead, [table])
