"""The end of a week: its verdicts as an ordinary batch file, and that file in the inbox, once.

Closing goes on where a kill left it: the week takes no more verdicts, the file is written and never
changes, it goes to the inbox, and the report is written last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from statistics import median
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from rlhf.artifacts import read_jsonl, sha256_file, write_json, write_jsonl
from rlhf.data.ledger import Store
from rlhf.data.prompts import keyed_digest
from rlhf.data.records import STRENGTHS, Kind
from rlhf.faults import boundary
from rlhf.service.annotation.journal_file import locked
from rlhf.service.annotation.measures import (
    annotators,
    judged,
    measure_agreement,
    signed_strength,
    week_counts,
)
from rlhf.service.annotation.schemas import Closed
from rlhf.service.annotation.weeks import (
    REPORT,
    batch_file,
    close_report,
    find_week,
    folder_of,
    has_verdicts,
)
from rlhf.service.database.models import Annotation, Task, User, Week, now
from rlhf.service.problems import Problem
from rlhf.service.state import State

SOURCE = "annotation"


def close_week(state: State, name: str) -> Closed:
    """Close a week and drop its batch into the inbox; a closed week says what it said.

    Raises Problem for a week without any verdict, and where the stream has another batch of its
    name.
    """
    folder = folder_of(state, _begin(state, name))
    with locked(folder):
        path = batch_file(folder)
        report = close_report(folder)
        if report is None:
            with state.reading() as session:
                week = find_week(session, name)
                if not path.exists():
                    write_jsonl(path, batch_rows(session, week))
                rows = read_jsonl(path)
                report = _report(session, week, rows)
                stream = week.stream
            _drop(state, stream, name)
            boundary("batch-dropped", path)
            write_json(folder / REPORT, report)
        with state.transaction() as session:
            week = find_week(session, name)
            week.state, week.closed = "closed", week.closed or now()
    return Closed(week=name, file=path.name, rows=report["rows"]["written"], report=report)


def batch_rows(session: Session, week: Week) -> Iterator[dict[str, Any]]:
    """Yield the week's judged pairs as rows of a batch, in the order of the tasks."""
    given = session.execute(
        select(Annotation, User.name)
        .join(Task, Task.id == Annotation.task_id)
        .join(User, User.id == Annotation.user_id)
        .where(Task.week_id == week.id, ~Task.is_qualification)
        .order_by(Annotation.submitted, Annotation.id)
    ).all()
    by_task: dict[int, list[tuple[Annotation, str]]] = defaultdict(list)
    for annotation, name in given:
        by_task[annotation.task_id].append((annotation, name))
    tasks = session.scalars(
        select(Task).where(Task.week_id == week.id, ~Task.is_qualification).order_by(Task.position)
    )
    for task in tasks:
        if task.id in by_task:
            yield batch_row(week.name, task.pair, by_task[task.id])


def batch_row(
    week: str, pair: dict[str, Any], verdicts: Sequence[tuple[Annotation, str]]
) -> dict[str, Any]:
    """Return a pair and its verdicts as one comparison.

    The week is part of the id: runs of one stream collect pairs of the same ids. The strength is
    the median of the verdicts' signed strengths, halves going to the weaker level; a median of 0 is
    a tie, whose order is a coin flip. A response is unsafe when half of those who labelled it, or
    more, say so.
    """
    middle = median(signed_strength(given.preferred, given.strength) for given, _ in verdicts)
    is_tie = middle == 0
    coin = bool(keyed_digest(f"tie/{pair['id']}")[0] & 1)
    a_is_chosen = coin if is_tie else middle > 0
    sides = ("a", "b") if a_is_chosen else ("b", "a")
    row: dict[str, Any] = {"id": f"{week}/{pair['id']}", "prompt": pair["prompt"]}
    named = tuple(zip(("chosen", "rejected"), sides, strict=True))
    row |= {name: pair[f"response_{side}"] for name, side in named}
    row["strength"] = STRENGTHS[-max(1, int(abs(middle)))]
    row["axis"] = pair["axis"]
    row |= {
        f"{name}_safe": _is_safe([getattr(given, f"safe_{side}") for given, _ in verdicts])
        for name, side in named
    }
    row["source"] = SOURCE
    row["annotator"] = verdicts[0][1] if len(verdicts) == 1 else None
    row |= {f"model_{name}": pair.get(f"model_{side}") for name, side in named}
    row["tie"] = is_tie
    row["meta"] = {f"temperature_{name}": pair.get(f"temperature_{side}") for name, side in named}
    row["meta"]["annotations"] = [_verdict(given, name, sides) for given, name in verdicts]
    return row


def _verdict(given: Annotation, annotator: str, sides: Sequence[str]) -> dict[str, Any]:
    """Return a verdict with the row's names of the responses."""
    chosen, rejected = sides
    return {
        "annotator": annotator,
        "preferred": "chosen" if given.preferred == chosen else "rejected",
        "strength": given.strength,
        "chosen_safe": getattr(given, f"safe_{chosen}"),
        "rejected_safe": getattr(given, f"safe_{rejected}"),
        "comment": given.comment,
        "seconds": given.seconds,
        "submitted": given.submitted.isoformat(),
    }


def _is_safe(labels: Sequence[bool | None]) -> bool | None:
    known = [label for label in labels if label is not None]
    return 2 * known.count(False) < len(known) if known else None


def _begin(state: State, name: str) -> str:
    """Take no more verdicts; returns the name as it is stored."""
    with state.transaction() as session:
        week = find_week(session, name)
        if week.state == "open":
            # The update waits for verdicts that are being submitted, and later ones wait for it.
            session.execute(
                update(Week).where(Week.id == week.id, Week.state == "open").values(state="closing")
            )
            if not has_verdicts(session, week):
                raise Problem(
                    HTTPStatus.CONFLICT,
                    f"no pair of week {name} has been judged, so there is nothing to close: "
                    "let annotators judge it at /annotate, or discard it",
                )
        return week.name


def _drop(state: State, stream: str, name: str) -> None:
    """Put the batch file into the inbox, unless the stream has it already, or as a correction.

    Raises Problem where it has a batch of the name from another file: that one never changes.
    """
    from rlhf.service.inbox import drop

    path = batch_file(folder_of(state, name))
    batches = Store(state.store, stream).entries(Kind.batch)
    if name not in batches:
        drop(state, path, f"{stream}/{path.name}")
        return
    family = [batches[name], *(m for m in batches.values() if m.get("supersedes") == name)]
    if sha256_file(path) not in [manifest["file"]["sha256"] for manifest in family]:
        raise Problem(
            HTTPStatus.CONFLICT,
            f"stream {stream} has a batch {name} from another file than this week's: make the "
            f"week's its correction with `rlhf ingest {path} ingest.stream={stream} "
            f"ingest.supersedes={name}`, then close the week again",
        )


def _report(session: Session, week: Week, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what became of a week's pairs."""
    verdicts = judged(session, week)
    counts = week_counts(session, week, verdicts)
    return {
        "week": week.name,
        "stream": week.stream,
        "run": week.run,
        "node": week.node,
        "closed": now().isoformat(),
        "rows": {
            "written": len(rows),
            "ties": sum(row["tie"] for row in rows),
            "several_annotators": sum(row["annotator"] is None for row in rows),
            "unjudged": counts.pairs - counts.judged,
            "skipped_only": counts.skipped_only,
        },
        "counts": counts.model_dump(),
        "agreement": measure_agreement(verdicts).model_dump(),
        "annotators": [row.model_dump() for row in annotators(session, week)],
    }
