"""Templates and the few values that every page gets."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

from fastapi import Request
from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse, RedirectResponse, Response

from rlhf.progress import duration
from rlhf.report.view.common import badge, prose
from rlhf.service.access import CSRF_FIELD, Caller, caller
from rlhf.service.pages.assets import address

NAVIGATION = (
    ("/", "Runs", "viewer"),
    ("/batches", "Batches", "viewer"),
    ("/annotate", "Annotate", "annotator"),
    ("/weeks", "Weeks", "viewer"),
    ("/audit", "Audit", "operator"),
)
"""Where every page leads: address, title, and the role that it needs."""

MESSAGE = "rlhf_message"
"""Cookie that carries a sentence over a redirection."""
MESSAGE_SECONDS = 60
MESSAGE_BYTES = 2500
"""Longest sentence that a cookie can hold: browsers take 4096 bytes of base64."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a page says first; `level` is ok, look or stop."""

    text: str
    level: str = "ok"


@cache
def environment() -> Environment:
    """Return the templates, which escape every value that was not made here."""
    found = Environment(
        loader=ChoiceLoader(
            [
                PackageLoader("rlhf.service.pages"),
                PrefixLoader({"report": PackageLoader("rlhf.report")}),
            ]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"prose": prose, "moment": moment, "duration": duration, "badge": badge}
    found.globals |= {"asset": address, "navigation": NAVIGATION, "is_current": is_current}
    return found


def render(
    request: Request,
    template: str,
    *,
    found: Caller | None = None,
    status_code: int = 200,
    message: Message | None = None,
    **values: Any,
) -> HTMLResponse:
    """Return a page for whoever asks; templates also see `caller`, `csrf_field`, `path` and `here`.

    `found` is for pages that come before signing in.
    """
    found = found or caller(request)
    carried = _read_message(request)
    response = fragment(
        template,
        status_code=status_code,
        caller=found,
        csrf_field=csrf_field(found),
        path=request.url.path,
        here=address_of(request),
        message=message or carried,
        **values,
    )
    if carried is not None:
        response.delete_cookie(MESSAGE, path="/")
    return response


def fragment(template: str, *, status_code: int = 200, **values: Any) -> HTMLResponse:
    """Return a template as an answer: a page, or a part that a script puts in an old one's place.

    Texts of models may hold half characters, which no encoding takes.
    """
    body = environment().get_template(template).render(**values).encode("utf-8", "replace")
    # Runs change, and a shared machine's cache is no place for pairs and comments.
    headers = {"Cache-Control": "no-store"}
    return HTMLResponse(body, status_code=status_code, headers=headers)


def redirect(target: str, message: Message | None = None) -> Response:
    """Return the answer to a form that was carried out: the page to see next, and what it says."""
    response = RedirectResponse(target, status_code=303)
    if message is not None:
        text = message.text.encode()[:MESSAGE_BYTES].decode(errors="ignore")
        said = asdict(Message(text, message.level))
        value = base64.urlsafe_b64encode(json.dumps(said, ensure_ascii=False).encode()).decode()
        response.set_cookie(
            MESSAGE, value, max_age=MESSAGE_SECONDS, httponly=True, samesite="strict", path="/"
        )
    return response


def address_of(request: Request) -> str:
    """Return where a request went in this service, with its query."""
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def csrf_field(found: Caller) -> Markup:
    """Return the hidden field that every form carries."""
    return Markup('<input type="hidden" name="{}" value="{}">').format(CSRF_FIELD, found.csrf)


def is_current(target: str, path: str) -> bool:
    """Tell whether a page belongs to an entry of the navigation; runs belong to the overview."""
    if target == "/":
        return path == "/" or path.startswith("/runs")
    return path == target or path.startswith(f"{target}/")


def moment(value: datetime | float | str | None) -> Markup:
    """Return a time as the browser may show it in the reader's zone; floats are seconds."""
    if value is None or value == "":
        return Markup('<span class="none">-</span>')
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    elif not isinstance(value, datetime):
        value = datetime.fromtimestamp(value, UTC)
    value = value.astimezone(UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(
        value.isoformat(timespec="seconds"), value.strftime("%Y-%m-%d %H:%M")
    )


def _read_message(request: Request) -> Message | None:
    """Return what the page before wanted to say; None for a cookie that it did not write."""
    value = request.cookies.get(MESSAGE)
    if not value:
        return None
    try:
        read = json.loads(base64.urlsafe_b64decode(value))
        return Message(str(read["text"]), str(read["level"]))
    except (ValueError, KeyError, TypeError):
        return None
