"""Rounds in turn: order, repeats, what counts, and contenders that drop out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.rounds import (
    Attempt,
    Ended,
    Process,
    Quiet,
    TooSlow,
    counted,
    interleave,
    measured,
    summary,
)

ECHO = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("die"):
        sys.exit("ValueError: no more")
    time.sleep(request.get("sleep", 0))
    print(json.dumps({"seconds": 0.5, "units": 3, "round": request["round"]}), flush=True)
"""


def attempt(number: int, *, foreign: float = 0.0, seconds: float = 1.0) -> Attempt:
    return Attempt(number, seconds, 10.0, foreign, foreign > 0.1, 0.0, 0.0)


def echo(folder: Path) -> Process:
    return Process(
        [sys.executable, "-c", ECHO], environment=os.environ, log_path=folder / "echo.log"
    )


def test_contenders_take_turns() -> None:
    calls: list[tuple[str, int]] = []

    def play(name: str, number: int) -> Attempt:
        calls.append((name, number))
        return attempt(number)

    interleave(["a", "b"], rounds=2, repeats=3, attempt=play)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_loaded_round_is_repeated_at_once_and_listed() -> None:
    shares = {"a": iter([0.5, 0.0]), "b": iter([0.9, 0.7, 0.8])}

    def play(name: str, number: int) -> Attempt:
        return attempt(number, foreign=next(shares[name]))

    found = interleave(["a", "b"], rounds=1, repeats=2, attempt=play)
    assert [a.foreign for a in found["a"].attempts] == [0.5, 0.0]
    assert [a.foreign for a in found["b"].attempts] == [0.9, 0.7, 0.8]
    assert [a.foreign for a in found["a"].counted()] == [0.0]
    assert [a.foreign for a in found["b"].counted()] == [0.7]


def test_the_first_quiet_attempt_counts() -> None:
    attempts = [
        attempt(0, foreign=0.3),
        attempt(0, foreign=0.05, seconds=2),
        attempt(0, foreign=0.0, seconds=1),
        attempt(1, foreign=0.02),
    ]
    assert [(a.round, a.foreign) for a in counted(attempts)] == [(0, 0.05), (1, 0.02)]


def test_who_is_too_slow_drops_out_and_the_others_go_on() -> None:
    def play(name: str, number: int) -> Attempt:
        if name == "slow" and number == 1:
            raise TooSlow("more than 9 s")
        return attempt(number)

    found = interleave(["slow", "fast"], rounds=3, repeats=0, attempt=play)
    assert found["slow"].problem == "more than 9 s"
    assert [a.round for a in found["slow"].attempts] == [0]
    assert [a.round for a in found["fast"].attempts] == [0, 1, 2]


def test_a_rate_is_units_over_seconds() -> None:
    assert attempt(0, seconds=4.0).rate == 2.5


def test_summary_is_median_and_range() -> None:
    assert summary([5.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 5.0}
    assert summary([4.0, 1.0])["median"] == 2.5


def test_a_process_answers_and_ends(tmp_path: Path) -> None:
    process = echo(tmp_path)
    assert process.ready(30) == {"ready": True}
    assert process.ask({"round": 7}, seconds=30)["round"] == 7
    process.stop()
    assert not Path(f"/proc/{process.pid}").exists()


def test_a_process_that_needs_too_long_is_killed(tmp_path: Path) -> None:
    process = echo(tmp_path)
    process.ready(30)
    with pytest.raises(TooSlow, match="more than 0 s"):
        process.ask({"round": 0, "sleep": 60}, seconds=0.2)
    assert not Path(f"/proc/{process.pid}").exists()
    process.stop()


def test_the_last_error_says_why_a_process_ended(tmp_path: Path) -> None:
    process = echo(tmp_path)
    process.ready(30)
    with pytest.raises(Ended, match="ValueError: no more"):
        process.ask({"round": 0, "die": True}, seconds=30)
    process.stop()


def test_a_measured_round_has_the_load_beside_it(tmp_path: Path) -> None:
    process = echo(tmp_path)
    process.ready(30)
    never_loaded = Quiet(max_share=1.0, wait_seconds=0)
    done = measured(process, 4, request={"sleep": 0.05}, limit=30, quiet=never_loaded)
    assert (done.round, done.seconds, done.units, done.loaded) == (4, 0.5, 3, False)
    assert 0 <= done.foreign <= 1
    assert done.facts["wall_seconds"] >= 0.05
    always_loaded = Quiet(max_share=-1.0, wait_seconds=0)
    assert measured(process, 4, request={}, limit=30, quiet=always_loaded).loaded
    process.stop()
