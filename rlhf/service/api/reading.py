"""What can be read about runs, streams and writes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import select

from rlhf.data.records import Kind
from rlhf.service import facts
from rlhf.service.access import Operator, StateOf, Viewer
from rlhf.service.api.models import (
    AuditModel,
    BatchModel,
    BatchReportModel,
    LogModel,
    MetricsModel,
    NodeModel,
    RoundModel,
    Row,
    RunDetailModel,
    RunModel,
    StreamModel,
    VersionModel,
)
from rlhf.service.api.openapi import problems
from rlhf.service.api.paging import (
    DEFAULT,
    MAX_NUMBER,
    Cursor,
    Limit,
    Page,
    cut,
    cut_names,
    decode,
    encode,
)
from rlhf.service.database.models import Audit

router = APIRouter(
    prefix="/api/v1", responses=problems(s422="A value cannot be used; `errors` lists the fields.")
)

NO_RUN = problems(s404="There is no such run; the answer names those there are.")
NO_NODE = problems(s404="There is no such run or node; the answer names those there are.")
NO_STREAM = problems(s404="There is no such stream; the answer names those there are.")
NO_BATCH = problems(s404="There is no such stream or batch; the answer names those there are.")

NodeName = Annotated[
    str, Query(max_length=200, description="Name of a node, such as round-01/evaluate.")
]
MAX_STEP = 2**53
Step = Annotated[int | None, Query(ge=-1, le=MAX_STEP)]


@router.get("/runs", tags=["runs"], summary="All runs")
def get_runs(
    state: StateOf, caller: Viewer, limit: Limit = DEFAULT, cursor: Cursor = None
) -> Page[RunModel]:
    """List the runs by name."""
    names, following = cut_names(facts.known_runs(state), cursor=cursor, limit=limit)
    found = facts.list_runs(state, names=names)
    return Page(items=[RunModel.of(item) for item in found], next_cursor=following)


@router.get("/runs/{run}", tags=["runs"], summary="One run", responses=NO_RUN)
def get_run(state: StateOf, caller: Viewer, run: str) -> RunDetailModel:
    """Return a run with the rounds of its plan."""
    found = facts.open_run(state, run)
    summary = RunModel.of(facts.run_summary(found, facts.node_rows(found)))
    plan = [RoundModel.model_validate(item) for item in found.plan.rounds]
    return RunDetailModel(**summary.model_dump(), plan=plan)


@router.get("/runs/{run}/nodes", tags=["runs"], summary="Nodes and their state", responses=NO_RUN)
def get_nodes(
    state: StateOf, caller: Viewer, run: str, limit: Limit = DEFAULT, cursor: Cursor = None
) -> Page[NodeModel]:
    """List the nodes of a run in the order of its plan."""
    rows, following = cut(facts.node_rows(facts.open_run(state, run)), cursor=cursor, limit=limit)
    return Page(items=[NodeModel.of(row) for row in rows], next_cursor=following)


@router.get("/runs/{run}/metrics", tags=["runs"], summary="Metrics of a node", responses=NO_NODE)
def get_metrics(
    state: StateOf,
    caller: Viewer,
    run: str,
    node: NodeName,
    name: Annotated[
        list[Annotated[str, Query(max_length=100)]] | None,
        Query(max_length=50, description="Metrics to return; all without."),
    ] = None,
    after: Annotated[Step, Query(description="Only later steps.")] = None,
    before: Annotated[Step, Query(description="Only earlier steps.")] = None,
    points: Annotated[int, Query(ge=1, le=5000, description="Rows at most.")] = 500,
) -> MetricsModel:
    """Return a node's metrics within a window of steps, evenly thinned to a number of rows."""
    found = facts.open_run(state, run)
    tree = facts.read_metrics(
        found, facts.find_node(found, node), names=name, after=after, before=before, points=points
    )
    return MetricsModel.model_validate(tree)


@router.get("/runs/{run}/samples", tags=["runs"], summary="Texts of a node", responses=NO_NODE)
def get_samples(
    state: StateOf,
    caller: Viewer,
    run: str,
    node: NodeName,
    limit: Limit = DEFAULT,
    cursor: Cursor = None,
) -> Page[Row]:
    """List texts that a node wrote down, in the order it did."""
    found = facts.open_run(state, run)
    start = decode(cursor, 0)
    read = facts.read_samples(found, facts.find_node(found, node), offset=start, limit=limit)
    following = encode(start + limit) if start + limit < read["total"] else None
    return Page(items=read["items"], next_cursor=following)


@router.get("/runs/{run}/log", tags=["runs"], summary="End of a node's log", responses=NO_NODE)
def get_log(
    state: StateOf,
    caller: Viewer,
    run: str,
    node: NodeName,
    lines: Annotated[int, Query(ge=1, le=2000, description="Lines at most.")] = 200,
) -> LogModel:
    """Return the last lines of a node's log."""
    found = facts.open_run(state, run)
    which = facts.find_node(found, node)
    return LogModel(node=which.name, lines=facts.read_log(found, which, lines=lines))


@router.get(
    "/runs/{run}/report",
    tags=["runs"],
    summary="Report",
    responses=problems(
        s404="There is no such run.",
        s409="A file of the run cannot be read; `detail` names it.",
        s503="The run is changing; ask again.",
    ),
)
def get_report(state: StateOf, caller: Viewer, run: str) -> dict[str, Any]:
    """Return what `rlhf report` would write into report.json now."""
    return facts.run_report(state, facts.open_run(state, run))


@router.get("/runs/{run}/versions", tags=["runs"], summary="Versions", responses=NO_RUN)
def get_versions(
    state: StateOf, caller: Viewer, run: str, limit: Limit = DEFAULT, cursor: Cursor = None
) -> Page[VersionModel]:
    """List the versions that a run has made, oldest first."""
    versions = facts.run_versions(facts.open_run(state, run))
    rows, following = cut(versions, cursor=cursor, limit=limit)
    return Page(items=[VersionModel.of(row) for row in rows], next_cursor=following)


@router.get("/streams", tags=["batches"], summary="All streams")
def get_streams(
    state: StateOf, caller: Viewer, limit: Limit = DEFAULT, cursor: Cursor = None
) -> Page[StreamModel]:
    """List the streams of the store by name."""
    streams = {row.name: row for row in facts.list_streams(state)}
    names, following = cut_names(list(streams), cursor=cursor, limit=limit)
    return Page(items=[StreamModel.of(streams[name]) for name in names], next_cursor=following)


@router.get(
    "/streams/{stream}/batches",
    tags=["batches"],
    summary="Batches and sets of a stream",
    responses=NO_STREAM,
)
def get_batches(
    state: StateOf, caller: Viewer, stream: str, limit: Limit = DEFAULT, cursor: Cursor = None
) -> Page[BatchModel]:
    """List the batches and sets of a stream in the order they came."""
    start = decode(cursor, 0)
    rows = facts.list_batches(state, stream, start=start, stop=start + limit + 1)
    following = encode(start + limit) if len(rows) > limit else None
    return Page(items=[BatchModel.of(row) for row in rows[:limit]], next_cursor=following)


@router.get(
    "/streams/{stream}/batches/{batch}",
    tags=["batches"],
    summary="Report of a batch or set",
    responses=NO_BATCH,
)
def get_batch(
    state: StateOf,
    caller: Viewer,
    stream: str,
    batch: str,
    kind: Annotated[
        str | None,
        Query(
            pattern=f"^({'|'.join(Kind.__members__)})$",
            description="Needed only where a batch and a set have the same name.",
        ),
    ] = None,
) -> BatchReportModel:
    """Return what ingest recorded of a batch, its drift, and how its annotators judged."""
    found = facts.batch_report(state, stream, batch, kind=kind)
    return BatchReportModel.model_validate(found)


@router.get("/audit", tags=["audit"], summary="Audit log")
def get_audit(
    state: StateOf, caller: Operator, limit: Limit = DEFAULT, cursor: Cursor = None
) -> Page[AuditModel]:
    """List the audit log, newest first."""
    before = decode(cursor, MAX_NUMBER - 1)
    with state.reading() as session:
        rows = session.scalars(
            select(Audit).where(Audit.id < before).order_by(Audit.id.desc()).limit(limit + 1)
        ).all()
        items = [AuditModel.model_validate(row) for row in rows[:limit]]
    return Page(items=items, next_cursor=encode(items[-1].id) if len(rows) > limit else None)
