"""The end of a job: what is noted, and when the job goes back to the queue."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rlhf import compose
from rlhf.config import Config
from rlhf.launch.conclude import clock_seconds, conclude
from rlhf.launch.failures import read_exits
from rlhf.processes import STOP


@pytest.fixture(autouse=True)
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    yield
    STOP.signal = None


@pytest.fixture
def config() -> Config:
    return compose.load(["recipe=quickstart", "launcher=slurm"])


@pytest.fixture
def requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line per call of a stand-in for scontrol."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    program(tmp_path / "calls", "scontrol", f'echo "$@" >> {tmp_path}/calls')
    program(tmp_path / "calls", "squeue", "echo UNLIMITED")
    return tmp_path / "calls"


def program(calls: Path, name: str, text: str) -> None:
    path = calls.parent / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_outside_a_job_and_after_success_nothing_is_noted(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert conclude(config, tmp_path, 0) == 0
    monkeypatch.delenv("SLURM_JOB_ID")
    assert conclude(config, tmp_path, 1) == 1
    assert read_exits(tmp_path) == []


def test_preemption_goes_back_to_the_queue(tmp_path: Path, config: Config, requeued: Path) -> None:
    STOP.note(signal.SIGUSR1)
    assert conclude(config, tmp_path, 75) == 0
    assert requeued.read_text() == "requeue 41\n"
    [entry] = read_exits(tmp_path)
    assert (entry.job, entry.attempt, entry.code, entry.failure) == ("41", 2, 75, "preempted")


@pytest.mark.parametrize(
    ("left", "expected"),
    [("1:40", "time_limit"), ("2:30:00", "preempted"), ("UNLIMITED", "preempted")],
)
def test_a_warning_near_the_limit_is_the_time_limit(
    tmp_path: Path, config: Config, requeued: Path, left: str, expected: str
) -> None:
    program(requeued, "squeue", f"echo {left}")
    STOP.note(signal.SIGUSR1)
    conclude(config, tmp_path, 75)
    assert read_exits(tmp_path)[0].failure == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("59", 59), ("4:30", 270), ("2:00:01", 7201), ("1-00:00:00", 86400), ("INVALID", None)],
)
def test_times_as_slurm_writes_them(text: str, expected: int | None) -> None:
    assert clock_seconds(text) == expected


def test_a_cancelled_job_stays_cancelled(tmp_path: Path, config: Config, requeued: Path) -> None:
    STOP.note(signal.SIGTERM)
    assert conclude(config, tmp_path, 75) == 75
    assert not requeued.exists()
    assert read_exits(tmp_path)[0].failure == "stopped"


def test_the_policy_bounds_how_often(
    tmp_path: Path, config: Config, requeued: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.launcher.retries.error = 2
    assert [conclude(config, tmp_path, 1) for _ in range(3)] == [0, 0, 1]
    assert requeued.read_text() == "requeue 41\n" * 2
    # Another job starts counting anew.
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert conclude(config, tmp_path, 1) == 0


def test_bad_input_is_never_repeated(tmp_path: Path, config: Config, requeued: Path) -> None:
    assert conclude(config, tmp_path, 2) == 2
    assert not requeued.exists()


def test_a_job_that_cannot_be_requeued_keeps_its_exit_code(
    tmp_path: Path, config: Config, requeued: Path
) -> None:
    program(requeued, "scontrol", "exit 1")
    STOP.note(signal.SIGUSR1)
    assert conclude(config, tmp_path, 75) == 75
