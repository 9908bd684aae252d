"""Where results come from and what they cost: every node's inputs, versions, seeds and energy."""

from __future__ import annotations

from typing import Any

from rlhf.artifacts import read_json
from rlhf.report.cost import ESTIMATE, used
from rlhf.report.gather.sources import Done, Row, Run, at

NODE_FIELDS = (
    "wall_seconds",
    "peak_memory_mb",
    "peak_gpu_memory_mb",
    "exact",
    "git_commit",
    "source_hash",
    "seeds",
    "num_processes",
    "device_seconds",
    "energy",
    "host",
)
"""What the report keeps of a manifest, where it has it."""

SUMMED = ("device_hours", "kwh", "co2_kg")


def nodes(run: Run) -> list[Row]:
    """Return every finished node: what it read, what it cost and what was estimated."""
    estimates = _estimates(run)
    return [_node(item, estimates.get(item.name)) for item in run.done]


def _node(item: Done, estimate: Row | None) -> Row:
    kept = {name: item.manifest[name] for name in NODE_FIELDS if name in item.manifest}
    inputs = item.read("inputs.json") or {"models": {}, "data": []}
    reads = [
        {"role": role, "name": model["name"], "digest": model["digest"]}
        for role, model in inputs["models"].items()
    ]
    reads += [
        {"role": row["kind"], "name": row["id"], "digest": row["digest"]} for row in inputs["data"]
    ]
    return {
        "node": item.name,
        "stage": item.stage,
        "round": item.round,
        **kept,
        "used": {**used(item.manifest), "from": item.at("manifest.json"), "how": "used"},
        "reads": reads,
        "estimate": estimate,
        "from": item.at("manifest.json"),
    }


def _estimates(run: Run) -> dict[str, Row]:
    path = run.folder / ESTIMATE
    if not path.exists():
        return {}
    rows = read_json(path)["nodes"]
    return {row["node"]: {**row, "from": at(ESTIMATE, "nodes", i)} for i, row in enumerate(rows)}


def environments(run: Run) -> list[Row]:
    """Return the distinct environments that nodes ran in, and which nodes."""
    found: list[Row] = []
    for item in run.done:
        names = ("versions", "cpu_model", "machine", "device")
        kept: dict[str, Any] = {
            name: item.manifest[name] for name in names if name in item.manifest
        }
        same = next((row for row in found if all(row.get(k) == v for k, v in kept.items())), None)
        if same is None:
            same = {**kept, "nodes": [], "from": item.at("manifest.json")}
            found.append(same)
        same["nodes"].append(item.name)
    return [row for row in found if row.keys() - {"nodes", "from"}]


def cost(run: Run, rows: list[Row]) -> Row:
    """Return sums over the finished nodes, and the estimate's totals and assumptions.

    A sum is None unless every finished node has the value: a part of a sum misleads.
    """
    totals: Row = {"wall_seconds": _total([row["wall_seconds"] for row in rows])}
    totals |= {name: _total([row["used"][name] for row in rows]) for name in SUMMED}
    energies = [row.get("energy") or {} for row in rows]
    methods = sorted({energy["method"] for energy in energies if energy.get("method")})
    path = run.folder / ESTIMATE
    estimate = None
    if path.exists():
        content = read_json(path)
        estimate = {
            "totals": content["totals"],
            "assumptions": content["assumptions"],
            "from": at(ESTIMATE),
        }
    return {
        "actual": {
            **totals,
            "methods": methods,
            "from": [row["from"] for row in rows],
            "how": "sum",
        },
        "estimate": estimate,
    }


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if values and len(known) == len(values) else None
