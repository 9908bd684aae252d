"""Errors for people in browsers: the same sentence as the API's, on a page that leads on."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from rlhf.service.access import CALLER, SAFE_METHODS, Caller
from rlhf.service.pages.render import address_of, csrf_field, fragment

PROGRAMS = ("/api/", "/healthz", "/readyz", "/metrics", "/static/")
"""Paths whose errors are problem documents, whatever a browser says that it takes."""
LIVE = "X-Live"
"""Header of a page's own requests for its live parts; a redirection would only mislead them."""


def wants_page(request: Request) -> bool:
    """Tell whether a person in a browser reads the answer."""
    accepted = request.headers.get("Accept", "")
    return "text/html" in accepted and not request.url.path.startswith(PROGRAMS)


def error_page(request: Request, status: int, detail: str) -> Response:
    """Return an error as a page; whoever has to sign in is led to where that is done."""
    is_reader = request.method in SAFE_METHODS and LIVE not in request.headers
    if status == HTTPStatus.UNAUTHORIZED and is_reader:
        target = quote(address_of(request), safe="")
        return RedirectResponse(f"/login?next={target}", status_code=303)
    found: Caller | None = request.scope.get(CALLER)
    values = {"caller": found, "csrf_field": csrf_field(found)} if found is not None else {}
    return fragment(
        "error.html",
        status_code=status,
        path=request.url.path,
        here=address_of(request),
        status=status,
        heading=HTTPStatus(status).phrase,
        detail=detail,
        must_sign_in=status == HTTPStatus.UNAUTHORIZED,
        **values,
    )
