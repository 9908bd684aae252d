"""The annotation part of the API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response, StreamingResponse

from rlhf.service.access import Annotator, Operator, StateOf, Viewer
from rlhf.service.annotation import assigning, closing, judging, measures, weeks
from rlhf.service.annotation.schemas import (
    AnnotatorRow,
    Answer,
    Closed,
    Discarded,
    NewDraft,
    NewWeek,
    NextTask,
    Saved,
    Skip,
    TaskView,
    Verdict,
    WeekRow,
    WeekView,
)
from rlhf.service.api.openapi import problems
from rlhf.service.api.paging import (
    DEFAULT,
    MAX_NUMBER,
    Cursor,
    Limit,
    Page,
    cut_names,
    decode,
    encode,
)
from rlhf.service.guards import note
from rlhf.service.state import State

NDJSON = "application/x-ndjson"
NO_WEEK = problems(s404="There is no such week; the answer names those there are.")
NOT_OPERATORS = problems(
    s403="Only operators do this.",
    s404="There is no such run, node or week; the answer names those there are.",
    s409="The pairs are a week already, or cannot be one; or the week has no verdict to be closed "
    "with, or has some and cannot be discarded; or its stream has another batch of its name.",
)
OWN = problems(
    s404="The caller has no such assignment.",
    s409="It is finished otherwise, its week is closed, or somebody else has the pair now.",
    s507="The disk is full: the same again, once there is room, is recorded once.",
)

router = APIRouter(prefix="/api/v1", tags=["annotation"])

WeekFilter = Annotated[
    str | None, Query(max_length=100, description="A week; null takes the oldest open one.")
]


@router.get("/weeks", summary="Weeks")
def list_weeks(
    state: StateOf, caller: Viewer, limit: Limit = DEFAULT, cursor: Cursor = None
) -> Page[WeekRow]:
    """List weeks, newest first."""
    before = decode(cursor, MAX_NUMBER - 1)
    with state.reading() as session:
        rows = measures.list_weeks(session, limit=limit + 1, before=before)
    following = encode(rows[limit - 1][0]) if len(rows) > limit else None
    return Page(items=[row for _, row in rows[:limit]], next_cursor=following)


@router.post(
    "/weeks", summary="Create a week", status_code=HTTPStatus.CREATED, responses=NOT_OPERATORS
)
def create_week(state: StateOf, caller: Operator, body: NewWeek, request: Request) -> WeekView:
    """Create a week from the pairs of a run's finished collect node."""
    made = weeks.create_from_run(state, run=body.run, node=body.node, name=body.name)
    note(request.scope, week=made.name, run=made.run, node=made.node)
    with state.reading() as session:
        return measures.week_view(session, made)


@router.get("/weeks/{week}", summary="A week and its agreement", responses=NO_WEEK)
def get_week(state: StateOf, caller: Viewer, week: str) -> WeekView:
    """Tell how far a week is and how far its annotators agree."""
    with state.reading() as session:
        return measures.week_view(session, weeks.find_week(session, week))


@router.get("/weeks/{week}/annotators", summary="Annotators of a week", responses=NO_WEEK)
def list_annotators(
    state: StateOf, caller: Operator, week: str, limit: Limit = DEFAULT, cursor: Cursor = None
) -> Page[AnnotatorRow]:
    """Tell what each annotator has done and how they qualified."""
    with state.reading() as session:
        rows = measures.annotators(session, weeks.find_week(session, week))
    people = {row.annotator: row for row in rows}
    names, following = cut_names(list(people), cursor=cursor, limit=limit)
    return Page(items=[people[name] for name in names], next_cursor=following)


@router.post("/weeks/{week}/close", summary="Close a week", responses=NOT_OPERATORS)
def close_week(state: StateOf, caller: Operator, week: str, request: Request) -> Closed:
    """Take no more verdicts and drop the week's batch into the inbox; again finishes the job."""
    closed = closing.close_week(state, week)
    note(request.scope, week=week, rows=closed.rows)
    return closed


@router.post("/weeks/{week}/discard", summary="Discard a week", responses=NOT_OPERATORS)
def discard_week(state: StateOf, caller: Operator, week: str, request: Request) -> Discarded:
    """Take back a week of which no pair has been judged; its pairs can be a week again."""
    gone = weeks.discard_week(state, week)
    note(request.scope, week=gone.name, run=gone.run, node=gone.node)
    return Discarded(week=gone.name, run=gone.run, node=gone.node)


@router.get(
    "/weeks/{week}/export",
    summary="A week's batch file, or its verdicts so far",
    response_class=StreamingResponse,
    responses={200: {"description": "Rows of a batch.", "content": {NDJSON: {}}}, **NO_WEEK},
)
def export_week(state: StateOf, caller: Operator, week: str) -> Response:
    """Download the batch file; before the week is closed, the rows that it would have now.

    Those have a name of their own, under which nobody takes them for the week's batch.
    """
    with state.reading() as session:
        name = weeks.find_week(session, week).name
    path = weeks.batch_file(weeks.folder_of(state, name))
    if path.exists():
        return FileResponse(path, media_type=NDJSON, filename=path.name)
    return StreamingResponse(
        _lines(state, name),
        media_type=NDJSON,
        headers={"Content-Disposition": f'attachment; filename="{name}.so-far.jsonl"'},
    )


@router.post("/tasks/next", summary="Next pair", responses=NO_WEEK)
def next_task(state: StateOf, caller: Annotator, week: WeekFilter = None) -> NextTask:
    """Give the annotator their open pair or the next one; asking again gives the same pair."""
    user = assigning.user_of(state, caller)
    offer = assigning.next_assignment(state, user, week)
    found = NextTask(status=offer.status, message=offer.message, task=None, progress=None)
    if offer.week is not None:
        if offer.assignment is not None:
            found.task = judging.view(offer.assignment, offer.week)
        with state.reading() as session:
            found.progress = measures.progress(session, offer.week, user.id, offer.standing)
    return found


@router.get("/assignments/{key}", summary="An assignment", responses=OWN)
def get_assignment(state: StateOf, caller: Annotator, key: str) -> TaskView:
    """Show an assignment of one's own, with what was typed."""
    return judging.show(state, assigning.user_of(state, caller), key)


@router.put("/assignments/{key}/draft", summary="Keep a draft", responses=OWN)
def put_draft(state: StateOf, caller: Annotator, key: str, body: NewDraft) -> Saved:
    """Keep what has been typed."""
    return judging.save_draft(state, assigning.user_of(state, caller), key, body)


@router.post("/assignments/{key}/submit", summary="Submit a verdict", responses=OWN)
def submit(state: StateOf, caller: Annotator, key: str, body: Verdict) -> Answer:
    """Submit a verdict; the same again gives the same answer, another one a conflict."""
    return judging.submit(state, assigning.user_of(state, caller), key, body)


@router.post("/assignments/{key}/skip", summary="Skip a pair", responses=OWN)
def skip(state: StateOf, caller: Annotator, key: str, body: Skip) -> Answer:
    """Give a pair back for good and say why."""
    return judging.skip(state, assigning.user_of(state, caller), key, body)


def _lines(state: State, week: str) -> Iterator[str]:
    with state.reading() as session:
        for row in closing.batch_rows(session, weeks.find_week(session, week)):
            yield json.dumps(row, ensure_ascii=False) + "\n"
