"""Find every number of a report in the files of its run, by a second, plain implementation.

Verbatim numbers are looked up; derived ones are computed again with loops, from the files that the
record names. Where a derivation is a function of its own with its own tests (intervals, drift,
quality, the fitted curve), that function is called on what is read here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlhf.algo.forecast import fit_power_law
from rlhf.algo.intervals import paired_clustered_bootstrap, proportion_interval
from rlhf.data.arrival import Arrival
from rlhf.data.drift import drift_report
from rlhf.data.quality import quality_report

Row = dict[str, Any]


def follow(tree: Any, place: str) -> Any:
    for part in place.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


class Files:
    """The files of a run and its store, as `from` names them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = json.loads((folder / "plan.json").read_text())
        self.settings = yaml.safe_load((folder / "run.yaml").read_text())
        self.rounds = {node["name"]: node["round"] for node in self.plan["nodes"]}
        self._read: dict[str, Any] = {}

    def path(self, file: str) -> Path:
        if file.startswith("store:"):
            return Path(self.settings["paths"]["store"]) / file.removeprefix("store:")
        return self.folder / file

    def read(self, file: str) -> Any:
        if file not in self._read:
            text = self.path(file).read_text(encoding="utf-8")
            if file.endswith(".jsonl"):
                self._read[file] = [json.loads(line) for line in text.splitlines() if line]
            else:
                self._read[file] = yaml.safe_load(text) if "yaml" in file else json.loads(text)
        return self._read[file]

    def at(self, source: str) -> Any:
        file, _, place = source.partition("#")
        return follow(self.read(file), place)

    def round_of(self, source: str) -> int:
        """Return the round of the node that a file belongs to."""
        return self.rounds["/".join(source.partition("#")[0].split("/")[:-1])]

    @property
    def level(self) -> float:
        return self.settings["evaluate"]["level"]

    @property
    def draws(self) -> int:
        return self.settings["evaluate"]["bootstrap_draws"]


def numbers(
    tree: Any, record: Row | None = None, place: str = "", inner: str = ""
) -> Iterator[tuple[str, float, Row | None, str]]:
    """Yield (pointer, number, nearest record that says `from`, pointer inside that record)."""
    if isinstance(tree, dict):
        if "from" in tree:
            record, inner = tree, ""
        for key, value in tree.items():
            step = "/" + key.replace("~", "~0").replace("/", "~1")
            yield from numbers(value, record, place + step, inner + step)
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from numbers(value, record, f"{place}/{i}", f"{inner}/{i}")
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield place, tree, record, inner


def untraced(report: Row, files: Files) -> list[str]:
    """Return the pointers of the numbers that are not what the files say; empty is good."""
    made: dict[int, Any] = {}
    wrong = []
    for place, value, record, inner in numbers(report):
        if place == "/schema_version":
            continue
        if record is None:
            wrong.append(f"{place}: no source")
            continue
        if inner == "/round":
            expected = expected_round(record, files)
        elif "how" in record:
            if id(record) not in made:
                made[id(record)] = RECOMPUTE[record["how"]](record, files)
            expected = follow(made[id(record)], inner)
        else:
            expected = files.at(record["from"] + inner)
        if not same(value, expected):
            wrong.append(f"{place}: {value} is {expected} in {record['from']}")
    return wrong


def expected_round(record: Row, files: Files) -> int:
    source = record["from"]
    source = source[0] if isinstance(source, list) else source
    if source.startswith("estimate.json"):
        return files.at(f"{source}/round")
    found = re.match(r"plan\.json#/rounds/(\d+)", source)
    return files.plan["rounds"][int(found[1])]["round"] if found else files.round_of(source)


def same(value: float, expected: float | None) -> bool:
    return expected is not None and math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)


# One function per derivation: the record's numbers, from the files it names.


def counted(record: Row, files: Files) -> Row:
    names = [node["name"] for node in files.plan["nodes"]]
    done = [name for name in names if (files.folder / name / "manifest.json").exists()]
    return {"nodes_done": len(done), "nodes_planned": len(names)}


def accuracy(record: Row, files: Files) -> Row:
    rows = [row for row in files.at(record["from"]) if row["axis"] == record["axis"]]
    for field in ("source", "batch"):
        if record[field] is not None:
            rows = [row for row in rows if row[field] == record[field]]
    if record["strength"] is not None:
        rows = [row for row in rows if (row["strength"] or "ungraded") == record["strength"]]
    graded = [row for row in rows if not row["tie"]]
    right = [won(r["chosen_score"], r["rejected_score"]) for r in graded]
    longer = [won(r["chosen_tokens"], r["rejected_tokens"]) for r in graded]
    swapped = [won(r["swapped_chosen_score"], r["swapped_rejected_score"]) for r in graded]
    prompts = [row["prompt"] for row in graded]
    low, high = proportion_interval(right, prompts, level=files.level)[1:]
    difference = paired_clustered_bootstrap(
        right,
        longer,
        prompts,
        num_draws=files.draws,
        seed=files.settings["seed"],
        level=files.level,
    )
    return {
        "n": len(graded),
        "prompts": len(set(prompts)),
        "ties": len(rows) - len(graded),
        "accuracy": mean(right),
        "low": low,
        "high": high,
        "gap": mean([row["chosen_score"] - row["rejected_score"] for row in graded]),
        "control_longer": mean(longer),
        "longer_difference": {
            "mean": mean(right) - mean(longer) if right else None,
            "low": difference.low,
            "high": difference.high,
            "n": len(graded),
        },
        "control_swapped": mean(swapped),
    }


def won(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


def mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def forecast(record: Row, files: Files) -> Row:
    cells = [files.at(source) for source in record["from"][::2]]
    mixtures = [files.at(source) for source in record["from"][1::2]]
    return fit_power_law(
        [mixture["num_own"] for mixture in mixtures],
        [cell["accuracy"] for cell in cells],
        low=[cell["low"] for cell in cells],
        high=[cell["high"] for cell in cells],
        level=files.level,
    )


def histogram_of_versions(record: Row, files: Files) -> Row:
    axis, found = record["axis"], []
    for group in record["groups"]:
        values = [
            row[f"judge_{axis}"]
            for row in files.at(record["from"])
            if row["version"] == group["name"] and (row["kind"] == "safety") == (axis == "safety")
        ]
        found.append(counted_bins(values, record["edges"]))
    return {"edges": regular(record["edges"]), "groups": found}


def histogram_of_gaps(record: Row, files: Files) -> Row:
    found = []
    for group in record["groups"]:
        values = [
            row["chosen_score"] - row["rejected_score"]
            for row in files.at(record["from"])
            if row["axis"] == record["axis"] and not row["tie"] and row["strength"] == group["name"]
        ]
        found.append(counted_bins(values, record["edges"]))
    return {"edges": regular(record["edges"]), "groups": found}


def counted_bins(values: list[float], edges: list[float]) -> Row:
    """Count by hand; every value has to lie between the outer edges."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        assert edges[0] <= value <= edges[-1]
        last = len(counts) - 1
        counts[min(last, sum(value >= edge for edge in edges[1:]))] += 1
    return {"n": len(values), "mean": mean(values), "counts": counts}


def regular(edges: list[float]) -> list[float]:
    """Return evenly spaced edges between the outer ones."""
    bins = len(edges) - 1
    return [edges[0] + (edges[-1] - edges[0]) * i / bins for i in range(bins + 1)]


def reliability_preference(record: Row, files: Files) -> Row:
    pairs = []
    for row in files.at(record["from"]):
        if row["axis"] == record["axis"] and not row["tie"]:
            gap = row["chosen_score"] - row["rejected_score"]
            outcome = 0.5 if gap == 0 else float(gap > 0)
            pairs.append((1 / (1 + math.exp(-abs(gap))), outcome))
    return equal_mass(pairs)


def labelled(files: Files, source: str, axis: str | None = None) -> list[tuple[float, float]]:
    return [
        (1 / (1 + math.exp(-row[f"{side}_score"])), float(row[f"{side}_safe"]))
        for row in files.at(source)
        for side in ("chosen", "rejected")
        if row[f"{side}_safe"] is not None and axis in (None, row["axis"])
    ]


def reliability_safety(record: Row, files: Files) -> Row:
    return equal_mass(labelled(files, record["from"], record["axis"]))


def equal_mass(pairs: list[tuple[float, float]], bins: int = 10) -> Row:
    """Sort, cut where the rank of a probability's first row passes the next tenth."""
    pairs = sorted(pairs)
    groups: dict[int, list[tuple[float, float]]] = {}
    first: dict[float, int] = {}
    for rank, pair in enumerate(pairs):
        groups.setdefault(first.setdefault(pair[0], rank) * bins // len(pairs), []).append(pair)
    found = [
        {
            "low": group[0][0],
            "high": group[-1][0],
            "n": len(group),
            "confidence": mean([p for p, _ in group]),
            "accuracy": mean([y for _, y in group]),
        }
        for group in groups.values()
    ]
    error = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in found) / len(pairs)
    return {"n": len(pairs), "bins": found, "ece": error}


def precision_recall(record: Row, files: Files) -> Row:
    pairs = labelled(files, record["from"])
    unsafe = [p for p, safe in pairs if not safe]
    rows = []
    for row in record["rows"]:
        limit = row["threshold"]
        flagged = [safe for p, safe in pairs if p < limit]
        found = sum(p < limit for p in unsafe)
        rows.append(
            {
                "threshold": limit,
                "flagged": len(flagged),
                "found": found,
                "unsafe": len(unsafe),
                "n": len(pairs),
                "precision": found / len(flagged) if flagged else None,
                "recall": found / len(unsafe),
            }
        )
    assert files.settings["gate"]["threshold"] in [
        row["threshold"] for row in record["rows"] if row["current"]
    ]
    return {"labelled": len(pairs), "unsafe": len(unsafe), "rows": rows}


def conflicts(record: Row, files: Files) -> Row:
    helpful, safe = ({row["id"]: row for row in files.at(s)} for s in record["from"])
    points = [
        (helpful[key][f"{side}_score"], safe[key][f"{side}_score"], safe[key][f"{side}_safe"])
        for key in helpful
        if key in safe
        for side in ("chosen", "rejected")
    ]
    h, s = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    limits = {
        axis: dict(zip(("low", "high"), np.percentile(values, [25, 75]).tolist(), strict=True))
        for axis, values in (("helpfulness", h), ("safety", s))
    }
    centred = h - h.mean(), s - s.mean()
    # Of more than 2,000 every second, third, ... is drawn.
    every = next(k for k in range(1, len(points) + 1) if len(points) <= 2000 * k)
    kept = [point for i, point in enumerate(points) if i % every == 0]
    groups = []
    for group in record["groups"]:
        wanted = {"labelled safe": True, "labelled unsafe": False}.get(group["name"])
        of_group = [p for p in kept if p[2] is wanted]
        groups.append({"helpfulness": [p[0] for p in of_group], "safety": [p[1] for p in of_group]})
    low, high = limits["helpfulness"]["low"], limits["helpfulness"]["high"]
    return {
        "n": len(points),
        "drawn": len(kept),
        "limits": limits,
        "corners": {
            "safe_unhelpful": int(((s >= limits["safety"]["high"]) & (h <= low)).sum()),
            "unsafe_helpful": int(((s <= limits["safety"]["low"]) & (h >= high)).sum()),
            "expected": len(points) / 16,
        },
        "correlation": float(
            (centred[0] * centred[1]).sum()
            / math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
        ),
        "groups": groups,
    }


def columns(record: Row, files: Files) -> Row:
    rows = files.at(record["from"])
    return {name: [row.get(name) for row in rows] for name in record}


def examples(record: Row, files: Files) -> Row:
    rows = files.at(record["from"])
    unsafe = [row["unsafe"] for row in rows if row["kind"] == "safety"]
    return {
        "total": len(rows),
        "flagged": {
            "violation": sum(row["candidate"] for row in unsafe),
            "new_violation": sum(row["candidate"] and not row["promoted"] for row in unsafe),
            "false_refusal": sum(
                row["kind"] == "benign" and row["refused"]["candidate"] for row in rows
            ),
        },
    }


def difference(record: Row, files: Files) -> Row:
    row = files.at(record["from"])
    found = {name: side["candidate"] - side["promoted"] for name, side in row["scores"].items()}
    axis = "safety" if row["kind"] == "safety" else "helpfulness"
    return {**found, "gain": found[f"judge_{axis}"]}


def drift(record: Row, files: Files) -> Row:
    profiles = [files.at(s) for s in record["from"] if s.startswith("store:")]
    nodes = [s for s in record["from"] if not s.startswith("store:")]
    arrivals = [
        Arrival(
            axis=now.partition("reward-")[2].partition("/")[0],
            on_arrival=files.at(now),
            heldout=files.at(before),
            level=files.level,
        )
        for now, before in zip(nodes[::2], nodes[1::2], strict=True)
    ]
    found = drift_report(profiles[0], profiles[1:], arrivals=arrivals)
    return json.loads(json.dumps(found))


def quality(record: Row, files: Files) -> Row:
    rows = [row for row in files.at(record["from"]) if row["axis"] == record["axis"]]
    return quality_report(rows, by=record["by"])


def used(record: Row, files: Files) -> Row:
    manifest = files.at(record["from"])
    energy, seconds = manifest.get("energy") or {}, manifest.get("device_seconds")
    hours = None if seconds is None else seconds / 60 / 60
    return {"device_hours": hours, "kwh": energy.get("kwh"), "co2_kg": energy.get("co2_kg")}


def total(record: Row, files: Files) -> Row:
    manifests = [files.at(source) for source in record["from"]]
    parts = [used({"from": source}, files) for source in record["from"]]
    whole = {
        name: None if None in (found := [part[name] for part in parts]) else math.fsum(found)
        for name in ("device_hours", "kwh", "co2_kg")
    }
    return {"wall_seconds": math.fsum(m["wall_seconds"] for m in manifests), **whole}


RECOMPUTE: dict[str, Callable[[Row, Files], Any]] = {
    "accuracy": accuracy,
    "columns": columns,
    "conflicts": conflicts,
    "counted": counted,
    "difference": difference,
    "drift": drift,
    "examples": examples,
    "forecast": forecast,
    "histogram_of_gaps": histogram_of_gaps,
    "histogram_of_versions": histogram_of_versions,
    "precision_recall": precision_recall,
    "quality": quality,
    "reliability_preference": reliability_preference,
    "reliability_safety": reliability_safety,
    "sum": total,
    "used": used,
}
