"""What a node writes while it runs: metrics, samples, its log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.config import LauncherKind
from rlhf.launch.local import PLAN
from rlhf.launch.operator import BACKGROUND, BACKGROUND_LOG, background_process
from rlhf.nodes import Node
from rlhf.runner import within_limit
from rlhf.service.facts.files import parsed, rows, stamp, tail, thinned, whole_lines
from rlhf.service.facts.nodes import NodeRow
from rlhf.service.facts.runs import Run
from rlhf.state import LOG

METRICS = "metrics.jsonl"
SAMPLES = ("samples.jsonl", "responses.jsonl")
"""Files of texts, the first that is there; never pairs.jsonl, whose models annotators must not
know."""


def read_metrics(
    run: Run,
    node: Node,
    *,
    names: Sequence[str] | None = None,
    after: int | None = None,
    before: int | None = None,
    points: int = 500,
) -> dict[str, Any]:
    """Return a node's metrics: the rows with after < step < before, thinned evenly to `points`.

    `names` keeps these metrics only, and the rows that hold one of them; it is applied before
    thinning, so that a metric which is written seldom is not thinned away by the others.
    `available` lists all metrics of the file, `total` counts its rows, `matched` those of the
    window. `latest` holds the newest value of every metric: some are written now and then only.
    """
    available: set[str] = set()
    latest: dict[str, Any] = {}
    matched: list[dict[str, Any]] = []
    total = 0
    for row in rows(run.folder / node.name / METRICS):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        total += 1
        available.update(row.keys() - {"step"})
        latest |= {name: value for name, value in row.items() if value is not None}
        is_within = (after is None or step > after) and (before is None or step < before)
        if not is_within:
            continue
        kept = row if names is None else {k: v for k, v in row.items() if k in names or k == "step"}
        if names is None or len(kept) > 1:
            matched.append(kept)
    return {
        "node": node.name,
        "available": sorted(available),
        "total": total,
        "matched": len(matched),
        "latest": {name: latest[name] for name in sorted(latest.keys() - {"step"})},
        "rows": thinned(matched, points),
    }


def read_samples(run: Run, node: Node, *, offset: int = 0, limit: int = 50) -> dict[str, Any]:
    """Return texts that a node wrote: `total` rows in `file`, `items` those from `offset` on.

    `file` is "" for a node that has written none.
    """
    for name in SAMPLES:
        path = run.folder / node.name / name
        if not path.exists():
            continue
        total = 0
        items: list[dict[str, Any]] = []
        for total, line in enumerate(whole_lines(path), 1):
            if offset < total <= offset + limit:
                items.append(parsed(line) or {})
        return {"node": node.name, "file": name, "total": total, "items": items}
    return {"node": node.name, "file": "", "total": 0, "items": []}


def has_ended_early(run: Run, nodes: Sequence[NodeRow]) -> bool:
    """Tell whether the process that `rlhf launch` started here ended before everything was done.

    Not where something else works on the run.
    """
    if run.config.launcher.kind is not LauncherKind.local:
        return False
    launched, planned = stamp(run.folder / BACKGROUND), stamp(run.folder / PLAN)
    if launched is None or planned is None or launched[0] < planned[0]:
        # Where the plan became longer since, what is left was not there yet.
        return False
    wanted = {node.name for node in within_limit(run.config, run.plan)}
    states = {node.state for node in nodes if node.name in wanted}
    is_left = "running" not in states and not states <= {"done"}
    return is_left and background_process(run.folder) is None


def read_background(run: Run, *, lines: int) -> list[str]:
    """Return the last lines of what `rlhf launch` started on this machine, oldest first."""
    return tail(run.folder / BACKGROUND_LOG, lines=lines)


def read_log(run: Run, node: Node, *, lines: int = 200) -> list[str]:
    """Return the last lines of a node's log that are not blank, oldest first."""
    return tail(run.folder / node.name / LOG, lines=lines)
