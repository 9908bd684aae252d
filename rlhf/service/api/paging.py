"""Lists in pages: `limit` and an opaque `cursor` in, `next_cursor` out."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

from rlhf.service.problems import Problem

T = TypeVar("T")
Place = TypeVar("Place", int, str)

DEFAULT, MAX = 50, 200
MAX_NUMBER = 2**31
"""Numbers in cursors are below this: PostgreSQL's keys are, and files are shorter."""

Limit = Annotated[int, Query(ge=1, le=MAX, description="Items on a page at most.")]
Cursor = Annotated[
    str | None,
    Query(max_length=600, description="`next_cursor` of the page before; the first page has none."),
]


class Page(BaseModel, Generic[T]):
    """A part of a list."""

    items: list[T] = Field(description="The items, in the list's order.")
    next_cursor: str | None = Field(
        description="Give it as `cursor` for the page after this one; null on the last page."
    )


def encode(place: int | str) -> str:
    """Return a cursor that stands for a place in a list."""
    # Spelled out, names in other scripts would be longer than a cursor may be.
    text = json.dumps([place], ensure_ascii=False)
    data = text.encode("utf-8", "surrogatepass")
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decode(cursor: str | None, default: Place) -> Place:
    """Return the place that a cursor stands for, of the default's type; a Problem for any other."""
    if cursor is None:
        return default
    try:
        data = base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
        (place,) = json.loads(data)
    except (UnicodeError, binascii.Error, ValueError, TypeError):
        place = None
    is_valid = type(place) is type(default)
    if not is_valid or (isinstance(place, int) and not 0 <= place < MAX_NUMBER):
        raise Problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "cursor is not one that this list gave: leave it out for the first page",
        )
    found: Place = place
    return found


def cut(items: Sequence[T], *, cursor: str | None, limit: int) -> tuple[Sequence[T], str | None]:
    """Return a page of a list that only grows at its end, and the cursor of the next one."""
    start = decode(cursor, 0)
    end = start + limit
    return items[start:end], encode(end) if end < len(items) else None


def cut_names(
    names: Sequence[str], *, cursor: str | None, limit: int
) -> tuple[Sequence[str], str | None]:
    """Return a page of sorted names, which may come and go, and the cursor of the next one."""
    after = decode(cursor, "")
    left = [name for name in names if name > after]
    return left[:limit], encode(left[limit - 1]) if len(left) > limit else None
