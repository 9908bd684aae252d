"""The journal of a week: every verdict in a file, on the disk before the database says so.

A line is one JSON object, written by one call under a lock. What is read back tolerates lines that
a crash cut off, and takes the last of several lines about one assignment: an earlier one was never
acknowledged, or the later one would have been refused.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from rlhf.artifacts import fsync_path
from rlhf.errors import is_disk_full
from rlhf.faults import boundary
from rlhf.service.problems import DISK_FULL, Problem

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
LOCK = ".lock"
LEFT_OUT = "left_out"
"""Kind of an entry after one that never counted, and that is not to come back later."""


def append(folder: Path, entry: dict[str, Any]) -> None:
    """Add one entry to a week's journal and flush it to disk; a Problem where the disk is full."""
    path = folder / JOURNAL
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            if os.write(handle, line) != len(line):
                raise Problem(HTTPStatus.INSUFFICIENT_STORAGE, DISK_FULL)
            os.fsync(handle)
        except (OSError, Problem) as error:
            os.ftruncate(handle, size)
            if is_disk_full(error):
                raise Problem(HTTPStatus.INSUFFICIENT_STORAGE, DISK_FULL) from error
            raise
    finally:
        os.close(handle)
    if is_new:
        fsync_path(folder)
    boundary("journalled", path)


def entries(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a week's journal that count, the last one of each assignment."""
    path = folder / JOURNAL
    if not path.exists():
        return []
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found[entry["key"]] = entry
        except (ValueError, KeyError, TypeError):
            log.warning("%s line %d is damaged and was left out", path, number)
    return [entry for entry in found.values() if entry.get("kind") != LEFT_OUT]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out of a folder meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
