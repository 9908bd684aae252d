"""Around every request: host check, body limit, security headers, and the audit log of writes.

Whatever goes wrong inside is answered here, so that such an answer has its headers and its row too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.service.access import CALLER, SAFE_METHODS, Caller
from rlhf.service.database.models import Audit
from rlhf.service.heads import is_upload
from rlhf.service.problems import problem_response
from rlhf.service.state import State

log = logging.getLogger(__name__)

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
HOST = re.compile(r"(?:\[([^\]]*)\]|([^:]*))(?::\d*)?")
"""A name or address, as browsers send it: with a port, and an IPv6 address in brackets."""
PROXIES = (
    "Forwarded",
    "Via",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Real-IP",
)
"""Headers by which a proxy shows itself."""
FORM_BYTES = 2**20
"""Largest body of a request that is no upload."""
MAX_DIGITS = 18
"""Longest length in decimal digits; Python refuses to read very long ones."""
HEADERS = {
    # Plotly sets styles in the document; scripts come from our own files only.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Runs change, and a shared machine's cache is no place for pairs and comments.
    "Cache-Control": "no-store",
}
"""Headers of every answer that has none of its own under the name."""
AUDIT = "rlhf.audit"
"""Key of a request's scope under which a handler leaves what the audit log should hold."""
SIGN_IN = "POST /login"
UNRECORDED = ("POST /api/v1/tasks/next", "PUT /api/v1/assignments/{key}/draft")
"""Offers and drafts, thousands a day: the assignment itself says who got it and what was typed."""


def note(scope: MutableMapping[str, Any], **detail: Any) -> None:
    """Add details of a write, such as its reason, to what the audit log will hold."""
    scope.setdefault(AUDIT, {}).update(detail)


def host_name(text: str) -> str:
    """Return the name or address in a Host header or a setting, without port and brackets."""
    lower = text.strip().lower()
    match = HOST.fullmatch(lower)
    return (match[1] or match[2] or "") if match else lower


class Guard:
    """ASGI middleware that every request passes; `fail` makes the answer to an exception."""

    def __init__(
        self, app: ASGIApp, state: State, fail: Callable[[Request, Exception], Response]
    ) -> None:
        self.app = app
        self.state = state
        self.fail = fail
        service = state.config.service
        names = (*LOOPBACK_NAMES, service.host, *service.allowed_hosts)
        self.hosts = {host_name(name) for name in names}
        self.max_upload = service.max_upload_mb * 2**20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_started = False

        async def guarded(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                await self._complete(scope, message)
                has_started = True
            await send(message)

        is_file = is_upload(scope["method"], scope["path"])
        limit = self.max_upload if is_file else FORM_BYTES
        try:
            refusal = self._refusal(Headers(scope=scope), limit)
            if refusal is not None:
                await refusal(scope, receive, guarded)
            else:
                await self.app(scope, _limited(receive, limit), guarded)
        except Exception as error:
            # An answer that has begun can only be broken off.
            if has_started:
                raise
            response = await run_in_threadpool(self.fail, Request(scope), error)
            await response(scope, receive, guarded)

    def _refusal(self, headers: Headers, limit: int) -> Response | None:
        """Return why a request is not even read, None where it is."""
        needs_tokens = self.state.config.service.needs_tokens
        host = host_name(headers.get("host", ""))
        if host not in self.hosts and not self._takes_any_host():
            return problem_response(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"host {host} is not one of the service's: add it to service.allowed_hosts, with "
                "which everybody needs a token",
            )
        if not needs_tokens and any(name in headers for name in PROXIES):
            return problem_response(
                HTTPStatus.FORBIDDEN,
                "a proxy stands in between, so that anybody could be asking: start the service "
                "with service.tokens=true",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > MAX_DIGITS or int(length) > limit:
            return problem_response(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large(limit))
        return None

    def _takes_any_host(self) -> bool:
        """Tell whether any name will do: where tokens are needed, a rebound name gains nothing."""
        service = self.state.config.service
        return service.needs_tokens and not service.allowed_hosts

    async def _complete(self, scope: Scope, message: Message) -> None:
        """Add the headers of every answer, and write the audit log before the answer leaves."""
        headers = MutableHeaders(scope=message)
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
        if scope["method"] not in SAFE_METHODS:
            await run_in_threadpool(self._record, scope, message["status"])

    def _record(self, scope: Scope, status: int) -> None:
        found: Caller | None = scope.get(CALLER)
        action = f"{scope['method']} {getattr(scope.get('route'), 'path', '(none)')}"
        # Who did not sign in writes nothing, and must not be able to fill the table.
        if action in UNRECORDED or (found is None and action != SIGN_IN):
            return
        row = Audit(
            user=found.name if found else "(nobody)",
            role=found.role if found else "",
            action=action[:200],
            # PostgreSQL stores no text with a zero byte.
            target=scope["path"].replace("\0", "\\0")[:500],
            status=status,
            detail=scope.get(AUDIT, {}),
        )
        try:
            with self.state.transaction() as session:
                session.add(row)
        except SQLAlchemyError:
            if status < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
            # Perhaps the answer is just that the database is away.
            log.exception("the audit log lacks %s, answered with %d", action, status)


def _too_large(limit: int) -> str:
    return (
        f"the body may have {limit} bytes at most: send less, or raise service.max_upload_mb for "
        "uploads"
    )


def _limited(receive: Receive, limit: int) -> Receive:
    """Return a source of the body that ends with an error beyond the limit, whatever was said."""
    total = 0

    async def wrapped() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > limit:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large(limit))
        return message

    return wrapped
