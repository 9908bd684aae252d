"""The audit log: who asked for which write, and how it was answered."""

from __future__ import annotations

import json
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from sqlalchemy import select
from starlette.responses import HTMLResponse

from rlhf.service.access import Operator, StateOf
from rlhf.service.database.models import Audit
from rlhf.service.pages.render import render

router = APIRouter(include_in_schema=False)

PAGE = 100
BAD = 400
"""Status from which on a write was refused."""


@router.get("/audit")
def audit(
    request: Request,
    state: StateOf,
    caller: Operator,
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    user: Annotated[str, Query(max_length=200)] = "",
) -> HTMLResponse:
    """Show the newest writes, `before` a row's number, of one user or of all."""
    # No name has a zero byte, and PostgreSQL refuses to look for one.
    user = user.replace("\0", "")
    wanted = select(Audit).order_by(Audit.id.desc()).limit(PAGE + 1)
    if before is not None:
        wanted = wanted.where(Audit.id < before)
    if user:
        wanted = wanted.where(Audit.user == user)
    with state.reading() as session:
        found = list(session.scalars(wanted))
    rows = [
        {
            "row": row,
            "is_bad": row.status >= BAD,
            "detail": json.dumps(row.detail, ensure_ascii=False) if row.detail else "",
        }
        for row in found[:PAGE]
    ]
    earlier = found[PAGE - 1].id if len(found) > PAGE else None
    return render(
        request,
        "audit.html",
        rows=rows,
        user=user,
        earlier=f"/audit?{urlencode({'before': earlier, 'user': user})}" if earlier else "",
    )
