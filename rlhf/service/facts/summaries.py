"""All runs at a glance."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rlhf.artifacts import MANIFEST
from rlhf.runner import within_limit
from rlhf.service.facts.cache import Cache
from rlhf.service.facts.files import UNREADABLE, stamp
from rlhf.service.facts.logs import has_ended_early
from rlhf.service.facts.nodes import NodeRow, node_rows
from rlhf.service.facts.runs import MAX_OPEN, Run, known_runs, open_known, run_versions
from rlhf.service.problems import Problem
from rlhf.service.state import State
from rlhf.state import INPUTS
from rlhf.versions import OVERRULES, current_version

log = logging.getLogger(__name__)

STATES = ("done", "running", "stopped", "waiting")
DECIDING = ("sft", "rejection", "ppo", "evaluate")
"""Stages whose nodes make versions or judge them."""
_PROMOTED = Cache(MAX_OPEN)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run in one line.

    `version` is the one that counts as promoted, "" before there is one; `started` and
    `finished_at` are None before; `running` and `failed` name nodes; `has_ended_early` tells that
    nothing works on what is left. A run that cannot be read says why in `problem`, and nothing
    else.
    """

    name: str
    recipe: str
    stream: str
    rounds: int
    counts: dict[str, int]
    version: str
    started: datetime | None
    finished_at: datetime | None
    running: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    has_ended_early: bool = False
    problem: str = ""

    @property
    def state(self) -> str:
        """Return what says most about the run: failed, running, done, stopped or waiting."""
        if self.failed or self.problem:
            return "failed"
        if self.running:
            return "running"
        if self.finished_at is not None:
            return "done"
        return "stopped" if self.counts["stopped"] or self.has_ended_early else "waiting"


def list_runs(state: State, *, names: Sequence[str] | None = None) -> list[RunSummary]:
    """Return every run, or some of those known, by name; one that cannot be read hides no other."""
    found = []
    for name in known_runs(state) if names is None else names:
        try:
            run = open_known(state, name)
            found.append(run_summary(run, node_rows(run, ask_scheduler=False)))
        except Problem:
            # It was deleted meanwhile.
            continue
        except UNREADABLE as error:
            log.warning("run %s cannot be read: %s", name, error)
            counts = dict.fromkeys(STATES, 0)
            reason = str(error) or type(error).__name__
            found.append(RunSummary(name, "", "", 0, counts, "", None, None, problem=reason))
    return found


def run_summary(run: Run, rows: Sequence[NodeRow]) -> RunSummary:
    """Return a run in one line, from its nodes."""
    counts = Counter(row.state for row in rows)
    within = {node.name for node in within_limit(run.config, run.plan)}
    is_over = all(row.state == "done" for row in rows if row.name in within)
    mark = (
        tuple((row.name, row.state) for row in rows),
        stamp(run.folder / OVERRULES),
        *(stamp(run.folder / row.name / MANIFEST) for row in rows if row.stage in DECIDING),
    )
    return RunSummary(
        name=run.name,
        recipe=run.plan.recipe,
        stream=run.config.data.stream,
        rounds=len(run.plan.rounds),
        counts={name: counts[name] for name in STATES},
        version=_PROMOTED.get(run.folder, mark, lambda: _promoted(run)),
        started=min(_times(run, INPUTS), default=None),
        finished_at=max(_times(run, MANIFEST), default=None) if is_over else None,
        running=[row.name for row in rows if row.state == "running"],
        failed=[row.name for row in rows if row.has_failed],
        has_ended_early=has_ended_early(run, rows),
    )


def _promoted(run: Run) -> str:
    versions = run_versions(run)
    return current_version(versions, run.folder).name if versions else ""


def _times(run: Run, file: str) -> list[datetime]:
    """Return when the nodes wrote a file."""
    paths = (run.folder / node.name / file for node in run.plan.nodes)
    return [moment for path in paths if (moment := _time(path)) is not None]


def _time(path: Path) -> datetime | None:
    found = stamp(path)
    return datetime.fromtimestamp(found[0] / 1e9, UTC) if found is not None else None
