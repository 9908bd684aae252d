"""The report in the terminal: one table for each question a reader has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rlhf.data.records import AXES
from rlhf.report.cost import COLUMNS, cost_cells
from rlhf.report.gather import MIN_PROMPTS, Row

NOTHING = "-"
GROUPS = ("all", "helpfulness", "safety", "longer", "not_longer")
"""Prompts that a win rate is read on, as evaluation.json names them."""

SHORT = {
    "significantly_better": "significantly",
    "slightly_better": "slightly",
    "negligibly_better": "negligibly",
    None: "all",
}
"""Strengths as tables name them, where that differs."""


def tables(report: Row) -> list[Table]:
    """Return every table that has rows, in reading order."""
    found = [
        _versions(report["versions"]),
        _gold(report["versions"]),
        _decisions(report["evaluations"]),
        _win_rates(report["evaluations"]),
        _shifts(report["evaluations"]),
        _behaviour(report["evaluations"]),
        *(_accuracy(report, axis) for axis in AXES),
        _before(report["reward_accuracy_before"]),
        _detection(report["safety_detection"]),
        _mixtures(report["mixtures"]),
        _rejection(report["rejection"]),
        _ppo(report["ppo"]),
        _nodes(report),
    ]
    return [table for table in found if table.row_count]


def _table(
    title: str, names: Sequence[str], values: Sequence[str] = (), *, caption: str = ""
) -> Table:
    """Return an empty table: names on the left, values, ranged right, after them.

    Where the terminal is narrow, intervals are wrapped, never cut.
    """
    table = Table(
        title=title,
        caption=caption,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in names:
        table.add_column(name, no_wrap=name != "sources", overflow="fold")
    for value in values:
        table.add_column(value, justify="right", overflow="fold")
    return table


def _versions(versions: Sequence[Row]) -> Table:
    rounds = {version["scores"]["round"] for version in versions if version["scores"]}
    has_gold = any(version["gold"] for version in versions)
    notes = [
        f"judge: mean raw score under the judges of round {k}, for all versions" for k in rounds
    ]
    if has_gold:
        notes.append("gold: known in the toy world only, never seen by a decision")
    if any(version["overruled"] for version in versions):
        notes.append("*: set by an operator")
    table = _table(
        "Versions",
        ("version", "state"),
        ("judge helpfulness", "judge safety", *(["gold helpfulness"] if has_gold else [])),
        caption="\n".join(notes),
    )
    for version in versions:
        scores, gold = version["scores"] or {}, version["gold"] or {}
        values = [interval(scores.get(f"judge_{axis}")) for axis in AXES]
        if has_gold:
            values.append(interval(gold.get("helpfulness")))
        state = version["state"] + ("*" if version["overruled"] else "")
        table.add_row(version["name"], state, *values)
    return table


def _gold(versions: Sequence[Row]) -> Table:
    rates = {"violation_rate": "violations", "over_refusal_rate": "over-refusals"}
    table = _table("Gold rates (toy world)", ("version",), tuple(rates.values()))
    for version in versions:
        if version["gold"]:
            table.add_row(version["name"], *(interval(version["gold"][rate]) for rate in rates))
    return table


def _decisions(evaluations: Sequence[Row]) -> Table:
    table = _table(
        "Promotion",
        ("version", "against", "rule"),
        ("value", "bound", "holds"),
        caption="min_win_rate bounds the lower limit of the judges' win rate; "
        "a value that could not be measured does not block",
    )
    for evaluation in evaluations:
        for reason in evaluation["decision"]["reasons"]:
            table.add_row(
                evaluation["candidate"],
                evaluation["promoted"],
                reason["rule"],
                number(reason["value"]),
                f"{reason['bound']:g}",
                Text("yes", "green") if reason["ok"] else Text("NO", "bold red"),
            )
        table.add_section()
    return table


def _win_rates(evaluations: Sequence[Row]) -> Table:
    table = _table(
        "Win rate against the promoted version",
        ("version", "against", "prompts"),
        ("n", "judge pair", "used pair"),
        caption="judge decides; used is the pair that was optimised against: "
        "used far above judge is over-optimisation\n"
        "longer, not longer: all, split by whether the new version's response has more tokens",
    )
    for evaluation in evaluations:
        rates = evaluation["win_rate"]
        for group in GROUPS:
            table.add_row(
                evaluation["candidate"],
                evaluation["promoted"],
                group.replace("_", " "),
                str(rates["judge"][group]["n"]),
                interval(rates["judge"][group]),
                interval(rates["used"][group]),
            )
        table.add_section()
    return table


def _shifts(evaluations: Sequence[Row]) -> Table:
    table = _table(
        "Score shift from the promoted version, all prompts",
        ("version", "against", "model"),
        ("judge pair", "used pair"),
        caption="each value is one reward model of that round: no two are on one scale",
    )
    for evaluation in evaluations:
        for axis in AXES:
            shifts = [evaluation["scores"][f"{p}_{axis}"]["shift"] for p in ("judge", "reward")]
            table.add_row(
                evaluation["candidate"], evaluation["promoted"], axis, *map(interval, shifts)
            )
        table.add_section()
    return table


def _behaviour(evaluations: Sequence[Row]) -> Table:
    table = _table(
        "Behaviour on held-out prompts",
        ("round", "version"),
        ("violations", "over-refusals", "tokens", "finished", "KL"),
        caption="violations: by that round's safety judge; KL: of the new version to the "
        "promoted one, in nats",
    )
    for evaluation in evaluations:
        for side in ("promoted", "candidate"):
            table.add_row(
                str(evaluation["round"]),
                evaluation[side],
                interval(evaluation["violation_rate"][side]),
                interval(evaluation["over_refusal_rate"][side]),
                number(evaluation["response_length"][side], digits=1),
                number(evaluation["finished_fraction"][side]),
                number(evaluation["kl"]) if side == "candidate" else NOTHING,
            )
        table.add_section()
    return table


def _accuracy(report: Row, axis: str) -> Table:
    table = _table(
        f"Reward accuracy on held-out comparisons: {axis}",
        ("model", "strength"),
        ("n", "prompts", "accuracy", "longer", "minus longer", "swapped"),
        caption="n: comparisons without ties; longer: accuracy of the longer response; "
        "swapped: with the answers exchanged; "
        f"few: under {MIN_PROMPTS} prompts, compared with nothing; judges: all strengths",
    )
    judges = {r["round"]: r for r in report["judge_accuracy"] if _is_total(r, axis)}
    for row in (r for r in report["reward_accuracy"] if r["axis"] == axis):
        _add_accuracy(table, f"reward {row['round']}", row)
        if row["strength"] is None:
            if row["round"] in judges:
                _add_accuracy(table, f"judge {row['round']}", judges[row["round"]])
            table.add_section()
    return table


def _is_total(row: Row, axis: str) -> bool:
    return row["axis"] == axis and row["strength"] is None


def _add_accuracy(table: Table, model: str, row: Row) -> None:
    table.add_row(
        model,
        strength_name(row),
        str(row["n"]),
        str(row["prompts"]),
        interval(row, middle="accuracy"),
        number(row["control_longer"]),
        "few" if row["few"] else interval(row["longer_difference"]),
        number(row["control_swapped"]),
    )


def _before(rows: Sequence[Row]) -> Table:
    table = _table(
        "Reward accuracy on new batches before training on them",
        ("model", "strength"),
        ("n", "prompts", "accuracy", "longer"),
        caption="the model of the round before, on all rows of the round's batches",
    )
    last = None
    for row in rows:
        key = (row["round"], row["axis"])
        if last not in (None, key):
            table.add_section()
        last = key
        table.add_row(
            f"{row['axis']} {row['round'] - 1} on round {row['round']}",
            strength_name(row),
            str(row["n"]),
            str(row["prompts"]),
            interval(row, middle="accuracy"),
            number(row["control_longer"]),
        )
    return table


def _detection(rows: Sequence[Row]) -> Table:
    table = _table(
        "Responses labelled unsafe, found by the safety models",
        ("model",),
        ("labelled", "unsafe", "recall at 0.5", "gate at", "precision", "recall"),
    )
    for row in rows:
        table.add_row(
            f"{row['role']} {row['round']}",
            str(row["labelled"]),
            str(row["unsafe"]),
            number(row["unsafe_recall"]),
            f"{row['gate_threshold']:g}",
            number(row["gate_precision"]),
            number(row["gate_recall"]),
        )
    return table


def _mixtures(mixtures: Sequence[Row]) -> Table:
    table = _table("Training mixtures", ("node", "sources"), ("rows", "own share"))
    for mixture in mixtures:
        sources = ", ".join(f"{name} {count}" for name, count in mixture["sources"].items())
        table.add_row(mixture["node"], sources, str(mixture["rows"]), number(mixture["own_share"]))
    return table


def _rejection(selections: Sequence[Row]) -> Table:
    table = _table(
        "Rejection sampling: best of N",
        ("round", "prompts"),
        ("N", "best", "median", "gain"),
        caption="expected raw scores of N samples",
    )
    for selection in selections:
        for axis, curve in selection["against_n"].items():
            for n in _powers_of_two(len(curve["max"])):
                best, median = curve["max"][n - 1], curve["median"][n - 1]
                table.add_row(
                    str(selection["round"]),
                    axis,
                    str(n),
                    number(best),
                    number(median),
                    number(best - median),
                )
            table.add_section()
    return table


def _ppo(rows: Sequence[Row]) -> Table:
    table = _table(
        "PPO",
        ("round", "stopped by", "alarms"),
        ("iterations", "best", "held-out score", "KL"),
        caption="held-out score: at the best iteration, in standard deviations above the start; "
        "KL: to the start, in nats",
    )
    for row in rows:
        best = {item["iteration"]: item for item in row["heldout"]}.get(row["best_iteration"], {})
        table.add_row(
            str(row["round"]),
            str(row["stopped"]),
            ", ".join(alarm["kind"] for alarm in row["alarms"]) or "none",
            str(row["iterations"]),
            NOTHING if row["best_iteration"] is None else str(row["best_iteration"]),
            number(best.get("score")),
            number(best.get("kl_to_start")),
        )
    return table


def _nodes(report: Row) -> Table:
    total = sum(row["wall_seconds"] for row in report["nodes"])
    table = _table(
        "Time",
        ("node",),
        ("seconds", "share", "peak MB", *COLUMNS),
        caption=f"{report['nodes_done']} of {report['nodes_planned']} nodes are done, "
        f"in {total:.0f} s; expected: estimate.json; Wh and CO2: docs/cost.md",
    )
    for row in report["nodes"]:
        table.add_row(
            row["node"],
            f"{row['wall_seconds']:.1f}",
            f"{row['wall_seconds'] / total:.0%}" if total else NOTHING,
            f"{row['peak_memory_mb']:.0f}",
            *cost_cells(row),
        )
    return table


def strength_name(row: Row) -> str:
    """Return a row's strength as tables name it."""
    return SHORT.get(row["strength"], str(row["strength"]))


def number(value: float | None, *, digits: int = 3) -> str:
    """Return a number with `digits` digits after the point, or a dash for None."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def interval(values: Mapping[str, Any] | None, *, middle: str = "mean") -> str:
    """Return `0.612 [0.571, 0.652]`; without limits the value alone, without a value a dash."""
    if values is None or values[middle] is None:
        return NOTHING
    if values["low"] is None or values["high"] is None:
        return number(values[middle])
    return f"{number(values[middle])} [{number(values['low'])}, {number(values['high'])}]"


def _powers_of_two(last: int) -> list[int]:
    """Return 1, 2, 4, ... below `last`, and `last` itself."""
    powers = [2**k for k in range(last.bit_length()) if 2**k < last]
    return [*powers, last]
