"""What to look at first: every finding that a rule of the report raises, the worst ones on top.

A finding holds no number itself: `about` and `values` are JSON pointers into the same report, so
that the page shows the number that stands in its section.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.algo.over_optimisation import OVER
from rlhf.report.gather.sources import Row, pointer

LEVELS = ("stop", "look")

SWAP_TOLERANCE = 0.02
"""Largest sum of accuracy and its swapped control, off 1, that numerical ties explain."""

MAX_ECE = 0.1
"""Calibration error above which a model's probabilities should not be read as such."""

MIN_FINISHED = 0.9
"""Share of finished responses below which length limits distort everything else."""


def summary(report: Row) -> Row:
    """Return the findings, worst first and newest round first, and the newest batch's place."""
    found = [
        *_decisions(report),
        *_over_optimisation(report),
        *_alarms(report),
        *_drift(report),
        *_reward(report),
        *_calibration(report),
        *_quality(report),
        *_finished(report),
    ]

    def order(row: Row) -> tuple[int, int]:
        return LEVELS.index(row["level"]), -follow(report, row["about"])["round"]

    newest = len(report["batches"]) - 1
    return {
        "findings": sorted(found, key=order),
        "newest_batch": pointer("batches", newest) if newest >= 0 else None,
    }


def follow(tree: Any, place: str) -> Any:
    """Return what a JSON pointer points to."""
    for part in place.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


def _finding(level: str, section: str, about: str, text: str, **values: str) -> Row:
    """Return a finding about a record that has a round; `values` are keys inside it, by label."""
    shown = [
        {"label": label.replace("_", " "), "at": f"{about}/{key}"} for label, key in values.items()
    ]
    return {"level": level, "section": section, "about": about, "text": text, "values": shown}


def _decisions(report: Row) -> Iterator[Row]:
    """Every refused version, with the rules that it broke; the newest one asks for a stop."""
    for i, evaluation in enumerate(report["evaluations"]):
        reasons = evaluation["decision"]["reasons"]
        broken = [j for j, reason in enumerate(reasons) if not reason["ok"]]
        if evaluation["decision"]["promoted"] or not broken:
            continue
        is_newest = i == len(report["evaluations"]) - 1
        names = " and ".join(reasons[j]["rule"].replace("_", " ") for j in broken)
        values = {reasons[j]["rule"]: f"decision/reasons/{j}/value" for j in broken}
        if len(broken) == 1:
            values["bound"] = f"decision/reasons/{broken[0]}/bound"
        yield _finding(
            "stop" if is_newest else "look",
            "versions",
            pointer("evaluations", i),
            f"{evaluation['candidate']} was refused: it broke {names}",
            **values,
        )


def _over_optimisation(report: Row) -> Iterator[Row]:
    for i, row in enumerate(report["over_optimisation"]):
        if row["verdict"]["verdict"] == OVER:
            about = pointer("over_optimisation", i)
            yield _finding("stop", "ppo", about, f"PPO: {row['verdict']['text']}")


def _alarms(report: Row) -> Iterator[Row]:
    for i, row in enumerate(report["ppo"]):
        for j, alarm in enumerate(row["alarms"]):
            values = {name: f"alarms/{j}/{name}" for name in ("iteration", "value", "bound")}
            text = f"PPO raised an alarm: {alarm['kind']}"
            yield _finding("look", "ppo", pointer("ppo", i), text, **values)


def _drift(report: Row) -> Iterator[Row]:
    """Every batch with a line that is not as expected, named with all of them."""
    for i, batch in enumerate(report["batches"]):
        lines = [] if batch["drift"] is None else batch["drift"]["lines"]
        for level in LEVELS:
            titles = [line["title"] for line in lines if line["verdict"] == level]
            if titles:
                text = f"batch {batch['id']} drifted in {' and '.join(titles)}"
                yield _finding(level, "data", pointer("batches", i), text)


def _reward(report: Row) -> Iterator[Row]:
    """A model that longer-response-wins equals, or whose swapped control does not mirror it."""
    for i, row in enumerate(report["reward_accuracy"]):
        if row["strength"] is not None or row["few"] or row["accuracy"] is None:
            continue
        about = pointer("reward_accuracy", i)
        name = f"the {row['axis']} reward model of this round"
        shown = {"accuracy": "accuracy"}
        low = row["longer_difference"]["low"]
        if low is not None and low <= 0:
            text = f"{name} is not better than choosing the longer response"
            yield _finding("look", "reward", about, text, **shown, longer="control_longer")
        if row["low"] is not None and row["low"] <= 0.5:
            text = f"{name} is not better than a coin"
            yield _finding("stop", "reward", about, text, **shown, lower_limit="low")
        swapped = row["control_swapped"]
        if swapped is not None and abs(row["accuracy"] + swapped - 1) > SWAP_TOLERANCE:
            text = f"{name} depends on which response is called chosen: its evaluation is wrong"
            yield _finding("stop", "reward", about, text, **shown, swapped="control_swapped")


def _calibration(report: Row) -> Iterator[Row]:
    newest = max((row["round"] for row in report["calibration"]), default=None)
    for i, row in enumerate(report["calibration"]):
        if row["round"] == newest and row["ece"] is not None and row["ece"] > MAX_ECE:
            subject = "agreement" if row["kind"] == "preference" else "safe responses"
            text = f"the {row['axis']} reward model's probabilities of {subject} are off"
            yield _finding("look", "scores", pointer("calibration", i), text, ECE="ece")


def _quality(report: Row) -> Iterator[Row]:
    for i, table in enumerate(report["quality"]):
        for j, row in enumerate(table["rows"]):
            if row["flags"]:
                flags = ", ".join(row["flags"])
                text = f"{table['by']} {row['name']}, {table['axis']}: {flags}"
                about = pointer("quality", i)
                yield _finding("look", "data", about, text, comparisons=f"rows/{j}/n")


def _finished(report: Row) -> Iterator[Row]:
    for i, row in enumerate(report["evaluations"]):
        share = row["finished_fraction"]["candidate"]
        if share is not None and share < MIN_FINISHED:
            text = f"many responses of {row['candidate']} end at the length limit, not with EOS"
            about = pointer("evaluations", i)
            yield _finding("look", "versions", about, text, finished="finished_fraction/candidate")
