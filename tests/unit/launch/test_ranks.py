"""Processes of a node on one machine: who they are, how they end, and what a signal does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config import StageResources
from rlhf.errors import ConfigError
from rlhf.launch import ranks
from rlhf.launch.ranks import Place, find_place, is_rank, needs_srun, run_ranks
from rlhf.processes import STOP

TWO = StageResources(processes=2)
HERE = Place(0, "127.0.0.1", 12345)


@pytest.fixture(autouse=True)
def no_request() -> object:
    yield
    STOP.signal = None


def test_each_process_is_told_who_it_is(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

    def run() -> int:
        (tmp_path / os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
        return 0

    resources = StageResources(nodes=3, processes=2)
    assert run_ranks(run, resources, Place(2, "10.0.0.7", 23456)) == 0
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"4": "4 0 6 2 10.0.0.7 23456", "5": "5 1 6 2 10.0.0.7 23456"}
    assert "RANK" not in os.environ


def test_a_single_supervised_process_is_told_nothing(tmp_path: Path) -> None:
    def run() -> int:
        return 3 if "RANK" in os.environ else 0

    assert run_ranks(run, StageResources(), HERE) == 0


def exits(*codes: int) -> Callable[[], int]:
    return lambda: codes[int(os.environ["RANK"])]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((0, 2), 2), ((75, 75), 75), ((75, 0), 75), ((75, 1), 1)],
)
def test_the_first_failure_is_the_nodes(codes: tuple[int, int], expected: int) -> None:
    assert run_ranks(exits(*codes), TWO, HERE) == expected


def test_the_others_end_soon_after_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LAST_WORDS_SECONDS", 0.2)

    def run() -> int:
        if os.environ["RANK"] == "0":
            return 1
        time.sleep(60)
        return 0

    started = time.monotonic()
    assert run_ranks(run, TWO, HERE) == 1
    assert time.monotonic() - started < 30


def test_a_killed_process_ends_the_node_with_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LAST_WORDS_SECONDS", 0.2)

    def run() -> int:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGALRM)
        time.sleep(60)
        return 0

    assert run_ranks(run, TWO, HERE) == -signal.SIGALRM


def test_a_signal_reaches_every_process() -> None:
    def run() -> int:
        for _ in range(600):
            if STOP.made:
                return 75
            time.sleep(0.05)
        return 1

    sender = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    sender.start()
    assert run_ranks(run, TWO, HERE) == 75
    assert STOP.signal == signal.SIGUSR1
    sender.join()


def test_no_process_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, time, pathlib\n"
        "from rlhf.config import StageResources\n"
        "from rlhf.launch.ranks import Place, run_ranks\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def run():\n"
        "    (folder / os.environ['RANK']).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "    return 0\n"
        "run_ranks(run, StageResources(processes=2), Place(0, '127.0.0.1', 1))\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script])
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    time.sleep(0.2)
    children = [int(path.read_text()) for path in tmp_path.iterdir()]
    supervisor.kill()
    supervisor.wait()
    wait_for(lambda: not any(alive(pid) for pid in children))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


def test_several_machines_need_a_scheduler() -> None:
    resources = StageResources(nodes=2)
    with pytest.raises(ConfigError, match="nodes=2 needs RLHF_MACHINE"):
        find_place(resources, {})
    told = {"RLHF_MACHINE": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "23456"}
    assert find_place(resources, told) == Place(1, "10.0.0.7", 23456)


def test_srun_is_for_the_batch_script_of_a_job_on_several_machines() -> None:
    job = {"SLURM_JOB_NODELIST": "node[1-2]"}
    assert needs_srun(StageResources(nodes=2), job)
    assert not needs_srun(StageResources(), job)
    assert not needs_srun(StageResources(nodes=2), {})
    assert not needs_srun(StageResources(nodes=2), {**job, "RLHF_MACHINE": "0"})


def test_a_process_that_was_told_starts_no_others() -> None:
    assert is_rank({"RANK": "0", "WORLD_SIZE": "2"})
    assert not is_rank({"WORLD_SIZE": "2"})
