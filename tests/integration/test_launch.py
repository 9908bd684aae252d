"""`rlhf launch` on this machine: in the background, once, until it is cancelled or done."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import SETTINGS, rlhf

from rlhf.artifacts import NodeDir
from rlhf.state import read_progress

ONLY_SFT = ("rounds.limit=0", "toy.sft_rows=1200", "sft.epochs=4")


def call(
    root: Path, command: str, *overrides: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    paths = [f"paths.runs={root / 'runs'}", f"paths.store={root / 'store'}"]
    return rlhf(command, "recipe=quickstart", *paths, *overrides, cwd=root, environment=environment)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_in_the_background_is_launched_once_cancelled_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "quickstart"
    settings = (*SETTINGS, *ONLY_SFT, "checkpoint.every_steps=100000")
    first = call(tmp_path, "launch", *settings)
    assert first.returncode == 0, first.stderr
    assert f"its output: {folder / 'background.txt'}" in first.stdout
    process = first.stdout.partition("process ")[2].split()[0]
    wait_for(lambda: read_progress(folder / "sft")["step"] >= 3)
    assert f"process {process} runs quickstart already" in call(tmp_path, "launch").stdout

    cancelled = call(tmp_path, "cancel")
    assert f"process {process} saves its state and stops" in cancelled.stdout
    wait_for(lambda: "sft saved and stopped" in (folder / "background.txt").read_text())
    saved = NodeDir(folder / "sft").last_checkpoint()
    assert saved is not None
    assert saved.step >= 3
    wait_for(lambda: "no process started" in call(tmp_path, "cancel").stdout)

    again = call(tmp_path, "launch")
    assert again.returncode == 0
    wait_for(lambda: NodeDir(folder / "sft").is_done())
    assert f"continuing at step {saved.step}" in (folder / "sft" / "log.txt").read_text()


@pytest.mark.parametrize(("launcher", "program"), [("slurm", "squeue"), ("kubernetes", "kubectl")])
def test_without_the_scheduler_nothing_is_written(
    tmp_path: Path, launcher: str, program: str
) -> None:
    environment = {"PATH": str(tmp_path), "HOME": os.environ.get("HOME", "/")}
    done = call(
        tmp_path,
        "launch",
        f"launcher={launcher}",
        "paths.runs=/data/runs",
        "paths.store=/data/store",
        environment=environment,
    )
    assert done.returncode == 1
    assert f"{program} is not installed here" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_every_job_and_writes_nothing(tmp_path: Path) -> None:
    # 15 nodes, and two sampling jobs as one array; only the first node waits for nobody.
    done = call(tmp_path, "launch", "launcher=slurm", "dry_run=true", "rounds.sampling_jobs=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#SBATCH --job-name=") == 16
    assert done.stdout.count("#SBATCH --dependency=afterok:<") == 15
    assert done.stdout.count("#SBATCH --array=0,1") == 1
    assert list(tmp_path.iterdir()) == []
