"""The report in the terminal: report.json and one table for each question a reader has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.artifacts import write_json
from rlhf.report.gather import MIN_PROMPTS, SCORE_ROLES, Row, gather

REPORT = "report.json"
NOTHING = "-"


def write_report(run_dir: Path, console: Console | None = None) -> Row:
    """Write report.json, print the tables where there is a console, and return the report.

    Works on an unfinished run: what is not there yet is left out.
    """
    report = gather(run_dir)
    write_json(run_dir / REPORT, report)
    if console is not None:
        for table in tables(report):
            console.print(table)
    return report


def tables(report: Row) -> list[Table]:
    """Return every table that has rows, in reading order."""
    found = [
        _versions(report["versions"]),
        _decisions(report["evaluations"]),
        _win_rates(report["evaluations"]),
        _shifts(report["evaluations"]),
        _behaviour(report["evaluations"]),
        _accuracy(report),
        _mixtures(report["mixtures"]),
        _rejection(report["rejection"]),
        _ppo(report["ppo"]),
        _nodes(report),
    ]
    return [table for table in found if table.row_count]


def _table(title: str, *columns: str, caption: str = "") -> Table:
    """Return an empty table; names on the left, numbers on the right."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    return table


def _versions(versions: Sequence[Row]) -> Table:
    table = _table(
        "Versions",
        "version",
        "state",
        "gold helpfulness",
        "gold violations",
        "gold over-refusals",
        caption="gold is known in the toy world only; the decisions never see it",
    )
    for version in versions:
        gold = version["gold"] or {}
        state = version["state"] + (" (overruled)" if version["overruled"] else "")
        table.add_row(
            version["name"],
            state,
            interval(gold.get("helpfulness")),
            interval(gold.get("violation_rate")),
            interval(gold.get("over_refusal_rate")),
        )
    return table


def _decisions(evaluations: Sequence[Row]) -> Table:
    table = _table("Promotion", "version", "against", "rule", "value", "bound", "holds")
    for evaluation in evaluations:
        for reason in evaluation["decision"]["reasons"]:
            table.add_row(
                evaluation["candidate"],
                evaluation["promoted"],
                reason["rule"],
                number(reason["value"]),
                number(reason["bound"]),
                Text("yes", "green") if reason["ok"] else Text("NO", "bold red"),
            )
        table.add_section()
    return table


def _win_rates(evaluations: Sequence[Row]) -> Table:
    groups = ("all", "helpfulness", "safety", "longer", "not_longer")
    table = _table(
        "Win rate against the promoted version",
        "version",
        "pair",
        *groups,
        caption="judge decides; used is the pair that was optimised against: "
        "used far above judge is over-optimisation",
    )
    for evaluation in evaluations:
        for pair, rates in evaluation["win_rate"].items():
            table.add_row(
                evaluation["candidate"], pair, *(interval(rates[group]) for group in groups)
            )
    return table


def _shifts(evaluations: Sequence[Row]) -> Table:
    table = _table(
        "Score shift to the promoted version",
        "version",
        "against",
        *SCORE_ROLES,
        caption="each column is one reward model of that round; rows are not on one scale",
    )
    for evaluation in evaluations:
        shifts = (evaluation["scores"][role]["shift"] for role in SCORE_ROLES)
        table.add_row(
            evaluation["candidate"], evaluation["promoted"], *(interval(shift) for shift in shifts)
        )
    return table


def _behaviour(evaluations: Sequence[Row]) -> Table:
    table = _table(
        "Behaviour on held-out prompts",
        "version",
        "judged violations",
        "over-refusals",
        "tokens",
        "finished",
        "KL (nats)",
    )
    for evaluation in evaluations:
        for side in ("promoted", "candidate"):
            table.add_row(
                evaluation[side],
                interval(evaluation["violation_rate"][side]),
                interval(evaluation["over_refusal_rate"][side]),
                number(evaluation["response_length"][side]),
                number(evaluation["finished_fraction"][side]),
                number(evaluation["kl"]) if side == "candidate" else NOTHING,
            )
        table.add_section()
    return table


def _accuracy(report: Row) -> Table:
    table = _table(
        "Reward accuracy on held-out comparisons",
        "model",
        "strength",
        "n",
        "prompts",
        "accuracy",
        "before",
        "longer wins",
        "minus longer",
        "swapped",
        caption="before: the previous model on the new batches, all their rows; "
        f"few: under {MIN_PROMPTS} prompts, compared with nothing",
    )
    before = {
        (row["round"], row["axis"], row["strength"]): row
        for row in report["reward_accuracy_before"]
    }
    last = None
    for row in report["reward_accuracy"]:
        key = (row["round"], row["axis"])
        if last not in (None, key):
            table.add_section()
        last = key
        table.add_row(
            f"{row['axis']} {row['round']}",
            row["strength"] or "all",
            str(row["n"]),
            str(row["prompts"]),
            interval(row, middle="accuracy"),
            interval(before.get((*key, row["strength"])), middle="accuracy"),
            number(row["control_longer"]),
            "few" if row["few"] else interval(row["longer_difference"]),
            number(row["control_swapped"]),
        )
    return table


def _mixtures(mixtures: Sequence[Row]) -> Table:
    table = _table("Training mixtures", "node", "rows", "own share", "sources")
    for mixture in mixtures:
        sources = ", ".join(f"{name} {count}" for name, count in mixture["sources"].items())
        table.add_row(mixture["node"], str(mixture["rows"]), number(mixture["own_share"]), sources)
    return table


def _rejection(selections: Sequence[Row]) -> Table:
    table = _table("Rejection sampling", "round", "axis", "N", "best of N", "median of N", "gain")
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
    return table


def _ppo(rows: Sequence[Row]) -> Table:
    table = _table("PPO", "round", "iterations", "best", "stopped by", "KL to start", "alarms")
    for row in rows:
        table.add_row(
            str(row["round"]),
            str(row["iterations"]),
            str(row["best_iteration"]),
            str(row["stopped"]),
            number(row["kl_to_start"]),
            ", ".join(alarm["kind"] for alarm in row["alarms"]) or "none",
        )
    return table


def _nodes(report: Row) -> Table:
    total = sum(row["seconds"] for row in report["nodes"])
    table = _table(
        "Time",
        "node",
        "seconds",
        "share",
        "peak MB",
        caption=f"{report['nodes_done']} of {report['nodes_planned']} nodes are done, "
        f"in {total:.0f} s",
    )
    for row in report["nodes"]:
        table.add_row(
            row["node"],
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / total:.0%}" if total else NOTHING,
            f"{row['peak_memory_mb']:.0f}",
        )
    return table


def number(value: float | None) -> str:
    """Return a number with three digits after the point, or a dash for None."""
    return NOTHING if value is None else f"{value:.3f}"


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
