"""What a run's finished nodes left on disk, as one JSON tree: the content of report.json.

Only nodes with a manifest are read, so an unfinished run gives a shorter report. docs/metrics.md
describes every field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.artifacts import NodeDir, read_json
from rlhf.data.records import STRENGTHS
from rlhf.report.cost import read_estimates, used

Row = dict[str, Any]

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


@dataclass(frozen=True, slots=True)
class Done:
    """A finished node: its row in plan.json, its folder, its manifest."""

    node: Mapping[str, Any]
    folder: Path
    manifest: Mapping[str, Any]

    @property
    def round(self) -> int:
        """Return the node's round."""
        return int(self.node["round"])

    def read(self, name: str) -> Any:
        """Return one of the node's JSON artifacts, or None where it wrote none."""
        return read_json(self.folder / name) if (self.folder / name).exists() else None


def gather(run_dir: Path) -> Row:
    """Return the report of a run; ArtifactError if there is no plan.json."""
    plan = read_json(run_dir / "plan.json")
    nodes = plan["nodes"]
    done = [
        Done(node, folder.path, folder.manifest())
        for node in nodes
        if (folder := NodeDir(run_dir / node["name"])).is_done()
    ]
    expected = read_estimates(run_dir)
    evaluations = [_evaluation(item) for item in _of_stage(done, "evaluate")]
    return {
        "run": plan["run"],
        "recipe": plan["recipe"],
        "nodes_done": len(done),
        "nodes_planned": len(nodes),
        "versions": _versions(run_dir, evaluations),
        "reward_accuracy": _accuracy(done, role="reward", file="accuracy.json"),
        "reward_accuracy_before": _accuracy(done, role="reward", file="accuracy_before.json"),
        "reward_accuracy_other_axis": _accuracy(
            done, role="reward", file="accuracy.json", other_axis=True
        ),
        "judge_accuracy": _accuracy(done, role="judge", file="accuracy.json"),
        "safety_detection": _detection(done),
        "mixtures": _artifacts(done, "reward", "mixture.json"),
        "evaluations": evaluations,
        "rejection": _artifacts(done, "rejection", "selection.json"),
        "ppo": _artifacts(done, "ppo", "ppo.json"),
        "nodes": [_node(item, expected.get(item.node["name"])) for item in done],
    }


def _of_stage(done: list[Done], stage: str) -> Iterator[Done]:
    return (item for item in done if item.node["stage"] == stage)


def _artifacts(done: list[Done], stage: str, file: str) -> list[Row]:
    """Return one artifact of every node of a stage, with the node's name and round."""
    found = ((item, item.read(file)) for item in _of_stage(done, stage))
    return [
        {"node": item.node["name"], "round": item.round, **content}
        for item, content in found
        if content is not None
    ]


def _accuracy(done: list[Done], *, role: str, file: str, other_axis: bool = False) -> list[Row]:
    """Return the accuracy of every model of a role per strength, over all sources and batches.

    `axis` is the model's; with `other_axis` the comparisons are those of the axis it is not for.
    Strengths come strongest first, ungraded comparisons after them; None is all of them together.
    """
    rows = []
    for item in _of_stage(done, "reward"):
        content = item.read(file)
        if item.node["options"]["role"] != role or content is None:
            continue
        axis = item.node["options"]["axis"]
        for cell in sorted(content["cells"], key=_strength_order):
            is_total = cell["source"] is None and cell["batch"] is None
            if is_total and (cell["axis"] != axis) == other_axis:
                values = {field: cell[field] for field in CELL_FIELDS}
                few = cell["prompts"] < MIN_PROMPTS
                rows.append({"round": item.round, "axis": axis, **values, "few": few})
    return rows


def _strength_order(cell: Row) -> int:
    strength = cell["strength"]
    if strength is None:
        return len(STRENGTHS) + 1
    return STRENGTHS.index(strength) if strength in STRENGTHS else len(STRENGTHS)


def _detection(done: list[Done]) -> list[Row]:
    """Return how well each round's safety model finds responses that are labelled unsafe."""
    rows = []
    for item in _of_stage(done, "reward"):
        content = item.read("accuracy.json")
        if content is not None and "detection" in content["summary"]:
            role = item.node["options"]["role"]
            rows.append({"round": item.round, "role": role, **content["summary"]["detection"]})
    return rows


def _evaluation(item: Done) -> Row:
    decision = item.read("decision.json")
    return {
        "round": item.round,
        **item.read("evaluation.json"),
        "decision": {"promoted": decision["promoted"], "reasons": decision["reasons"]},
    }


def _versions(run_dir: Path, evaluations: list[Row]) -> list[Row]:
    """Return every version with its scores under the newest judge pair, and its gold.

    All versions are scored by the same pair, so their scores may be compared.
    """
    path = run_dir / "versions.json"
    listed = read_json(path) if path.exists() else []
    return [
        {
            "name": version["name"],
            "promoted": version["state"] == "promoted",
            "state": version["state"],
            "node": version["node"],
            "against": version["against"],
            "overruled": version["overruled"],
            "reasons": version["reasons"],
            **_measured(version["name"], evaluations),
        }
        for version in listed
    ]


def _measured(name: str, evaluations: list[Row]) -> Row:
    """Return scores from the newest evaluation; gold from the one that made the version known."""
    newest = evaluations[-1] if evaluations else None
    scores = None
    if newest is not None and name in newest["versions"]:
        scores = {"round": newest["round"], **newest["versions"][name]}
    for side in ("candidate", "promoted"):
        for evaluation in evaluations:
            if evaluation[side] == name:
                gold = evaluation["gold"]
                return {"scores": scores, "gold": None if gold is None else gold[side]}
    return {"scores": scores, "gold": None}


def _node(item: Done, estimate: Row | None) -> Row:
    manifest = item.manifest
    return {
        "node": item.node["name"],
        "stage": item.node["stage"],
        "round": item.round,
        "seconds": manifest["wall_seconds"],
        "peak_memory_mb": manifest["peak_memory_mb"],
        "exact": manifest["exact"],
        "energy": manifest.get("energy"),
        "used": used(manifest),
        "estimate": estimate,
    }
