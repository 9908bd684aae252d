"""One tiny run of both rounds through the command line, made once and shared by many tests."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf import compose
from rlhf.artifacts import read_json, read_jsonl, sha256_file
from rlhf.config import Config
from rlhf.data.ledger import Store
from rlhf.plan import Plan

ROOT = Path(__file__).parent.parent
SETTINGS = (
    "toy.sft_rows=240",
    "toy.open_rows=60",
    "toy.prompts_per_kind=40",
    "sft.epochs=1",
    "sft.batch_size=8",
    "sft.micro_batch_size=8",
    "collect.num_pairs=24",
    "collect.shard_prompts=8",
    "collect.max_new_tokens=16",
    "judge.share=1.0",
    "reward.batch_size=4",
    "reward.micro_batch_size=4",
    "rejection.num_prompts=24",
    "rejection.num_samples=3",
    "rejection.shard_prompts=8",
    "rejection.temperatures=[0.8,1.2]",
    "rejection.sweep_prompts=12",
    "rejection.batch_size=2",
    "rejection.micro_batch_size=2",
    "rejection.sampling.max_new_tokens=16",
    "ppo.iterations=6",
    "ppo.batch_size=8",
    "ppo.num_minibatches=2",
    "ppo.micro_batch_size=4",
    "ppo.heldout_prompts=8",
    "ppo.heldout_every=2",
    "ppo.critic_warmup_iterations=1",
    "ppo.sampling.max_new_tokens=16",
    "evaluate.num_prompts=12",
    "evaluate.shard_prompts=4",
    "evaluate.sampling.max_new_tokens=16",
    "evaluate.bootstrap_draws=100",
    "checkpoint.every_seconds=1e9",
    "compute.num_threads=1",
    "tracking.mode=none",
)


@dataclass(frozen=True, slots=True)
class TinyRun:
    """A run of the recipe quickstart: `root` holds runs/ and store/."""

    root: Path

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.root / "runs" / "quickstart"

    @property
    def output(self) -> str:
        """What `rlhf run` printed."""
        return (self.root / "output.txt").read_text(encoding="utf-8")

    @property
    def plan(self) -> Plan:
        """The frozen plan."""
        return Plan.from_json(read_json(self.folder / "plan.json"))

    @property
    def config(self) -> Config:
        """The frozen configuration, with the paths where the run lies now."""
        config = compose.load_frozen(self.folder)
        config.paths.store = str(self.root / "store")
        return config

    @property
    def store(self) -> Store:
        """The run's stream."""
        config = self.config
        return Store(Path(config.paths.store), config.data.stream)

    def paths(self) -> list[str]:
        """Return the overrides that name this run."""
        return [
            "recipe=quickstart",
            f"paths.runs={self.root / 'runs'}",
            f"paths.store={self.root / 'store'}",
        ]

    def copy(self, root: Path) -> TinyRun:
        """Copy the whole run to another folder; models are hard links, as all writes rename."""
        shutil.copytree(self.root / "store", root / "store")
        shutil.copytree(self.root / "runs", root / "runs", copy_function=link_or_copy)
        copied = TinyRun(root)
        text = compose.freeze(copied.config)
        (copied.folder / "run.yaml").unlink()
        (copied.folder / "run.yaml").write_text(text, encoding="utf-8")
        return copied


def shared_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Return the run that all tests of one pytest call share; the first caller makes it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    root = base / "tiny-run"
    root.mkdir(exist_ok=True)
    # Opened for appending, it keeps its time: another process may be comparing the folder.
    with (root / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "output.txt").exists():
            done = rlhf("run", *TinyRun(root).paths(), *SETTINGS, cwd=root)
            assert done.returncode == 0, done.stdout + done.stderr
            (root / "output.txt").write_text(done.stdout, encoding="utf-8")
    return TinyRun(root)


def rlhf(
    *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line of this checkout in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "rlhf.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Return relative path to time of change and sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows_without_time(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what the clock decides."""
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_jsonl(path)
    ]


def link_or_copy(source: str, target: str) -> None:
    """Link weights, which are never written in place, and copy every other file."""
    if source.endswith(".safetensors"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)
