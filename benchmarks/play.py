"""Play a suite: start its contenders, let them take turns, and sum up."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import interpreter, variables
from benchmarks.limits import Roof, demand
from benchmarks.rounds import (
    Attempt,
    Ended,
    Outcome,
    Process,
    Quiet,
    TooSlow,
    interleave,
    measured,
    summary,
)
from benchmarks.suites import (
    CHECK_SHARE,
    DEFAULT,
    OURS,
    REFERENCE,
    ROOF,
    SECONDS,
    TARGETS,
    Entry,
    Target,
)
from benchmarks.workload import Material

log = logging.getLogger(__name__)

ROOF_UNITS = 1e9
"""The machine's rate is written in units of 10^9 operations."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure; the same for all suites."""

    folder: Path
    environments: Mapping[str, Path]
    threads: int
    rounds: int
    quiet: Quiet
    limit_seconds: float
    """Bound of one round, of the warm-up and of loading, each."""
    check_seconds: float
    """Bound of the training whose losses are compared."""
    trim: bool
    """Give a contender's free memory back before the others' turn."""
    max_length: int
    only: Sequence[str]
    """Names of the contenders to play; empty for all."""


class Stage:
    """The contenders of a suite, loaded and warm, each in its process."""

    def __init__(
        self,
        suite: str,
        precision: str,
        entries: Sequence[Entry],
        *,
        sizes: Mapping[str, Any],
        settings: Settings,
        material: Material,
    ) -> None:
        self.suite, self.precision, self.sizes = suite, precision, dict(sizes)
        self.entries = _chosen(entries, settings)
        self.settings, self.material = settings, material
        self.processes: dict[str, Process] = {}
        self.ready: dict[str, dict[str, Any]] = {}
        self.problems: dict[str, str] = {}

    def open(self, stack: ExitStack, entry: Entry) -> Process | None:
        """Start a contender and let it warm up; None, with the reason noted, if it cannot."""
        settings = self.settings
        try:
            process = self.start(entry)
            stack.callback(process.stop)
            self.ready[entry.name] = process.ready(settings.limit_seconds)
            warmup = {"warmup": True, "round": -1, "trim": settings.trim}
            process.ask(warmup, seconds=settings.limit_seconds)
        except (TooSlow, Ended) as error:
            self.problems[entry.name] = str(error)
            log.warning("%s cannot take part: %s", entry.name, error)
            return None
        self.processes[entry.name] = process
        log.info("%s is ready", entry.name)
        return process

    def attempt(
        self, name: str, number: int, *, request: Mapping[str, Any] | None = None
    ) -> Attempt:
        """Let a contender do one round."""
        return measured(
            self.processes[name],
            number,
            request={"trim": self.settings.trim, **(request or {})},
            limit=self.settings.limit_seconds,
            quiet=self.settings.quiet,
        )

    def start(self, entry: Entry) -> Process:
        """Start a contender's process; it loads by itself."""
        settings = self.settings
        label = f"{self.suite}-{self.precision}-{entry.name}"
        scratch = settings.folder / "scratch" / _file_name(label)
        scratch.mkdir(parents=True, exist_ok=True)
        job = {
            **asdict(self.material.folders),
            "suite": self.suite,
            "precision": self.precision,
            "threads": settings.threads,
            "max_length": settings.max_length,
            "sizes": self.sizes,
            "options": dict(entry.options),
            "scratch": str(scratch),
        }
        path = scratch.with_suffix(".json")
        path.write_text(json.dumps(job), encoding="utf-8")
        python = interpreter(
            entry.environment, folder=settings.folder / "envs", given=settings.environments
        )
        return Process(
            [str(python), "-m", "benchmarks.worker", entry.module, str(path)],
            environment=variables(tuned=entry.tuned, threads=settings.threads),
            log_path=scratch.with_suffix(".log"),
        )


def play(stage: Stage) -> dict[str, Any]:
    """Measure a suite; returns its part of the results."""
    settings = stage.settings
    is_computation = any(entry.module != "command" for entry in stage.entries)
    entries = [*_chosen([ROOF] if is_computation else [], settings), *stage.entries]
    with ExitStack() as stack:
        for entry in entries:
            stage.open(stack, entry)
        outcomes = interleave(
            list(stage.processes),
            rounds=settings.rounds,
            repeats=settings.quiet.repeats,
            attempt=stage.attempt,
        )
    for name, problem in stage.problems.items():
        outcomes[name] = Outcome(problem=problem)
    roof = _roof(outcomes.get(ROOF.name))
    rows = [_row(stage, entry, outcomes[entry.name], roof) for entry in entries]
    return {
        "suite": stage.suite,
        "precision": stage.precision,
        "sizes": stage.sizes,
        "roof": None if roof is None else asdict(roof),
        "contenders": rows,
        "targets": [
            reached(target, rows, limit=settings.limit_seconds)
            for target in TARGETS.get(stage.suite, ())
        ],
        "bounds": [
            {"name": row["name"], "seconds": row["seconds"]["median"], "most": SECONDS[row["name"]]}
            for row in rows
            if row["name"] in SECONDS and row["seconds"]
        ],
        "check": _check(stage) if stage.suite in REFERENCE else None,
    }


def reached(target: Target, rows: Sequence[Mapping[str, Any]], *, limit: float) -> dict[str, Any]:
    """Return how many times as fast ours is as the best of a library, or at least is.

    Where nobody of the library finished a round, the bound of a round stands for its time.
    """
    ours = next((r for r in rows if r["library"] == OURS and r["rate"]), None)
    others = [
        r
        for r in rows
        if r["library"] == target.library and (target.kind != DEFAULT or r["kind"] == DEFAULT)
    ]
    found: dict[str, Any] = {**asdict(target), "reached": None, "is_bound": False, "against": ""}
    if ours is None or not others:
        return found
    timed = [r for r in others if r["rate"]]
    if timed:
        best = max(timed, key=lambda r: r["rate"]["median"])
        ratio = ours["rate"]["median"] / best["rate"]["median"]
        return {**found, "reached": ratio, "against": best["name"]}
    if all(r["problem"].startswith("more than") for r in others):
        ratio = limit / ours["seconds"]["median"]
        return {**found, "reached": ratio, "is_bound": True, "against": others[0]["name"]}
    return found


def profile(stage: Stage) -> str:
    """Return the profile of our contender's round: operators by self time."""
    entry = next(entry for entry in stage.entries if entry.library == OURS)
    with ExitStack() as stack:
        process = stage.open(stack, entry)
        if process is None:
            raise SystemExit(f"no profile of {stage.suite}: {stage.problems[entry.name]}")
        request = {"profile": True, "round": 0}
        answer = process.ask(request, seconds=stage.settings.limit_seconds)
    return f"{stage.suite}, {stage.precision}: {answer['seconds']:.2f} s\n\n{answer['table']}\n"


def _row(stage: Stage, entry: Entry, outcome: Outcome, roof: Roof | None) -> dict[str, Any]:
    counted, ready = outcome.counted(), stage.ready.get(entry.name, {})
    scale = ROOF_UNITS if entry is ROOF else 1.0
    attempts = [{**asdict(attempt), "units": attempt.units / scale} for attempt in outcome.attempts]
    shares = [found for a in counted if (found := _shares(stage, entry, a, roof)) is not None]
    losses = [attempt.facts["loss"] for attempt in counted if "loss" in attempt.facts]
    return {
        "name": entry.name,
        "library": entry.library,
        "kind": entry.kind,
        "note": entry.note,
        "tuned": entry.tuned,
        "options": dict(entry.options),
        "versions": ready.get("versions", {}),
        "facts": ready.get("facts", {}),
        "problem": outcome.problem,
        "attempts": attempts,
        "rate": summary([a.rate / scale for a in counted]) if counted else None,
        "seconds": summary([a.seconds for a in counted]) if counted else None,
        "mfu": statistics.median(s[0] for s in shares) if shares else None,
        "limit_share": statistics.median(s[1] for s in shares) if shares else None,
        "peak_memory_mb": max((a.facts.get("peak_memory_mb", 0) for a in counted), default=None),
        "loss": losses[-1] if losses else None,
    }


def _shares(
    stage: Stage, entry: Entry, attempt: Attempt, roof: Roof | None
) -> tuple[float, float] | None:
    """Return utilisation and the share of the limit that a round reached."""
    if roof is None or entry is ROOF:
        return None
    needed = demand(
        stage.suite,
        stage.material.size,
        stage.material.work,
        sizes=stage.sizes,
        precision=stage.precision,
        facts=attempt.facts,
        units=attempt.units,
    )
    if needed is None:
        return None
    mfu = needed.flops / attempt.seconds / roof.gemm_flops
    return mfu, needed.seconds(roof) / attempt.seconds


def _roof(outcome: Outcome | None) -> Roof | None:
    """Return the best of the machine's rounds: a limit is what was reached once."""
    if outcome is None or not outcome.attempts:
        return None
    return Roof(
        gemm_flops=max(a.facts["gemm_gflops"] for a in outcome.attempts) * 1e9,
        read_bytes=max(a.facts["read_gb_per_second"] for a in outcome.attempts) * 1e9,
    )


def _check(stage: Stage) -> dict[str, Any] | None:
    """Compare our loss after many steps with a plain loop's, each trained once."""
    steps = stage.sizes["check_steps"]
    if not steps:
        return None
    ours = next((e for e in stage.entries if e.library == OURS), None)
    if ours is None:
        return None
    plain = Entry("plain loop", "plain", "reference")
    losses: dict[str, float] = {}
    start = float("nan")
    for entry in (ours, plain):
        with ExitStack() as stack:
            process = stage.start(entry)
            stack.callback(process.stop)
            try:
                process.ready(stage.settings.limit_seconds)
                if entry is plain:
                    before = process.ask(
                        {"steps": 0, "round": -1}, seconds=stage.settings.limit_seconds
                    )
                    start = before["loss"]
                answer = process.ask(
                    {"steps": steps, "round": 0}, seconds=stage.settings.check_seconds
                )
            except (TooSlow, Ended) as error:
                return {"steps": steps, "problem": f"{entry.name} {error}"}
        losses[entry.name] = answer["loss"]
    difference = abs(losses[ours.name] - losses[plain.name]) / abs(losses[plain.name])
    return {
        "steps": steps,
        "ours": losses[ours.name],
        "plain": losses[plain.name],
        "start": start,
        "difference": difference,
        "share": CHECK_SHARE,
        "is_within": difference <= CHECK_SHARE,
    }


def _chosen(entries: Sequence[Entry], settings: Settings) -> list[Entry]:
    return [entry for entry in entries if not settings.only or entry.name in settings.only]


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in label)
