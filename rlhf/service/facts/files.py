"""Reading files that another process may be writing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import ArtifactError, RlhfError
from rlhf.service.problems import Problem

T = TypeVar("T")

BLOCK = 2**16
"""Bytes that are read at a time, from the end."""
MAX_TAIL = 2**20
"""Bytes of a log that are read at most."""
MAX_KNOWN = 20
"""Names that a message lists."""
MAX_SHOWN = 80
"""Characters of a name from outside that a message repeats."""

UNREADABLE = (RlhfError, OSError, KeyError, TypeError, ValueError)
"""What comes of files that are damaged, or cannot be read or written."""

Stamp = tuple[int, int, int]


def stamp(path: Path | str) -> Stamp | None:
    """Return what changes with a file's content: time, size and inode; None without a file."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def steadily(read: Callable[[], T]) -> T:
    """Read what a running node may be replacing; the second try finds what took its place."""
    try:
        return read()
    except (FileNotFoundError, ArtifactError, json.JSONDecodeError):
        return read()


def not_found(what: str, name: str, known: Iterable[str]) -> Problem:
    """Return the Problem of a name that does not exist; it lists those that do."""
    names = list(known)
    more = f" and {len(names) - MAX_KNOWN} more" if len(names) > MAX_KNOWN else ""
    shown = ", ".join(names[:MAX_KNOWN]) + more if names else "none"
    short = name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."
    return Problem(HTTPStatus.NOT_FOUND, f"{what} {short} does not exist: there is {shown}")


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file that are complete; none where there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            if line.strip():
                yield line


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete rows of a JSONL file; a damaged row is passed over."""
    for line in whole_lines(path):
        row = parsed(line)
        if row is not None:
            yield row


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return a row of a JSONL file with null for what JSON has no number for; None if damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return finite(row) if isinstance(row, dict) else None


def finite(value: Any) -> Any:
    """Return a JSON value with None in the place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def tail(path: Path, *, lines: int) -> list[str]:
    """Return the last lines of a text file that are not blank, oldest first."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return []
    blocks: list[bytes] = []
    # A line that lies in two blocks is counted twice, so every block has to bring one more.
    num_lines = 0
    with file:
        end = start = file.seek(0, 2)
        while start > 0 and end - start < MAX_TAIL and num_lines <= lines + len(blocks):
            block = min(BLOCK, start)
            start -= block
            file.seek(start)
            blocks.insert(0, file.read(block))
            num_lines += sum(1 for line in blocks[0].splitlines() if line.strip())
    text = b"".join(blocks).decode(errors="replace")
    found = [line.rstrip() for line in text.splitlines() if line.strip()]
    if start > 0 and len(found) > 1:
        # The first line is most likely a part of one.
        found = found[1:]
    return found[-lines:]


def thinned(items: list[T], number: int) -> list[T]:
    """Return at most a number of items, evenly chosen, the first and the last among them."""
    if len(items) <= number:
        return items
    if number == 1:
        return items[-1:]
    return [items[i * (len(items) - 1) // (number - 1)] for i in range(number)]
