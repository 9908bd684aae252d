"""What a run's finished nodes left on disk, as one JSON tree: the content of report.json.

Only nodes with a manifest are read, so an unfinished run gives a shorter report. `sources` says how
every number names the file it comes from; docs/metrics.md describes every field, and
`report.schema.json` beside this package is its JSON Schema.
"""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.report.gather import cost, data, reward, scores, training, versions
from rlhf.report.gather.reward import MIN_PROMPTS
from rlhf.report.gather.sources import Row, Run
from rlhf.report.gather.summary import summary

SCHEMA_VERSION = 1
"""Raised when a field of report.json changes its meaning or goes away."""


def gather(run_dir: Path, *, store: Path | None = None) -> Row:
    """Return the report of a run; ArtifactError if there is no plan.json.

    `store` is the folder of all streams, by default the one that the run was started with; where it
    is not there, nothing is said about the batches.
    """
    run = Run.open(run_dir, store)
    evaluated = versions.evaluations(run)
    nodes = cost.nodes(run)
    report: Row = {
        "schema_version": SCHEMA_VERSION,
        "run": run.plan["run"],
        "recipe": run.plan["recipe"],
        "nodes_done": len(run.done),
        "nodes_planned": len(run.plan["nodes"]),
        "from": "plan.json#",
        "how": "counted",
        "settings": _settings(run),
        "versions": versions.versions(run, evaluated),
        "reward_accuracy": reward.accuracy(run, role="reward", file="accuracy.json"),
        "reward_accuracy_before": reward.accuracy(run, role="reward", file="accuracy_before.json"),
        "reward_accuracy_other_axis": reward.accuracy(
            run, role="reward", file="accuracy.json", other_axis=True
        ),
        "judge_accuracy": reward.accuracy(run, role="judge", file="accuracy.json"),
        "reward_by_source": reward.cells_by_source(run),
        "reward_by_batch": reward.cells_by_batch(run),
        "reward_curves": reward.curves(run),
        "safety_detection": reward.detection(run),
        "mixtures": run.artifacts("reward", "mixture.json"),
        "version_histograms": scores.versions(run),
        "gap_histograms": scores.by_strength(run),
        "calibration": scores.calibration(run),
        "gate": scores.gate(run),
        "conflicts": scores.conflicts(run),
        "evaluations": evaluated,
        "over_optimisation": versions.over_optimisation(run),
        "examples": versions.examples(run),
        "rejection": run.artifacts("rejection", "selection.json"),
        "temperature": run.artifacts("sweep", "temperature.json"),
        "ppo": training.ppo(run),
        "batches": data.batches(run),
        "corrections": data.corrections(run),
        "quality": data.quality(run),
        "nodes": nodes,
        "environments": cost.environments(run),
        "cost": cost.cost(run, nodes),
    }
    report["summary"] = summary(report)
    # What is returned is what a reader of the file gets: tuples are lists, keys are strings.
    tree: Row = json.loads(json.dumps(report, allow_nan=False))
    return tree


def _settings(run: Run) -> Row | None:
    """Return the frozen settings that the page refers to; None for a run without run.yaml."""
    if run.settings is None:
        return None
    names = ("seed", "model", "data", "reward", "judge", "gate", "rejection", "ppo", "evaluate")
    kept = {name: run.settings[name] for name in names if name in run.settings}
    return {**kept, "from": "run.yaml#"}


__all__ = ["MIN_PROMPTS", "SCHEMA_VERSION", "Row", "gather"]
