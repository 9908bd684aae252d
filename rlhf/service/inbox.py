"""The inbox: a local folder, or any file system that fsspec knows, whose files are ingested.

FILE or STREAM/FILE waits; accepted/ and refused/ hold what was done with it, each file with its
report beside it. Names that start with a dot or end in .tmp or .part are still being written.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rlhf.artifacts import digest_json, write_parts
from rlhf.errors import ConfigError
from rlhf.service.state import State

ACCEPTED, REFUSED = "accepted", "refused"
REPORT = ".report.json"
"""What a file's report adds to its name."""
LOCK = ".watch.lock"
UNFINISHED = (".tmp", ".part")
MARKS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""Under which names file systems tell that a file has changed, the most certain first."""
MAX_NAME = 400
"""Longest name of a file, its stream's folder included; the table has room for more."""
PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file of the inbox: its path in there; another content has another `mark`."""

    name: str
    size: int
    mark: str

    @property
    def stream(self) -> str | None:
        """Stream that its folder names; None for a file in the inbox itself."""
        folder, _, _ = self.name.rpartition("/")
        return folder or None


class Inbox:
    """Looks into an inbox, takes files out of it, and files them under what became of them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, root = fsspec.core.url_to_fs(url)
        self.root = root.rstrip("/")

    @cached_property
    def key(self) -> str:
        """Name of the inbox in the database; it holds no password."""
        return str(self.fs.unstrip_protocol(self.root))[:500]

    @cached_property
    def local(self) -> Path | None:
        """The folder, where it is one of this machine."""
        return Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def create(self) -> None:
        """Make the folders that are missing."""
        for folder in (ACCEPTED, REFUSED):
            self.fs.makedirs(f"{self.root}/{folder}", exist_ok=True)

    def waiting(self) -> list[Waiting]:
        """Return the files that wait, by name."""
        found = []
        for entry in self._entries(self.root):
            name = PurePosixPath(entry["name"].rstrip("/")).name
            if entry["type"] == "file":
                found += self._known(name, entry)
            elif entry["type"] == "directory" and _is_stream(name):
                for inner in self._entries(f"{self.root}/{name}"):
                    if inner["type"] == "file":
                        found += self._known(f"{name}/{PurePosixPath(inner['name']).name}", inner)
        return sorted(found, key=lambda item: item.name)

    def find(self, name: str) -> Waiting | None:
        """Return a file as it is now; None where it is gone."""
        # From the listing, too: what `info` says is another mark on some file systems.
        folder = f"{self.root}/{name}".rpartition("/")[0]
        last = PurePosixPath(name).name
        same = [row for row in self._entries(folder) if PurePosixPath(row["name"]).name == last]
        found = self._known(name, same[0]) if same else []
        return found[0] if found else None

    def fetch(self, name: str, folder: Path) -> Path:
        """Return a local path of a file's bytes; what is not local is copied into `folder`."""
        if self.local is not None:
            return self.local / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / PurePosixPath(name).name
        self.fs.get_file(f"{self.root}/{name}", str(path))
        return path

    def file_under(self, outcome: str, item: Waiting, report: Mapping[str, Any]) -> str:
        """Write a file's report and move the file beside it; returns its new path in the inbox.

        Nothing is overwritten: a name that is taken gets a number. A report without its file, left
        by a kill, is known by the file's mark and written again.
        """
        target = self._free(outcome, item)
        text = json.dumps({**report, "mark": item.mark}, indent=2, ensure_ascii=False) + "\n"
        self.fs.makedirs(f"{self.root}/{target.rpartition('/')[0]}", exist_ok=True)
        self._write(f"{target}{REPORT}", text)
        self.fs.mv(f"{self.root}/{item.name}", f"{self.root}/{target}")
        return target

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Keep other watchers off a folder of this machine; False where one is at work.

        It ends with the process. Elsewhere the database's claims alone keep watchers apart.
        """
        if self.local is None:
            yield True
            return
        with (self.local / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        # Remote file systems remember listings.
        self.fs.invalidate_cache(folder)
        try:
            found: list[dict[str, Any]] = self.fs.ls(folder, detail=True)
        except FileNotFoundError:
            return []
        return found

    def _known(self, name: str, entry: Mapping[str, Any]) -> list[Waiting]:
        last = PurePosixPath(name).name
        if last.startswith(".") or last.endswith(UNFINISHED) or entry["type"] != "file":
            return []
        if len(name) > MAX_NAME or entry.get("islink"):
            return []
        return [Waiting(name, int(entry["size"] or 0), _mark(entry))]

    def _free(self, outcome: str, item: Waiting) -> str:
        """Return where a file can go without taking anything's place."""
        plain = PurePosixPath(outcome) / item.name
        number = 1
        while True:
            suffix = "" if number == 1 else f"-{number}"
            target = str(plain.with_name(f"{plain.stem}{suffix}{plain.suffix}"))
            is_free = not self.fs.exists(f"{self.root}/{target}")
            if is_free and self._reported(target) in (None, item.mark):
                return target
            number += 1

    def _reported(self, target: str) -> str | None:
        """Return the mark in the report of a name; "" for a report without one, None for none."""
        try:
            row = json.loads(self.fs.cat_file(f"{self.root}/{target}{REPORT}"))
        except FileNotFoundError:
            return None
        except ValueError:
            return ""
        return str(row.get("mark", "")) if isinstance(row, dict) else ""

    def _write(self, name: str, text: str) -> None:
        if self.local is not None:
            write_parts(self.local / name, [text.encode()])
        else:
            self.fs.pipe_file(f"{self.root}/{name}", text.encode())


def open_inbox(state: State) -> Inbox:
    """Open the inbox of the configuration; raises ConfigError for a URL that fsspec cannot open."""
    try:
        found = Inbox(state.inbox)
        found.create()
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(
            f"service.inbox={state.inbox} cannot be opened ({error}): give a folder, or a URL of a "
            "file system that fsspec knows and whose package is installed"
        ) from error
    return found


def drop(state: State, path: Path, name: str) -> None:
    """Put a copy of a file into the inbox under a name; it appears there at once and whole."""
    inbox = open_inbox(state)
    if inbox.local is not None:
        write_parts(inbox.local / name, _pieces(path))
        return
    folder, _, last = f"{inbox.root}/{name}".rpartition("/")
    inbox.fs.makedirs(folder, exist_ok=True)
    hidden = f"{folder}/.{last}.tmp"
    inbox.fs.put_file(str(path), hidden)
    inbox.fs.mv(hidden, f"{folder}/{last}")


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _is_stream(name: str) -> bool:
    return not name.startswith(".") and name not in (ACCEPTED, REFUSED)


def _mark(entry: Mapping[str, Any]) -> str:
    known = {name: str(entry[name]) for name in MARKS if entry.get(name) is not None}
    first = next(iter(known.values()), "")
    # A file that replaces another within a tick of the clock has another inode.
    return digest_json([int(entry["size"] or 0), first, entry.get("ino")])
