"""Longer plans and launches: what a new batch, or an operator, sets going.

A launch is the command `rlhf launch` in a process of its own, so the configured launcher, its
checks and its messages are the command line's. A run that is busy with an older plan is launched
when it is free; the table of launches remembers it. One run that cannot be read or written keeps
no other waiting.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select

from rlhf import runner
from rlhf.artifacts import NodeDir
from rlhf.compose import RUN_FILE, RUN_NAME, known_runs, load_frozen, recipes
from rlhf.config import Annotators, LauncherKind
from rlhf.data.ledger import Store
from rlhf.errors import ArtifactError, ConfigError, RlhfError, UserError
from rlhf.launch.local import PLAN
from rlhf.launch.operator import BACKGROUND, background_process
from rlhf.lease import is_run_locked
from rlhf.service.command import cancel_arguments, launch_arguments, run_command
from rlhf.service.database.models import Audit, Launch
from rlhf.service.facts import find_node, open_run
from rlhf.service.facts.files import UNREADABLE, stamp
from rlhf.service.pauses import Pauses
from rlhf.service.problems import Problem
from rlhf.service.settings import overrides_of
from rlhf.service.state import State
from rlhf.state import LOG, node_state
from rlhf.supply import reads_store

log = logging.getLogger(__name__)

WANTED, LAUNCHED, FAILED = "wanted", "launched", "failed"
WATCHER = "watcher"
"""Name under which the audit log has what nobody asked for."""


class Extended(NamedTuple):
    """A run whose plan has become longer, and the numbers of its new rounds."""

    run: str
    rounds: tuple[int, ...]


class Broken:
    """The runs that a walk over all of them could not read or write, and why."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    @contextmanager
    def of(self, run: str) -> Iterator[None]:
        """Note what goes wrong with a run inside the block instead of raising it."""
        try:
            yield
        except UNREADABLE as error:
            log.warning("run %s is left out: %s: %s", run, type(error).__name__, error)
            # A refusal would be the same the next time.
            if not isinstance(error, UserError):
                self._found[run] = f"{type(error).__name__}: {error}"

    def check(self) -> None:
        """Raise ArtifactError where another try may find the runs mended."""
        if self._found:
            said = "; ".join(f"{run} ({reason})" for run, reason in sorted(self._found.items()))
            raise ArtifactError(f"runs that cannot be read or written: {said}")


def subscribers(state: State, stream: str, broken: Broken | None = None) -> list[str]:
    """Return the runs that read a stream of the service's store and whose annotators are people."""
    store = Store(state.store, stream)
    broken = Broken() if broken is None else broken
    found = []
    for name in known_runs(state.runs):
        with broken.of(name):
            config = load_frozen(state.runs / name)
            if reads_store(config, store) and config.collect.annotators is Annotators.people:
                found.append(name)
    return found


def extend(state: State, stream: str, broken: Broken | None = None) -> list[Extended]:
    """Write the longer plans that a stream's batches allow; a run that refuses is logged."""
    broken = Broken() if broken is None else broken
    found = []
    for run in subscribers(state, stream, broken):
        with broken.of(run):
            try:
                added = runner.extend(load_frozen(state.runs / run))
            except RlhfError as error:
                record(state, "extend", run, status=HTTPStatus.CONFLICT, reason=str(error))
                raise
            if added:
                found.append(Extended(run, tuple(item.round for item in added)))
                record(state, "extend", run, stream=stream, rounds=[item.round for item in added])
    return found


def batch_arrived(state: State, stream: str, batch: str) -> list[Extended]:
    """Do what follows when a stream has got a batch: longer plans, and their launch if so set.

    Doing it again changes nothing. Raises ArtifactError once all runs have had their turn where one
    could not be read or written.
    """
    broken = Broken()
    found = extend(state, stream, broken)
    if state.config.service.autolaunch:
        for run in subscribers(state, stream, broken):
            with broken.of(run):
                if _is_unfinished(state.runs / run, batch):
                    want(state, run)
    broken.check()
    return found


def _is_unfinished(folder: Path, batch: str) -> bool:
    """Tell whether a run has a round of a batch which is not done."""
    plan = runner.read_plan(folder)
    rounds = {item.round for item in plan.rounds if batch in item.batches} if plan else set()
    nodes = [node for node in plan.nodes if node.round in rounds] if plan else []
    return any(not NodeDir(folder / node.name).is_done() for node in nodes)


def launch(
    state: State,
    run: str,
    *,
    user: str,
    recipe: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Launch:
    """Launch what is left of a run, or start one from a recipe; returns the row of the table.

    Launching again doubles nothing. A run that is busy is `wanted`, and launched when it is free,
    unless the process that works on it will do everything that is left. Raises ConfigError and
    LauncherError with the messages of `rlhf launch`, and a Problem for a run that does not exist.
    """
    changed = overrides_of(settings or {})
    if recipe is None:
        open_run(state, run)
    else:
        _check_new(run, recipe)
    with alone(state, run, "launch"):
        if not is_busy(state, run):
            is_kept = _wanted(state, run) is not None
            row = _ordered(state, run, user=user, recipe=recipe, settings=settings or {})
            return _start(state, row, is_kept=is_kept)
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


def launch_wanted(state: State, pauses: Pauses | None = None) -> list[str]:
    """Launch the runs that are wanted and free; returns their names. A failure is in the table.

    What is refused is wanted no more. Anything else that fails is tried again after a pause.
    """
    pauses = Pauses() if pauses is None else pauses
    with state.reading() as session:
        waiting = session.scalars(select(Launch.run).where(Launch.state == WANTED).distinct())
        names = [name for name in waiting if pauses.is_over(name)]
    launched = []
    for run in names:
        try:
            row = _launch_wanted(state, run)
        except UNREADABLE as error:
            _not_launched(state, run, str(error) or type(error).__name__, pauses)
            continue
        pauses.forget(run)
        if row is not None:
            launched.append(run)
            record(state, "launch", run, user=row.user)
    return launched


def _not_launched(state: State, run: str, reason: str, pauses: Pauses) -> None:
    """Say once why a run was not launched, and let it wait where it is still wanted."""
    seconds, is_new = pauses.begin(run, reason)
    if is_new:
        log.warning("run %s was not launched: %s", run, reason)
        record(state, "launch", run, status=HTTPStatus.BAD_GATEWAY, reason=reason)
    row = _wanted(state, run)
    if row is None:
        pauses.forget(run)
        return
    log.info("run %s is launched again in %.0f s", run, seconds)
    _change(state, row, output=reason)


def _launch_wanted(state: State, run: str) -> Launch | None:
    """Launch a run that is wanted; None where it is busy, or wanted no more."""
    with alone(state, run, "launch"):
        row = _wanted(state, run)
        if row is None or is_busy(state, run):
            return None
        return _start(state, row, is_kept=True)


def cancel(state: State, run: str, *, node: str = "", user: str) -> str:
    """End the jobs of a run, or one node's; returns what `rlhf cancel` said.

    With the whole run, a launch that was only wanted is wanted no more, and the last one is over.
    """
    found = open_run(state, run)
    if node:
        find_node(found, node)
    with alone(state, run, "launch"):
        rows = select(Launch).where(Launch.run == run).order_by(Launch.id.desc())
        is_last_over = not node and is_busy(state, run)
        with state.transaction() as session:
            for row in session.scalars(rows.where(Launch.state == WANTED)) if not node else ():
                row.state, row.output = FAILED, f"cancelled by {user}"
        said = run_command(cancel_arguments(state, run, node))
        with state.transaction() as session:
            last = session.scalars(rows.limit(1)).first()
            if last is not None and last.state == LAUNCHED and is_last_over:
                last.state, last.output = FAILED, f"{last.output}\ncancelled by {user}".strip()
    return said


def is_busy(state: State, run: str) -> bool:
    """Tell whether a process here works on a run, or follows its jobs.

    Schedulers take only what is missing, so that a run of theirs is free while nobody follows it.
    """
    folder = state.runs / run
    if not (folder / RUN_FILE).exists():
        return False
    if background_process(folder) is not None:
        return True
    if load_frozen(folder).launcher.kind is not LauncherKind.local:
        return False
    if is_run_locked(folder):
        return True
    plan = runner.read_plan(folder)
    nodes = plan.nodes if plan else ()
    return any(node_state(folder, node).state == "running" for node in nodes)


def record(
    state: State, action: str, target: str, *, status: int = HTTPStatus.OK, **detail: object
) -> None:
    """Add a row to the audit log for something that no request asked for."""
    with state.transaction() as session:
        session.add(audit_row(action, target, status=status, **detail))


def audit_row(action: str, target: str, *, status: int = HTTPStatus.OK, **detail: object) -> Audit:
    """Return the row of the audit log for something that no request asked for."""
    return Audit(
        user=WATCHER, role="", action=action, target=target[:500], status=int(status), detail=detail
    )


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
    folder = state.runs / run
    found = _wanted(state, run)
    if found is not None:
        return found
    with state.reading() as session:
        rows = select(Launch).where(Launch.run == run).order_by(Launch.id.desc())
        last = session.scalars(rows.limit(1)).first()
    is_cancelled = last is not None and last.state == FAILED
    if is_cancelled or not _does_all(folder):
        return _add(state, run, WANTED, user=user)
    said = f"process {background_process(folder)} runs {run} already"
    return last or _add(state, run, LAUNCHED, user=user, output=said)


def _does_all(folder: Path) -> bool:
    """Tell whether the process in the background will do all that is left.

    It knows the plan as it was when it began, and starts no node again that has ended since.
    """
    plan, background = runner.read_plan(folder), stamp(folder / BACKGROUND)
    if background_process(folder) is None or plan is None or background is None:
        return False
    if (folder / PLAN).stat().st_mtime_ns > background[0]:
        return False
    ended = [node for node in plan.nodes if node_state(folder, node).state == "stopped"]
    logs = [stamp(folder / node.name / LOG) for node in ended]
    return all(found is None or found[0] <= background[0] for found in logs)


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


def _start(state: State, row: Launch, *, is_kept: bool) -> Launch:
    """Call the command; a kill on the way leaves the row wanted, and it is called again.

    With `is_kept` so does any failure but a refusal.
    """
    try:
        changed = overrides_of(row.settings)
        said = run_command([*launch_arguments(state, row.run, row.recipe), *changed])
    except UNREADABLE as error:
        is_over = isinstance(error, UserError) or not is_kept
        _change(state, row, state=FAILED if is_over else WANTED, output=str(error))
        raise
    return _change(state, row, state=LAUNCHED, output=said)


def _change(state: State, row: Launch, /, **values: Any) -> Launch:
    with state.transaction() as session:
        kept = session.get_one(Launch, row.id)
        for name, value in values.items():
            setattr(kept, name, value)
    return kept


@contextmanager
def alone(state: State, run: str, what: str) -> Iterator[None]:
    """Let one at a time do something to a run, over all servers that share the folder of runs."""
    state.runs.mkdir(parents=True, exist_ok=True)
    with (state.runs / f".{run}.{what}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
