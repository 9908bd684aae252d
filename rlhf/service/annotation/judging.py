"""Drafts, verdicts and skips of an assignment.

A verdict is in the journal before the database commits, and submitting it again is answered in the
same way. The row of the assignment is locked meanwhile, so that a double click is two submissions
one after the other, and the week's, so that it is not closed in between.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, contains_eager

from rlhf.service.annotation import journal_file
from rlhf.service.annotation.assigning import places_kept, release, reopen
from rlhf.service.annotation.schemas import (
    Answer,
    Draft,
    NewDraft,
    Saved,
    Skip,
    TaskView,
    Turn,
    Verdict,
)
from rlhf.service.annotation.weeks import folder_of
from rlhf.service.database.models import Annotation, Assignment, Task, User, Week, now
from rlhf.service.problems import Problem
from rlhf.service.state import State

SKIPPED = "skipped"
"""Key of a skip's reason in `Assignment.draft`."""
SIDES = {False: {"a": "left", "b": "right"}, True: {"a": "right", "b": "left"}}
"""Where each response of a pair is shown, by whether their order is swapped."""


def show(state: State, user: User, key: str) -> TaskView:
    """Return one's own assignment as the page shows it."""
    with state.reading() as session:
        found = _own(session, user, key)
        return view(found, session.get_one(Week, found.task.week_id))


def view(assignment: Assignment, week: Week) -> TaskView:
    """Return a pair in its annotator's order and without its origin."""
    task = assignment.task
    shown = {
        side: task.pair[f"response_{name}"] for name, side in SIDES[assignment.swapped].items()
    }
    kept = assignment.draft if assignment.state in ("open", "expired") else None
    return TaskView(
        key=assignment.key,
        week=week.name,
        axis=task.axis,
        guideline=week.settings["guidelines"][task.axis],
        is_qualification=task.is_qualification,
        prompt=[Turn(role=turn["role"], content=turn["content"]) for turn in task.pair["prompt"]],
        **shown,
        state=assignment.state,
        draft=Draft(**kept) if kept else None,
    )


def save_draft(state: State, user: User, key: str, draft: NewDraft) -> Saved:
    """Keep what has been typed, unless a newer draft is kept, or one that the page does not know.

    Raises Problem once it is submitted.
    """
    with state.transaction() as session:
        found = _own(session, user, key, lock=True)
        _refuse_finished(found)
        kept = Draft(**found.draft) if found.draft else None
        newest = draft.saved if draft.based_on is None else min(draft.saved, draft.based_on)
        if kept is None or kept.saved <= newest:
            found.draft = draft.model_dump(exclude={"based_on"})
            kept = Draft(**found.draft)
        if found.state == "open":
            found.touched = now()
        return Saved(key=key, state=found.state, draft=kept)


def submit(state: State, user: User, key: str, verdict: Verdict) -> Answer:
    """Take a verdict; the same one again changes nothing, another one is a Problem."""
    with state.transaction() as session:
        found = _own(session, user, key, lock=True)
        task = found.task
        given = _as_in_pair(verdict, swapped=found.swapped)
        if found.state == "done":
            return _again(session, found, given, verdict)
        _refuse_finished(found)
        if task.axis == "safety" and None in (verdict.safe_left, verdict.safe_right):
            raise Problem(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "on the safety axis each response needs a label: choose safe or unsafe for both",
            )
        week = _open_week(session, found)
        _hold(session, found)
        found.state, found.draft, found.touched = "done", None, now()
        row = Annotation(
            assignment_id=found.id,
            task_id=task.id,
            user_id=user.id,
            comment=verdict.comment,
            seconds=verdict.seconds,
            submitted=found.touched,
            **given,
        )
        session.add(row)
        session.flush()
        entry = {**_head(found, user, week, "submit"), **given}
        entry |= {"comment": row.comment, "seconds": row.seconds}
        journal_file.append(folder_of(state, week.name), entry)
    return Answer(key=key, state="done", verdict=verdict)


def skip(state: State, user: User, key: str, body: Skip) -> Answer:
    """Give a pair back for good, with a reason; the same again changes nothing."""
    answer = Answer(key=key, state="skipped", reason=body.reason)
    with state.transaction() as session:
        found = _own(session, user, key, lock=True)
        if found.state == "skipped" and found.draft == {SKIPPED: body.reason}:
            return answer
        _refuse_finished(found)
        week = _open_week(session, found)
        _hold(session, found)
        found.state, found.touched = "skipped", now()
        found.draft = {SKIPPED: body.reason}
        skips = select(func.count()).where(
            Assignment.task_id == found.task_id, Assignment.state == "skipped"
        )
        session.flush()
        if not places_kept(session.scalar(skips) or 0) and not found.task.is_qualification:
            release(session, found.task_id)
        entry = {**_head(found, user, week, "skip"), "reason": body.reason}
        journal_file.append(folder_of(state, week.name), entry)
    return answer


def as_shown(given: Annotation, *, swapped: bool) -> Verdict:
    """Return a stored verdict in the order in which its annotator saw the pair."""
    side_of = SIDES[swapped]
    labels = {f"safe_{side_of[name]}": getattr(given, f"safe_{name}") for name in side_of}
    return Verdict.model_validate(
        {
            "preferred": side_of[given.preferred],
            "strength": given.strength,
            **labels,
            "comment": given.comment,
            "seconds": given.seconds,
        }
    )


def _own(session: Session, user: User, key: str, *, lock: bool = False) -> Assignment:
    """Return somebody's assignment; a Problem where it is another's or nobody's."""
    query = (
        select(Assignment)
        .join(Assignment.task)
        .options(contains_eager(Assignment.task))
        .where(Assignment.key == key, Assignment.user_id == user.id)
    )
    if lock:
        query = query.with_for_update(of=Assignment)
    found = session.scalar(query) if key.isascii() and key.isprintable() else None
    if found is None:
        raise Problem(
            HTTPStatus.NOT_FOUND,
            f"{user.name} has no assignment {key[:100]!r}: POST /api/v1/tasks/next gives one",
        )
    return found


def _as_in_pair(verdict: Verdict, *, swapped: bool) -> dict[str, Any]:
    """Return a verdict with the pair's names of the responses."""
    name_of = {side: name for name, side in SIDES[swapped].items()}
    labels = {f"safe_{name_of[side]}": getattr(verdict, f"safe_{side}") for side in name_of}
    return {"preferred": name_of[verdict.preferred], "strength": verdict.strength, **labels}


def _again(session: Session, found: Assignment, given: dict[str, Any], verdict: Verdict) -> Answer:
    """Answer a submission that has been made before."""
    row = session.scalars(select(Annotation).where(Annotation.assignment_id == found.id)).one()
    kept = {name: getattr(row, name) for name in given}
    if kept != given or row.comment != verdict.comment:
        raise Problem(
            HTTPStatus.CONFLICT,
            "this pair has been submitted with another verdict, perhaps in another tab; that one "
            "counts",
            verdict=as_shown(row, swapped=found.swapped).model_dump(),
        )
    return Answer(key=found.key, state="done", verdict=as_shown(row, swapped=found.swapped))


def _refuse_finished(found: Assignment) -> None:
    if found.state in ("done", "skipped"):
        how = "submitted" if found.state == "done" else "skipped"
        raise Problem(
            HTTPStatus.CONFLICT, f"this pair has been {how} already: go on with the next one"
        )


def _open_week(session: Session, found: Assignment) -> Week:
    """Return the week of an assignment, kept from being closed until the transaction ends."""
    week = session.scalars(
        select(Week)
        .where(Week.id == found.task.week_id)
        .with_for_update(read=True)
        .execution_options(populate_existing=True)
    ).one()
    if week.state != "open":
        raise Problem(
            HTTPStatus.CONFLICT,
            f"week {week.name} has been closed, so that this pair does not count any more: go on "
            "with the next one",
        )
    return week


def _hold(session: Session, found: Assignment) -> None:
    """Take the place of an expired assignment back; a Problem where somebody else has it."""
    if found.state == "expired" and not reopen(session, found):
        raise Problem(
            HTTPStatus.CONFLICT,
            "this pair was left alone for so long that somebody else has it: go on with the next",
        )


def _head(found: Assignment, user: User, week: Week, kind: str) -> dict[str, Any]:
    task: Task = found.task
    return {
        "kind": kind,
        "key": found.key,
        "week": week.name,
        "pair_id": task.pair_id,
        "annotator": user.name,
        "swapped": found.swapped,
        "assigned": found.assigned.isoformat(),
        "time": found.touched.isoformat(),
    }
