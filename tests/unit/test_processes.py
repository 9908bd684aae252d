"""Processes of a node: alone they cost nothing; together they agree, and say who is missing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.artifacts import NodeDir, read_json
from rlhf.config import StageResources
from rlhf.errors import StageError, Stopped
from rlhf.launch.ranks import Place, free_port, run_ranks
from rlhf.processes import STOP, Processes, join


@pytest.fixture(autouse=True)
def no_request() -> object:
    yield
    STOP.signal = None


def together(folder: Path, work: Callable[[Processes], object], *, timeout: float = 60) -> list:
    """Run `work` in two processes that have met; returns what each gave, by rank."""

    def run() -> int:
        processes = join(folder, timeout_seconds=timeout, device="cpu")
        try:
            result = work(processes)
        except StageError as error:
            result = f"StageError: {error}"
        (folder / f"result-{processes.rank}").write_text(json.dumps(result))
        return 0

    assert run_ranks(run, StageResources(processes=2), Place(0, "127.0.0.1", free_port())) == 0
    return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(2)]


def test_alone_every_question_is_answered_at_once() -> None:
    alone = Processes()
    alone.wait("nobody")
    assert alone.is_main
    assert alone.any(True, False, what="") == [True, False]
    assert alone.broadcast({"a": 1}, "") == {"a": 1}
    assert alone.gather(7, "") == [7]
    assert alone.sum([1.5], "") == [1.5]
    assert alone.share([1, 2, 3]) == [1, 2, 3]


def test_two_processes_agree_and_exchange(tmp_path: Path) -> None:
    def work(processes: Processes) -> object:
        rank = processes.rank
        return {
            "any": processes.any(rank == 1, False, what="flags"),
            "broadcast": processes.broadcast(f"from {rank}", "word"),
            "gather": processes.gather(rank * 10, "numbers"),
            "sum": processes.sum([rank + 0.5, 1.0], "totals"),
            "share": processes.share([0, 1, 2, 3, 4]),
        }

    first, second = together(tmp_path, work)
    assert first.pop("share") == [0, 2, 4]
    assert second.pop("share") == [1, 3]
    assert first == second
    assert first == {
        "any": [True, False],
        "broadcast": "from 0",
        "gather": [0, 10],
        "sum": [2.0, 2.0],
    }


def test_a_process_that_stays_away_is_named_with_its_place(tmp_path: Path) -> None:
    def work(processes: Processes) -> object:
        processes.passed("step 12")
        if processes.rank == 1:
            time.sleep(8)
            return "slept"
        time.sleep(0.5)
        processes.wait("checkpoint 12")
        return "met"

    first, second = together(tmp_path, work, timeout=3)
    assert second == "slept"
    assert first.startswith("StageError: at `checkpoint 12`:")
    lines = [line for line in first.splitlines() if line.startswith("rank ")]
    assert "rank 1" in lines[0]
    assert "at `step 12` for" in lines[0]
    assert "at `checkpoint 12` for" in lines[1]


def test_one_request_stops_all_after_the_same_step(tmp_path: Path) -> None:
    def work(processes: Processes) -> object:
        directory = NodeDir(tmp_path / "node", processes=processes)
        for step in range(1, 10):
            if step == 3 and processes.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if directory.save_now(step, is_due=False):
                with directory.checkpoint(step, {"from": step}) as folder:
                    (folder / f"rank-{processes.rank}").write_text("x")
            try:
                directory.step(step, 10)
            except Stopped:
                return step
        return None

    assert together(tmp_path, work) == [3, 3]
    saved = NodeDir(tmp_path / "node").last_checkpoint()
    assert saved is not None
    assert (saved.step, saved.state) == (3, {"from": 3})
    assert sorted(path.name for path in saved.path.glob("rank-*")) == ["rank-0", "rank-1"]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    def work(processes: Processes) -> object:
        directory = NodeDir(tmp_path / "node", processes=processes)
        directory.metrics.append({"rank": processes.rank})
        directory.write_json("result.json", {"rank": processes.rank})
        processes.wait("end")
        return None

    together(tmp_path, work)
    assert (tmp_path / "node" / "metrics.jsonl").read_text() == '{"rank": 0}\n'
    assert read_json(tmp_path / "node" / "result.json") == {"rank": 0}


def test_shards_are_shared_and_each_is_made_once(tmp_path: Path) -> None:
    def work(processes: Processes) -> object:
        directory = NodeDir(tmp_path / "node", processes=processes)
        made: list[int] = []

        def make(number: int) -> list[dict[str, object]]:
            made.append(number)
            return [{"shard": number, "rank": processes.rank}]

        rows = directory.shards(["a", "b", "c"], make)
        again = directory.shards(["a", "b", "c"], make)
        return made, rows == again, [row["rank"] for [row] in rows]

    assert together(tmp_path, work) == [[[0, 2], True, [0, 1, 0]], [[1], True, [0, 1, 0]]]


def test_a_request_to_one_process_stops_all_after_their_shards(tmp_path: Path) -> None:
    def work(processes: Processes) -> object:
        directory = NodeDir(tmp_path / "node", processes=processes)

        def make(number: int) -> list[dict[str, object]]:
            if number == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return []

        try:
            directory.shards(["a", "b", "c", "d"], make)
        except Stopped:
            return "stopped"
        return "done"

    assert together(tmp_path, work) == ["stopped", "stopped"]
    made = {path.name for path in (tmp_path / "node" / "shards").iterdir()}
    assert made == {"a.jsonl", "b.jsonl", "c.jsonl"}


def test_a_request_stops_a_single_process_after_its_shard(tmp_path: Path) -> None:
    directory = NodeDir(tmp_path)
    directory.step(1, 2)
    STOP.note(signal.SIGTERM)
    directory.step(1, 2)
    with pytest.raises(Stopped, match="its state is saved"):
        directory.shards(["a", "b"], lambda number: [{"number": number}])
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["a.jsonl"]


def test_the_first_signal_is_remembered() -> None:
    STOP.note(signal.SIGUSR1)
    STOP.note(signal.SIGTERM)
    assert STOP.signal == signal.SIGUSR1
