"""What can be done with runs: start, go on, end, and overrule a promotion."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Request

from rlhf.service import facts, launching
from rlhf.service.access import Operator, StateOf
from rlhf.service.api.models import (
    CancelledModel,
    CancelOrder,
    LaunchModel,
    LaunchOrder,
    NewRun,
    PromotedModel,
    Promotion,
)
from rlhf.service.api.openapi import problems
from rlhf.service.guards import note
from rlhf.service.problems import Problem
from rlhf.versions import overrule

router = APIRouter(prefix="/api/v1", tags=["runs"])

REFUSED = "The configuration or a value is refused; `detail` says what `rlhf` says."
ANSWERS = problems(
    s404="There is no such run; the answer names those there are.",
    s409="The run is busy, or the first request with this key is under way.",
    s422=REFUSED,
    s502="The scheduler is absent, refuses, or does not answer.",
)


@router.post(
    "/runs",
    summary="Start a run",
    status_code=HTTPStatus.ACCEPTED,
    responses=problems(s409="The run exists.", s422=REFUSED, s502=str(ANSWERS[502]["description"])),
)
def start_run(request: Request, state: StateOf, caller: Operator, order: NewRun) -> LaunchModel:
    """Start a run from a recipe, as `rlhf launch recipe=...` does."""
    run = order.run if order.run is not None else order.recipe
    note(request.scope, run=run, recipe=order.recipe, settings=order.settings)
    if run in facts.known_runs(state):
        raise Problem(
            HTTPStatus.CONFLICT,
            f"run {run} exists: POST /api/v1/runs/{run}/launch goes on with it, or choose another "
            "name",
        )
    launch = launching.launch(
        state, run, user=caller.name, recipe=order.recipe, settings=order.settings
    )
    return LaunchModel.model_validate(launch)


@router.post(
    "/runs/{run}/launch",
    summary="Go on with a run",
    status_code=HTTPStatus.ACCEPTED,
    responses=ANSWERS,
)
def launch_run(
    request: Request, state: StateOf, caller: Operator, run: str, order: LaunchOrder | None = None
) -> LaunchModel:
    """Launch what is not done yet; launching twice starts nothing twice."""
    settings = order.settings if order is not None else {}
    note(request.scope, settings=settings)
    facts.open_run(state, run)
    launch = launching.launch(state, run, user=caller.name, settings=settings)
    return LaunchModel.model_validate(launch)


@router.post("/runs/{run}/cancel", summary="End a run's jobs", responses=ANSWERS)
def cancel_run(
    request: Request, state: StateOf, caller: Operator, run: str, order: CancelOrder | None = None
) -> CancelledModel:
    """End the jobs of a run, or one node's; what they saved stays."""
    node = order.node if order is not None and order.node is not None else ""
    note(request.scope, node=node)
    found = facts.open_run(state, run)
    if node:
        facts.find_node(found, node)
    said = launching.cancel(state, run, node=node, user=caller.name)
    return CancelledModel(run=run, output=said)


@router.post("/runs/{run}/promote", summary="Overrule a promotion", responses=ANSWERS)
def promote_version(
    request: Request, state: StateOf, caller: Operator, run: str, order: Promotion
) -> PromotedModel:
    """Make a version count as promoted after the last evaluated round, with a reason."""
    note(request.scope, version=order.version, reason=order.reason)
    found = facts.open_run(state, run)
    with launching.alone(state, found.name, "promote"):
        last = overrule(
            found.config, found.plan, found.folder, version=order.version, reason=order.reason
        )
    return PromotedModel(run=run, version=order.version, round=last, reason=order.reason)
