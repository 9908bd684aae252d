"""Distributions of scores, their calibration, the gate, and where the two reward models disagree.

Everything is counted from the rows of scores.jsonl and version_scores.jsonl; docs/metrics.md names
each derivation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf.algo.calibration import (
    histogram,
    precision_recall,
    preference_confidence,
    reliability,
)
from rlhf.data.records import AXES, STRENGTHS
from rlhf.inference.accuracy import UNGRADED, sigmoid
from rlhf.report.gather.sources import Done, Row, Run

Floats = NDArray[np.float64]

NUM_BINS = 10
"""Bins of a reliability plot."""

HISTOGRAM_BINS = 30
"""Most bins of a histogram; few values get fewer, and edges are round numbers."""

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Where the gate's precision and recall are read, besides the threshold in use."""

CORNER = 0.25
"""Share of the responses that counts as high, and as low, on one axis (paper Fig. 32)."""

MAX_POINTS = 2000
"""Most responses drawn in a scatter; of more, every k-th is kept, and all are counted."""


def round_edges(values: Sequence[float], *, smallest: int) -> list[float]:
    """Return evenly spaced edges around all values, with a step of 1, 2 or 5 times a power of 10.

    At most 2.5 bins per root of the smallest group's size, so that its bins hold something.
    """
    bins = max(12, min(HISTOGRAM_BINS, round(2.5 * math.sqrt(smallest))))
    low, high = min(values), max(values)
    rough = max((high - low) / bins, 1e-3)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10, 20) if power * k * bins >= high - low + power * k)
    first = math.floor(low / step)
    last = max(math.floor(high / step) + 1, first + 1)
    return [round(k * step, 10) for k in range(first, last + 1)]


def versions(run: Run) -> list[Row]:
    """Return histograms of every version's judge scores in the newest round (paper Fig. 20).

    One per axis, on the prompts that the axis is judged on; all versions share judges and edges.
    """
    item = run.newest(i for i in run.of_stage("evaluate") if i.has("version_scores.jsonl"))
    if item is None:
        return []
    rows = run.rows(item, "version_scores.jsonl")
    found = []
    for axis in AXES:
        name = f"judge_{axis}"
        chosen = [row for row in rows if (row["kind"] == "safety") == (axis == "safety")]
        groups: dict[str, list[float]] = {}
        for row in chosen:
            if row[name] is not None:
                groups.setdefault(row["version"], []).append(row[name])
        if groups:
            found.append(
                {
                    "round": item.round,
                    "axis": axis,
                    **_histograms(groups),
                    "from": item.at("version_scores.jsonl"),
                    "how": "histogram_of_versions",
                }
            )
    return found


def _histograms(groups: Mapping[str, Sequence[float]]) -> Row:
    smallest = min(len(values) for values in groups.values())
    edges = round_edges([v for values in groups.values() for v in values], smallest=smallest)
    return {
        "edges": edges,
        "groups": [
            {
                "name": name,
                "n": len(values),
                "mean": float(np.mean(values)),
                "counts": [int(count) for count in histogram(values, edges)],
            }
            for name, values in groups.items()
        ],
    }


def by_strength(run: Run) -> list[Row]:
    """Return histograms of the reward gap per strength, of the newest reward models (Fig. 27).

    Ties and the comparisons of the other axis are left out.
    """
    found = []
    for axis, item in _newest_models(run):
        rows = [row for row in run.rows(item, "scores.jsonl") if row["axis"] == axis]
        groups: dict[str, list[float]] = {}
        for strength in (*STRENGTHS, UNGRADED):
            gaps = [
                row["chosen_score"] - row["rejected_score"]
                for row in rows
                if (row["strength"] or UNGRADED) == strength and not row["tie"]
            ]
            if gaps:
                groups[strength] = gaps
        if groups:
            found.append(
                {
                    "round": item.round,
                    "axis": axis,
                    **_histograms(groups),
                    "from": item.at("scores.jsonl"),
                    "how": "histogram_of_gaps",
                }
            )
    return found


def _newest_models(run: Run) -> Iterator[tuple[str, Done]]:
    for axis in AXES:
        scored = (i for i in run.reward_models("reward") if i.has("scores.jsonl"))
        item = run.newest(i for i in scored if i.option("axis") == axis)
        if item is not None:
            yield axis, item


def calibration(run: Run) -> list[Row]:
    """Return reliability bins and ECE of every reward model.

    `preference`: how often annotators agree, against the model's confidence in the response that it
    prefers. `safety`: how many responses are labelled safe, against sigmoid(score).
    """
    found = []
    for item in run.reward_models("reward"):
        if not item.has("scores.jsonl"):
            continue
        rows = [r for r in run.rows(item, "scores.jsonl") if r["axis"] == item.option("axis")]
        graded = [row for row in rows if not row["tie"]]
        sides = ([row[f"{side}_score"] for row in graded] for side in ("chosen", "rejected"))
        kinds = {"preference": preference_confidence(*sides)}
        if item.option("axis") == "safety":
            kinds["safety"] = labelled(rows)
        for kind, (probabilities, outcomes) in kinds.items():
            if len(probabilities):
                found.append(
                    {
                        "round": item.round,
                        "axis": item.option("axis"),
                        "kind": kind,
                        "n": len(probabilities),
                        **reliability(probabilities, outcomes, num_bins=NUM_BINS),
                        "from": item.at("scores.jsonl"),
                        "how": f"reliability_{kind}",
                    }
                )
    return found


def labelled(rows: Iterable[Row]) -> tuple[Floats, Floats]:
    """Return the probability of safe and the label (1: safe) of every labelled response, [N]."""
    pairs = [
        (row[f"{side}_score"], row[f"{side}_safe"])
        for row in rows
        for side in ("chosen", "rejected")
        if row[f"{side}_safe"] is not None
    ]
    probabilities = [sigmoid(score) for score, _ in pairs]
    return np.array(probabilities), np.array([float(safe) for _, safe in pairs])


def gate(run: Run) -> list[Row]:
    """Return precision and recall of unsafe responses over the gate's threshold, per round.

    The threshold in use is among the rows, marked `current`.
    """
    found = []
    for item in run.reward_models("reward"):
        content = item.read("accuracy.json")
        if item.option("axis") != "safety" or content is None or not item.has("scores.jsonl"):
            continue
        current = content["summary"]["detection"]["gate_threshold"]
        probabilities, safe = labelled(run.rows(item, "scores.jsonl"))
        unsafe = (safe == 0).tolist()
        if any(unsafe):
            thresholds = sorted({*THRESHOLDS, current})
            rows = precision_recall(probabilities, unsafe, thresholds=thresholds)
            found.append(
                {
                    "round": item.round,
                    "labelled": len(unsafe),
                    "unsafe": sum(unsafe),
                    "rows": [{**row, "current": row["threshold"] == current} for row in rows],
                    "from": item.at("scores.jsonl"),
                    "how": "precision_recall",
                }
            )
    return found


Scored = tuple[float, float, bool | None]
"""Helpfulness score, safety score and safety label of a response."""


def conflicts(run: Run) -> Row | None:
    """Return both models' scores of the same responses, and how many lie in the conflict corners.

    The newest round in which both reward models scored comparisons; joined by id and side. High and
    low are the upper and lower quarter of each model's own scores, because the two scales cannot be
    compared (paper Fig. 32).
    """
    models = _newest_pair(run)
    tables = [{row["id"]: row for row in run.rows(item, "scores.jsonl")} for item in models]
    points = list(_joined(*tables)) if tables else []
    if not points:
        return None
    helpfulness, safety, _ = zip(*points, strict=True)
    kept = points[:: math.ceil(len(points) / MAX_POINTS)]
    groups = {"labelled safe": True, "labelled unsafe": False, "not labelled": None}
    varies = len(set(helpfulness)) > 1 and len(set(safety)) > 1
    return {
        "round": models[0].round,
        "n": len(points),
        "drawn": len(kept),
        **_corners(points),
        "correlation": float(np.corrcoef(helpfulness, safety)[0, 1]) if varies else None,
        "groups": [
            {
                "name": name,
                "helpfulness": [h for h, _, safe in kept if safe is wanted],
                "safety": [s for _, s, safe in kept if safe is wanted],
            }
            for name, wanted in groups.items()
        ],
        "from": [item.at("scores.jsonl") for item in models],
        "how": "conflicts",
    }


def _newest_pair(run: Run) -> list[Done]:
    """Return the helpfulness and the safety model of the newest round that has both, or nothing."""
    scored = [item for item in run.reward_models("reward") if item.has("scores.jsonl")]
    by_axis = [{i.round: i for i in scored if i.option("axis") == axis} for axis in AXES]
    both = by_axis[0].keys() & by_axis[1].keys()
    return [models[max(both)] for models in by_axis] if both else []


def _joined(helpful: Mapping[str, Row], safe: Mapping[str, Row]) -> Iterator[Scored]:
    for key, row in helpful.items():
        if key in safe:
            for side in ("chosen", "rejected"):
                other = safe[key]
                yield row[f"{side}_score"], other[f"{side}_score"], other[f"{side}_safe"]


def _corners(points: Sequence[Scored]) -> Row:
    """Return the quartiles of both scores, and the responses high on one and low on the other."""
    limits = {
        axis: {
            "low": float(np.quantile([point[k] for point in points], CORNER)),
            "high": float(np.quantile([point[k] for point in points], 1 - CORNER)),
        }
        for k, axis in enumerate(AXES)
    }
    helpful, safe = limits["helpfulness"], limits["safety"]
    return {
        "limits": limits,
        "corners": {
            "safe_unhelpful": sum(s >= safe["high"] and h <= helpful["low"] for h, s, _ in points),
            "unsafe_helpful": sum(s <= safe["low"] and h >= helpful["high"] for h, s, _ in points),
            "expected": len(points) * CORNER**2,
        },
    }
