"""The application: routes, error answers and guards put together."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rlhf.errors import RlhfError, is_disk_full
from rlhf.provenance import versions
from rlhf.service.access import check_origin
from rlhf.service.api.idempotency import Idempotent
from rlhf.service.api.metering import Meter, Metered
from rlhf.service.api.openapi import describe
from rlhf.service.guards import Guard
from rlhf.service.pages.errors import error_page, wants_page
from rlhf.service.problems import (
    DATABASE_SILENT,
    DISK_FULL,
    Problem,
    problem_response,
    status_of,
)
from rlhf.service.state import State

log = logging.getLogger(__name__)

DESCRIPTION = "Runs, batches and annotations of one folder of runs and one store."

HINTS: Mapping[int, str] = {
    HTTPStatus.NOT_FOUND: "nothing is at this address: /api/v1/openapi.json lists what there is",
    HTTPStatus.METHOD_NOT_ALLOWED: "this address does not take this method: /api/v1/openapi.json "
    "lists those it takes",
    HTTPStatus.BAD_REQUEST: "the request could not be read, or broke off: send it again",
}
"""What an error of the framework itself says."""
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeoutError)
"""Errors of a database that does not answer, or not in time."""


def create_app(
    state: State, *, beside: Callable[[State], AbstractContextManager[object]] | None = None
) -> FastAPI:
    """Return the application; `beside` is entered while it runs, such as the inbox watcher."""
    from rlhf.service.annotation import routes as annotation
    from rlhf.service.api import batches, health, reading, runs
    from rlhf.service.pages import routes as pages

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if beside is None:
            yield
            return
        with beside(state):
            yield

    app = FastAPI(
        title="rlhf",
        # A checkout that is not installed has no number.
        version=versions()["rlhf"] or "0",
        description=DESCRIPTION,
        lifespan=lifespan,
        dependencies=[Depends(check_origin)],
        # FastAPI's own pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
    )
    app.state.service = state
    for module in (health, reading, runs, batches, annotation, pages):
        app.include_router(module.router)
    describe(app)
    _answer_errors(app)
    # The last one is the outermost.
    app.add_middleware(Idempotent, state=state)
    app.add_middleware(Guard, state=state, fail=_failure)
    meter = Meter(state)
    app.state.meter = meter
    app.add_middleware(Metered, meter=meter)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Turn errors into problem documents, and into pages for people; the guard turns the others."""
    app.exception_handler(RlhfError)(_known)
    app.exception_handler(HTTPException)(_http)
    app.exception_handler(RequestValidationError)(_invalid)


def _answer(request: Request, status: int, detail: str, **extra: Any) -> Response:
    if wants_page(request):
        return error_page(request, status, detail)
    return problem_response(status, detail, **extra)


def _known(request: Request, error: RlhfError) -> Response:
    extra = error.extra if isinstance(error, Problem) else {}
    status = status_of(error)
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
    return _answer(request, status, str(error), headers=headers, **extra)


def _http(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers) if error.headers else None
    said = HINTS.get(error.status_code, str(error.detail))
    return _answer(request, error.status_code, said, headers=headers)


def _invalid(request: Request, error: RequestValidationError) -> Response:
    rows = [
        {"field": ".".join(map(str, item["loc"])), "reason": item["msg"]} for item in error.errors()
    ]
    said = "; ".join(f"{row['field']}: {row['reason']}" for row in rows)
    return _answer(
        request,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        f"{said}; /api/v1/openapi.json says what is accepted",
        errors=rows,
    )


def _failure(request: Request, error: Exception) -> Response:
    """Return the answer to an exception that no handler knows, or that came before them."""
    if isinstance(error, HTTPException):
        return _http(request, error)
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    if is_disk_full(error):
        return _answer(request, HTTPStatus.INSUFFICIENT_STORAGE, DISK_FULL)
    if isinstance(error, DATABASE_AWAY):
        return _answer(request, HTTPStatus.SERVICE_UNAVAILABLE, DATABASE_SILENT)
    return _answer(
        request,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "this is a bug in rlhf: the server's log has the details; please report it",
    )
