"""Writes with an `Idempotency-Key`: the same request again gets the same answer, and does nothing.

A key belongs to its caller. Its row in the database is claimed before the work and holds the answer
afterwards, so two servers on one database do the work once. What mends without another request
(5xx, no token, no role, nothing there yet, busy) is not kept: the key is free again. So it is when
the server that did the work has ended.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.errors import RlhfError
from rlhf.lease import HEARTBEAT_SECONDS, Holder, is_gone, this_process
from rlhf.service.access import CALLER, identify
from rlhf.service.api.openapi import KEY_HEADER, KEY_PATTERN, MAX_KEY, PREFIX
from rlhf.service.database.models import Idempotency, now
from rlhf.service.guards import note
from rlhf.service.heads import is_upload
from rlhf.service.problems import (
    MEDIA_TYPE,
    Problem,
    document_response,
    problem_of,
    status_of,
)
from rlhf.service.state import State

log = logging.getLogger(__name__)

REPLAYED = "Idempotent-Replayed"
KEPT = timedelta(days=7)
"""How long an answer is given again."""
FREED = (
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.CONFLICT,
)
"""Answers that free the key, besides 5xx."""
HOLDER = "holder"
"""Name under which the body of a row without an answer has the server that works on it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that can be given again."""

    status: int
    body: Any

    def response(self, *, replayed: bool = False) -> JSONResponse:
        """Return the answer as it is sent."""
        return JSONResponse(
            self.body,
            status_code=self.status,
            media_type=MEDIA_TYPE if self.status >= HTTPStatus.BAD_REQUEST else "application/json",
            headers={REPLAYED: "true"} if replayed else None,
        )

    @property
    def is_kept(self) -> bool:
        """Tell whether it is given again, instead of trying again."""
        return self.status < HTTPStatus.INTERNAL_SERVER_ERROR and self.status not in FREED


@dataclass(frozen=True, slots=True)
class Claim:
    """A row that is a request's own; SQLite may give the number of a deleted one again."""

    id: int
    created: datetime

    @property
    def is_own(self) -> ColumnElement[bool]:
        """Return the condition that a row is the claim's and has no answer yet."""
        is_same = (Idempotency.id == self.id) & (Idempotency.created == self.created)
        return is_same & (Idempotency.status == 0)


def check_key(key: str) -> None:
    """Refuse a key that the database could not hold."""
    if len(key) > MAX_KEY or not re.fullmatch(KEY_PATTERN, key):
        raise Problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            f"{KEY_HEADER} has up to {MAX_KEY} printable ASCII characters without blanks: a random "
            "UUID is a good one",
        )


def claim(state: State, user: str, key: str, digest: str) -> Claim | Answer:
    """Take a key for a request: returns the claim, or the answer that the request got before.

    A Problem says that the key belongs to another request (422), or that the first request with it
    is still under way (409).
    """
    with state.transaction() as session:
        session.execute(delete(Idempotency).where(Idempotency.created < now() - KEPT))
    found = _insert(state, user, key, digest)
    if isinstance(found, Idempotency) and _is_abandoned(found):
        settle(state, Claim(found.id, found.created), None)
        found = _insert(state, user, key, digest)
    if isinstance(found, Claim):
        return found
    if found is not None and found.request != digest:
        raise Problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            f"{KEY_HEADER} was used for another request: give every write that is meant its own",
        )
    if found is None or found.status == 0:
        raise Problem(
            HTTPStatus.CONFLICT,
            f"the first request with this {KEY_HEADER} is still under way: ask again in a moment",
        )
    return Answer(found.status, found.body["content"])


def _insert(state: State, user: str, key: str, digest: str) -> Claim | Idempotency | None:
    """Return a new claim, or the row that has the key; None where that has just gone."""
    row = Idempotency(user=user, key=key, request=digest, body=_holder())
    try:
        with state.transaction() as session:
            session.add(row)
            session.flush()
            return Claim(row.id, row.created)
    except IntegrityError:
        pass
    with state.reading() as session:
        return session.scalar(
            select(Idempotency).where(Idempotency.user == user, Idempotency.key == key)
        )


def _holder() -> dict[str, Any]:
    return {HOLDER: asdict(this_process(""))}


def _is_abandoned(row: Idempotency) -> bool:
    """Tell whether the server that works on a row has ended without an answer."""
    return row.status == 0 and is_gone(Holder(**row.body[HOLDER]), now=time.time())


@contextmanager
def _beating(state: State, claimed: Claim) -> Iterator[None]:
    """Renew a claim while the block runs, so that servers elsewhere see that it is worked on."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(HEARTBEAT_SECONDS):
            try:
                with state.transaction() as session:
                    session.execute(
                        update(Idempotency).where(claimed.is_own).values(body=_holder())
                    )
            except SQLAlchemyError:
                log.warning("a claim could not be renewed; it is tried again", exc_info=True)

    threading.Thread(target=beat, name="idempotency", daemon=True).start()
    try:
        yield
    finally:
        end.set()


def settle(state: State, claimed: Claim, answer: Answer | None) -> None:
    """Keep the answer of a claim, or free its key; nothing where another request has it now."""
    with state.transaction() as session:
        if answer is not None and answer.is_kept:
            kept = {"status": answer.status, "body": {"content": answer.body}}
            session.execute(update(Idempotency).where(claimed.is_own).values(**kept))
        else:
            session.execute(delete(Idempotency).where(claimed.is_own))


def answer_once(
    state: State, user: str, key: str | None, digest: str, work: Callable[[], Answer]
) -> JSONResponse:
    """Do work under a key, or give its answer again; without a key just do it."""
    if key is None:
        return _answered(work).response()
    claimed = claim(state, user, key, digest)
    if isinstance(claimed, Answer):
        return claimed.response(replayed=True)
    answer = None
    try:
        with _beating(state, claimed):
            answer = _answered(work)
    finally:
        settle(state, claimed, answer)
    return answer.response()


def _answered(work: Callable[[], Answer]) -> Answer:
    try:
        return work()
    except RlhfError as error:
        return Answer(status_of(error), problem_of(error))


def digest_of(scope: Scope, body_digest: str) -> str:
    """Return what tells requests apart: method, address with its query, and body."""
    parts = (scope["method"], scope["path"], scope["query_string"].decode("latin-1"), body_digest)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Idempotent:
    """ASGI middleware that handles the keys of all writes of the API but uploads.

    An upload's body is not known before it lies on the disk: its handler uses `answer_once`.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_write = scope["type"] == "http" and scope["method"] == "POST"
        if not is_write or not scope["path"].startswith(PREFIX):
            await self.app(scope, receive, send)
            return
        key = Headers(scope=scope).get(KEY_HEADER)
        if key is None or is_upload(scope["method"], scope["path"]):
            await self.app(scope, receive, send)
            return
        found = await run_in_threadpool(identify, Request(scope))
        body, messages = await _read(receive)
        if found is None or body is None:
            await self.app(scope, _again(messages, receive), send)
            return
        scope[CALLER] = found
        digest = digest_of(scope, hashlib.sha256(body).hexdigest())
        try:
            check_key(key)
            claimed = await run_in_threadpool(claim, self.state, found.name, key, digest)
        except Problem as error:
            await document_response(problem_of(error))(scope, receive, send)
            return
        if isinstance(claimed, Answer):
            note(scope, replayed=True)
            await claimed.response(replayed=True)(scope, receive, send)
            return
        await self._work(scope, _again(messages, receive), send, claimed)

    async def _work(self, scope: Scope, receive: Receive, send: Send, claimed: Claim) -> None:
        """Let the application answer, and keep the answer before it is sent."""
        sent: list[Message] = []

        async def hold(message: Message) -> None:
            sent.append(message)

        answer = None
        try:
            with _beating(self.state, claimed):
                await self.app(scope, receive, hold)
            answer = _answer(sent)
        finally:
            await run_in_threadpool(settle, self.state, claimed, answer)
        for message in sent:
            await send(message)


async def _read(receive: Receive) -> tuple[bytes | None, list[Message]]:
    """Return a request's body, None where it broke off, and the messages that brought it."""
    messages: list[Message] = []
    body = b""
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            return None, messages
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body, messages


def _again(messages: list[Message], receive: Receive) -> Callable[[], Awaitable[Message]]:
    """Return a source that gives messages again before it goes on with the others."""
    waiting = list(messages)

    async def wrapped() -> Message:
        return waiting.pop(0) if waiting else await receive()

    return wrapped


def _answer(sent: list[Message]) -> Answer | None:
    """Return an answer that was sent, None where it cannot be given again."""
    if not sent or sent[0]["type"] != "http.response.start":
        return None
    body = b"".join(message.get("body", b"") for message in sent[1:])
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return Answer(sent[0]["status"], content)
