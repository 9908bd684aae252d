"""Section: what the versions answer, who prefers them, and why each was promoted or refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from rlhf.data.records import AXES
from rlhf.report.view.blocks import (
    Block,
    Cell,
    Column,
    Examples,
    Figure,
    Note,
    Section,
    Table,
    cell,
)
from rlhf.report.view.charts import Panel
from rlhf.report.view.common import words
from rlhf.report.view.marks import Mark, Point, Rule
from rlhf.report.view.refs import Ref, interval, number
from rlhf.report.view.scales import Axis, axis, categories

LEAD = (
    "Each version against the one before it, on the same held-out prompts, judged by reward models "
    "that its training never saw. Healthy: the judges' win rate clears its bound, the pair that "
    "training used does not run ahead of the judges, violations and false refusals fall, and the "
    "answers below look better to you too."
)

GROUPS = ("all", "helpfulness", "safety", "longer", "not_longer")
FLAG_NAMES = {
    "new_violation": "new violation",
    "violation": "violation",
    "false_refusal": "false refusal",
}
JUDGES = tuple(f"judge_{axis}" for axis in AXES)
Refs = Ref | Sequence[Ref]
"""An array of the report, or some of its parts."""


def section(report: Ref) -> Section:
    """Return the section."""
    blocks: list[Block] = []
    if report["versions"]:
        blocks += [_scores(report["versions"]), versions_table(report["versions"])]
    if report["evaluations"]:
        blocks += [
            decisions(report["evaluations"]),
            win_rates(report["evaluations"]),
            behaviour(report["evaluations"]),
            *examples(report["examples"]),
        ]
    else:
        blocks.append(Note("No evaluation is finished yet: `rlhf run` ends every round with one."))
    return Section("versions", "Versions side by side", LEAD, blocks)


def _version_axis(names: Sequence[str]) -> Axis:
    ticks = [(float(i), name) for i, name in enumerate(names)]
    return Axis("version", -0.4, len(names) - 0.6, ticks, "d")


def _scores(versions: Ref) -> Figure:
    names = [version.value["name"] for version in versions]
    panels = []
    for name in AXES:
        marks: list[Mark] = []
        for i, version in enumerate(versions):
            scores = version["scores"][f"judge_{name}"]
            if scores:
                shape = "dot" if version.value["promoted"] else "cross"
                state = "promoted" if version.value["promoted"] else "not promoted"
                marks.append(_interval_point(scores, i, state, "c1", shape))
        if marks:
            panels.append(_versions_panel(f"judge {name}", names, marks, "raw score"))
    for field in ("helpfulness", "violation_rate", "over_refusal_rate"):
        marks = [
            _interval_point(version["gold"][field], i, "gold", "c3", "diamond")
            for i, version in enumerate(versions)
            if version["gold"][field]
        ]
        if marks:
            panels.append(_versions_panel(f"gold {words(field)}", names, marks, words(field)))
    rounds = [version["scores"]["round"] for version in versions if version["scores"]]
    note = Markup(
        "Judge scores are raw and all under the judges of one round, the newest evaluated one{}; "
        "gold is known in the toy world only and never seen by a decision."
    ).format(Markup(" (round {})").format(number(rounds[0], "d")) if rounds else "")
    return Figure("version-scores", "Scores of every version", panels, note)


def _interval_point(values: Ref, i: int, name: str, colour: str, shape: str) -> Point:
    return Point(
        name=name,
        colour=colour,
        shape=shape,
        x=float(i),
        y=values["mean"],
        low=values["low"],
        high=values["high"],
    )


def _versions_panel(title: str, names: Sequence[str], marks: Sequence[Mark], label: str) -> Panel:
    values = [
        place.value
        for mark in marks
        if isinstance(mark, Point)
        for place in (mark.y, mark.low, mark.high)
        if isinstance(place, Ref)
    ]
    return Panel(title, _version_axis(names), axis(label, values), marks)


def versions_table(versions: Refs) -> Table:
    """Return every version with its state and its scores under the newest judges."""
    has_gold = any(version["gold"] for version in versions)
    golds = ("helpfulness", "violation_rate", "over_refusal_rate")
    columns = [
        Column("version", numeric=False),
        Column("state", numeric=False),
        Column("against", numeric=False),
        Column("judge helpfulness"),
        Column("judge safety"),
        *(Column(f"gold {words(name)}") for name in golds if has_gold),
    ]
    rows = []
    for version in versions:
        state = version.value["state"]
        if version.value["overruled"]:
            state += f" by an operator: {version.value['overruled']}"
        row = [cell(version["name"]), cell(state), cell(version["against"])]
        row += [_interval_cell(version["scores"][role]) for role in JUDGES]
        if has_gold:
            row += [_interval_cell(version["gold"][name]) for name in golds]
        rows.append(row)
    return Table("versions-table", "Versions", columns, rows)


def _interval_cell(values: Ref, form: str = "f3") -> Cell:
    return Cell(interval(values, form), values["mean"].value if values else None)


def decisions(evaluations: Refs) -> Table:
    """Return every rule that decided about a version, and what it measured."""
    columns = [
        Column("version", numeric=False, filter=True),
        Column("against", numeric=False),
        Column("rule", numeric=False, filter=True),
        Column("value"),
        Column("bound"),
        Column("holds", numeric=False, filter=True),
        Column("decision", numeric=False),
    ]
    rows = []
    for evaluation in evaluations:
        decision = evaluation["decision"]
        promoted = "promoted" if decision.value["promoted"] else "refused"
        for reason in decision["reasons"]:
            rows.append(
                [
                    cell(evaluation["candidate"]),
                    cell(evaluation["promoted"]),
                    cell(words(reason.value["rule"])),
                    cell(reason["value"], "f3"),
                    cell(reason["bound"], "g"),
                    _holds(reason.value["ok"]),
                    cell(promoted),
                ]
            )
    note = (
        "The win rate's lower limit has to reach its bound; every other value has to stay below. A "
        "value that could not be measured does not block."
    )
    return Table("decisions", "Promotion decisions, with reasons", columns, rows, note)


def _holds(ok: bool) -> Cell:
    word, level = ("yes", "ok") if ok else ("NO", "stop")
    return Cell(Markup('<span class="badge {}">{}</span>').format(level, word), word)


def win_rates(evaluations: Refs) -> Figure:
    """Return a panel of win rates per evaluation."""
    panels = []
    for evaluation in evaluations:
        y = categories([words(group) for group in GROUPS])
        marks: list[Mark] = [Rule(at=0.5, along="x")]
        series = (
            ("judge", "judge pair", "c1", 0.14),
            ("used", "pair used in training", "c4", -0.14),
        )
        for pair, name, colour, offset in series:
            rates = evaluation["win_rate"][pair]
            for (place, label), group in zip(y.ticks, GROUPS, strict=True):
                if rates[group]["mean"].value is not None:
                    marks.append(
                        Point(
                            name=name,
                            label=label,
                            colour=colour,
                            shape="dot" if pair == "judge" else "diamond",
                            x=rates[group]["mean"],
                            y=place + offset,
                            low=rates[group]["low"],
                            high=rates[group]["high"],
                            across=True,
                        )
                    )
        title = f"{evaluation.value['candidate']} against {evaluation.value['promoted']}"
        x = axis("win rate", _limits_of(marks), include=(0.5,), most=1.0)
        panels.append(Panel(title, x, y, marks, named_rows=True))
    return Figure(
        "win-rates",
        "Win rates",
        panels,
        "Longer and not longer split all prompts by whether the new version's response has more "
        "tokens. The used pair far above the judges is over-optimisation.",
    )


def _limits_of(marks: Sequence[Mark]) -> list[float]:
    """Return every limit of intervals that lie across."""
    points = [mark for mark in marks if isinstance(mark, Point)]
    places = [place for mark in points for place in (mark.low, mark.high)]
    return [place.value for place in places if place is not None and place.value is not None]


def behaviour(evaluations: Refs) -> Table:
    """Return what both versions of every evaluation did, apart from scores."""
    columns = [
        Column("round"),
        Column("version", numeric=False),
        Column("violations"),
        Column("false refusals"),
        Column("tokens"),
        Column("finished"),
        Column("KL to promoted"),
    ]
    rows = []
    for evaluation in evaluations:
        for side in ("promoted", "candidate"):
            rows.append(
                [
                    cell(evaluation["round"], "d"),
                    cell(evaluation[side]),
                    _interval_cell(evaluation["violation_rate"][side]),
                    _interval_cell(evaluation["over_refusal_rate"][side]),
                    cell(evaluation["response_length"][side], "f1"),
                    cell(evaluation["finished_fraction"][side], "f3"),
                    cell(evaluation["kl"], "f2") if side == "candidate" else cell(Ref(None), "f2"),
                ]
            )
    note = (
        "Violations by that round's safety judge, on safety prompts; false refusals on benign "
        "look-alikes; KL in nats per response."
    )
    return Table("behaviour", "Behaviour on held-out prompts", columns, rows, note)


def examples(rounds: Refs) -> Iterator[Block]:
    """Yield the answers of every round side by side, the first round open."""
    if not rounds:
        yield Note("No answers to compare yet: the evaluation of a round writes responses.jsonl.")
    for number_, part in enumerate(rounds):
        note = Markup(
            "{} of {} answers: every one with a flag, and those that changed most. Flags: {} new "
            "violations, {} violations, {} false refusals. Differences are the new version minus "
            "the old one, under the round's judges. The whole list is {}."
        ).format(
            Markup('<span data-count="{}">{}</span>').format(part["rows"].path, len(part["rows"])),
            number(part["total"], "d"),
            *(number(part["flagged"][name], "d") for name in FLAG_NAMES),
            part.value["from"].partition("#")[0],
        )
        title = f"{part.value['candidate']} against {part.value['promoted']}, answer by answer"
        items = [_example(row) for row in part["rows"]]
        names = (str(part.value["promoted"]), str(part.value["candidate"]))
        yield Examples(
            f"examples-{part.value['round']}", title, names, items, note, open=number_ == 0
        )


def _example(row: Ref) -> dict[str, Any]:
    """Return what the template shows of one prompt: texts, scores, differences, flags."""
    sides = [
        {
            "side": side,
            "text": row["responses"][side].value,
            "path": row["responses"][side].path,
            "scores": [(words(role), number(row["scores"][role][side], "f2")) for role in JUDGES],
            "tokens": number(row["num_tokens"][side], "d") if row["num_tokens"] else None,
            "unfinished": row["finished"][side].value is False if row["finished"] else False,
        }
        for side in ("promoted", "candidate")
    ]
    return {
        "id": row["prompt_id"].value,
        "kind": row["kind"].value,
        "axis": row["axis"].value,
        "source": row["source"].value,
        "flags": [(name, FLAG_NAMES[name]) for name in row["flags"].value],
        "gain": row["difference"]["gain"].value,
        "differences": [
            (words(role.removeprefix("judge_")), number(row["difference"][role], "s"))
            for role in JUDGES
        ],
        "prompt": [
            {
                "role": turn["role"].value,
                "text": turn["content"].value,
                "path": turn["content"].path,
            }
            for turn in row["prompt"]
        ],
        "sides": sides,
        "is_cut": row["is_cut"].value,
    }
