"""Runs: which there are, and one of them with its frozen settings and plan."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path

from rlhf import runner
from rlhf.compose import RUN_FILE, load_frozen
from rlhf.compose import known_runs as started_runs
from rlhf.config import Config
from rlhf.errors import ArtifactError
from rlhf.launch.local import PLAN
from rlhf.plan import Plan
from rlhf.service.facts.files import UNREADABLE, Stamp, not_found, stamp, steadily
from rlhf.service.problems import Problem
from rlhf.service.state import State
from rlhf.versions import Version, list_versions

MAX_OPEN = 2048
"""Runs that stay in memory. Lists look at all of them in turn: with one more than that, each look
would read every run anew."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has started: its frozen settings, its plan and its folder."""

    config: Config
    plan: Plan
    folder: Path

    @property
    def name(self) -> str:
        """The run's name, which is also its folder's."""
        return self.folder.name


def known_runs(state: State) -> list[str]:
    """Return the names of the runs that have a plan, sorted."""
    return [name for name in started_runs(state.runs) if (state.runs / name / PLAN).is_file()]


def open_run(state: State, name: str) -> Run:
    """Return a run; a Problem (404) naming the runs there are, ArtifactError for a damaged one."""
    known = known_runs(state)
    if name not in known:
        raise not_found("run", name, known)
    return open_known(state, name)


def open_known(state: State, name: str) -> Run:
    """Return a run that `known_runs` has named; a Problem (404) where it went away meanwhile."""
    return steadily(lambda: _open(state.runs / name))


def open_runs(state: State) -> list[Run]:
    """Return the runs that can be read, by name; the overview says why another one cannot."""
    found = []
    for name in known_runs(state):
        with suppress(*UNREADABLE):
            found.append(open_known(state, name))
    return found


def _open(folder: Path) -> Run:
    settings, plan = stamp(folder / RUN_FILE), stamp(folder / PLAN)
    if settings is None or plan is None:
        raise Problem(
            HTTPStatus.NOT_FOUND, f"run {folder.name} went away while it was read: look again"
        )
    return _read(folder, settings, plan)


@lru_cache(maxsize=MAX_OPEN)
def _read(folder: Path, settings: Stamp, plan: Stamp) -> Run:
    """Read a run anew only when one of its files was replaced."""
    found = runner.read_plan(folder)
    if found is None:
        raise ArtifactError(f"{folder / PLAN} is missing: look again")
    return Run(load_frozen(folder), found, folder)


def run_versions(run: Run) -> list[Version]:
    """Return the versions that exist, oldest first, as the files say now."""
    return steadily(lambda: list_versions(run.config, run.plan, run.folder))
