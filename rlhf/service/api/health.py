"""Whether the service is alive and ready, and its numbers for Prometheus."""

from __future__ import annotations

import os
import shutil
from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from rlhf.runner import FULL_BYTES
from rlhf.service.access import StateOf, Viewer
from rlhf.service.api.models import StatusModel
from rlhf.service.api.openapi import problems
from rlhf.service.database.models import User
from rlhf.service.problems import DATABASE_SILENT, Problem
from rlhf.service.state import State

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Alive")
async def get_health() -> StatusModel:
    """Answer as long as the process does."""
    # Not in a thread: all of them may wait for a database or a disk.
    return StatusModel(status="alive")


@router.get(
    "/readyz",
    summary="Ready",
    responses=problems(
        s503="The database does not answer, or a folder cannot be written or is full."
    ),
)
def get_readiness(state: StateOf) -> StatusModel:
    """Answer if the database does and the folders can be written."""
    found = [*_silent_database(state), *_closed_folders(state)]
    if found:
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "; ".join(found))
    return StatusModel(status="ready")


@router.get(
    "/metrics",
    summary="Numbers for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_numbers(request: Request, caller: Viewer) -> Response:
    """Return requests, runs, nodes, annotations and inbox files as Prometheus reads them."""
    return Response(request.app.state.meter.text(), media_type=CONTENT_TYPE_LATEST)


def _silent_database(state: State) -> list[str]:
    try:
        with state.reading() as session:
            # SQLite answers SELECT 1 without a look at its file.
            session.execute(select(User.id).limit(1))
    except SQLAlchemyError:
        return [DATABASE_SILENT]
    return []


def _closed_folders(state: State) -> list[str]:
    folders = {
        "paths.runs": state.runs,
        "paths.store": state.store,
        "service.folder": state.folder,
    }
    closed = [
        f"{key} cannot be written: give the service's user the right to"
        for key, folder in folders.items()
        if not os.access(_existing(folder), os.W_OK | os.X_OK)
    ]
    full = [
        f"{key} has less than 1 MiB left: free some space"
        for key, folder in folders.items()
        if shutil.disk_usage(_existing(folder)).free < FULL_BYTES
    ]
    return closed + full


def _existing(path: Path) -> Path:
    """Return a folder, or the closest one above it that there is."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())
