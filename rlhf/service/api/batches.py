"""Uploads of batches and sets: a file streamed to the disk, then `rlhf ingest`."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from rlhf.config import OnBadRow
from rlhf.data.ingest import NAME, BadRows
from rlhf.data.records import AXES, Kind
from rlhf.errors import RlhfError, is_disk_full
from rlhf.service import launching
from rlhf.service.access import Operator, StateOf
from rlhf.service.api.idempotency import REPLAYED, Answer, answer_once, check_key, digest_of
from rlhf.service.api.models import ExtendedModel, IngestedModel
from rlhf.service.api.openapi import KEY_HEADER, problems
from rlhf.service.guards import note
from rlhf.service.heads import UPLOAD_TYPE, media_type
from rlhf.service.ingesting import drift_headline, ingest_into
from rlhf.service.problems import DISK_FULL, Problem, status_of
from rlhf.service.state import State

router = APIRouter(prefix="/api/v1", tags=["batches"])

FOLDER = "upload-"
"""What the names of uploads' folders begin with."""
ABANDONED_SECONDS = 24 * 3600.0
"""After so long a folder belongs to a server that was killed."""
MAX_NAME = 100
PIECE_BYTES = 2**20
"""Bytes that are collected before they are written."""


def _one_of(names: Iterable[str]) -> str:
    return f"^({'|'.join(names)})$"


@dataclass(frozen=True, slots=True)
class Upload:
    """How a file is to be taken in; None leaves it to the configuration's `ingest`."""

    stream: str
    name: str
    kind: str | None
    id: str | None
    on_bad_row: str | None
    axis: str | None


@router.post(
    "/streams/{stream}/batches",
    summary="Upload a batch or set",
    status_code=HTTPStatus.CREATED,
    response_model=IngestedModel,
    responses={
        200: {"model": IngestedModel, "description": "All rows were in the stream already."},
        **problems(
            s400="The upload broke off.",
            s409="The first request with this key is under way.",
            s413="The upload is larger than service.max_upload_mb.",
            s415=f"The body is not {UPLOAD_TYPE}.",
            s422="The file is refused as `rlhf ingest` refuses it; `refused` has its bad rows.",
            s507="The disk is full.",
        ),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "The file: JSONL, JSON or Parquet, also with gzip.",
            "content": {UPLOAD_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload_batch(
    request: Request,
    state: StateOf,
    caller: Operator,
    stream: str,
    name: Annotated[
        str, Query(max_length=MAX_NAME, description="Name of the file, such as week-12.jsonl.")
    ],
    kind: Annotated[
        str | None, Query(pattern=_one_of(Kind.__members__), description="Inferred without.")
    ] = None,
    id: Annotated[
        str | None, Query(max_length=100, description="Name in the store; without, the file's.")
    ] = None,
    on_bad_row: Annotated[
        str | None,
        Query(pattern=_one_of(OnBadRow.__members__), description="What bad rows lead to."),
    ] = None,
    axis: Annotated[
        str | None, Query(pattern=_one_of(AXES), description="Axis of rows without one.")
    ] = None,
    key: Annotated[str | None, Header(alias=KEY_HEADER, include_in_schema=False)] = None,
) -> JSONResponse:
    """Stream a file to the disk, then check and add it by the rules of `rlhf ingest`.

    A refused file leaves nothing behind. Plans of runs that read the stream become longer.
    """
    order = Upload(stream, name, kind, id, on_bad_row, axis)
    _check(order, media_type(request.headers))
    if key is not None:
        check_key(key)
    note(request.scope, file=name, kind=kind, id=id)
    folder = await run_in_threadpool(_new_folder, state)
    try:
        path = folder / name
        digest = digest_of(request.scope, await _receive(request, path))
        response = await run_in_threadpool(
            answer_once, state, caller.name, key, digest, lambda: _take_in(state, path, order)
        )
    finally:
        await run_in_threadpool(shutil.rmtree, folder, ignore_errors=True)
    if REPLAYED in response.headers:
        note(request.scope, replayed=True)
    return response


def _check(order: Upload, kind: str) -> None:
    if kind != UPLOAD_TYPE:
        raise Problem(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"send the file's bytes as the body, with `Content-Type: {UPLOAD_TYPE}`",
        )
    rule = "use up to 100 letters, digits, dots, dashes and underscores"
    for what, text in (("stream", order.stream), ("name", order.name), ("id", order.id)):
        if text is not None and not NAME.fullmatch(text):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{what} is no name: {rule}")


def _new_folder(state: State) -> Path:
    """Return an empty folder for one upload; what killed servers left behind goes away."""
    state.uploads.mkdir(parents=True, exist_ok=True)
    for old in state.uploads.glob(f"{FOLDER}*"):
        if time.time() - old.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=FOLDER, dir=state.uploads))


async def _receive(request: Request, path: Path) -> str:
    """Write a request's body to a file, flushed to disk; returns its SHA-256."""
    sha256 = hashlib.sha256()
    total = 0
    waiting = bytearray()
    with path.open("xb", buffering=0) as file:

        def write(data: bytes) -> None:
            with _room():
                sha256.update(data)
                left = memoryview(data)
                # An almost full disk takes a part.
                while left:
                    left = left[file.write(left) :]

        def sync() -> None:
            with _room():
                os.fsync(file.fileno())

        try:
            async for piece in request.stream():
                total += len(piece)
                waiting += piece
                if len(waiting) >= PIECE_BYTES:
                    await run_in_threadpool(write, bytes(waiting))
                    waiting.clear()
        except ClientDisconnect as error:
            raise Problem(
                HTTPStatus.BAD_REQUEST,
                f"the upload broke off after {total} bytes: send it again",
            ) from error
        await run_in_threadpool(write, bytes(waiting))
        await run_in_threadpool(sync)
    return sha256.hexdigest()


@contextmanager
def _room() -> Iterator[None]:
    """Turn a full disk into an answer that says so."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise Problem(HTTPStatus.INSUFFICIENT_STORAGE, DISK_FULL) from error


def _take_in(state: State, path: Path, order: Upload) -> Answer:
    """Ingest a file that lies on the disk, and make the plans longer."""
    try:
        with _room():
            report = ingest_into(
                state,
                path,
                kind=order.kind,
                stream=order.stream,
                id=order.id,
                on_bad_row=order.on_bad_row,
                axis=order.axis,
            )
    except BadRows as error:
        raise Problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            _plain(str(error), path),
            counts=error.counts,
            refused=error.rows,
        ) from error
    except Problem:
        raise
    except RlhfError as error:
        raise Problem(status_of(error), _plain(str(error), path)) from error
    # Also for what is there already: a kill may have come between the rows and the plans.
    extended = launching.extend(state, order.stream)
    body = IngestedModel(
        added=report.added,
        kind=report.kind.name,
        id=report.id,
        stream=report.stream,
        digest=report.digest,
        counts=report.counts,
        refused=report.refused,
        excluded=report.excluded,
        message=report.message,
        drift=drift_headline(state, report),
        extended=[ExtendedModel.model_validate(item) for item in extended],
    )
    status = HTTPStatus.CREATED if report.added else HTTPStatus.OK
    return Answer(status, body.model_dump(mode="json"))


def _plain(message: str, path: Path) -> str:
    """Return a message that names the file as its sender does."""
    return re.sub(re.escape(f"{path.parent}{os.sep}"), "", message)
