"""Pages of runs: all of them, one of them, and what operators do with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Form, Query, Request
from sqlalchemy import select
from starlette.responses import HTMLResponse, Response

from rlhf.compose import recipes
from rlhf.errors import ConfigError, RlhfError
from rlhf.report.view.blocks import Block, Note, slug
from rlhf.report.view.refs import Ref
from rlhf.service import facts, launching
from rlhf.service.access import Caller, Operator, StateOf, Viewer
from rlhf.service.database.models import Launch
from rlhf.service.guards import note
from rlhf.service.pages.front import front
from rlhf.service.pages.graph import (
    SHOWN_ROUNDS,
    counted,
    describe,
    graph,
    newest_rounds,
    node_address,
    shown_state,
)
from rlhf.service.pages.render import Message, fragment, redirect, render
from rlhf.service.problems import Problem, status_of
from rlhf.service.state import State

router = APIRouter(include_in_schema=False)

SILENT_SECONDS = 120.0
"""A running node that reports no step for longer may hang."""
SHOWN_LAUNCHES = 3
SHOWN_RUNS = 50
"""Runs on one page of the overview."""
BACKGROUND_LINES = 30
MAX_SETTINGS = 10_000
"""Characters of the settings that a form may bring."""
START = datetime.min.replace(tzinfo=UTC)
Offset = Annotated[int, Query(ge=0, le=10**9)]


@router.get("/")
def overview(request: Request, state: StateOf, caller: Viewer, offset: Offset = 0) -> HTMLResponse:
    """Show the runs."""
    return _overview(request, state, offset=offset)


@router.get("/live")
def overview_live(state: StateOf, caller: Viewer, offset: Offset = 0) -> HTMLResponse:
    """Return the part of the overview that changes."""
    return fragment("_runs.html", **_listed(state, offset))


@router.post("/runs")
def launch_new(
    request: Request,
    state: StateOf,
    caller: Operator,
    run: Annotated[str, Form(max_length=80)] = "",
    recipe: Annotated[str, Form(max_length=80)] = "",
    settings: Annotated[str, Form(max_length=MAX_SETTINGS)] = "",
) -> Response:
    """Start a run from a recipe."""
    typed = {"run": run, "recipe": recipe, "settings": settings}
    try:
        if not run.strip():
            raise ConfigError("a new run needs a name: fill in the field")
        if run.strip() in facts.known_runs(state):
            raise ConfigError(
                f"run {run.strip()} exists: go on with it on its page, or choose another name"
            )
        message = _launch(request, state, caller, run.strip(), recipe=recipe, settings=settings)
    except RlhfError as error:
        return _overview(request, state, typed=typed, error=error)
    return redirect(f"/runs/{quote(run.strip())}", message)


@router.get("/runs/{run}")
def one_run(
    request: Request,
    state: StateOf,
    caller: Viewer,
    run: str,
    rounds: Annotated[str, Query(max_length=10)] = "",
) -> HTMLResponse:
    """Show a run: how well its reward models agree with people, and where its nodes stand."""
    return _one_run(request, state, run, every=rounds == "all")


@router.get("/runs/{run}/live")
def one_run_live(
    state: StateOf,
    caller: Viewer,
    run: str,
    rounds: Annotated[str, Query(max_length=10)] = "",
) -> HTMLResponse:
    """Return the part of a run's page that changes."""
    opened = facts.open_run(state, run)
    return fragment("_graph.html", **graph_values(state, opened, every=rounds == "all"))


@router.post("/runs/{run}/launch")
def launch(
    request: Request,
    state: StateOf,
    caller: Operator,
    run: str,
    settings: Annotated[str, Form(max_length=MAX_SETTINGS)] = "",
) -> Response:
    """Go on with a run: start what is not done."""
    try:
        name = facts.open_run(state, run).name
        message = _launch(request, state, caller, name, recipe=None, settings=settings)
    except RlhfError as error:
        typed = {"settings": settings}
        return _one_run(request, state, run, typed=typed, failed="launch", error=error)
    return redirect(f"/runs/{quote(name)}", message)


@router.post("/runs/{run}/cancel")
def cancel(
    request: Request,
    state: StateOf,
    caller: Operator,
    run: str,
    node: Annotated[str, Form(max_length=200)] = "",
) -> Response:
    """End a run's jobs, or one node's; what they saved stays."""
    opened = facts.open_run(state, run)
    if node:
        facts.find_node(opened, node)
    note(request.scope, run=opened.name, node=node)
    try:
        said = launching.cancel(state, opened.name, node=node, user=caller.name)
    except RlhfError as error:
        return _one_run(request, state, run, failed="cancel", error=error)
    return redirect(f"/runs/{quote(opened.name)}", Message(str(said)))


def graph_values(state: State, run: facts.Run, *, every: bool) -> dict[str, Any]:
    """Return what the live part of a run's page shows."""
    rows = facts.node_rows(run)
    drawn = newest_rounds(rows, every=every)
    launches = _launches(state, run.name)
    # A launch that waits or was refused has a word of its own.
    is_gone = (not launches or launches[0].state == "launched") and facts.has_ended_early(run, rows)
    return {
        "run": run.name,
        "svg": graph(run.name, drawn),
        "every": every,
        "has_more": len(drawn) < len(rows),
        "can_fold": len({row.round for row in rows}) > SHOWN_ROUNDS,
        "counts": counted(rows),
        "rows": [node_view(run.name, row) for row in rows],
        "attention": [node_view(run.name, row) for row in rows if row.has_failed],
        "launches": launches,
        "background": facts.read_background(run, lines=BACKGROUND_LINES) if is_gone else None,
    }


def node_view(run: str, row: facts.NodeRow) -> dict[str, Any]:
    """Return what tables and pages show of a node."""
    silent = row.silent is not None and row.silent > SILENT_SECONDS
    return {
        "row": row,
        "address": node_address(run, row.name),
        "state": shown_state(row),
        "said": describe(row),
        "silent": row.silent if silent else None,
        "failure": row.failure.replace("_", " "),
    }


def error_message(error: RlhfError | None) -> Message | None:
    """Return what a page says first after a form that failed."""
    return Message(str(error), "stop") if error is not None else None


def error_status(error: RlhfError | None) -> int:
    """Return the status of a page that is shown again because its form failed."""
    return HTTPStatus.OK if error is None else status_of(error)


def _overview(
    request: Request,
    state: State,
    *,
    offset: int = 0,
    typed: Mapping[str, str] | None = None,
    error: RlhfError | None = None,
) -> HTMLResponse:
    return render(
        request,
        "runs.html",
        message=error_message(error),
        status_code=error_status(error),
        recipes=recipes(),
        typed={"run": "", "recipe": "", "settings": "", **(typed or {})},
        **_listed(state, offset),
    )


def _listed(state: State, offset: int) -> dict[str, Any]:
    """Return a page of the runs: those that need somebody, those that run, then by their start."""
    order = ("failed", "running", "stopped", "waiting", "done")
    found = sorted(facts.list_runs(state), key=lambda run: run.started or START, reverse=True)
    found.sort(key=lambda run: order.index(run.state))
    last = max(0, len(found) - 1) // SHOWN_RUNS * SHOWN_RUNS
    offset = min(offset, last)
    return {
        "runs": [
            {"run": run, "total": sum(run.counts.values()), "status": run.state}
            for run in found[offset : offset + SHOWN_RUNS]
        ],
        "offset": offset,
        "before": max(0, offset - SHOWN_RUNS) if offset else None,
        "after": offset + SHOWN_RUNS if offset < last else None,
        "num_runs": len(found),
    }


def _one_run(
    request: Request,
    state: State,
    run: str,
    *,
    every: bool = False,
    typed: Mapping[str, str] | None = None,
    failed: str = "",
    error: RlhfError | None = None,
) -> HTMLResponse:
    opened = facts.open_run(state, run)
    values = graph_values(state, opened, every=every)
    return render(
        request,
        "run.html",
        message=error_message(error),
        status_code=error_status(error),
        summary=facts.run_summary(opened, [item["row"] for item in values["rows"]]),
        blocks=_front(state, opened),
        prefix=slug(opened.name),
        failed=failed,
        launcher=opened.config.launcher.kind.name,
        typed={"settings": "", **(typed or {})},
        **values,
    )


def _front(state: State, run: facts.Run) -> list[Block]:
    """Return what the report says first; a report that cannot be made hides nothing else."""
    try:
        return front(Ref(facts.run_report(state, run)))
    except Problem as error:
        return [Note(str(error), "message stop")]


def _launches(state: State, run: str) -> Sequence[Launch]:
    wanted = select(Launch).where(Launch.run == run).order_by(Launch.id.desc())
    with state.reading() as session:
        return session.scalars(wanted.limit(SHOWN_LAUNCHES)).all()


def _launch(
    request: Request,
    state: State,
    caller: Caller,
    run: str,
    *,
    recipe: str | None,
    settings: str,
) -> Message:
    given = read_settings(settings)
    note(request.scope, run=run, recipe=recipe or "", settings=given)
    launched = launching.launch(state, run, user=caller.name, recipe=recipe, settings=given)
    if launched.state == "wanted":
        return Message(f"{run} is busy: it is launched as soon as it is free", "look")
    level = "stop" if launched.state == "failed" else "ok"
    return Message(f"{run}: {launched.state}\n{launched.output}".strip(), level)


def read_settings(text: str) -> dict[str, str]:
    """Return the settings of a form, one `key=value` per line; raises ConfigError."""
    found: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{line} is no setting: write one key=value per line")
        found[key.strip()] = value.strip()
    return found
