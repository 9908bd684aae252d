"""Sign in with a token, or without tokens with a name; sign out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from sqlalchemy import delete
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from rlhf.config import Service
from rlhf.errors import ConfigError
from rlhf.service.access import (
    CALLER,
    COOKIE,
    LOCAL,
    MAX_NAME,
    Caller,
    StateOf,
    clean_name,
    digest,
    find_user,
    identify,
    open_session,
    valid_token,
)
from rlhf.service.database.models import BrowserSession, Token, User
from rlhf.service.pages.render import render
from rlhf.service.state import State

router = APIRouter(include_in_schema=False)

NOBODY = Caller("", "viewer")
"""Whom the page is made for before anybody has signed in."""
OPEN_HOURS = 365 * 24.0
"""How long a session lasts where only a name is asked for: whoever lost it would go on as LOCAL."""


@router.get("/login")
def show(request: Request, state: StateOf, next: str = "/") -> Response:
    """Show the form."""
    return _form(request, state, target=next, refusal="")


@router.post("/login")
def sign_in(
    request: Request,
    state: StateOf,
    token: Annotated[str, Form()] = "",
    name: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "/",
) -> Response:
    """Open a session and go where the browser came from."""
    service = state.config.service
    hours = service.session_hours if service.needs_tokens else OPEN_HOURS
    try:
        with state.transaction() as session:
            user, shown = _signed_in(session, service, token=token, name=name)
            secret, _ = open_session(session, user, hours=hours, token=shown)
            request.scope[CALLER] = Caller(user.name, user.role)
    except ConfigError as error:
        return _form(request, state, target=next, refusal=str(error))
    response = RedirectResponse(local_path(next), status_code=303)
    response.set_cookie(
        COOKIE,
        secret,
        max_age=int(hours * 3600),
        httponly=True,
        # A link in a chat leads to the page, not to the form; writes need more than the cookie.
        samesite="lax",
        secure=_is_secure(request),
    )
    return response


def _signed_in(
    session: Session, service: Service, *, token: str, name: str
) -> tuple[User, Token | None]:
    """Return who signs in, and with which token; raises ConfigError for nobody."""
    if not service.needs_tokens:
        return find_user(session, clean_name(name), role="operator"), None
    found = valid_token(session, token.strip())
    if found is None:
        raise ConfigError(
            "this token is unknown, revoked or too old: ask an operator for a new one"
        )
    return found.user, found


def _is_secure(request: Request) -> bool:
    """Tell whether the browser speaks https; a proxy before the service does not pass that on."""
    return request.headers.get("Origin", "").startswith("https://")


@router.post("/logout")
def sign_out(request: Request, state: StateOf) -> Response:
    """End the session."""
    secret = request.cookies.get(COOKIE, "")
    with state.transaction() as session:
        session.execute(delete(BrowserSession).where(BrowserSession.digest == digest(secret)))
    response = RedirectResponse("/login", status_code=303)
    response.delete_cookie(COOKIE, httponly=True, samesite="lax", secure=_is_secure(request))
    return response


def local_path(target: str) -> str:
    """Return a path of this service; whatever would lead elsewhere becomes the overview."""
    is_path = target.startswith("/") and not target.startswith(("//", "/\\"))
    return target if is_path and target.isprintable() else "/"


def _form(request: Request, state: State, *, target: str, refusal: str) -> Response:
    found = identify(request) or NOBODY
    return render(
        request,
        "login.html",
        found=found,
        status_code=403 if refusal else 200,
        needs_tokens=state.config.service.needs_tokens,
        max_name=MAX_NAME,
        is_named=found.name not in ("", LOCAL),
        target=local_path(target),
        refusal=refusal,
    )
