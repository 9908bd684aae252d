"""How well the reward models agree with the annotators, and what the next batch would add."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from rlhf.algo.forecast import fit_power_law
from rlhf.data.records import AXES, STRENGTHS, Comparison
from rlhf.inference.accuracy import UNGRADED, ScoredPair, measure
from rlhf.report.gather.sources import Done, Row, Run

MIN_PROMPTS = 30
"""Cells with fewer distinct prompts are shown but compared with nothing."""

CELL_FIELDS = (
    "strength",
    "n",
    "prompts",
    "ties",
    "accuracy",
    "low",
    "high",
    "gap",
    "control_longer",
    "longer_difference",
    "control_swapped",
)


FLAT = (
    "later models were not trained on more comparisons of their axis than earlier ones, so nothing "
    "can be said about more (reward.max_comparisons caps them)"
)
"""Why there is no forecast where the number of comparisons does not grow."""


def accuracy(run: Run, *, role: str, file: str, other_axis: bool = False) -> list[Row]:
    """Return the accuracy of every model of a role per strength, over all sources and batches.

    `axis` is the model's; with `other_axis` the comparisons are those of the axis it is not for.
    Strengths come strongest first, ungraded comparisons after them; None is all of them together.
    """
    rows = []
    for item in run.reward_models(role):
        content = item.read(file)
        if content is None:
            continue
        axis = item.option("axis")
        cells = list(enumerate(content["cells"]))
        for position, cell in sorted(cells, key=lambda pair: strength_order(pair[1]["strength"])):
            is_total = cell["source"] is None and cell["batch"] is None
            if is_total and (cell["axis"] != axis) == other_axis:
                rows.append(
                    {
                        "round": item.round,
                        "axis": axis,
                        **{field: cell[field] for field in CELL_FIELDS},
                        "few": cell["prompts"] < MIN_PROMPTS,
                        "from": item.at(file, "cells", position),
                    }
                )
    return rows


def strength_order(strength: str | None) -> int:
    """Return the place of a strength: strongest first, then ungraded, then all together."""
    if strength is None:
        return len(STRENGTHS) + 1
    return STRENGTHS.index(strength) if strength in STRENGTHS else len(STRENGTHS)


def detection(run: Run) -> list[Row]:
    """Return how well each round's safety model finds responses that are labelled unsafe."""
    rows = []
    for item in run.of_stage("reward"):
        content = item.read("accuracy.json")
        if content is not None and "detection" in content["summary"]:
            source = item.at("accuracy.json", "summary", "detection")
            found = content["summary"]["detection"]
            rows.append({"round": item.round, "role": item.option("role"), **found, "from": source})
    return rows


def cells_by_source(run: Run) -> list[Row]:
    """Return held-out accuracy of the reward models per strength and source, over all batches."""
    groups = (("source", "strength"), ("source",))
    return [row for item in _scored(run) for row in _cells(run, item, groups)]


def cells_by_batch(run: Run) -> list[Row]:
    """Return held-out accuracy of the reward models per batch, over all sources and strengths."""
    return [row for item in _scored(run) for row in _cells(run, item, (("batch",),))]


def _scored(run: Run) -> Iterator[Done]:
    return (item for item in run.reward_models("reward") if item.has("scores.jsonl"))


def _cells(run: Run, item: Done, groups: Sequence[tuple[str, ...]]) -> Iterator[Row]:
    """Measure groups of a model's scored comparisons of its own axis, by the fields named.

    Level and draws of the intervals are those of evaluate, so that all of a run's intervals agree.
    """
    settings = run.settings
    if settings is None:
        return
    axis = item.option("axis")
    rows = [row for row in run.rows(item, "scores.jsonl") if row["axis"] == axis]
    for fields in groups:
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            found.setdefault(tuple(_field(row, name) for name in fields), []).append(row)
        for key in sorted(found, key=lambda key: [_order(value) for value in key]):
            measured = measure(
                [scored_pair(row) for row in found[key]],
                level=settings["evaluate"]["level"],
                num_draws=settings["evaluate"]["bootstrap_draws"],
                seed=settings["seed"],
            )
            names = dict(zip(fields, key, strict=True))
            yield {
                "round": item.round,
                "axis": axis,
                "source": names.get("source"),
                "strength": names.get("strength"),
                "batch": names.get("batch"),
                **{name: measured[name] for name in CELL_FIELDS if name != "strength"},
                "few": measured["prompts"] < MIN_PROMPTS,
                "from": item.at("scores.jsonl"),
                "how": "accuracy",
            }


def _field(row: Row, name: str) -> Any:
    return row["strength"] or UNGRADED if name == "strength" else row[name]


def _order(value: str) -> tuple[int, str]:
    return (STRENGTHS.index(value) if value in STRENGTHS else len(STRENGTHS), value)


def scored_pair(row: Row) -> ScoredPair:
    """Return a row of scores.jsonl as the record that accuracies are measured on."""
    comparison = Comparison(
        id=row["id"],
        prompt=[],
        chosen="",
        rejected="",
        strength=row["strength"],
        axis=row["axis"],
        source=row["source"],
        chosen_safe=row["chosen_safe"],
        rejected_safe=row["rejected_safe"],
        tie=row["tie"],
        batch_id=row["batch"],
    )
    return ScoredPair(
        comparison=comparison,
        cluster=row["prompt"],
        chosen_score=row["chosen_score"],
        rejected_score=row["rejected_score"],
        chosen_tokens=row["chosen_tokens"],
        rejected_tokens=row["rejected_tokens"],
        swapped_chosen_score=row["swapped_chosen_score"],
        swapped_rejected_score=row["swapped_rejected_score"],
    )


def curves(run: Run) -> list[Row]:
    """Return per axis the accuracy of every round's model against the comparisons it saw.

    `forecast` is a power law through the points and what it expects of one more batch (paper Fig.
    6), or the reason why none is drawn.
    """
    found = []
    for axis in AXES:
        points = []
        for item in run.reward_models("reward"):
            content, mixture = item.read("accuracy.json"), item.read("mixture.json")
            if item.option("axis") != axis or content is None or mixture is None:
                continue
            trained = {name: mixture[name] for name in ("num_own", "rows")}
            points += [
                {
                    "round": item.round,
                    **{name: cell[name] for name in ("accuracy", "low", "high")},
                    "from": item.at("accuracy.json", "cells", position),
                    "trained": {**trained, "from": item.at("mixture.json")},
                }
                for position, cell in enumerate(content["cells"])
                if cell["axis"] == axis
                and cell["source"] is cell["batch"] is cell["strength"] is None
            ]
        if points:
            found.append({"axis": axis, "points": points, "forecast": _forecast(run, points)})
    return found


def _forecast(run: Run, points: Sequence[Row]) -> Row:
    """Return the fit through the points and the value of one more batch of the newest's size."""
    measured = [point for point in points if point["accuracy"] is not None]
    made: Row = {
        "from": [
            place for point in measured for place in (point["from"], point["trained"]["from"])
        ],
        "how": "forecast",
    }
    settings = run.settings
    rows = [point["trained"]["num_own"] for point in measured]
    if settings is None or any(later <= earlier for earlier, later in pairwise(rows)):
        return {**made, "curve": [], "next": None, "warnings": [], "reason": FLAT}
    fitted = fit_power_law(
        rows,
        [point["accuracy"] for point in measured],
        low=[point["low"] for point in measured],
        high=[point["high"] for point in measured],
        level=settings["evaluate"]["level"],
    )
    return {**made, **fitted}
