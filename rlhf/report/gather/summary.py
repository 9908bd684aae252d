"""What to look at first: every finding that a rule of the report raises, the worst ones on top.

A finding holds no number itself: `values` are JSON pointers into the same report, so that the page
shows the number that stands in its section.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    newest = len(report["batches"]) - 1
    return {
        "findings": sorted(found, key=lambda row: (LEVELS.index(row["level"]), -row["round"])),
        "newest_batch": pointer("batches", newest) if newest >= 0 else None,
    }


def _finding(level: str, section: str, round_: int, text: str, **values: str) -> Row:
    shown = [
        {"label": label.rstrip("_0123456789").replace("_", " "), "at": place}
        for label, place in values.items()
    ]
    return {"level": level, "section": section, "round": round_, "text": text, "values": shown}


def _decisions(report: Row) -> Iterator[Row]:
    """Every refused version, with the rules that it broke; the newest one asks for a stop."""
    for i, evaluation in enumerate(report["evaluations"]):
        reasons = evaluation["decision"]["reasons"]
        broken = [j for j, reason in enumerate(reasons) if not reason["ok"]]
        if evaluation["decision"]["promoted"] or not broken:
            continue
        is_newest = i == len(report["evaluations"]) - 1
        places: dict[str, str] = {}
        for j in broken:
            place = pointer("evaluations", i, "decision", "reasons", j)
            places |= {reasons[j]["rule"]: f"{place}/value", f"bound_{j}": f"{place}/bound"}
        yield _finding(
            "stop" if is_newest else "look",
            "versions",
            evaluation["round"],
            f"{evaluation['candidate']} was refused: it broke "
            + ", ".join(reasons[j]["rule"].replace("_", " ") for j in broken),
            **places,
        )


def _over_optimisation(report: Row) -> Iterator[Row]:
    for row in report["over_optimisation"]:
        if row["verdict"]["verdict"] == OVER:
            yield _finding("stop", "ppo", row["round"], f"PPO: {row['verdict']['text']}")


def _alarms(report: Row) -> Iterator[Row]:
    for i, row in enumerate(report["ppo"]):
        for j, alarm in enumerate(row["alarms"]):
            yield _finding(
                "look",
                "ppo",
                row["round"],
                f"PPO raised an alarm: {alarm['kind']}",
                iteration=pointer("ppo", i, "alarms", j, "iteration"),
                value=pointer("ppo", i, "alarms", j, "value"),
                bound=pointer("ppo", i, "alarms", j, "bound"),
            )


def _drift(report: Row) -> Iterator[Row]:
    """Every batch with a line that is not as expected, named with all of them."""
    for batch in report["batches"]:
        lines = [] if batch["drift"] is None else batch["drift"]["lines"]
        found = {level: [x for x in lines if x["verdict"] == level] for level in LEVELS}
        for level, of_level in found.items():
            if of_level:
                measures = " and ".join(line["title"] for line in of_level)
                text = f"batch {batch['id']} drifted in {measures}"
                yield _finding(level, "data", batch["round"], text)


def _reward(report: Row) -> Iterator[Row]:
    """A model that longer-response-wins equals, or whose swapped control does not mirror it."""
    for i, row in enumerate(report["reward_accuracy"]):
        if row["strength"] is not None or row["few"] or row["accuracy"] is None:
            continue
        place = {"accuracy": pointer("reward_accuracy", i, "accuracy")}
        name = f"the {row['axis']} reward model of this round"
        low = row["longer_difference"]["low"]
        if low is not None and low <= 0:
            longer = pointer("reward_accuracy", i, "control_longer")
            text = f"{name} is not better than choosing the longer response"
            yield _finding("look", "reward", row["round"], text, **place, longer=longer)
        if row["low"] is not None and row["low"] <= 0.5:
            text = f"{name} is not better than a coin"
            yield _finding(
                "stop",
                "reward",
                row["round"],
                text,
                **place,
                lower_limit=pointer("reward_accuracy", i, "low"),
            )
        swapped = row["control_swapped"]
        if swapped is not None and abs(row["accuracy"] + swapped - 1) > SWAP_TOLERANCE:
            text = f"{name} depends on which response is called chosen: its evaluation is wrong"
            yield _finding(
                "stop",
                "reward",
                row["round"],
                text,
                **place,
                swapped=pointer("reward_accuracy", i, "control_swapped"),
            )


def _calibration(report: Row) -> Iterator[Row]:
    for i, row in enumerate(report["calibration"]):
        if row["ece"] is not None and row["ece"] > MAX_ECE and _is_newest(report, row):
            subject = "preferences" if row["kind"] == "preference" else "safe and unsafe"
            text = f"the {row['axis']} reward model's probabilities of {subject} are off"
            place = pointer("calibration", i, "ece")
            yield _finding("look", "scores", row["round"], text, ECE=place)


def _is_newest(report: Row, row: Row) -> bool:
    return bool(row["round"] == max(other["round"] for other in report["calibration"]))


def _quality(report: Row) -> Iterator[Row]:
    for i, table in enumerate(report["quality"]):
        for j, row in enumerate(table["rows"]):
            if row["flags"]:
                text = f"{table['by']} {row['name']} on {table['axis']}: " + ", ".join(row["flags"])
                place = pointer("quality", i, "rows", j, "n")
                yield _finding("look", "data", table["round"], text, comparisons=place)


def _finished(report: Row) -> Iterator[Row]:
    for i, row in enumerate(report["evaluations"]):
        share = row["finished_fraction"]["candidate"]
        if share is not None and share < MIN_FINISHED:
            text = f"many responses of {row['candidate']} end at the length limit, not with EOS"
            place = pointer("evaluations", i, "finished_fraction", "candidate")
            yield _finding("look", "versions", row["round"], text, finished=place)
