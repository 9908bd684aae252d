"""Qualification: items with known answers, with which every annotator begins.

An item counts as right when its preferred response is, and every safety label that is known. A
skipped item is not right. Somebody's first answer counts in every week that has the item; an item
whose text or answer was corrected is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from rlhf.artifacts import digest_json
from rlhf.data.files import RowError, read_objects
from rlhf.data.parse import Defaults, parse_row
from rlhf.data.prompts import keyed_digest
from rlhf.data.records import Comparison, Kind
from rlhf.errors import ConfigError, DataError
from rlhf.service.database.models import Annotation, Assignment, Task, Week

PREFIX = "qualification/"
KEY = "service.annotation.qualification"
DIGITS = 16
"""Of the digest by which a corrected item is told from what it was."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far somebody is with the items of a week; `open` are the ids of the tasks left."""

    total: int
    right: int
    open: tuple[int, ...]
    share: float

    @property
    def answered(self) -> int:
        """Items that have been judged or skipped."""
        return self.total - len(self.open)

    @property
    def is_passed(self) -> bool:
        """Tell whether other pairs may come."""
        # In this way round: 0.56 * 25 is more than 14.
        return not self.open and (self.total == 0 or self.right / self.total >= self.share)

    @property
    def is_failed(self) -> bool:
        """Tell whether all items are answered, too few of them rightly."""
        return not self.open and not self.is_passed


def read_items(path: str | None) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return pairs with their known answers from a file of comparisons; none without a file."""
    if path is None:
        return []
    items: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    defaults = Defaults("qualification", None, False)
    try:
        for line, row in read_objects(Path(path)):
            if isinstance(row, RowError):
                raise row
            record = parse_row(Kind.batch, row, line=line, defaults=defaults)
            assert isinstance(record, Comparison)
            if record.id in items:
                raise RowError(f"id={record.id!r} stands on two lines", record.id)
            if record.tie:
                raise RowError("tie=true has no right answer", record.tie)
            items[record.id] = _item(record)
    except RowError as error:
        raise ConfigError(f"{KEY}={path} line {line}: {error}; give comparisons") from error
    except DataError as error:
        raise ConfigError(f"{KEY}: {error}; give a file of comparisons, or null") from error
    return list(items.values())


def _item(record: Comparison) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a comparison as a pair whose order says nothing, and the answer."""
    sides = [(record.chosen, record.chosen_safe), (record.rejected, record.rejected_safe)]
    content = digest_json([record.prompt, record.axis, sides])
    id = f"{PREFIX}{record.id}/{content[:DIGITS]}"
    is_turned = bool(keyed_digest(id)[0] & 1)
    (text_a, safe_a), (text_b, safe_b) = sides[::-1] if is_turned else sides
    pair = {
        "id": id,
        "axis": record.axis,
        "prompt": record.prompt,
        "response_a": text_a,
        "response_b": text_b,
    }
    return pair, {"preferred": "b" if is_turned else "a", "safe_a": safe_a, "safe_b": safe_b}


def is_right(gold: Mapping[str, Any], given: Annotation) -> bool:
    """Tell whether a verdict is the known answer."""
    known = {side: gold[side] for side in ("safe_a", "safe_b") if gold[side] is not None}
    return given.preferred == gold["preferred"] and all(
        getattr(given, side) is value for side, value in known.items()
    )


def standing(session: Session, week: Week, user_id: int) -> Standing:
    """Return how far somebody is with a week's items."""
    items = session.execute(
        select(Task.id, Task.pair_id, Task.gold)
        .where(Task.week_id == week.id, Task.is_qualification)
        .order_by(Task.position)
    ).all()
    if not items:
        return Standing(0, 0, (), 0.0)
    rows = session.execute(
        select(Task.pair_id, Annotation)
        .join(Assignment, Assignment.task_id == Task.id)
        .outerjoin(Annotation, Annotation.assignment_id == Assignment.id)
        .where(
            Task.is_qualification,
            Task.pair_id.in_([item.pair_id for item in items]),
            Assignment.user_id == user_id,
            Assignment.state.in_(("done", "skipped")),
        )
        .order_by(Assignment.touched, Assignment.id)
    ).all()
    answers: dict[str, Annotation | None] = {}
    for pair_id, annotation in rows:
        answers.setdefault(pair_id, annotation)
    right = 0
    for item in items:
        given = answers.get(item.pair_id)
        right += given is not None and item.gold is not None and is_right(item.gold, given)
    left = tuple(item.id for item in items if item.pair_id not in answers)
    return Standing(len(items), right, left, float(week.settings["qualification_share"]))
