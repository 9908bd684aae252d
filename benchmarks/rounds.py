"""Rounds of several contenders in turn, A B C A B C, with the load of the machine beside each.

A round during which others kept the machine busy is repeated, a few times at most; every attempt is
listed, and of each round the quietest one counts.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import foreign_share, peak_megabytes, read_ticks, wait_until_quiet

log = logging.getLogger(__name__)

STOP_SECONDS = 20.0


class TooSlow(Exception):
    """A contender needed more than the bound."""


class Ended(Exception):
    """A contender's process ended by itself."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One execution of a round: what the contender says, and what the machine did meanwhile."""

    round: int
    seconds: float
    units: float
    foreign: float
    """Share of all cores' time that went to others while it ran."""
    loaded: bool
    """Whether that is more than what was allowed."""
    load_before: float
    load_after: float
    """One-minute load averages."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Return units per second."""
        return self.units / self.seconds


@dataclass
class Outcome:
    """All attempts of one contender, and why there are no more of them, if so."""

    attempts: list[Attempt] = field(default_factory=list)
    problem: str = ""
    ready: dict[str, Any] = field(default_factory=dict)

    def counted(self) -> list[Attempt]:
        """Return one attempt per round: the first quiet one, else the quietest."""
        return counted(self.attempts)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Quiet:
    """What counts as quiet, and how patient to be."""

    max_share: float = 0.08
    """Share of all cores' time that others may take during a round."""
    repeats: int = 2
    """Further attempts at a loaded round."""
    wait_seconds: float = 20.0
    """Longest wait for a quiet machine before an attempt."""


def counted(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return one attempt per round: the first quiet one, else the one with the least load."""
    found: dict[int, Attempt] = {}
    for attempt in attempts:
        best = found.get(attempt.round)
        if best is None or (best.loaded and attempt.foreign < best.foreign):
            found[attempt.round] = attempt
    return [found[number] for number in sorted(found)]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def interleave(
    names: Sequence[str],
    *,
    rounds: int,
    repeats: int,
    attempt: Callable[[str, int], Attempt],
) -> dict[str, Outcome]:
    """Let each contender do a round, then each the next one; repeat a loaded round at once.

    A contender that is too slow or ends drops out; the others go on.
    """
    outcomes = {name: Outcome() for name in names}
    for number in range(rounds):
        for name in names:
            outcome = outcomes[name]
            for _ in range(1 + repeats):
                if outcome.problem:
                    break
                try:
                    done = attempt(name, number)
                except (TooSlow, Ended) as error:
                    outcome.problem = str(error)
                    log.warning("%s: %s", name, error)
                    break
                outcome.attempts.append(done)
                log.info(
                    "round %d %s: %.2f s, %.1f/s, others %.0f %%%s",
                    number + 1,
                    name,
                    done.seconds,
                    done.rate,
                    100 * done.foreign,
                    ", loaded" if done.loaded else "",
                )
                if not done.loaded:
                    break
    return outcomes


class Process:
    """A contender's process, asked one thing at a time."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], log_path: Path
    ) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_path = log_path
        self._errors = log_path.open("wb")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=dict(environment),
            text=True,
            # Its own group, so that its children end with it.
            start_new_session=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        """Return the root of its tree of processes."""
        return self._process.pid

    def ready(self, seconds: float) -> dict[str, Any]:
        """Wait for the first line: what was loaded."""
        return self._answer(seconds)

    def ask(self, request: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """Send a request and return the answer; TooSlow after so many seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise Ended(self._last_words()) from error
        return self._answer(seconds)

    def stop(self) -> None:
        """End the process, politely first."""
        assert self._process.stdin is not None
        if self._process.poll() is None:
            try:
                self._process.stdin.close()
                self._process.wait(STOP_SECONDS)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                self.kill()
        self._errors.close()

    def kill(self) -> None:
        """End the process and its children at once."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty as error:
            self.kill()
            raise TooSlow(f"more than {seconds:.0f} s") from error
        if not line:
            self._process.wait()
            raise Ended(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if "Error" in line] or lines or ["no output"]
        return f"ended: {errors[-1]} ({self._log_path})"


def measured(
    process: Process, number: int, *, request: Mapping[str, Any], limit: float, quiet: Quiet
) -> Attempt:
    """Do one attempt at a round, with the machine's load around it."""
    wait_until_quiet(max_share=quiet.max_share, seconds=quiet.wait_seconds)
    load_before, before = os.getloadavg()[0], read_ticks(process.pid)
    started = time.monotonic()
    answer = process.ask({**request, "round": number}, seconds=limit)
    wall = time.monotonic() - started
    share = foreign_share(before, read_ticks(process.pid))
    facts = {name: answer[name] for name in answer if name not in ("seconds", "units")}
    return Attempt(
        round=number,
        seconds=answer["seconds"],
        units=answer["units"],
        foreign=share,
        loaded=share > quiet.max_share,
        load_before=load_before,
        load_after=os.getloadavg()[0],
        facts={"peak_memory_mb": peak_megabytes(process.pid), **facts, "wall_seconds": wall},
    )
