"""A launch that is followed from the background, and its end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf import commands, runner
from rlhf.compose import load
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.launch import operator
from rlhf.launch.jobs import RUNNING, Job
from rlhf.launch.operator import background_process, cancel_jobs, follow_here

SECONDS = 30


class Queue:
    """A scheduler with one job."""

    def __init__(self, folder: Path, *, orders_jobs: bool = False) -> None:
        self.folder, self.orders_jobs = folder, orders_jobs
        self.cancelled: list[str] = []
        self.was_followed: bool | None = None

    def poll(self) -> dict[str, Job]:
        self.was_followed = background_process(self.folder) is not None
        return {"sft": Job("sft", "7", RUNNING)}

    def cancel(self, jobs: Sequence[Job]) -> None:
        self.cancelled += [job.id for job in jobs]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "runs" / "quickstart"
    found.mkdir(parents=True)
    return found


def config_of(folder: Path, *more: str) -> Config:
    return load(["recipe=quickstart", f"paths.runs={folder.parent}", *more])


@pytest.fixture
def queue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    found = Queue(folder)
    monkeypatch.setattr(operator, "open_launcher", lambda config: found)
    return found


def test_one_process_follows_the_jobs_until_the_run_is_cancelled(
    folder: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = config_of(folder, "launcher=slurm")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexec sleep 600\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    out = StringIO()
    console = Console(file=out, width=200)
    follow_here(config, folder, console)
    pid = background_process(folder)
    assert pid == json.loads((folder / "background.json").read_text())["pid"]
    assert f"process {pid} follows quickstart; its output: {folder}" in out.getvalue()
    follow_here(config, folder, console)
    assert f"process {pid} follows quickstart already" in out.getvalue()
    end = time.monotonic() + SECONDS
    while not (said := (tmp_path / "said").read_text() if (tmp_path / "said").exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert said.split() == [
        *("-m", "rlhf.cli", "launch", "run=quickstart"),
        *(f"paths.runs={folder.parent}", "launcher.follow=true"),
    ]
    cancel_jobs(config, folder, console, node="sft")
    assert background_process(folder) == pid
    cancel_jobs(config, folder, console, node="")
    # It is gone before the scheduler is asked for the jobs that are to end.
    assert queue.was_followed is False
    assert queue.cancelled == ["7", "7"]


def test_a_node_of_a_local_run_has_no_job(folder: Path) -> None:
    with pytest.raises(ConfigError, match="node=sft has no job of its own with launcher=local"):
        cancel_jobs(config_of(folder), folder, Console(quiet=True), node="sft")


@pytest.mark.parametrize(
    ("orders_jobs", "follow", "detach", "followed"),
    [
        (False, "false", "true", True),
        (True, "true", "true", True),
        (True, "false", "true", False),
        (True, "true", "false", False),
        (False, "false", "false", False),
    ],
)
def test_what_needs_following_is_followed_from_the_background(
    folder: Path,
    queue: Queue,
    monkeypatch: pytest.MonkeyPatch,
    orders_jobs: bool,
    follow: str,
    detach: str,
    followed: bool,
) -> None:
    called: list[str] = []

    def note(name: str) -> Any:
        return lambda *given: called.append(name)

    prepared = runner.Prepared(config_of(folder), runner.Plan("r", "r", (), ()), {}, folder, ())
    monkeypatch.setattr(runner, "prepare", lambda *given: prepared)
    monkeypatch.setattr(commands, "write_versions", lambda *given: None)
    for name in ("launch_jobs", "follow_here"):
        monkeypatch.setattr(operator, name, note(name))
    queue.orders_jobs = orders_jobs
    config = config_of(folder, "launcher=slurm", f"launcher.follow={follow}")
    assert commands.launch(config, dry_run="false", detach=detach) == 0
    assert called == ["follow_here" if followed else "launch_jobs"]
