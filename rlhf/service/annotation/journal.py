"""Weeks and verdicts back from their files, into a database that lost them or never had them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session

from rlhf.artifacts import read_json, read_jsonl
from rlhf.service.access import find_user
from rlhf.service.annotation.assigning import MAX_SKIPS
from rlhf.service.annotation.journal_file import entries, locked
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


@dataclass(frozen=True, slots=True)
class Restored:
    """What the files had and the database did not."""

    weeks: int
    entries: int


def restore(state: State) -> Restored:
    """Bring the database up to the files of all weeks; what it has already stays as it is.

    Annotators whom it does not know come back without tokens.
    """
    weeks = number = 0
    with locked(state.weeks):
        for folder in sorted(path for path in state.weeks.iterdir() if path.is_dir()):
            with state.transaction() as session:
                week = session.scalar(select(Week).where(Week.name == folder.name))
                if week is None and (folder / WEEK).exists():
                    week = add_week(session, read_json(folder / WEEK), read_jsonl(folder / TASKS))
                    weeks += 1
                if week is None:
                    continue
                number += _apply(session, week, folder)
                _restore_state(week, folder)
    if weeks or number:
        log.warning("restored %d weeks and %d journal entries from files", weeks, number)
    return Restored(weeks, number)


def _restore_state(week: Week, folder: Path) -> None:
    report = close_report(folder)
    if report is not None and week.state != "closed":
        week.state, week.closed = "closed", datetime.fromisoformat(report["closed"])
    elif week.state == "open" and batch_file(folder).exists():
        week.state = "closing"


def _apply(session: Session, week: Week, folder: Path) -> int:
    """Apply the entries that the database lacks; returns their number."""
    finished = set(
        session.scalars(
            select(Assignment.key)
            .join(Task)
            .where(Task.week_id == week.id, Assignment.state.in_(("done", "skipped")))
        )
    )
    left = [entry for entry in entries(folder) if entry["key"] not in finished]
    tasks = {
        task.pair_id: task
        for task in (session.scalars(select(Task).where(Task.week_id == week.id)) if left else ())
    }
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
        number += _apply_entry(session, task, people[name], entry)
    if number:
        session.flush()
        _recount(session, week)
    return number


def _apply_entry(session: Session, task: Task, user: User, entry: dict[str, Any]) -> bool:
    found = session.scalar(
        select(Assignment).where(Assignment.task_id == task.id, Assignment.user_id == user.id)
    )
    if found is not None and found.state in ("done", "skipped"):
        return False
    if found is None:
        found = Assignment(key=entry["key"], task_id=task.id, user_id=user.id)
        found.assigned = datetime.fromisoformat(entry["assigned"])
        session.add(found)
    found.key, found.swapped = entry["key"], entry["swapped"]
    found.touched = datetime.fromisoformat(entry["time"])
    if entry["kind"] == "skip":
        found.state, found.draft = "skipped", {SKIPPED: entry["reason"]}
        return True
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
    return True


def _recount(session: Session, week: Week) -> None:
    """Set `taken` of a week's tasks to what their assignments say."""
    is_skip = case((Assignment.state == "skipped", 1), else_=0)
    is_kept = case((Assignment.state.in_(("open", "done")), 1), else_=0)
    rows = session.execute(
        select(Assignment.task_id, func.sum(is_kept), func.sum(is_skip))
        .join(Task)
        .where(Task.week_id == week.id, Task.needed < UNLIMITED)
        .group_by(Assignment.task_id)
    ).all()
    for task_id, kept, skips in rows:
        taken = kept + max(0, skips - MAX_SKIPS + 1)
        session.execute(update(Task).where(Task.id == task_id).values(taken=taken))
