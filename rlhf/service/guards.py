"""Around every request: host check, body limit, security headers, and the audit log of writes."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.service.access import SAFE_METHODS, Caller
from rlhf.service.database.models import Audit
from rlhf.service.problems import problem_response
from rlhf.service.state import State

log = logging.getLogger(__name__)

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
FORM_BYTES = 2**20
"""Largest body of a request that is no upload."""
MAX_DIGITS = 18
"""Longest length in decimal digits; Python refuses to read very long ones."""
UPLOAD_TYPE = "application/octet-stream"
"""Content type of uploads, which are streamed to disk under a limit of their own."""
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
}
AUDIT = "rlhf.audit"
"""Key of a request's scope under which a handler leaves what the audit log should hold; None is
for what it need not hold."""


def note(scope: MutableMapping[str, Any], **detail: Any) -> None:
    """Add details of a write, such as its reason, to what the audit log will hold."""
    scope.setdefault(AUDIT, {}).update(detail)


class Guard:
    """ASGI middleware that every request passes."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app = app
        self.state = state
        service = state.config.service
        self.hosts = {*LOOPBACK_NAMES, service.host, *service.allowed_hosts}
        self.max_upload = service.max_upload_mb * 2**20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if host not in self.hosts and not self._takes_any_host():
            response = problem_response(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"host {host} is not one of the service's: add it to service.allowed_hosts",
            )
            await response(scope, receive, self._with_headers(scope, send))
            return
        limit = self._limit(headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > MAX_DIGITS or int(length) > limit:
            response = problem_response(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body may have {limit} bytes at most: send less, or raise "
                "service.max_upload_mb for uploads",
            )
            await response(scope, receive, self._with_headers(scope, send))
            return
        await self.app(scope, _limited(receive, limit), self._with_headers(scope, send))

    def _takes_any_host(self) -> bool:
        """Tell whether any name will do: where tokens are needed, a rebound name gains nothing."""
        service = self.state.config.service
        return service.needs_tokens and not service.allowed_hosts

    def _limit(self, headers: Headers) -> int:
        kind = headers.get("content-type", "").partition(";")[0].strip()
        return self.max_upload if kind == UPLOAD_TYPE else FORM_BYTES

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if scope["method"] not in SAFE_METHODS and scope.get(AUDIT, {}) is not None:
                    await run_in_threadpool(self._record, scope, message["status"])
            await send(message)

        return wrapped

    def _record(self, scope: Scope, status: int) -> None:
        """Write a row of the audit log before the answer leaves."""
        found: Caller | None = scope.get("rlhf.caller")
        route = scope.get("route")
        path = getattr(route, "path", "(none)")
        row = Audit(
            user=found.name if found else "(nobody)",
            role=found.role if found else "",
            action=f"{scope['method']} {path}"[:200],
            # PostgreSQL stores no text with a zero byte.
            target=scope["path"].replace("\0", "\\0")[:500],
            status=status,
            detail=scope.get(AUDIT, {}),
        )
        with self.state.transaction() as session:
            session.add(row)


def _limited(receive: Receive, limit: int) -> Receive:
    """Return a source of the body that breaks off beyond the limit, whatever the length said."""
    total = 0

    async def wrapped() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > limit:
                log.warning("a body was larger than %d bytes and was broken off", limit)
                return {"type": "http.disconnect"}
        return message

    return wrapped
