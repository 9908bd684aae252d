"""Who judges which pair next.

A place on a task is taken by raising `taken` where it is below `needed`, in one statement: two
annotators who want the last place are told apart by the database. Somebody's own requests wait for
each other, so that two tabs get the same pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

from sqlalchemy import CursorResult, Select, exists, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased, contains_eager

from rlhf.artifacts import digest_json
from rlhf.data.prompts import keyed_digest
from rlhf.service.access import Caller, find_user
from rlhf.service.annotation.qualification import Standing, standing
from rlhf.service.annotation.weeks import find_week
from rlhf.service.database.models import Assignment, Task, User, Week, now
from rlhf.service.state import State

CANDIDATES = 8
"""Tasks that are looked at together; others may take them meanwhile."""
KEY_DIGITS = 32
"""Of an assignment's key."""
MAX_SKIPS = 3
"""A pair that so many annotators have skipped goes to nobody else in their place."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What somebody gets next: `status` is task, none or not_qualified, and `message` says why."""

    status: Literal["task", "none", "not_qualified"]
    message: str
    week: Week | None = None
    assignment: Assignment | None = None
    standing: Standing | None = None


def user_of(state: State, caller: Caller) -> User:
    """Return the row of whoever asks, added where the service needs no tokens."""
    with state.reading() as session:
        found = session.scalar(select(User).where(User.name == caller.name))
    if found is not None:
        return found
    try:
        with state.transaction() as session:
            return find_user(session, caller.name, role="operator")
    except IntegrityError:  # another request has just added it
        with state.transaction() as session:
            return find_user(session, caller.name, role="operator")


def next_assignment(state: State, user: User, week: str | None = None) -> Offer:
    """Return an annotator's open pair or give them the next, of a week or of the oldest open."""
    with state.transaction() as session:
        # Two requests of one person wait here; rows that refer to the user do not.
        session.execute(select(User.id).where(User.id == user.id).with_for_update(key_share=True))
        if week is not None:
            found = find_week(session, week)
            if found.state != "open":
                return Offer("none", f"Week {week} is closed. Thank you.", found)
            return _offer(session, state, found, user)
        said = Offer("none", "No week is open. An operator creates the next one.")
        for item in session.scalars(
            select(Week).where(Week.state == "open").order_by(Week.id)
        ).all():
            offer = _offer(session, state, item, user)
            if offer.assignment is not None:
                return offer
            # Who is not qualified for one week hears that rather than that others are empty.
            if said.status != "not_qualified":
                said = offer
        return said


def _offer(session: Session, state: State, week: Week, user: User) -> Offer:
    stood = standing(session, week, user.id)
    own: Assignment | None = session.scalar(
        _assignments(week).where(Assignment.user_id == user.id, _IS_OPEN).limit(1)
    )
    if own is not None:
        own.touched = now()
        return Offer("task", "", week, own, stood)
    if stood.open:
        taken = _take(session, stood.open[0], week, user)
        return Offer("task", "", week, taken, stood)
    if stood.is_failed:
        return Offer(
            "not_qualified",
            f"{stood.right} of {stood.total} qualification items were right, and "
            f"{stood.share:.0%} are needed, so there are no further pairs of week {week.name} "
            "for you. Please talk to whoever runs the annotation.",
            week,
            standing=stood,
        )
    given = (
        _take_free(session, week, user)
        or _take_over(session, state, week, user)
        or _take_back(session, week, user)
    )
    if given is not None:
        return Offer("task", "", week, given, stood)
    waiting = session.scalar(
        select(func.count())
        .select_from(Assignment)
        .join(Task)
        .where(Task.week_id == week.id, _IS_OPEN)
    )
    later = " Others still have pairs, which may come back: look again later." if waiting else ""
    return Offer(
        "none", f"No pair of week {week.name} is left for you. Thank you.{later}", week, None, stood
    )


_IS_OPEN = Assignment.state == "open"


def _assignments(week: Week) -> Select[Any]:
    """Select a week's assignments with their tasks, oldest first."""
    return (
        select(Assignment)
        .join(Assignment.task)
        .options(contains_eager(Assignment.task))
        .where(Task.week_id == week.id)
        .order_by(Assignment.id)
    )


def _take_free(session: Session, week: Week, user: User) -> Assignment | None:
    """Take the first task that has a place and that the annotator never had."""
    had = exists().where(Assignment.task_id == Task.id, Assignment.user_id == user.id)
    while True:
        tasks = session.scalars(
            select(Task.id)
            .where(
                Task.week_id == week.id,
                ~Task.is_qualification,
                Task.taken < Task.needed,
                ~had,
            )
            .order_by(Task.position)
            .limit(CANDIDATES)
        ).all()
        for task_id in tasks:
            given = _take(session, task_id, week, user)
            if given is not None:
                return given
        if not tasks:
            return None


def _take_over(session: Session, state: State, week: Week, user: User) -> Assignment | None:
    """Take a task that its annotator has left alone for too long."""
    minutes = state.config.service.annotation.assignment_minutes
    cutoff = now() - timedelta(minutes=minutes)
    other = aliased(Assignment)
    had = exists().where(other.task_id == Task.id, other.user_id == user.id)
    while True:
        stale: Assignment | None = session.scalar(
            _assignments(week)
            .where(_IS_OPEN, Assignment.touched < cutoff, ~Task.is_qualification, ~had)
            .limit(1)
            .execution_options(populate_existing=True)
        )
        if stale is None:
            return None
        ended = _count(
            session,
            update(Assignment)
            .where(Assignment.id == stale.id, _IS_OPEN, Assignment.touched < cutoff)
            .values(state="expired"),
        )
        if ended:
            release(session, stale.task_id)
            given = _take(session, stale.task_id, week, user)
            if given is not None:
                return given


def _take_back(session: Session, week: Week, user: User) -> Assignment | None:
    """Take a task again that was given back and that nobody else has taken."""
    # Another tab may be submitting it; locked rows are read as they are after that.
    old: Assignment | None = session.scalar(
        _assignments(week)
        .where(
            Assignment.user_id == user.id,
            Assignment.state == "expired",
            Task.taken < Task.needed,
        )
        .limit(1)
        .with_for_update(of=Assignment)
        .execution_options(populate_existing=True)
    )
    return old if old is not None and reopen(session, old) else None


def reopen(session: Session, assignment: Assignment) -> bool:
    """Open an expired assignment again where its task has a place; tells whether it had."""
    if not _raise_taken(session, assignment.task_id):
        return False
    assignment.state, assignment.touched = "open", now()
    session.flush()
    return True


def places_kept(skips: int) -> int:
    """Return how many places of a task its skips keep: the last allowed one, and any after it."""
    return max(0, skips - MAX_SKIPS + 1)


def release(session: Session, task_id: int) -> None:
    """Give a place on a task back."""
    session.execute(
        update(Task)
        .where(Task.id == task_id)
        .values(taken=Task.taken - 1)
        .execution_options(synchronize_session=False)
    )


def _take(session: Session, task_id: int, week: Week, user: User) -> Assignment | None:
    if not _raise_taken(session, task_id):
        return None
    task = session.get_one(Task, task_id)
    order_key = week.settings["order_key"]
    order = f"{order_key}/{task.pair_id}/{user.name}"
    given = Assignment(
        # The same after the database was lost: an open page keeps what was typed under the key.
        key=digest_json([order_key, task.pair_id, user.name])[:KEY_DIGITS],
        task_id=task.id,
        user_id=user.id,
        state="open",
        swapped=bool(keyed_digest(order)[0] & 1),
    )
    session.add(given)
    session.flush()
    given.task = task
    return given


def _raise_taken(session: Session, task_id: int) -> bool:
    return bool(
        _count(
            session,
            update(Task)
            .where(Task.id == task_id, Task.taken < Task.needed)
            .values(taken=Task.taken + 1),
        )
    )


def _count(session: Session, statement: Any) -> int:
    """Run an update and return the number of rows that it changed."""
    done = session.execute(statement.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", done).rowcount
