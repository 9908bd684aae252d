"""Two runs beside each other: how their settings differ, and the same comparisons judged twice.

Scores of different runs are on different scales and are never subtracted. What can be compared is
accuracy on the comparisons that both runs' reward models were measured on, pair by pair; rates
against each run's own promoted version; and gold, in the toy world.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.algo.intervals import interval_json, paired_clustered_bootstrap
from rlhf.data.records import AXES
from rlhf.inference.accuracy import wins
from rlhf.report.gather import SCHEMA_VERSION, gather
from rlhf.report.gather.sources import RUN_SETTINGS, Done, Row, Run, at

SIDES = ("a", "b")
NOT_COMPARED = ("run", "paths", "ingest", "launcher", "tracking", "checkpoint", "resources")
"""Groups of settings that say where and how a run is executed, not what it computes."""


def compare(folders: Sequence[Path]) -> Row:
    """Return both runs' reports and what can be compared, from the folders of two runs.

    In `from`, `a:` and `b:` name the run that a file belongs to; reports name files of their own.
    """
    runs = [Run.open(folder) for folder in folders]
    names = [str(run.plan["run"]) for run in runs]
    if names[0] == names[1]:
        names = [str(folder) for folder in folders]
    found: Row = {
        "schema_version": SCHEMA_VERSION,
        "names": dict(zip(SIDES, names, strict=True)),
        "settings": list(_settings(runs)),
        "paired_accuracy": [row for axis in AXES if (row := _paired(runs, axis)) is not None],
        "reports": {side: gather(folder) for side, folder in zip(SIDES, folders, strict=True)},
    }
    tree: Row = json.loads(json.dumps(found, allow_nan=False))
    return tree


def _settings(runs: Sequence[Run]) -> Iterator[Row]:
    """Yield every setting that differs, as `key` and both values; None where a run lacks it."""
    flat = [dict(_flat(run.settings or {})) for run in runs]
    for key in sorted({key for side in flat for key in side}):
        values = [side.get(key) for side in flat]
        if values[0] != values[1] and key.partition(".")[0] not in NOT_COMPARED:
            sides = {
                side: {
                    "value": value,
                    "from": _of(side, at(RUN_SETTINGS, *key.split("."))),
                    "how": "setting",
                }
                for side, value in zip(SIDES, values, strict=True)
            }
            yield {"key": key, **sides}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _of(side: str, source: str) -> str:
    return f"{side}:{source}"


def _paired(runs: Sequence[Run], axis: str) -> Row | None:
    """Return the newest reward models' accuracies on the comparisons that both scored."""
    settings = runs[0].settings
    items = [_newest(run, axis) for run in runs]
    first, second = items
    if first is None or second is None or settings is None:
        return None
    tables = [
        {
            row["id"]: row
            for row in run.rows(item, "scores.jsonl")
            if row["axis"] == axis and not row["tie"]
        }
        for run, item in ((runs[0], first), (runs[1], second))
    ]
    # An id alone may stand for another pair in another stream.
    fields = ("strength", "prompt", "source")
    shared = [
        key
        for key, row in tables[0].items()
        if key in tables[1] and all(row[f] == tables[1][key][f] for f in fields)
    ]
    right = [
        [wins(table[key]["chosen_score"], table[key]["rejected_score"]) for key in shared]
        for table in tables
    ]
    difference = paired_clustered_bootstrap(
        right[1],
        right[0],
        [tables[0][key]["prompt"] for key in shared],
        num_draws=settings["evaluate"]["bootstrap_draws"],
        seed=settings["seed"],
        level=settings["evaluate"]["level"],
    )
    return {
        "axis": axis,
        "rounds": {"a": first.round, "b": second.round},
        "shared": len(shared),
        "only": {side: len(t) - len(shared) for side, t in zip(SIDES, tables, strict=True)},
        "accuracy": {
            side: sum(values) / len(values) if values else None
            for side, values in zip(SIDES, right, strict=True)
        },
        "difference": interval_json(difference, len(shared)),
        "from": [
            _of(side, item.at("scores.jsonl"))
            for side, item in zip(SIDES, (first, second), strict=True)
        ],
        "how": "paired_accuracy",
    }


def _newest(run: Run, axis: str) -> Done | None:
    models = (item for item in run.reward_models("reward") if item.has("scores.jsonl"))
    return run.newest(item for item in models if item.option("axis") == axis)
