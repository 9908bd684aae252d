"""What a node writes while it runs: metrics, samples, its log."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from rlhf.nodes import Node
from rlhf.service.facts.files import parsed, rows, tail, thinned, whole_lines
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
    window.
    """
    available: set[str] = set()
    matched: list[dict[str, Any]] = []
    total = 0
    for row in rows(run.folder / node.name / METRICS):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        total += 1
        available.update(row.keys() - {"step"})
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
        total = sum(1 for _ in whole_lines(path))
        found = (parsed(line) for line in islice(whole_lines(path), offset, offset + limit))
        items = [row if row is not None else {} for row in found]
        return {"node": node.name, "file": name, "total": total, "items": items}
    return {"node": node.name, "file": "", "total": 0, "items": []}


def read_log(run: Run, node: Node, *, lines: int = 200) -> list[str]:
    """Return the last lines of a node's log that are not blank, oldest first."""
    return tail(run.folder / node.name / LOG, lines=lines)
