"""Sign in with a token, or without tokens with a name; sign out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from sqlalchemy import delete
from starlette.responses import RedirectResponse, Response

from rlhf.service.access import (
    COOKIE,
    LOCAL,
    Caller,
    StateOf,
    digest,
    find_user,
    identify,
    open_session,
    valid_token,
)
from rlhf.service.database.models import BrowserSession
from rlhf.service.pages.render import render
from rlhf.service.state import State

router = APIRouter(include_in_schema=False)

NOBODY = Caller("", "viewer")
"""Whom the page is made for before anybody has signed in."""
MAX_NAME = 100


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
    with state.transaction() as session:
        if service.needs_tokens:
            found = valid_token(session, token.strip())
            if found is None:
                refusal = "this token is unknown, revoked or too old: ask an operator for a new one"
                return _form(request, state, target=next, refusal=refusal)
            user = found.user
        else:
            found = None
            chosen = " ".join(name.split())
            if not chosen or len(chosen) > MAX_NAME or not chosen.isprintable():
                refusal = f"give a name of up to {MAX_NAME} letters"
                return _form(request, state, target=next, refusal=refusal)
            user = find_user(session, chosen)
        secret, _ = open_session(session, user, hours=service.session_hours, token=found)
        request.scope["rlhf.caller"] = Caller(user.name, user.role, user.id)
    response = RedirectResponse(local_path(next), status_code=303)
    response.set_cookie(
        COOKIE,
        secret,
        max_age=int(service.session_hours * 3600),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout")
def sign_out(request: Request, state: StateOf) -> Response:
    """End the session."""
    secret = request.cookies.get(COOKIE, "")
    with state.transaction() as session:
        session.execute(delete(BrowserSession).where(BrowserSession.digest == digest(secret)))
    response = RedirectResponse("/login", status_code=303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
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
        is_named=found.name not in ("", LOCAL),
        target=local_path(target),
        refusal=refusal,
    )
