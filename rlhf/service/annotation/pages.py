"""The annotation page and the pages of the weeks; all of them work without script."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Query, Request
from pydantic import ValidationError
from sqlalchemy import select
from starlette.responses import HTMLResponse, Response

from rlhf.artifacts import NodeDir
from rlhf.data.records import STRENGTHS
from rlhf.errors import RlhfError
from rlhf.service.access import Annotator, Caller, Operator, StateOf, Viewer
from rlhf.service.annotation import assigning, closing, judging, measures, weeks
from rlhf.service.annotation.qualification import Standing
from rlhf.service.annotation.schemas import Draft, Skip, TaskView, Verdict
from rlhf.service.api.paging import MAX_NUMBER, Cursor, decode, encode
from rlhf.service.database.models import User, Week
from rlhf.service.facts import known_runs, open_run
from rlhf.service.guards import note
from rlhf.service.pages.render import Message, fragment, redirect, render
from rlhf.service.problems import Problem
from rlhf.service.state import State

router = APIRouter(include_in_schema=False)

LABELS = {"true": True, "false": False}
REASONS = (
    "I cannot judge the subject",
    "It is in a language that I do not read",
    "A response is garbled or cut off",
    "I do not want to read this",
)
WORDS = {
    "significantly_better": "significantly better",
    "better": "better",
    "slightly_better": "slightly better",
    "negligibly_better": "negligibly better, or unsure",
}
CHOICES = {
    "left": [(f"left-{name}", WORDS[name], i) for i, name in enumerate(STRENGTHS, 1)],
    "right": [(f"right-{name}", WORDS[name], i) for i, name in enumerate(STRENGTHS[::-1], 5)],
}
"""Form value, words and key of the eight levels, as they stand in a row."""
MAX_WEEKS = 200


@router.get("/annotate")
def annotate(
    request: Request,
    state: StateOf,
    caller: Annotator,
    week: Annotated[str | None, Query(max_length=100)] = None,
) -> HTMLResponse:
    """Show an annotator's open pair, or the next one."""
    user = assigning.user_of(state, caller)
    offer = assigning.next_assignment(state, user, week)
    if offer.assignment is None or offer.week is None:
        return _show_nothing(request, state, user, offer)
    task = judging.view(offer.assignment, offer.week)
    return _show_task(request, state, user, task, only=week, stood=offer.standing)


@router.post("/annotate/{key}")
def annotate_form(
    request: Request,
    state: StateOf,
    caller: Annotator,
    key: str,
    choice: Annotated[str, Form()] = "",
    safe_left: Annotated[str, Form()] = "",
    safe_right: Annotated[str, Form()] = "",
    comment: Annotated[str, Form()] = "",
    reason: Annotated[str, Form()] = "",
    action: Annotated[str, Form()] = "submit",
    only: Annotated[str, Form(max_length=100)] = "",
) -> Response:
    """Take a verdict or a skip of a browser without script; a refusal keeps what was typed."""
    user = assigning.user_of(state, caller)
    preferred, _, strength = choice.partition("-")
    # A browser sends line ends of its own.
    typed: dict[str, Any] = {
        "preferred": preferred or None,
        "strength": strength or None,
        "safe_left": LABELS.get(safe_left),
        "safe_right": LABELS.get(safe_right),
        "comment": comment.replace("\r\n", "\n"),
    }
    try:
        if action == "skip":
            judging.skip(state, user, key, Skip(reason=reason))
            message = Message("Skipped.")
        else:
            judging.submit(state, user, key, Verdict.model_validate(typed))
            message = Message("Submitted.")
    except ValidationError as error:
        said = _said(error, action)
    except Problem as error:
        if error.status != HTTPStatus.UNPROCESSABLE_ENTITY:
            raise
        said = str(error)
    else:
        return redirect(_next(only), message)
    return _show_refused(request, state, user, key, typed | {"reason": reason}, said, only)


@router.get("/weeks")
def show_weeks(
    request: Request, state: StateOf, caller: Viewer, cursor: Cursor = None
) -> HTMLResponse:
    """List the weeks; operators create one here."""
    return _show_weeks(request, state, caller, cursor=cursor)


@router.post("/weeks")
def create_week(
    request: Request,
    state: StateOf,
    caller: Operator,
    source: Annotated[str, Form(max_length=300)] = "",
    name: Annotated[str, Form(max_length=100)] = "",
) -> Response:
    """Create a week from a collect node."""
    run, _, node = source.partition(" ")
    try:
        made = weeks.create_from_run(state, run=run, node=node, name=name.strip() or None)
    except RlhfError as error:
        status = error.status if isinstance(error, Problem) else HTTPStatus.UNPROCESSABLE_ENTITY
        note(request.scope, refused=str(error)[:500])
        return _show_weeks(
            request, state, caller, message=Message(str(error), "stop"), status=status
        )
    note(request.scope, week=made.name, run=run, node=node)
    return redirect(f"/weeks/{made.name}", Message(f"Week {made.name} is open for annotators."))


@router.get("/weeks/{week}")
def show_week(request: Request, state: StateOf, caller: Viewer, week: str) -> HTMLResponse:
    """Show how far a week is; operators close and download it here."""
    return render(request, "week.html", **_week_values(state, caller, week))


@router.get("/weeks/{week}/live")
def show_week_live(request: Request, state: StateOf, caller: Viewer, week: str) -> HTMLResponse:
    """Return the part of a week's page that changes by itself."""
    return fragment("week_live.html", caller=caller, **_week_values(state, caller, week))


@router.post("/weeks/{week}/close")
def close_week(
    request: Request,
    state: StateOf,
    caller: Operator,
    week: str,
    sure: Annotated[str, Form()] = "",
) -> Response:
    """Close a week and send its batch on its way."""
    if not sure:
        said = "Nothing was closed: tick the box that says that the week takes no more verdicts."
        return redirect(f"/weeks/{week}", Message(said, "look"))
    closed = closing.close_week(state, week)
    note(request.scope, week=week, rows=closed.rows)
    said = f"Week {week} is closed: {closed.file} with {closed.rows} rows is in the inbox."
    return redirect(f"/weeks/{week}", Message(said))


@router.post("/weeks/{week}/discard")
def discard_week(
    request: Request,
    state: StateOf,
    caller: Operator,
    week: str,
    sure: Annotated[str, Form()] = "",
) -> Response:
    """Take back a week that nobody has judged."""
    if not sure:
        said = "Nothing was discarded: tick the box that says that the week goes away."
        return redirect(f"/weeks/{week}", Message(said, "look"))
    gone = weeks.discard_week(state, week)
    note(request.scope, week=gone.name, run=gone.run, node=gone.node)
    said = f"Week {gone.name} is discarded: the pairs of {gone.node} can be a week again."
    return redirect("/weeks", Message(said))


def _next(only: str | None) -> str:
    return f"/annotate?{urlencode({'week': only})}" if only else "/annotate"


def _show_task(
    request: Request,
    state: State,
    user: User,
    task: TaskView,
    *,
    only: str | None,
    stood: Standing | None = None,
    message: Message | None = None,
    status: int = HTTPStatus.OK,
) -> HTMLResponse:
    with state.reading() as session:
        progress = measures.progress(session, weeks.find_week(session, task.week), user.id, stood)
    return render(
        request,
        "annotate.html",
        status_code=status,
        message=message,
        task=task,
        draft=task.draft or Draft(),
        progress=progress,
        choices=CHOICES,
        reasons=REASONS,
        only=only or "",
        next=_next(only),
    )


def _show_nothing(
    request: Request, state: State, user: User, offer: assigning.Offer
) -> HTMLResponse:
    progress = None
    if offer.week is not None:
        with state.reading() as session:
            progress = measures.progress(session, offer.week, user.id, offer.standing)
    return render(request, "annotate_none.html", offer=offer, progress=progress)


def _show_refused(
    request: Request,
    state: State,
    user: User,
    key: str,
    typed: Mapping[str, Any],
    said: str,
    only: str,
) -> HTMLResponse:
    """Show a pair again as it was sent, and what is missing."""
    task = judging.show(state, user, key)
    known = {name: value for name, value in typed.items() if name in Draft.model_fields}
    try:
        task.draft = Draft.model_validate(known)
    except ValidationError:
        task.draft = Draft(safe_left=typed["safe_left"], safe_right=typed["safe_right"])
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    message = Message(said, "stop")
    return _show_task(request, state, user, task, only=only, message=message, status=status)


def _said(error: ValidationError, action: str) -> str:
    fields = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
    if action == "skip":
        return "A skip needs a reason: choose one, or write your own."
    if fields & {"preferred", "strength"}:
        return "Choose which response is better, and how much."
    return "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())


def _show_weeks(
    request: Request,
    state: State,
    caller: Caller,
    *,
    cursor: str | None = None,
    message: Message | None = None,
    status: int = HTTPStatus.OK,
) -> HTMLResponse:
    before = decode(cursor, MAX_NUMBER - 1)
    with state.reading() as session:
        rows = measures.list_weeks(session, limit=MAX_WEEKS + 1, before=before)
    older = encode(rows[MAX_WEEKS - 1][0]) if len(rows) > MAX_WEEKS else None
    sources = _sources(state) if caller.may("operator") else []
    return render(
        request,
        "weeks.html",
        status_code=status,
        message=message,
        weeks=[row for _, row in rows[:MAX_WEEKS]],
        older=older,
        sources=sources,
    )


def _sources(state: State) -> list[dict[str, str]]:
    """Return the finished collect nodes whose pairs are for people and no week yet."""
    with state.reading() as session:
        used = {tuple(row) for row in session.execute(select(Week.run, Week.node))}
    found = []
    for name in known_runs(state):
        try:
            run = open_run(state, name)
        except RlhfError:  # a damaged run hides nothing but itself
            continue
        for node in run.plan.nodes:
            is_peoples = node.stage == "collect" and "batch" not in node.options
            is_new = is_peoples and (name, node.name) not in used
            if is_new and NodeDir(run.folder / node.name).is_done():
                title = weeks.default_name(name, node.round)
                found.append({"run": name, "node": node.name, "name": title})
    return found


def _week_values(state: State, caller: Caller, name: str) -> dict[str, Any]:
    with state.reading() as session:
        week = weeks.find_week(session, name)
        view = measures.week_view(session, week)
        people = measures.annotators(session, week) if caller.may("operator") else []
    report = weeks.close_report(weeks.folder_of(state, week.name))
    return {"week": view, "people": people, "report": report}
