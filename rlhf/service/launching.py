"""Longer plans and launches: what a new batch, or an operator, sets going.

A launch is the command `rlhf launch` in a process of its own, so the configured launcher, its
checks and its messages are the command line's. A run that is busy with an older plan is launched
when it is free; the table of launches remembers it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select

from rlhf import runner
from rlhf.artifacts import NodeDir
from rlhf.compose import PLAIN, RUN_FILE, RUN_NAME, known_runs, load_frozen, recipes
from rlhf.config import Annotators, Config, LauncherKind
from rlhf.errors import ConfigError, LauncherError, RlhfError
from rlhf.fingerprint import flat_config
from rlhf.launch.local import PLAN
from rlhf.launch.operator import BACKGROUND, background_process
from rlhf.service.database.connect import PASSWORD, PASSWORD_FILE
from rlhf.service.database.models import Audit, Launch
from rlhf.service.facts import find_node, open_run
from rlhf.service.problems import Problem
from rlhf.service.settings import overrides_of
from rlhf.service.state import State
from rlhf.state import node_state

log = logging.getLogger(__name__)

LAUNCH_SECONDS = 300.0
"""Longest wait for `rlhf launch` and `rlhf cancel`, which ask a scheduler."""
WANTED, LAUNCHED, FAILED = "wanted", "launched", "failed"
WATCHER = "watcher"
"""Name under which the audit log has what nobody asked for."""


class Extended(NamedTuple):
    """A run whose plan has become longer, and the numbers of its new rounds."""

    run: str
    rounds: tuple[int, ...]


def subscribers(state: State, stream: str) -> list[str]:
    """Return the runs that read a stream and whose annotators are people."""
    return [
        name
        for name, config in _configs(state)
        if config.data.stream == stream and config.collect.annotators is Annotators.people
    ]


def extend(state: State, stream: str) -> list[Extended]:
    """Write the longer plans that a stream's batches allow; a run that refuses is logged."""
    found = []
    for run in subscribers(state, stream):
        try:
            config = _run_config(state, run)
            with alone(state, run, "plan"):
                added = runner.extend(config)
        except RlhfError as error:
            log.warning("the plan of run %s stays as it is: %s", run, error)
            record(state, "extend", run, status=HTTPStatus.CONFLICT, reason=str(error))
            continue
        if added:
            found.append(Extended(run, tuple(item.round for item in added)))
            record(state, "extend", run, stream=stream, rounds=[item.round for item in added])
    return found


def batch_arrived(state: State, stream: str, batch: str) -> list[Extended]:
    """Do what follows when a stream has got a batch: longer plans, and their launch if so set.

    Doing it again changes nothing.
    """
    found = extend(state, stream)
    if state.config.service.autolaunch:
        for run in unfinished(state, stream, batch):
            want(state, run)
    return found


def unfinished(state: State, stream: str, batch: str) -> list[str]:
    """Return the subscribers that have a round of a batch which is not done."""
    found = []
    for run in subscribers(state, stream):
        plan = runner.read_plan(state.runs / run)
        rounds = {item.round for item in plan.rounds if batch in item.batches} if plan else set()
        nodes = [node for node in plan.nodes if node.round in rounds] if plan else []
        if any(not NodeDir(state.runs / run / node.name).is_done() for node in nodes):
            found.append(run)
    return found


def launch(
    state: State,
    run: str,
    *,
    user: str,
    recipe: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Launch:
    """Launch what is left of a run, or start one from a recipe; returns the row of the table.

    Launching again doubles nothing. A run that is busy with an older plan is `wanted`, and launched
    when it is free. Raises ConfigError and LauncherError with the messages of `rlhf launch`, and a
    Problem for a run that does not exist.
    """
    changed = overrides_of(settings or {})
    if recipe is None:
        open_run(state, run)
    else:
        _check_new(run, recipe)
    with alone(state, run, "launch"):
        if not is_busy(state, run):
            row = _ordered(state, run, user=user, recipe=recipe, settings=settings or {})
            return _start(state, row)
        if changed:
            raise Problem(
                HTTPStatus.CONFLICT,
                f"run {run} is working, so {', '.join(changed)} cannot take effect: wait until it "
                "has ended, or cancel it first",
            )
        return _standing(state, run, user=user)


def want(state: State, run: str, *, user: str = WATCHER) -> Launch:
    """Note that a run is to be launched as soon as it is free; once is enough."""
    with alone(state, run, "launch"):
        return _wanted(state, run) or _add(state, run, WANTED, user=user)


def launch_wanted(state: State) -> list[str]:
    """Launch the runs that are wanted and free; returns their names. A failure is in the table."""
    with state.reading() as session:
        waiting = session.scalars(select(Launch.run).where(Launch.state == WANTED).distinct())
        names = list(waiting)
    launched = []
    for run in names:
        with alone(state, run, "launch"):
            row = _wanted(state, run)
            if row is None or is_busy(state, run):
                continue
            try:
                _start(state, row)
            except RlhfError as error:
                log.warning("run %s was not launched: %s", run, error)
                record(state, "launch", run, status=HTTPStatus.BAD_GATEWAY, reason=str(error))
            else:
                launched.append(run)
                record(state, "launch", run, user=row.user)
    return launched


def cancel(state: State, run: str, *, node: str = "", user: str) -> str:
    """End the jobs of a run, or one node's; returns what `rlhf cancel` said.

    A launch that was only wanted is wanted no more.
    """
    found = open_run(state, run)
    if node:
        find_node(found, node)
    with state.transaction() as session:
        rows = session.scalars(select(Launch).where(Launch.run == run, Launch.state == WANTED))
        for row in rows:
            row.state, row.output = FAILED, f"cancelled by {user}"
    return run_command(["cancel", *_fixed(state, run), f"node={node}"])


def is_busy(state: State, run: str) -> bool:
    """Tell whether a launch would change nothing because the run is worked on here.

    Schedulers take only what is missing, so their runs are never busy.
    """
    folder = state.runs / run
    if not (folder / RUN_FILE).exists():
        return False
    if load_frozen(folder).launcher.kind is not LauncherKind.local:
        return False
    if background_process(folder) is not None:
        return True
    plan = runner.read_plan(folder)
    nodes = plan.nodes if plan else ()
    return any(node_state(folder, node).state == "running" for node in nodes)


def record(
    state: State, action: str, target: str, *, status: int = HTTPStatus.OK, **detail: object
) -> None:
    """Add a row to the audit log for something that no request asked for."""
    row = Audit(
        user=WATCHER, role="", action=action, target=target[:500], status=int(status), detail=detail
    )
    with state.transaction() as session:
        session.add(row)


def _check_new(run: str, recipe: str) -> None:
    if recipe not in recipes():
        raise ConfigError(
            f"recipe={recipe[:100]} does not exist: choose one of {', '.join(recipes())}"
        )
    if not RUN_NAME.fullmatch(run):
        raise ConfigError(
            f"run={run[:100]} cannot name a run: use up to 80 letters, digits, dots, dashes and "
            "underscores"
        )


def _standing(state: State, run: str, *, user: str) -> Launch:
    """Return the launch that stands for another one of a busy run."""
    found = _wanted(state, run)
    if found is not None:
        return found
    if not _knows_plan(state.runs / run):
        return _add(state, run, WANTED, user=user)
    with state.reading() as session:
        rows = select(Launch).where(Launch.run == run, Launch.state == LAUNCHED)
        last = session.scalars(rows.order_by(Launch.id.desc()).limit(1)).first()
    said = f"process {background_process(state.runs / run)} runs {run} already"
    return last or _add(state, run, LAUNCHED, user=user, output=said)


def _knows_plan(folder: Path) -> bool:
    """Tell whether the process in the background was started with the plan as it is."""
    if background_process(folder) is None:
        return False
    started = (folder / BACKGROUND).stat().st_mtime_ns
    return (folder / PLAN).stat().st_mtime_ns <= started


def _wanted(state: State, run: str) -> Launch | None:
    with state.reading() as session:
        rows = select(Launch).where(Launch.run == run, Launch.state == WANTED).order_by(Launch.id)
        return session.scalars(rows.limit(1)).first()


def _ordered(
    state: State, run: str, *, user: str, recipe: str | None, settings: Mapping[str, object]
) -> Launch:
    """Return the row of a launch that begins: after a kill it is repeated with what it says."""
    order = {"recipe": recipe, "settings": dict(settings)}
    found = _wanted(state, run)
    if found is None:
        return _add(state, run, WANTED, user=user, **order)
    return _change(state, found, **order)


def _add(state: State, run: str, status: str, *, user: str, **values: Any) -> Launch:
    is_known = (state.runs / run / RUN_FILE).exists()
    config = load_frozen(state.runs / run) if is_known else state.config
    kind = config.launcher.kind.name
    row = Launch(run=run, user=user, state=status, launcher=kind, **values)
    with state.transaction() as session:
        session.add(row)
    return row


def _start(state: State, row: Launch) -> Launch:
    """Call the command; a kill on the way leaves the row wanted, and it is called again."""
    try:
        changed = overrides_of(row.settings)
        said = run_command(["launch", *_fixed(state, row.run, row.recipe), *changed])
    except RlhfError as error:
        _change(state, row, state=FAILED, output=str(error))
        raise
    return _change(state, row, state=LAUNCHED, output=said)


def _change(state: State, row: Launch, /, **values: Any) -> Launch:
    with state.transaction() as session:
        kept = session.get_one(Launch, row.id)
        for name, value in values.items():
            setattr(kept, name, value)
    return kept


def _fixed(state: State, run: str, recipe: str | None = None) -> list[str]:
    """Return what every call says: the run, the service's folders, for a new run its launcher."""
    folders = [_override("paths.runs", state.runs), _override("paths.store", state.store)]
    if recipe is None:
        follows = load_frozen(state.runs / run).launcher.follow
        # The service does not wait for jobs; its watcher launches what is left.
        return [f"run={run}", *folders, *(["launcher.follow=false"] if follows else [])]
    usual = flat_config(Config(recipe="none"))
    chosen = [
        _override(key, value)
        for key, value in flat_config(state.config).items()
        if key.startswith("launcher.") and key != "launcher.follow" and value != usual[key]
    ]
    return [f"recipe={recipe}", f"run={run}", *folders, *chosen]


def _override(key: str, value: object) -> str:
    text = "null" if value is None else str(value)
    if PLAIN.fullmatch(f"{key}={text}"):
        return f"{key}={text}"
    if isinstance(value, bool | int | float | list):
        return f"{key}={text}"
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{quoted}"'


def run_command(arguments: list[str]) -> str:
    """Run an `rlhf` command and return what it said; its refusals become the errors they were."""
    # A run has no business with the service's database.
    hidden = (PASSWORD, PASSWORD_FILE)
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rlhf.cli", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LAUNCH_SECONDS,
            env=environment,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LauncherError(
            f"rlhf {arguments[0]} did not answer within {LAUNCH_SECONDS:.0f} s: see whether the "
            "scheduler does, then try again"
        ) from error
    if done.returncode == 0:
        return done.stdout.strip()
    # Warnings come before; the message may have several lines.
    said = f"\n{done.stderr}".rpartition("\nrlhf: ")[2].strip()
    if done.returncode == 2:
        raise ConfigError(said)
    raise LauncherError(said or f"rlhf {arguments[0]} ended with exit code {done.returncode}")


def _configs(state: State) -> Iterator[tuple[str, Config]]:
    for name in known_runs(state.runs):
        try:
            yield name, _run_config(state, name)
        except RlhfError as error:
            log.warning("run %s is left out: %s", name, error)


def _run_config(state: State, run: str) -> Config:
    """Return a run's configuration; its store is the service's."""
    config = load_frozen(state.runs / run)
    return replace(config, paths=replace(config.paths, store=str(state.store)))


@contextmanager
def alone(state: State, run: str, what: str) -> Iterator[None]:
    """Let one at a time do something to a run, over all servers that share the folder of runs."""
    state.runs.mkdir(parents=True, exist_ok=True)
    with (state.runs / f".{run}.{what}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
