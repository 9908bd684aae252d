"""Pages of streams and batches: what came, what drifted, what was refused, and uploads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sqlalchemy import select
from starlette.responses import HTMLResponse

from rlhf.config import OnBadRow
from rlhf.data.drift import VERDICTS
from rlhf.data.records import STRENGTHS, Kind
from rlhf.report.view.common import strength_name, words
from rlhf.report.view.refs import Ref, interval, written
from rlhf.service import facts
from rlhf.service.access import StateOf, Viewer
from rlhf.service.database.models import InboxFile
from rlhf.service.pages.render import render
from rlhf.service.state import State

router = APIRouter(include_in_schema=False)

SHOWN_FILES = 10
"""Newest files of the inbox that are listed."""
COUNTED = ("read", "accepted", "refused", "heldout")
"""Counts that are shown even when they are zero."""
SHOWN_BATCHES = 50
"""Newest batches of a stream on one page."""


@router.get("/batches")
def streams(
    request: Request,
    state: StateOf,
    caller: Viewer,
    stream: Annotated[str, Query(max_length=200)] = "",
    before: Annotated[int, Query(ge=0, le=10**9)] = 0,
) -> HTMLResponse:
    """Show the streams, and the newest batches of each; `stream` shows one of them only."""
    runs = facts.open_runs(state)
    found = facts.list_streams(state, runs=runs)
    if stream:
        facts.open_stream(state, stream)
    shown = [item for item in found if not stream or item.name == stream]
    return render(
        request,
        "batches.html",
        streams=[_stream(state, item, runs, before if stream else 0) for item in shown],
        names=[item.name for item in found],
        stream=stream,
        kinds=[kind.name for kind in Kind],
        policies=[policy.name for policy in OnBadRow],
        default_stream=state.config.ingest.stream,
        default_policy=state.config.ingest.on_bad_row.name,
        max_upload_mb=state.config.service.max_upload_mb,
        files=_files(state),
    )


@router.get("/batches/{stream}/{batch}")
def one_batch(
    request: Request,
    state: StateOf,
    caller: Viewer,
    stream: str,
    batch: str,
    kind: Annotated[str | None, Query(max_length=20)] = None,
) -> HTMLResponse:
    """Show a batch: what ingest counted and refused, how it drifted, and who annotated it."""
    report = facts.batch_report(state, stream, batch, kind=kind)
    manifest = report["manifest"]
    return render(
        request,
        "batch.html",
        stream=stream,
        batch=batch,
        report=report,
        manifest=manifest,
        counts=[
            (words(name), number)
            for name, number in manifest["counts"].items()
            if number or name in COUNTED
        ],
        accepted_by=manifest.get("accepted_by") or {},
        drift=_drift(report["drift"]),
        quality=_quality(report["quality"]),
        strengths=[strength_name(name) for name in STRENGTHS],
    )


def _stream(
    state: State, row: facts.StreamRow, runs: Sequence[facts.Run], before: int
) -> dict[str, Any]:
    """Return a stream with a page of its batches and sets, newest first."""
    total = sum(row.sets.values())
    end = min(before or total, total)
    start = max(0, end - SHOWN_BATCHES)
    batches = facts.list_batches(state, row.name, runs=runs, start=start, stop=end)
    return {"row": row, "batches": batches[::-1], "earlier": start}


def _files(state: State) -> Sequence[InboxFile]:
    wanted = select(InboxFile).order_by(InboxFile.id.desc()).limit(SHOWN_FILES)
    with state.reading() as session:
        return session.scalars(wanted).all()


def _drift(report: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the lines of a batch's drift, worst first; none where nothing came before it."""
    if report is None or not report["against"]:
        return []
    lines = sorted(report["lines"], key=lambda line: -VERDICTS.index(line["verdict"]))
    return [
        {
            "verdict": line["verdict"],
            "text": line["text"],
            "effect": written(line["effect"], "f2"),
            "p_value": written(line["p_value"], "f4"),
        }
        for line in lines
    ]


def _quality(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return how annotators judged, as cells; None where nothing is known."""
    if report is None or not report["rows"]:
        return None
    rows = []
    for part in Ref(report)["rows"]:
        graded = sum(part.value["strengths"].get(name, 0) for name in STRENGTHS)
        shares = [part.value["strengths"].get(name, 0) for name in STRENGTHS]
        rows.append(
            {
                "name": part.value["name"],
                "n": part.value["n"],
                "prompts": part.value["prompts"],
                "strengths": [written(n / graded, "p0") if graded else "" for n in shares],
                "ties": interval(part["ties"], "p0"),
                "longer": interval(part["longer_preferred"], "p0"),
                "agreement": interval(part["agreement"], "p0"),
                "flags": part.value["flags"],
            }
        )
    return {"by": report["by"], "rows": rows}
