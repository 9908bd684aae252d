"""Errors as RFC 9457 problem details, with the same sentences as on the command line."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from rlhf.errors import RlhfError

MEDIA_TYPE = "application/problem+json"


class Problem(RlhfError):
    """An answer that is an error: HTTP status, what is wrong, and what to do about it."""

    def __init__(self, status: HTTPStatus, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.extra = extra


def problem(status: int, detail: str, **extra: Any) -> dict[str, Any]:
    """Return the members of a problem document."""
    title = HTTPStatus(status).phrase
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, **extra}


def problem_response(
    status: int, detail: str, *, headers: dict[str, str] | None = None, **extra: Any
) -> JSONResponse:
    """Return a problem document as an answer."""
    return JSONResponse(
        problem(status, detail, **extra),
        status_code=status,
        media_type=MEDIA_TYPE,
        headers=headers,
    )
