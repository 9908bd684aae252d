"""Who asks, what they may do, and whether a browser was tricked into asking.

A request names somebody by `Authorization: Bearer TOKEN` or by the cookie of a browser session.
Without `service.needs_tokens` whoever reaches the service is its operator, under a name they choose
or as `local`. A write with a cookie needs the session's secret, in a form field or a header; a
write from another site's page is refused in any case.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy import ColumnElement, delete, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from rlhf.errors import ConfigError
from rlhf.service.database.models import ROLES, BrowserSession, Token, User, now
from rlhf.service.heads import FORM_TYPE, is_upload, media_type
from rlhf.service.problems import Problem
from rlhf.service.state import State, state_of

COOKIE = "rlhf_session"
CSRF_HEADER = "X-CSRF-Token"
CSRF_FIELD = "csrf"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOCAL = "local"
"""Name of whoever reaches a service without tokens and gives no other."""
CALLER = "rlhf.caller"
"""Key of a request's scope under which its caller is, once they are known."""
MAX_NAME = 100


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request; `csrf` is the session's secret, "" without a session."""

    name: str
    role: str
    csrf: str = ""

    def may(self, role: str) -> bool:
        """Tell whether the caller has a role, or one above it."""
        return ROLES.index(self.role) >= ROLES.index(role)


def digest(secret: str) -> str:
    """Return how a token or a cookie is stored; its 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def clean_name(text: str) -> str:
    """Return a name with single blanks; raises ConfigError for what nobody can be called."""
    name = " ".join(text.split())
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ConfigError(f"{name[:MAX_NAME]!r} is no name: give up to {MAX_NAME} letters")
    return name


def find_user(session: Session, name: str, *, role: str) -> User:
    """Return the user of a name, added with a role where there is none."""
    wanted = select(User).where(User.name == name)
    user = session.scalar(wanted)
    if user is None:
        try:
            with session.begin_nested():
                user = User(name=name, role=role)
                session.add(user)
        except IntegrityError:  # another request has just added them
            user = session.scalars(wanted).one()
    return user


def new_token(session: Session, *, name: str, role: str, days: int | None) -> str:
    """Add a token for a user, who is added where unknown and gets the role; returns the token."""
    if role not in ROLES:
        raise ConfigError(f"role={role} is unknown: choose one of {', '.join(ROLES)}")
    user = find_user(session, name, role=role)
    user.role = role
    secret = f"rlhf_{secrets.token_urlsafe(32)}"
    expires = now() + timedelta(days=days) if days is not None else None
    session.add(Token(user_id=user.id, digest=digest(secret), expires=expires))
    return secret


def revoke_tokens(session: Session, *, name: str) -> int:
    """End a user's tokens, and with them the sessions they opened; returns how many.

    Raises ConfigError for a user that nobody knows.
    """
    user = session.scalar(select(User).where(User.name == name))
    if user is None:
        known = ", ".join(session.scalars(select(User.name).order_by(User.name))) or "nobody"
        raise ConfigError(f"{name} is no user of the service: known are {known}")
    valid = [token for token in user.tokens if token.revoked is None]
    for token in valid:
        token.revoked = now()
    return len(valid)


def open_session(
    session: Session, user: User, *, hours: float, token: Token | None = None
) -> tuple[str, BrowserSession]:
    """Sign a browser in; returns the value of its cookie and the row. Sessions that are over go."""
    session.execute(delete(BrowserSession).where(BrowserSession.expires <= now()))
    secret = secrets.token_urlsafe(32)
    row = BrowserSession(
        digest=digest(secret),
        user_id=user.id,
        token_id=token.id if token is not None else None,
        csrf=secrets.token_urlsafe(32),
        expires=now() + timedelta(hours=hours),
    )
    session.add(row)
    return secret, row


def token_counts() -> ColumnElement[bool]:
    """Return the condition that a token counts: it is neither revoked nor too old."""
    return Token.revoked.is_(None) & or_(Token.expires.is_(None), Token.expires > now())


def valid_token(session: Session, secret: str) -> Token | None:
    """Return the row of a token that counts."""
    return session.scalar(select(Token).where(Token.digest == digest(secret), token_counts()))


def _session_of(session: Session, request: Request, *, needs_tokens: bool) -> Caller | None:
    secret = request.cookies.get(COOKIE)
    if not secret:
        return None
    wanted = (
        select(BrowserSession)
        .outerjoin(BrowserSession.token)
        .where(BrowserSession.digest == digest(secret), BrowserSession.expires > now())
        .where(token_counts())
    )
    if needs_tokens:
        # A session that was opened without a token ends where tokens become necessary.
        wanted = wanted.where(BrowserSession.token_id.is_not(None))
    found = session.scalar(wanted)
    if found is None:
        return None
    role = found.user.role if needs_tokens else "operator"
    return Caller(found.user.name, role, found.csrf)


def _bearer(request: Request) -> str | None:
    """Return the token that a request shows, None for none."""
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else None


def identify(request: Request) -> Caller | None:
    """Return who asks, or None."""
    state = state_of(request)
    needs_tokens = state.config.service.needs_tokens
    secret = _bearer(request)
    with state.reading() as session:
        if secret is not None:
            token = valid_token(session, secret)
            if token is not None:
                return Caller(token.user.name, token.user.role)
            if needs_tokens:
                return None
        found = _session_of(session, request, needs_tokens=needs_tokens)
    if found is None and not needs_tokens:
        return Caller(LOCAL, "operator")
    return found


def caller(request: Request) -> Caller:
    """Return who asks; a Problem where nobody does (a FastAPI dependency)."""
    found: Caller | None = request.scope.get(CALLER) or identify(request)
    if found is None:
        raise Problem(
            HTTPStatus.UNAUTHORIZED,
            "this service wants a token: send `Authorization: Bearer TOKEN`, or sign in at /login; "
            "`rlhf token NAME role=viewer` makes one",
        )
    request.scope[CALLER] = found
    return found


def requires(role: str) -> Callable[..., Caller]:
    """Return a dependency that refuses callers without a role."""

    def check(found: Annotated[Caller, Depends(caller)]) -> Caller:
        if not found.may(role):
            raise Problem(
                HTTPStatus.FORBIDDEN,
                f"{found.name} is {found.role}, and this needs {role}: ask an operator for a token "
                "with that role",
            )
        return found

    return check


async def check_origin(request: Request) -> None:
    """Refuse a write that another site's page makes, or one with a cookie and without its secret.

    A dependency of the whole application.
    """
    if request.method in SAFE_METHODS:
        return
    origin = request.headers.get("Origin")
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    is_foreign = origin is not None and origin.partition("://")[2] != request.headers.get("Host")
    if is_foreign or site not in ("same-origin", "none"):
        raise Problem(HTTPStatus.FORBIDDEN, "another site's page asked for this: open our own")
    # Browsers add cookies, and names and passwords for a proxy, by themselves, but never a token.
    if _bearer(request) is not None or COOKIE not in request.cookies:
        return
    given = request.headers.get(CSRF_HEADER)
    is_file = is_upload(request.method, request.scope["path"])
    if given is None and media_type(request.headers) == FORM_TYPE and not is_file:
        field = (await request.form()).get(CSRF_FIELD)
        given = field if isinstance(field, str) else None
    found = await run_in_threadpool(identify, request)
    request.scope[CALLER] = found
    if found is None or not found.csrf:
        return
    if not secrets.compare_digest((given or "").encode(), found.csrf.encode()):
        raise Problem(
            HTTPStatus.FORBIDDEN,
            "the form is out of date: load the page again, what was typed is kept",
        )


Viewer = Annotated[Caller, Depends(requires("viewer"))]
Annotator = Annotated[Caller, Depends(requires("annotator"))]
Operator = Annotated[Caller, Depends(requires("operator"))]
StateOf = Annotated[State, Depends(state_of)]
