"""The inbox: a local folder, or any file system that fsspec knows, whose files are ingested.

FILE or STREAM/FILE waits; accepted/ and refused/ hold what was done with it, each file with its
report beside it. Names that start with a dot or end in .tmp or .part are still being written.
Every name is taken as it is: some file systems read [ and * in it as a pattern.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from rlhf.artifacts import digest_json, write_parts
from rlhf.errors import ConfigError
from rlhf.service.state import State

log = logging.getLogger(__name__)

ACCEPTED, REFUSED = "accepted", "refused"
REPORT = ".report.json"
"""What a file's report adds to its name."""
LOCK = ".watch.lock"
UNFINISHED = (".tmp", ".part")
MARKS = (
    *("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "modified", "modify"),
    *("modificationTime", "created"),
)
"""Under which names file systems tell that a file has changed, the most certain first."""
MAX_NAME = 400
"""Longest name of a file, its stream's folder included; the table has room for more."""
MAX_FILE_BYTES = 200
"""Longest name of a file in its folder: a report's name, and one for writing it, are longer."""
PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file of the inbox: its path in there; another content has another `mark`."""

    name: str
    size: int
    mark: str


class Inbox:
    """Looks into an inbox, takes files out of it, and files them under what became of them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, root = fsspec.core.url_to_fs(url)
        self.root = root.rstrip("/")
        self._has_folders = False
        self._left_out: set[str] = set()

    def reopen(self) -> None:
        """Connect anew: some file systems never come back by themselves."""
        self.fs, _ = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)

    @cached_property
    def key(self) -> str:
        """Name of the inbox in the database: protocol and path, neither user nor password."""
        return str(self.fs.unstrip_protocol(self.root))[:500]

    @cached_property
    def local(self) -> Path | None:
        """The folder, where it is one of this machine."""
        return Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def create(self) -> None:
        """Make the folders that are missing."""
        for folder in (ACCEPTED, REFUSED):
            self.fs.makedirs(f"{self.root}/{folder}", exist_ok=True)
        # Stores of objects have none: there an empty inbox does not exist.
        self._has_folders = bool(self.fs.isdir(self.root))

    def waiting(self) -> list[Waiting]:
        """Return the files that wait, by name; raises FileNotFoundError where the inbox is gone."""
        found = []
        for entry in self._entries(self.root, needed=self._has_folders):
            name = PurePosixPath(entry["name"].rstrip("/")).name
            if entry["type"] == "file":
                found += self._known(name, entry)
            elif entry["type"] == "directory" and _is_stream(name):
                found += self._stream_files(name)
        return sorted(found, key=lambda item: item.name)

    def _stream_files(self, stream: str) -> list[Waiting]:
        try:
            entries = self._entries(f"{self.root}/{stream}")
        except PermissionError as error:
            self._leave_out(stream, f"its folder cannot be read ({error.strerror})")
            return []
        files = [entry for entry in entries if entry["type"] == "file"]
        names = [f"{stream}/{PurePosixPath(entry['name']).name}" for entry in files]
        return [
            item
            for name, entry in zip(names, files, strict=True)
            for item in self._known(name, entry)
        ]

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

    def file_under(
        self, outcome: str, item: Waiting, report: Mapping[str, Any], target: str = ""
    ) -> str:
        """Write a file's report and move the file beside it; returns its new path in the inbox.

        Nothing is overwritten: a name that is taken gets a number. A `target` that `filed` has
        found has the report already.
        """
        if not target:
            target = self._free(outcome, item)
            text = json.dumps({**report, "mark": item.mark}, indent=2, ensure_ascii=False) + "\n"
            self.fs.makedirs(f"{self.root}/{target.rpartition('/')[0]}", exist_ok=True)
            self._write(f"{target}{REPORT}", text)
        self.move(item.name, target)
        return target

    def filed(self, outcome: str, name: str, mark: str) -> tuple[str, dict[str, Any]] | None:
        """Return where the report of a file with a mark lies, and the report; None for none."""
        for target in _targets(outcome, name):
            report = self._report(target)
            if report is not None and report.get("mark") == mark:
                return target, report
            if report is None and not self.fs.exists(f"{self.root}/{target}"):
                return None
        return None

    def move(self, old: str, new: str) -> None:
        """Give a file of the inbox another path."""
        old, new = f"{self.root}/{old}", f"{self.root}/{new}"
        if type(self.fs).mv is not AbstractFileSystem.mv:
            self.fs.mv(old, new)
            return
        # Without a rename of its own it would take the names for patterns and delete what fits.
        self.fs.cp_file(old, new)
        self.fs.rm_file(old)

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

    def _entries(self, folder: str, *, needed: bool = False) -> list[dict[str, Any]]:
        # Remote file systems remember listings.
        self.fs.invalidate_cache(folder)
        try:
            found: list[dict[str, Any]] = self.fs.ls(folder, detail=True)
        except FileNotFoundError:
            if needed:
                raise
            return []
        return found

    def _known(self, name: str, entry: Mapping[str, Any]) -> list[Waiting]:
        last = PurePosixPath(name).name
        if last.startswith(".") or last.endswith(UNFINISHED) or entry["type"] != "file":
            return []
        if entry.get("islink"):
            return []
        try:
            size = len(last.encode())
        except UnicodeEncodeError:
            self._leave_out(name, "its name is not UTF-8")
            return []
        if len(name) > MAX_NAME or size > MAX_FILE_BYTES:
            self._leave_out(name, "its name is too long")
            return []
        return [Waiting(name, int(entry["size"] or 0), _mark(entry))]

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            log.warning("%s stays in the inbox: %s", ascii(name), reason)

    def _free(self, outcome: str, item: Waiting) -> str:
        """Return where a file can go without taking anything's place."""
        for target in _targets(outcome, item.name):
            if not self.fs.exists(f"{self.root}/{target}"):
                report = self._report(target)
                # A kill may have left the report of this very file.
                if report is None or report.get("mark") == item.mark:
                    return target
        raise AssertionError("there is always another number")

    def _report(self, target: str) -> dict[str, Any] | None:
        """Return the report of a name; {} for a damaged one, None for none."""
        try:
            row = json.loads(self.fs.cat_file(f"{self.root}/{target}{REPORT}"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return row if isinstance(row, dict) else {}

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
    """Put a copy of a file into the inbox under a name; it appears there at once and whole.

    Raises ConfigError for a stream whose folder is one of the inbox's own.
    """
    stream = name.rpartition("/")[0]
    if stream and not _is_stream(stream):
        raise ConfigError(f"stream {stream} has no place in the inbox: choose another name for it")
    inbox = open_inbox(state)
    if inbox.local is not None:
        write_parts(inbox.local / name, _pieces(path))
        return
    folder, slash, last = name.rpartition("/")
    inbox.fs.makedirs(f"{inbox.root}/{folder}", exist_ok=True)
    hidden = f"{folder}{slash}.{last}.tmp"
    inbox.fs.put_file(str(path), f"{inbox.root}/{hidden}")
    inbox.move(hidden, name)


def _targets(outcome: str, name: str) -> Iterator[str]:
    """Yield the paths that a file may get, one after another."""
    plain = PurePosixPath(outcome) / name
    yield str(plain)
    for number in count(2):
        yield str(plain.with_name(f"{plain.stem}-{number}{plain.suffix}"))


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
