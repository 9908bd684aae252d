"""What a week amounts to so far: counts, agreement, and each annotator's part."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from rlhf.algo.agreement import Weights, gwet_ac2, mean_kappa
from rlhf.algo.intervals import finite
from rlhf.data.records import AXES, STRENGTHS
from rlhf.service.annotation.qualification import Standing, standing
from rlhf.service.annotation.schemas import (
    AgreementView,
    AnnotatorRow,
    Counts,
    Progress,
    WeekRow,
    WeekView,
)
from rlhf.service.database.models import Annotation, Assignment, Task, User, Week

NUM_LEVELS = 2 * len(STRENGTHS)
"""From significantly better the one way to significantly better the other way."""
WEIGHTS: tuple[Weights, ...] = ("quadratic", "linear")


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict on a pair, without the pair."""

    task_id: int
    annotator: str
    preferred: str
    strength: str
    safe_a: bool | None
    safe_b: bool | None

    @property
    def signed(self) -> int:
        """The strength from 1 to 4, negative where response_b is preferred."""
        return signed_strength(self.preferred, self.strength)


def signed_strength(preferred: str, strength: str) -> int:
    """Return 4 for significantly_better to 1 for negligibly_better, negative for b."""
    size = len(STRENGTHS) - STRENGTHS.index(strength)
    return size if preferred == "a" else -size


def level(signed: int) -> int:
    """Return one of the ordered levels 0 to 7; there is none for 0."""
    return signed + len(STRENGTHS) - (signed > 0)


def list_weeks(session: Session, *, limit: int, before: int) -> list[tuple[int, WeekRow]]:
    """Return weeks with their ids, newest first, from below an id on."""
    needed = func.coalesce(func.sum(case((~Task.is_qualification, Task.needed), else_=0)), 0)
    pairs = func.coalesce(func.sum(case((~Task.is_qualification, 1), else_=0)), 0)
    query = (
        select(Week, pairs, needed)
        .outerjoin(Task, Task.week_id == Week.id)
        .where(Week.id < before)
        .group_by(Week.id)
        .order_by(Week.id.desc())
        .limit(limit)
    )
    rows = session.execute(query).all()
    verdicts = _verdicts_by_week(session, [week.id for week, _, _ in rows])
    found = []
    for week, pairs_, needed_ in rows:
        made = verdicts.get(week.id, 0)
        row = WeekRow(**_head(week), pairs=pairs_, verdicts=made, needed=needed_)
        found.append((week.id, row))
    return found


def week_view(session: Session, week: Week) -> WeekView:
    """Return a week with its counts and its agreement."""
    verdicts = judged(session, week)
    return WeekView(
        **_head(week),
        counts=week_counts(session, week, verdicts),
        agreement=measure_agreement(verdicts),
    )


def judged(session: Session, week: Week) -> list[Judged]:
    """Return the verdicts on a week's pairs, qualification items left out."""
    rows = session.execute(
        select(
            Annotation.task_id,
            User.name,
            Annotation.preferred,
            Annotation.strength,
            Annotation.safe_a,
            Annotation.safe_b,
        )
        .join(Task, Task.id == Annotation.task_id)
        .join(User, User.id == Annotation.user_id)
        .where(Task.week_id == week.id, ~Task.is_qualification)
        .order_by(Annotation.id)
    ).all()
    return [Judged(*row) for row in rows]


def week_counts(session: Session, week: Week, given: Sequence[Judged]) -> Counts:
    """Return how many pairs there are, and verdicts, which are the week's `judged`."""
    verdicts = Counter(row.task_id for row in given)
    states: dict[int, Counter[str]] = defaultdict(Counter)
    for task_id, state, number in session.execute(
        select(Assignment.task_id, Assignment.state, func.count())
        .join(Task, Task.id == Assignment.task_id)
        .where(Task.week_id == week.id, ~Task.is_qualification)
        .group_by(Assignment.task_id, Assignment.state)
    ):
        states[task_id][state] += number
    tasks = session.execute(
        select(Task.id, Task.axis, Task.needed).where(
            Task.week_id == week.id, ~Task.is_qualification
        )
    ).all()
    axes = {axis: {"pairs": 0, "judged": 0} for axis in AXES}
    for id, axis, _ in tasks:
        axes[axis]["pairs"] += 1
        axes[axis]["judged"] += verdicts[id] > 0
    return Counts(
        pairs=len(tasks),
        judged=sum(verdicts[id] > 0 for id, _, _ in tasks),
        complete=sum(verdicts[id] >= needed for id, _, needed in tasks),
        verdicts=verdicts.total(),
        needed=sum(needed for _, _, needed in tasks),
        in_progress=sum(found["open"] for found in states.values()),
        skips=sum(found["skipped"] for found in states.values()),
        skipped_only=sum(
            found["skipped"] > 0 and verdicts[id] == 0 for id, found in states.items()
        ),
        axes=axes,
    )


def measure_agreement(verdicts: Sequence[Judged]) -> AgreementView:
    """Return the agreement of verdicts; pairs that one annotator judged tell what is usual."""
    by_task: dict[int, dict[str, Judged]] = defaultdict(dict)
    for row in verdicts:
        by_task[row.task_id][row.annotator] = row
    levels = [{name: level(v.signed) for name, v in found.items()} for found in by_task.values()]
    shared = [found for found in by_task.values() if len(found) >= 2]
    same = [
        (one.preferred == other.preferred)
        for found in shared
        for i, one in enumerate(found.values())
        for other in list(found.values())[i + 1 :]
    ]
    labels = [
        [int(value) for v in found.values() if (value := getattr(v, side)) is not None]
        for found in by_task.values()
        for side in ("safe_a", "safe_b")
    ]
    rows = [list(found.values()) for found in levels]
    return AgreementView(
        pairs=len(shared),
        annotators=len({name for found in shared for name in found}),
        same_preference=sum(same) / len(same) if same else None,
        ac2={how: finite(gwet_ac2(rows, num_levels=NUM_LEVELS, weights=how)) for how in WEIGHTS},
        kappa={
            how: finite(mean_kappa(levels, num_levels=NUM_LEVELS, weights=how)) for how in WEIGHTS
        },
        safety_ac1=finite(gwet_ac2(labels, num_levels=2, weights="identity")),
    )


def annotators(session: Session, week: Week) -> list[AnnotatorRow]:
    """Return what each annotator of a week has done, by name."""
    rows: Sequence[Any] = session.execute(
        select(User.id, User.name, Task.is_qualification, Assignment.state, Annotation.seconds)
        .join(Assignment, Assignment.user_id == User.id)
        .join(Task, Task.id == Assignment.task_id)
        .outerjoin(Annotation, Annotation.assignment_id == Assignment.id)
        .where(Task.week_id == week.id)
    ).all()
    people = dict(sorted({(name, id) for id, name, *_ in rows}))
    found = []
    for name, id in people.items():
        own = [row for row in rows if row.id == id]
        states = Counter(row.state for row in own if not row.is_qualification)
        seconds = [row.seconds for row in own if row.seconds is not None]
        stood = standing(session, week, id)
        found.append(
            AnnotatorRow(
                annotator=name,
                judged=states["done"],
                skipped=states["skipped"],
                open=states["open"],
                median_seconds=median(seconds) if seconds else None,
                qualification_right=stood.right,
                qualification_total=stood.total,
                qualification_answered=stood.answered,
                qualified=None if stood.open else stood.is_passed,
            )
        )
    return found


def progress(session: Session, week: Week, user_id: int, stood: Standing | None = None) -> Progress:
    """Return how far somebody is, and the week as a whole; `stood` where it is known."""
    pairs = (Task.week_id == week.id, ~Task.is_qualification)
    own = session.scalar(
        select(func.count())
        .select_from(Annotation)
        .join(Task, Task.id == Annotation.task_id)
        .where(*pairs, Annotation.user_id == user_id)
    )
    needed = session.scalar(select(func.coalesce(func.sum(Task.needed), 0)).where(*pairs))
    done = _verdicts_by_week(session, [week.id]).get(week.id, 0)
    stood = stood or standing(session, week, user_id)
    return Progress(
        judged=own or 0,
        left=max(0, (needed or 0) - done),
        qualification_total=stood.total,
        qualification_answered=stood.answered,
    )


def _verdicts_by_week(session: Session, ids: Sequence[int]) -> dict[int, int]:
    rows = session.execute(
        select(Task.week_id, func.count())
        .join(Annotation, Annotation.task_id == Task.id)
        .where(Task.week_id.in_(ids), ~Task.is_qualification)
        .group_by(Task.week_id)
    ).all()
    return {week_id: number for week_id, number in rows}  # noqa: C416


def _head(week: Week) -> dict[str, Any]:
    names = ("name", "stream", "run", "node", "state", "created", "closed")
    return {name: getattr(week, name) for name in names}
