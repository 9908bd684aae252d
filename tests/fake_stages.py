"""Stages without torch: they count, checkpoint and write what the runner needs."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rlhf.artifacts import digest_json, read_json, write_json, write_jsonl
from rlhf.config import OnBadRow
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import AXES, Kind
from rlhf.nodes import NodeContext
from rlhf.toy import World

REVISION = 1
STEPS = 4
MEET_SECONDS = 30.0


def run(context: NodeContext) -> None:
    """Count to STEPS in checkpointed steps; the model is a digest of everything that counts."""
    directory = context.directory
    _meet(context)
    saved = directory.resume()
    total = saved.state["total"] if saved else 0
    for step in range((saved.step if saved else 0) + 1, STEPS + 1):
        total += step * context.seed
        directory.metrics.append({"step": step, "total": total, "loaded": bool(saved)})
        with directory.checkpoint(step, {"total": total}):
            pass
        directory.step(step, STEPS)
        time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
    if context.node.name in os.environ.get("FAKE_FAIL", "").split(","):
        raise RuntimeError("planted failure")
    if context.node.stage == "evaluate":
        _decide(context)
    elif context.node.stage == "collect":
        _collect(context)
    else:
        value = digest_json([total, context.inputs.digests()])
        write_json(directory.model / "weights.json", value)


def _meet(context: NodeContext) -> None:
    """Wait until all nodes named in FAKE_MEET run at the same time; fail after MEET_SECONDS."""
    names = os.environ.get("FAKE_MEET", "").split(",")
    if context.node.name not in names:
        return
    run_folder = context.directory.path.parent.parent
    (context.directory.path / "arrived").touch()
    end = time.monotonic() + MEET_SECONDS
    while not all((run_folder / name / "arrived").exists() for name in names):
        if time.monotonic() > end:
            raise RuntimeError(f"{context.node.name} ran without the others of {names}")
        time.sleep(0.02)


def _decide(context: NodeContext) -> None:
    round_ = context.node.round
    refused = str(round_) in os.environ.get("FAKE_REFUSE", "").split(",")
    decision = {
        "version": f"v{round_}",
        "against": context.inputs.models["promoted"].name,
        "promoted": not refused,
        "reasons": [{"rule": "fake", "value": 0.0, "bound": 0.0, "ok": not refused}],
    }
    write_json(context.directory.path / "decision.json", decision)


def _collect(context: NodeContext) -> None:
    write_jsonl(context.directory.path / "pairs.jsonl", [])
    if "batch" not in context.node.options:
        return
    config, batch = context.config, str(context.node.options["batch"])
    world = World(config.seed)
    rows = [
        row.to_json() | {"id": f"{row.id}-{batch}"}
        for axis in AXES
        for row in world.comparison_set(4, axis=axis, seed=context.seed)
    ]
    for row in rows:
        row.pop("batch_id")
    path = context.directory.path / "rated.jsonl"
    write_jsonl(path, rows)
    store = Store(Path(config.paths.store), config.data.stream)
    ingested = ingest_file(
        path,
        store,
        kind=Kind.batch,
        id=batch,
        on_bad_row=OnBadRow.quarantine,
        heldout_share=config.data.heldout_share,
        heldout_salt=config.data.heldout_salt,
    )
    entry = {"stream": config.data.stream, "id": batch, "digest": ingested.digest}
    write_json(context.directory.path / "batch.json", entry)


def read_steps(folder: Path) -> list[int]:
    """Return the steps of a node's finished checkpoints (tests look at killed nodes with it)."""
    markers = sorted(folder.glob("checkpoints/step-*/complete.json"))
    return [read_json(marker)["step"] for marker in markers]
