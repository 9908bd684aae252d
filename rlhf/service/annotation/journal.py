"""Weeks and verdicts back from their files, into a database that lost them or never had them.

A verdict that the journal has and the database does not was never acknowledged, or the database was
lost or is an old copy. It counts unless it cannot have been acknowledged: a week's batch file does
not have it, or others have judged the pair as often as is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session

from rlhf.artifacts import read_json, read_jsonl
from rlhf.errors import ArtifactError
from rlhf.service.access import find_user
from rlhf.service.annotation.assigning import places_kept
from rlhf.service.annotation.journal_file import LEFT_OUT, append, entries, locked
from rlhf.service.annotation.judging import SKIPPED
from rlhf.service.annotation.weeks import (
    TASKS,
    UNLIMITED,
    WEEK,
    add_week,
    batch_file,
    close_report,
)
from rlhf.service.database.models import Annotation, Assignment, Task, User, Week
from rlhf.service.state import State

log = logging.getLogger(__name__)

FINISHED = ("done", "skipped")
KEEPING = ("open", "done")
"""States of assignments that keep a place on their task; of skips only the last ones do."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What the files had and the database did not."""

    weeks: int
    entries: int


def restore(state: State) -> Restored:
    """Bring the database up to the files of all weeks; what it has already stays as it is.

    Annotators whom it does not know come back without tokens. Raises ArtifactError for a week that
    it lacks and whose week.json is damaged.
    """
    number = 0
    with locked(state.weeks):
        folders = sorted(path for path in state.weeks.iterdir() if path.is_dir())
        with state.reading() as session:
            known = set(session.scalars(select(Week.name)))
        lost = _lost_weeks([path for path in folders if path.name not in known])
        for folder in [path for path in folders if path.name in known]:
            # The week is not being closed meanwhile.
            with locked(folder), state.transaction() as session:
                week = session.scalars(select(Week).where(Week.name == folder.name)).one()
                number += _apply(session, week, folder, is_back=False)
                _restore_state(week, folder)
        for folder, head in lost:
            with state.transaction() as session:
                week = add_week(session, head, read_jsonl(folder / TASKS))
                number += _apply(session, week, folder, is_back=True)
                _restore_state(week, folder)
    if lost or number:
        log.warning("restored %d weeks and %d journal entries from files", len(lost), number)
    return Restored(len(lost), number)


def _lost_weeks(folders: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the folders that hold a week, and its head, in the order of their creation."""
    found = []
    for folder in folders:
        if not (folder / WEEK).exists():
            continue
        try:
            found.append((folder, read_json(folder / WEEK)))
        except ArtifactError as error:
            raise ArtifactError(
                f"{folder / WEEK} is damaged, and the database does not know the week: put the "
                f"file back from a copy, or move the folder {folder} elsewhere; its journal.jsonl "
                "holds the verdicts"
            ) from error
    return sorted(found, key=lambda item: (datetime.fromisoformat(item[1]["created"]), item[0]))


def _restore_state(week: Week, folder: Path) -> None:
    report = close_report(folder)
    if report is not None and week.state != "closed":
        week.state, week.closed = "closed", datetime.fromisoformat(report["closed"])
    elif week.state == "open" and batch_file(folder).exists():
        week.state = "closing"


def _apply(session: Session, week: Week, folder: Path, *, is_back: bool) -> int:
    """Apply the entries that the database lacks; returns their number."""
    finished = set(
        session.scalars(
            select(Assignment.key)
            .join(Task)
            .where(Task.week_id == week.id, Assignment.state.in_(FINISHED))
        )
    )
    left = [entry for entry in entries(folder) if entry["key"] not in finished]
    tasks = {
        task.pair_id: task
        for task in (session.scalars(select(Task).where(Task.week_id == week.id)) if left else ())
    }
    written = _written(folder) if left else None
    people: dict[str, User] = {}
    number = 0
    for entry in left:
        task = tasks.get(entry["pair_id"])
        if task is None:
            log.warning("week %s has no pair %s: left out", week.name, entry["pair_id"])
            continue
        name = entry["annotator"]
        if name not in people:
            people[name] = find_user(session, name, role="annotator")
        user = people[name]
        found = _locked(session, task, user)
        if found is not None and found.state in FINISHED:
            continue
        if not _counts(session, task, user, entry, written, is_back=is_back):
            said = "week %s: the verdict of %s on %s was never acknowledged and is left out"
            log.warning(said, week.name, name, task.pair_id)
            append(folder, {**entry, "kind": LEFT_OUT})
            continue
        _apply_entry(session, task, user, found, entry)
        number += 1
    if number:
        session.flush()
        _recount(session, week)
    return number


def _locked(session: Session, task: Task, user: User) -> Assignment | None:
    """Return somebody's assignment of a task, once no submission of it is under way elsewhere."""
    found: Assignment | None = session.scalar(
        select(Assignment)
        .where(Assignment.task_id == task.id, Assignment.user_id == user.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return found


def _written(folder: Path) -> set[tuple[str, str]] | None:
    """Return annotator and time of the verdicts in a week's batch file; None without the file."""
    path = batch_file(folder)
    if not path.exists():
        return None
    return {
        (given["annotator"], given["submitted"])
        for row in read_jsonl(path)
        for given in row["meta"]["annotations"]
    }


def _counts(
    session: Session,
    task: Task,
    user: User,
    entry: dict[str, Any],
    written: set[tuple[str, str]] | None,
    *,
    is_back: bool,
) -> bool:
    """Tell whether an entry that the database lacks counts."""
    if entry["kind"] == "skip" or task.is_qualification:
        return True
    if written is not None:
        return (user.name, entry["time"]) in written
    # In an empty database nothing tells who had the place in the end.
    return is_back or _make_room(session, task, user)


def _make_room(session: Session, task: Task, user: User) -> bool:
    """Find a place for a verdict: whoever only holds the task gives way; False where nobody can."""
    others = session.scalars(
        select(Assignment)
        .where(
            Assignment.task_id == task.id,
            Assignment.user_id != user.id,
            Assignment.state.in_(KEEPING),
        )
        .order_by(Assignment.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    if len(others) < task.needed:
        return True
    holding = [row for row in others if row.state == "open"]
    if not holding:
        return False
    holding[-1].state = "expired"
    return True


def _apply_entry(
    session: Session, task: Task, user: User, found: Assignment | None, entry: dict[str, Any]
) -> None:
    if found is None:
        found = Assignment(key=entry["key"], task_id=task.id, user_id=user.id)
        found.assigned = datetime.fromisoformat(entry["assigned"])
        session.add(found)
    found.key, found.swapped = entry["key"], entry["swapped"]
    found.touched = datetime.fromisoformat(entry["time"])
    if entry["kind"] == "skip":
        found.state, found.draft = "skipped", {SKIPPED: entry["reason"]}
        return
    found.state, found.draft = "done", None
    session.flush()
    names = ("preferred", "strength", "safe_a", "safe_b", "comment", "seconds")
    session.add(
        Annotation(
            assignment_id=found.id,
            task_id=task.id,
            user_id=user.id,
            submitted=found.touched,
            **{name: entry[name] for name in names},
        )
    )


def _recount(session: Session, week: Week) -> None:
    """Set `taken` of a week's tasks to what their assignments say."""
    limited = select(Task.id).where(Task.week_id == week.id, Task.needed < UNLIMITED)
    # Whoever takes a place meanwhile has done so before the count, or waits for it.
    session.execute(limited.with_for_update())
    is_skip = case((Assignment.state == "skipped", 1), else_=0)
    is_kept = case((Assignment.state.in_(KEEPING), 1), else_=0)
    rows = session.execute(
        select(Assignment.task_id, func.sum(is_kept), func.sum(is_skip))
        .where(Assignment.task_id.in_(limited))
        .group_by(Assignment.task_id)
    ).all()
    for task_id, kept, skips in rows:
        taken = kept + places_kept(skips)
        session.execute(update(Task).where(Task.id == task_id).values(taken=taken))
