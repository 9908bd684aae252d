"""The application: routes, error answers and guards put together."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rlhf.errors import LauncherError, RlhfError, UserError
from rlhf.service.access import check_origin
from rlhf.service.guards import Guard
from rlhf.service.problems import Problem, problem_response
from rlhf.service.state import State

log = logging.getLogger(__name__)

DESCRIPTION = "Runs, batches and annotations of one folder of runs and one store."


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
        version=version("rlhf"),
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
    app.mount("/static", pages.static_files())
    _answer_errors(app)
    app.add_middleware(Guard, state=state)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Turn errors into problem documents."""

    @app.exception_handler(RlhfError)
    def known(_: Request, error: RlhfError) -> Response:
        if isinstance(error, Problem):
            return problem_response(error.status, str(error), **error.extra)
        return problem_response(status_of(error), str(error))

    @app.exception_handler(HTTPException)
    def http(_: Request, error: HTTPException) -> Response:
        headers = dict(error.headers) if error.headers else None
        return problem_response(error.status_code, str(error.detail), headers=headers)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        rows = [
            {"field": ".".join(map(str, item["loc"])), "reason": item["msg"]}
            for item in error.errors()
        ]
        said = "; ".join(f"{row['field']}: {row['reason']}" for row in rows)
        return problem_response(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            f"{said}; /api/v1/openapi.json says what is accepted",
            errors=rows,
        )

    @app.exception_handler(Exception)
    def unknown(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem_response(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            "this is a bug in rlhf: the server's log has the details; please report it",
        )


def status_of(error: RlhfError) -> HTTPStatus:
    """Return the HTTP status that fits an error of the command line."""
    if isinstance(error, UserError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    if isinstance(error, LauncherError):
        return HTTPStatus.BAD_GATEWAY
    return HTTPStatus.CONFLICT
