"""Leases: one holder, takeover from processes that ended, lost leases noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rlhf import lease as leases
from rlhf.errors import LeaseError
from rlhf.lease import (
    MISSED_SECONDS,
    Holder,
    Lease,
    is_gone,
    is_run_locked,
    process_start,
    run_lock,
)


def write(folder: Path, holder: Holder) -> None:
    (folder / "lease.json").write_text(json.dumps(asdict(holder)))


def held(folder: Path) -> Holder:
    """Return what a lease of this process looks like."""
    lease = Lease(folder)
    lease.take()
    holder = lease.read()
    assert holder is not None
    lease.release()
    return holder


def test_a_second_taker_is_told_who_works_there(tmp_path: Path) -> None:
    first, second = Lease(tmp_path), Lease(tmp_path)
    first.take()
    with pytest.raises(LeaseError, match=rf"process {os.getpid()} on .*works on {tmp_path}"):
        second.take()
    first.check()
    first.release()
    second.take()
    with pytest.raises(LeaseError, match="took over"):
        first.check()
    second.release()
    assert not (tmp_path / "lease.json").exists()


def test_releasing_a_lost_lease_leaves_the_new_one(tmp_path: Path) -> None:
    first, second = Lease(tmp_path), Lease(tmp_path)
    first.take()
    (tmp_path / "lease.json").unlink()
    second.take()
    first.release()
    second.check()
    second.release()


def test_takeover_at_once_when_the_process_has_ended(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    start = process_start(child.pid)
    child.wait()
    write(tmp_path, replace(held(tmp_path), pid=child.pid, start=start or 1, token="other"))
    lease = Lease(tmp_path)
    lease.take()
    lease.check()
    lease.release()


def test_a_zombie_counts_as_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    end = time.monotonic() + 30
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)
    assert process_start(child.pid) is None
    child.wait()


@pytest.mark.parametrize(
    ("change", "age", "gone"),
    [
        ({}, 0.0, False),
        ({}, 1e6, False),  # this very process lives, so its heartbeat does not matter
        ({"start": 1}, 0.0, True),  # the process id was given to another process
        ({"boot": "an earlier boot"}, 0.0, True),
        ({"host": "elsewhere"}, MISSED_SECONDS - 1, False),
        ({"host": "elsewhere"}, MISSED_SECONDS + 1, True),
        ({"space": "pid:[another container]"}, MISSED_SECONDS - 1, False),
        ({"space": "pid:[another container]"}, MISSED_SECONDS + 1, True),
    ],
)
def test_when_a_holder_counts_as_gone(
    tmp_path: Path, change: dict[str, str], age: float, gone: bool
) -> None:
    holder = replace(held(tmp_path), **change)  # type: ignore[arg-type]
    assert is_gone(holder, now=holder.heartbeat + age) is gone


def test_an_unreadable_lease_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text("{")
    lease = Lease(tmp_path)
    lease.take()
    lease.release()


def test_the_heartbeat_is_renewed_and_notices_a_takeover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    lease = Lease(tmp_path)
    lease.take()
    first = lease.read()
    assert first is not None
    wait_until(lambda: (lease.read() or first).heartbeat > first.heartbeat)
    lease.release()
    assert not lease.lost

    other = Lease(tmp_path)
    other.take()
    wait_until(lambda: not (tmp_path / "lease.json").unlink(missing_ok=True) and other.lost)


def test_a_heartbeat_that_cannot_be_written_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    lease = Lease(tmp_path)
    lease.take()
    first, write_lease, failed = lease.read(), lease._write, []
    assert first is not None

    def failing() -> None:
        if not failed:
            failed.append(1)
            raise OSError(28, "No space left on device")
        write_lease()

    monkeypatch.setattr(lease, "_write", failing)
    wait_until(lambda: (lease.read() or first).heartbeat > first.heartbeat)
    assert failed
    lease.release()


def test_one_runner_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LOCK_PAUSE", 0.001)
    assert not is_run_locked(tmp_path)
    refused = pytest.raises(LeaseError, match=f"another process runs {tmp_path}")
    with run_lock(tmp_path):
        assert is_run_locked(tmp_path)
        with refused, run_lock(tmp_path):
            pass
    assert not is_run_locked(tmp_path)


def wait_until(ready: object) -> None:
    assert callable(ready)
    end = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("job", "attempt", "gone"), [("7", 2, True), ("7", 1, False), ("8", 5, False), ("", 0, False)]
)
def test_a_later_attempt_of_a_job_takes_over_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, attempt: int, gone: bool
) -> None:
    earlier = replace(held(tmp_path), host="elsewhere", job="7", attempt=1)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
    assert is_gone(earlier, now=time.time()) is gone
