"""Weeks: the pairs of a collect node that people judge together, as files and as rows."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from sqlalchemy import delete, exists, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rlhf.artifacts import (
    NodeDir,
    digest_json,
    fsync_path,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from rlhf.config import Annotation as Settings
from rlhf.data.ingest import NAME
from rlhf.data.ledger import Store
from rlhf.data.prompts import keyed_digest
from rlhf.data.records import AXES, Kind
from rlhf.errors import ConfigError, DataError
from rlhf.service.annotation import journal_file
from rlhf.service.annotation.qualification import read_items
from rlhf.service.database.models import Annotation, Assignment, Task, Week, now
from rlhf.service.facts import open_run
from rlhf.service.problems import Problem
from rlhf.service.state import State

WEEK = "week.json"
TASKS = "tasks.jsonl"
REPORT = "report.json"
PAIRS = "pairs.jsonl"
DISCARDED = ".discarded"
"""Folder beside the weeks' for the files of those that were discarded."""
PAIR_FIELDS = {"id", "axis", "prompt", "response_a", "response_b"}
UNLIMITED = 2**31 - 1
"""Annotators who are to judge a qualification item."""
BLOCK = 25
"""Pairs of one axis in a row: an annotator keeps to one guideline for a while."""
MAX_NAME = 200
"""Characters of a text column."""


def folder_of(state: State, week: str) -> Path:
    """Return the folder of a week's files; the name has been checked."""
    return state.weeks / week


def batch_file(folder: Path) -> Path:
    """Return where a week's batch lies from its closing on."""
    return folder / f"{folder.name}.jsonl"


def close_report(folder: Path) -> dict[str, Any] | None:
    """Return the report that ends a week's closing, or None."""
    path = folder / REPORT
    return read_json(path) if path.exists() else None


def find_week(session: Session, name: str) -> Week:
    """Return a week; a Problem naming those there are."""
    found = session.scalar(select(Week).where(Week.name == name)) if NAME.fullmatch(name) else None
    if found is None:
        names = session.scalars(select(Week.name).order_by(Week.id.desc()).limit(20)).all()
        there = ", ".join(names) or "none yet; an operator creates one from a run's collect node"
        raise Problem(HTTPStatus.NOT_FOUND, f"there is no week {name[:100]!r}: there are {there}")
    return found


def collected_pairs(state: State, run: str, node: str) -> tuple[str, int, list[dict[str, Any]]]:
    """Return the stream, the round and the pairs of a finished collect node of a run."""
    opened = open_run(state, run)
    nodes = {item.name: item for item in opened.plan.nodes if item.stage == "collect"}
    if node not in nodes:
        there = ", ".join(nodes) or "none"
        raise Problem(
            HTTPStatus.NOT_FOUND,
            f"run {run} has no collect node {node[:200]!r}: there are {there}",
        )
    folder = opened.folder / node
    if not NodeDir(folder).is_done():
        raise Problem(
            HTTPStatus.CONFLICT, f"node {node} of run {run} is not finished: wait until it is"
        )
    if "batch" in nodes[node].options:
        raise Problem(
            HTTPStatus.CONFLICT,
            f"simulated annotators have judged the pairs of {node}: set collect.annotators=people "
            "in a new run",
        )
    return opened.config.data.stream, nodes[node].round, read_jsonl(folder / PAIRS)


def create_from_run(state: State, *, run: str, node: str, name: str | None) -> Week:
    """Create a week from a run's collect node; without a name it gets the run's and the number."""
    stream, round_, pairs = collected_pairs(state, run, node)
    chosen = name or default_name(run, round_)
    return create_week(state, name=chosen, stream=stream, run=run, node=node, pairs=pairs)


def default_name(run: str, round_: int) -> str:
    """Return how the week of a round's pairs is called: they become the next round's batch."""
    return f"{run}-week-{round_ + 1:02d}"


def create_week(
    state: State, *, name: str, stream: str, run: str, node: str, pairs: Sequence[Mapping[str, Any]]
) -> Week:
    """Create a week of pairs, rows of pairs.jsonl; files first, so that a lost database is none.

    Raises Problem for a name that is taken, for pairs that are a week already and for none at all.
    """
    if not NAME.fullmatch(name):
        raise Problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            f"week {name[:100]!r} is no name for a batch: use up to 100 letters, digits, dots, "
            "dashes and underscores",
        )
    if name in Store(state.store, stream).entries(Kind.batch):
        raise Problem(
            HTTPStatus.CONFLICT,
            f"stream {stream} has a batch {name} already: choose another name for the week",
        )
    settings = state.config.service.annotation
    tasks = plan_tasks(name, pairs, settings)
    head = {
        "name": name,
        "stream": stream,
        "run": run,
        "node": node,
        "created": now().isoformat(),
        "settings": frozen_settings(settings),
    }
    try:
        with journal_file.locked(state.weeks), state.transaction() as session:
            _refuse_known(session, name=name, run=run, node=node)
            week = add_week(session, head, tasks)
            folder = folder_of(state, name)
            if (folder / journal_file.JOURNAL).exists():
                raise _taken(name)
            write_jsonl(folder / TASKS, tasks)
            write_json(folder / WEEK, head)
    except IntegrityError as error:
        raise _taken(name) from error
    return week


def discard_week(state: State, name: str) -> Week:
    """Take a week back that nobody has judged a pair of; its pairs can be a week again.

    Answers to its qualification items go with it; its files are kept under DISCARDED. Raises
    Problem for a week with a verdict.
    """
    with journal_file.locked(state.weeks), state.transaction() as session:
        week = find_week(session, name)
        tasks = select(Task.id).where(Task.week_id == week.id)
        # In the order in which a submission locks: those under way end before, others find nothing.
        session.execute(
            select(Assignment.id).where(Assignment.task_id.in_(tasks)).with_for_update()
        )
        session.execute(select(Week.id).where(Week.id == week.id).with_for_update())
        session.execute(tasks.with_for_update())
        if has_verdicts(session, week):
            raise Problem(
                HTTPStatus.CONFLICT,
                f"pairs of week {name} have been judged, and verdicts are not thrown away: close "
                "the week instead",
            )
        for table, is_own in (
            (Annotation, Annotation.task_id.in_(tasks)),
            (Assignment, Assignment.task_id.in_(tasks)),
            (Task, Task.week_id == week.id),
            (Week, Week.id == week.id),
        ):
            statement = delete(table).where(is_own)
            session.execute(statement.execution_options(synchronize_session=False))
        folder = folder_of(state, name)
        # A kill before the commit leaves the rows, and discarding again ends it.
        if folder.exists():
            target = state.weeks / DISCARDED / f"{name}-{now():%Y%m%dT%H%M%S%f}"
            target.parent.mkdir(exist_ok=True)
            folder.rename(target)
            fsync_path(state.weeks)
    return week


def has_verdicts(session: Session, week: Week) -> bool:
    """Tell whether somebody has judged a pair of a week; qualification items are none."""
    query = select(
        exists().where(
            Annotation.task_id == Task.id, Task.week_id == week.id, ~Task.is_qualification
        )
    )
    return bool(session.scalar(query))


def add_week(session: Session, head: Mapping[str, Any], tasks: Sequence[dict[str, Any]]) -> Week:
    """Add the rows of a week and its tasks, as they stand in its files."""
    week = Week(
        **{key: head[key] for key in ("name", "stream", "run", "node", "settings")},
        state="open",
        created=datetime.fromisoformat(head["created"]),
    )
    session.add(week)
    session.flush()
    if tasks:
        session.execute(insert(Task), [{**task, "week_id": week.id} for task in tasks])
    return week


def plan_tasks(
    week: str, pairs: Sequence[Mapping[str, Any]], settings: Settings
) -> list[dict[str, Any]]:
    """Return the tasks of a week: qualification items, then pairs in an order by hash.

    The pairs with the smallest hashes go to several annotators.
    """
    _check_pairs(pairs)
    tasks = [
        _task(pair, gold=gold, needed=UNLIMITED)
        for pair, gold in read_items(settings.qualification)
    ]
    several = round(settings.overlap_share * len(pairs))
    chosen = {pair["id"] for pair in _by_hash(pairs, f"{week}/overlap")[:several]}
    blocks: list[tuple[int, str, list[Mapping[str, Any]]]] = []
    for axis in AXES:
        own = _by_hash([pair for pair in pairs if pair["axis"] == axis], f"{week}/order")
        blocks += [(start, axis, own[start : start + BLOCK]) for start in range(0, len(own), BLOCK)]
    blocks.sort(key=lambda block: block[:2])
    tasks += [
        _task(pair, gold=None, needed=settings.overlap if pair["id"] in chosen else 1)
        for _, _, block in blocks
        for pair in block
    ]
    return [{**task, "position": i} for i, task in enumerate(tasks)]


def _check_pairs(pairs: Sequence[Mapping[str, Any]]) -> None:
    if not pairs:
        raise Problem(HTTPStatus.CONFLICT, "the collect node has no pairs, so there is no week")
    seen = set()
    for number, pair in enumerate(pairs, 1):
        missing = PAIR_FIELDS - pair.keys()
        fault = ""
        if missing:
            fault = f"has no {sorted(missing)[0]}"
        elif pair["axis"] not in AXES:
            fault = f"has axis {pair['axis']}"
        elif pair["id"] in seen:
            fault = f"has id {pair['id']} once more"
        if fault:
            raise DataError(f"{PAIRS} line {number} {fault}: run the collect node again")
        seen.add(pair["id"])


def _by_hash(pairs: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return sorted(pairs, key=lambda pair: keyed_digest(f"{key}/{pair['id']}"))


def frozen_settings(settings: Settings) -> dict[str, Any]:
    """Return what stays as it is for a whole week, whatever the configuration says later."""
    return {
        "overlap_share": settings.overlap_share,
        "overlap": settings.overlap,
        "qualification_share": settings.qualification_share,
        "order_key": secrets.token_hex(16),
        "guidelines": {
            "helpfulness": guideline("helpfulness", settings.guideline_helpfulness),
            "safety": guideline("safety", settings.guideline_safety),
        },
    }


def guideline(axis: str, path: str | None) -> str:
    """Return the guideline of an axis: a file's text, or ours."""
    source = Path(path) if path else Path(__file__).parent / "guidelines" / f"{axis}.txt"
    try:
        return source.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"service.annotation.guideline_{axis}={path} cannot be read ({error}): give a text "
            "file, or null for ours"
        ) from error


def _task(
    pair: Mapping[str, Any], *, gold: Mapping[str, Any] | None, needed: int
) -> dict[str, Any]:
    id = str(pair["id"])
    short = id if len(id) <= MAX_NAME else f"{id[:120]}-{digest_json(id)}"
    return {
        "pair_id": short,
        "axis": pair["axis"],
        "pair": dict(pair),
        "is_qualification": gold is not None,
        "gold": dict(gold) if gold is not None else None,
        "needed": needed,
    }


def _refuse_known(session: Session, *, name: str, run: str, node: str) -> None:
    if session.scalar(select(Week.id).where(Week.name == name)) is not None:
        raise _taken(name)
    same = session.scalar(select(Week.name).where(Week.run == run, Week.node == node))
    if same is not None:
        raise Problem(
            HTTPStatus.CONFLICT,
            f"the pairs of {node} of run {run} are week {same} already: nobody is to judge a pair "
            "twice",
        )


def _taken(name: str) -> Problem:
    return Problem(HTTPStatus.CONFLICT, f"there is a week {name} already: choose another name")
