"""Templates and the few values that every page gets."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from rlhf.report.view.common import prose
from rlhf.service.access import CSRF_FIELD, Caller, caller


@cache
def environment() -> Environment:
    """Return the templates, which escape every value that was not made here."""
    found = Environment(
        loader=PackageLoader("rlhf.service.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["prose"] = prose
    return found


def render(
    request: Request,
    template: str,
    *,
    found: Caller | None = None,
    status_code: int = 200,
    **values: Any,
) -> HTMLResponse:
    """Return a page for whoever asks; templates also see `caller`, `csrf_field` and `path`.

    `found` is for pages that come before signing in.
    """
    found = found or caller(request)
    return HTMLResponse(
        environment()
        .get_template(template)
        .render(caller=found, csrf_field=csrf_field(found), path=request.url.path, **values),
        status_code=status_code,
        # Runs change, and a shared machine's cache is no place for pairs and comments.
        headers={"Cache-Control": "no-store"},
    )


def csrf_field(found: Caller) -> Markup:
    """Return the hidden field that every form carries."""
    return Markup('<input type="hidden" name="{}" value="{}">').format(CSRF_FIELD, found.csrf)
