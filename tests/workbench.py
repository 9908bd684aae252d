"""Kill a node of the tiny run where a test wants it, run it again, and compare what came out."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_run import TinyRun, link_or_copy, rows_without_time

from rlhf.artifacts import (
    COMPLETE,
    NodeDir,
    list_files,
    read_json,
    read_jsonl,
    sha256_file,
)
from rlhf.compose import freeze
from rlhf.data.ledger import FOLDERS
from rlhf.data.records import AXES, Kind
from rlhf.faults import KILL_VARIABLE, STOP_VARIABLE
from rlhf.fingerprint import STAGES
from rlhf.launch.local import NodeServer
from rlhf.nodes import Node
from rlhf.plan import Plan
from rlhf.state import LOG
from rlhf.worker import process_environment

NODES = {
    "sft": "sft",
    "reward": "round-02/reward-helpfulness",
    "sweep": "round-01/sweep",
    "rejection": "round-01/rejection",
    "ppo": "round-02/ppo",
    "evaluate": "round-02/evaluate",
    "collect": "round-02/collect",
}
"""The node that stands for each stage: where there is a choice, the one that reads more."""

TRAINING = ("sft", "reward", "rejection", "ppo")
LAST_ARTIFACT = {
    "sft": "model",
    "reward": "accuracy.json",
    "sweep": "temperature.json",
    "rejection": "selection.json",
    "ppo": "ppo.json",
    "evaluate": "responses.jsonl",
    "collect": "batch.json",
}
"""What each stage writes last, before the runner writes the manifest."""

EVERY_STEPS = 2
"""Steps between checkpoints; none comes from the clock, so that runs can be compared."""

NOT_COMPARED = ("metrics.jsonl", "provenance.json", "inputs.json", "config.yaml")
"""Files with times or with the paths of this copy; metrics are compared without the times."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a killed node had finished: its newest checkpoint, and files with their inodes."""

    step: int
    files: dict[str, tuple[int, int]]
    log_size: int

    @classmethod
    def of(cls, folder: Path) -> Kept:
        """Look at a node that was killed."""
        saved = NodeDir(folder).last_checkpoint()
        return cls(saved.step if saved else 0, finished(folder), (folder / LOG).stat().st_size)


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of the finished shards and the finished model."""
    paths = [*folder.glob("shards/*.jsonl"), *folder.glob("model/*")]
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in paths
    }


class Workbench:
    """Copies of the tiny run in which single nodes are killed and run again."""

    def __init__(self, tiny: TinyRun, folder: Path, server: NodeServer) -> None:
        self.tiny, self.folder = tiny, folder
        self._server = server
        self._references: dict[str, TinyRun] = {}

    @classmethod
    @contextmanager
    def open(cls, tiny: TinyRun, folder: Path) -> Iterator[Workbench]:
        """Start one server for all tests, so that imports are paid once."""
        environment = process_environment(tiny.config)
        with NodeServer(folder, stages=STAGES, environment=environment) as server:
            yield cls(tiny, folder, server)

    def prepare(self, name: str, root: Path) -> TinyRun:
        """Copy what a node reads, as it was before the node started."""
        run, plan = TinyRun(root), self.tiny.plan
        shutil.copytree(self.tiny.root / "store", root / "store")
        parents = ancestors(plan, name)
        for node in plan.nodes:
            if node in parents:
                source, target = self.tiny.folder / node.name, run.folder / node.name
                shutil.copytree(source, target, copy_function=link_or_copy)
            elif "batch" in node.options:
                folder = self.tiny.store.folder.name
                batch = root / "store" / folder / FOLDERS[Kind.batch] / node.options["batch"]
                shutil.rmtree(batch, ignore_errors=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        for file in ("plan.json", "run.yaml"):
            shutil.copy2(self.tiny.folder / file, run.folder / file)
        config = run.config
        config.checkpoint.every_steps = EVERY_STEPS
        (run.folder / "run.yaml").write_text(freeze(config), encoding="utf-8")
        return run

    def run(self, run: TinyRun, name: str, *, kill: str = "", stop: str = "") -> int:
        """Run a node in a process of its own; returns its exit code, -9 when it was killed."""
        self._server.run_dir = run.folder
        self._server.start(name, environment={KILL_VARIABLE: kill, STOP_VARIABLE: stop})
        ended, code = self._server.wait(lambda: None)
        assert ended == name
        return code

    def finish(self, run: TinyRun, name: str) -> None:
        """Run a node to its manifest; a kill right after it keeps the last checkpoints to see."""
        code = self.run(run, name, kill=f"after-rename:{name}/manifest.json")
        assert code == -9, (run.folder / name / LOG).read_text(encoding="utf-8")
        assert NodeDir(run.folder / name).is_done()

    def reference(self, name: str) -> TinyRun:
        """Return a copy in which the node ran without interruption and kept its checkpoints."""
        if name not in self._references:
            run = self.prepare(name, self.folder / f"reference-{name.replace('/', '-')}")
            self.finish(run, name)
            self._references[name] = run
        return self._references[name]


def ancestors(plan: Plan, name: str) -> list[Node]:
    """Return the nodes that a node waits for, directly or not, in plan order."""
    wanted = {name}
    for node in reversed(plan.nodes):
        if node.name in wanted:
            wanted |= set(node.after)
    return [node for node in plan.nodes if node.name in wanted and node.name != name]


def steps(stage: str, reference: TinyRun) -> list[int]:
    """Return the numbers that a stage's uninterrupted run reports, those first that come first.

    Rejection counts shards, then optimizer steps from 1 again: only those that no shard has are
    usable as a place.
    """
    folder = reference.folder / NODES[stage]
    shards = len(list(folder.glob("shards/*")))
    if stage in ("evaluate", "sweep"):
        return list(range(1, shards + 1))
    if stage == "collect":
        return _pair_counts(folder, reference.config.collect.num_pairs)
    trained = [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if row["step"] > 0]
    return [*range(1, shards + 1), *(step for step in trained if step > shards)]


def _pair_counts(folder: Path, num_pairs: int) -> list[int]:
    counts, done = [], 0
    for axis in AXES:
        found = 0
        for path in sorted(folder.glob(f"shards/{axis}-*.jsonl")):
            found += sum(not row["skipped"] for row in read_jsonl(path))
            counts.append(done + min(found, num_pairs))
        done += min(found, num_pairs)
    return counts


def place(stage: str, kind: str, reference: TinyRun) -> str:
    """Return the value of RLHF_KILL_AT for a kind of kill.

    `step-25` and the like is a step near 25 % that a seed chooses; `unit` is a checkpoint in the
    middle, or a shard where there are no checkpoints; `last` is the artifact before the manifest.
    """
    node = NODES[stage]
    boundary, _, what = kind.partition(":")
    if boundary.startswith("step-"):
        numbers = steps(stage, reference)
        drift = random.Random(f"{stage}/{kind}").uniform(-1.0, 1.0) / 12
        drawn = round((float(boundary[5:]) / 100 + drift) * len(numbers))
        index = min(max(drawn, EVERY_STEPS), len(numbers) - 1) - 1
        return f"step-{numbers[index]}:{node}"
    target = {"last": LAST_ARTIFACT[stage], "unit": _unit(stage, reference)}.get(what, what)
    return f"{boundary}:{target}" if "batches/" in target else f"{boundary}:{node}/{target}"


def _unit(stage: str, reference: TinyRun) -> str:
    folder = reference.folder / NODES[stage]
    if stage in TRAINING:
        last = [row["step"] for row in read_jsonl(folder / "metrics.jsonl")]
        middle = max(max(last) // 2 // EVERY_STEPS, 2) * EVERY_STEPS
        return f"checkpoints/step-{middle:08d}"
    shards = sorted(folder.glob("shards/*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return f"shards/{shards[len(shards) // 2].name}"


def assert_resumed(stage: str, folder: Path, kept: Kept) -> None:
    """Assert that the second start went on from what the first one had finished."""
    assert kept.step > 0 or kept.files, "nothing was finished before the kill"
    log = (folder / LOG).read_bytes()[kept.log_size :].decode()
    now = finished(folder)
    trained = any(name.startswith("model/") for name in kept.files)
    is_retrained = stage in ("rejection", "ppo")
    if kept.step > 0 and (is_retrained or not trained):
        where = "after iteration" if stage == "ppo" else "at step"
        assert f"continuing {where} {kept.step}" in log
    for name, unchanged in kept.files.items():
        if name.startswith("shards/") or not is_retrained:
            assert now[name] == unchanged, f"{name} was made a second time"


def assert_same(name: str, run: TinyRun, reference: TinyRun) -> None:
    """Assert equality bit for bit: weights, tables, samples, metrics, optimizer states."""
    folder, expected = run.folder / name, reference.folder / name
    manifest, wanted = read_json(folder / "manifest.json"), read_json(expected / "manifest.json")
    for entry in ("digest", "fingerprint", "inputs", "seeds", "exact", "num_threads"):
        assert manifest[entry] == wanted[entry], entry
    assert manifest["exact"] is True
    assert _artifacts(folder) == _artifacts(expected)
    assert manifest["files"] == list_files(folder)
    metrics = rows_without_time(folder / "metrics.jsonl")
    assert metrics == rows_without_time(expected / "metrics.jsonl")
    assert _checkpoints(folder) == _checkpoints(expected)
    assert [path for path in folder.rglob(".*") if path.name.endswith(".tmp")] == []


def _artifacts(folder: Path) -> dict[str, str]:
    files = list_files(folder)
    return {name: row["sha256"] for name, row in files.items() if name not in NOT_COMPARED}


def _checkpoints(folder: Path) -> dict[str, Any]:
    """Return digests of all checkpoint files, and what their markers say apart from sizes.

    training_args.bin names this copy's folder, and nothing is read from it on resume.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("checkpoints/**/*")):
        name = str(path.relative_to(folder))
        if path.name == COMPLETE:
            marker = read_json(path)
            found[name] = (marker["step"], marker["state"], sorted(marker["files"]))
        elif path.is_file() and path.name != "training_args.bin":
            found[name] = sha256_file(path)
    return found
