"""Errors as RFC 9457 problem details, with the same sentences as on the command line."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from rlhf.errors import LauncherError, RlhfError, UserError

MEDIA_TYPE = "application/problem+json"

DISK_FULL = "the service's disk is full: ask its operator to free some space, then send it again"
DATABASE_SILENT = "the database does not answer: start it, or correct service.database"


class Problem(RlhfError):
    """An answer that is an error: HTTP status, what is wrong, and what to do about it."""

    def __init__(self, status: HTTPStatus, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.extra = extra


def status_of(error: RlhfError) -> HTTPStatus:
    """Return the HTTP status that fits an error, also one of the command line."""
    if isinstance(error, Problem):
        return error.status
    if isinstance(error, UserError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    if isinstance(error, LauncherError):
        return HTTPStatus.BAD_GATEWAY
    return HTTPStatus.CONFLICT


def problem(status: int, detail: str, **extra: Any) -> dict[str, Any]:
    """Return the members of a problem document."""
    title = HTTPStatus(status).phrase
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, **extra}


def problem_of(error: RlhfError) -> dict[str, Any]:
    """Return the problem document of an error."""
    extra = error.extra if isinstance(error, Problem) else {}
    return problem(status_of(error), str(error), **extra)


def problem_response(
    status: int, detail: str, *, headers: dict[str, str] | None = None, **extra: Any
) -> JSONResponse:
    """Return a problem document as an answer."""
    return document_response(problem(status, detail, **extra), headers=headers)


def document_response(
    document: dict[str, Any], *, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return a problem document as an answer with its own status."""
    return JSONResponse(
        document,
        status_code=document["status"],
        media_type=MEDIA_TYPE,
        headers=headers,
    )
