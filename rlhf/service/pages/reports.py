"""Pages of a run's report: its sections, and two versions side by side."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Form, Query, Request
from starlette.responses import HTMLResponse, Response

from rlhf.errors import RlhfError
from rlhf.report.page import SECTIONS
from rlhf.report.view.blocks import Block, slug
from rlhf.report.view.refs import Ref
from rlhf.report.view.versions import behaviour, decisions, examples, versions_table, win_rates
from rlhf.service import facts, launching
from rlhf.service.access import Operator, StateOf, Viewer
from rlhf.service.guards import note
from rlhf.service.pages.render import Message, redirect, render
from rlhf.service.pages.runs import error_message, error_status
from rlhf.service.problems import Problem
from rlhf.service.state import State
from rlhf.versions import overrule

router = APIRouter(include_in_schema=False)

VersionName = Annotated[str, Query(max_length=80)]


@router.get("/runs/{run}/report")
def report(request: Request, state: StateOf, caller: Viewer, run: str) -> HTMLResponse:
    """Show the Evidence report as it is now."""
    opened = facts.open_run(state, run)
    root = Ref(facts.run_report(state, opened))
    return render(
        request,
        "report.html",
        run=opened.name,
        sections=[module.section(root) for module in SECTIONS],
        prefix=slug(opened.name),
    )


@router.get("/runs/{run}/versions")
def versions(
    request: Request,
    state: StateOf,
    caller: Viewer,
    run: str,
    a: VersionName = "",
    b: VersionName = "",
) -> HTMLResponse:
    """Compare two versions, by default the newest evaluated one and what it was up against."""
    return _show_versions(request, state, run, a=a, b=b)


@router.post("/runs/{run}/promote")
def promote(
    request: Request,
    state: StateOf,
    caller: Operator,
    run: str,
    version: Annotated[str, Form(max_length=80)] = "",
    reason: Annotated[str, Form(max_length=2000)] = "",
) -> Response:
    """Overrule the rule: make a version count as promoted, for a reason that is recorded."""
    opened = facts.open_run(state, run)
    note(request.scope, run=opened.name, version=version, reason=reason)
    try:
        with launching.alone(state, opened.name, "promote"):
            last = overrule(
                opened.config, opened.plan, opened.folder, version=version, reason=reason
            )
    except RlhfError as error:
        typed = {"version": version, "reason": reason}
        return _show_versions(request, state, run, typed=typed, error=error)
    text = f"{version} counts as promoted after round {last}: {reason}"
    return redirect(f"/runs/{quote(opened.name)}/versions", Message(text))


def _show_versions(
    request: Request,
    state: State,
    run: str,
    *,
    a: str = "",
    b: str = "",
    typed: Mapping[str, str] | None = None,
    error: RlhfError | None = None,
) -> HTMLResponse:
    opened = facts.open_run(state, run)
    root = Ref(facts.run_report(state, opened))
    known = [str(version.value["name"]) for version in root["versions"]]
    pairs = [
        (str(part.value["promoted"]), str(part.value["candidate"]))
        for part in reversed(list(root["evaluations"]))
    ]
    old, new = pairs[0] if pairs else ("", "")
    old, new = (a or old), (b or new)
    for name in {old, new} - {"", *known}:
        raise Problem(
            HTTPStatus.NOT_FOUND,
            f"version {name} does not exist: there is {', '.join(known) or 'none yet'}",
        )
    is_turned = (new, old) in pairs and (old, new) not in pairs
    pair = (new, old) if is_turned else (old, new)
    return render(
        request,
        "versions.html",
        message=error_message(error),
        status_code=error_status(error),
        run=opened.name,
        known=known,
        pair=pair,
        pairs=pairs,
        has_answers=pair in pairs,
        blocks=list(_blocks(root, pair)),
        answers=_answers(root, pair),
        prefix=slug(opened.name),
        current=facts.run_versions(opened),
        typed={"version": "", "reason": "", **(typed or {})},
    )


def _blocks(root: Ref, pair: tuple[str, str]) -> list[Block]:
    if not root["versions"]:
        return []
    chosen = [version for version in root["versions"] if version.value["name"] in pair]
    blocks: list[Block] = [versions_table(chosen)] if chosen else []
    evaluated = [part for part in root["evaluations"] if is_pair(part, pair)]
    if evaluated:
        blocks += [win_rates(evaluated), behaviour(evaluated), decisions(evaluated)]
    return blocks


def _answers(root: Ref, pair: tuple[str, str]) -> list[Block]:
    parts = [part for part in root["examples"] if is_pair(part, pair)]
    return list(examples(parts)) if parts else []


def is_pair(part: Ref, pair: tuple[str, str]) -> bool:
    """Tell whether an evaluation compared exactly these two, old and new."""
    return (str(part.value["promoted"]), str(part.value["candidate"])) == pair
