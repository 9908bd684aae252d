"""The watcher: files of the inbox go into the store once they are complete, and plans grow.

A file is claimed by a row of the database, ingested, its outcome recorded, its report written, the
file moved, the plans of the stream's runs extended, and the row finished together with its line of
the audit log, in this order. Every step can be done again, so that after a kill whoever looks next
goes on where the last one ended. What fails is tried again later, and keeps nothing else waiting.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from rlhf.data.files import storable
from rlhf.errors import UserError
from rlhf.faults import boundary
from rlhf.intake import check_settings, chosen_kind
from rlhf.service import launching
from rlhf.service.claims import CLAIMED, Claims, Lost
from rlhf.service.database.models import InboxFile, now
from rlhf.service.inbox import ACCEPTED, REFUSED, Waiting, open_inbox
from rlhf.service.ingesting import drift_headline, ingest_into, refusal_json, report_json
from rlhf.service.pauses import Pauses
from rlhf.service.state import State

log = logging.getLogger(__name__)

LOOK_SECONDS = 60.0
"""Longest pause between two looks that fail."""
STOP_SECONDS = 10.0
"""Longest wait for the file in work when the service stops; the next start goes on with it."""
SIGN = "watcher"
"""File whose time is that of the last look."""


class Changed(Exception):
    """A file is no longer the one that was listed; nothing of it is added."""


class Watcher:
    """Looks into the inbox of a service; `run` is for a thread of its own."""

    def __init__(self, state: State) -> None:
        check_settings(state.config)
        self.state = state
        self.inbox = open_inbox(state)
        self.claims = Claims(state, self.inbox)
        self._stop = threading.Event()
        self._seen: dict[str, tuple[str, float]] = {}
        self._pauses, self._launches = Pauses(), Pauses()

    def run(self) -> None:
        """Look again and again until `stop`."""
        usual = self.state.config.service.poll_seconds
        looks = Pauses(usual, max(usual, LOOK_SECONDS))
        seconds, has_failed = usual, False
        while not self._stop.is_set():
            try:
                if has_failed:
                    self.inbox.reopen()
                self.look_once()
                looks.forget("")
                seconds, has_failed = usual, False
            except Exception as error:
                # The thread has to outlive a database or a file system that is away for a while.
                (seconds, is_new), has_failed = looks.begin("", str(error)), True
                text = "the look into %s failed (%s); the next one follows in %.0f s"
                log.error(text, self.inbox.key, error, seconds, exc_info=is_new)
            self._stop.wait(seconds)

    def stop(self) -> None:
        """End after the file in work."""
        self._stop.set()

    def look_once(self) -> list[str]:
        """Take in what is complete, then launch what is wanted; returns the files taken in."""
        taken = []
        with self.inbox.lock() as alone:
            if alone:
                waiting = self.inbox.waiting()
                self._finish_moved(waiting)
                for item in self._complete(waiting):
                    if self._stop.is_set():
                        break
                    if self._take(item):
                        taken.append(item.name)
                    self._sign()
        launching.launch_wanted(self.state, self._launches)
        self._sign()
        return taken

    def _sign(self) -> None:
        (self.state.folder / SIGN).touch()

    def _complete(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Return the files that have not changed for `settle_seconds` and need not wait."""
        moment = time.monotonic()
        seen = {}
        for item in waiting:
            mark, since = self._seen.get(item.name, (item.mark, moment))
            seen[item.name] = (item.mark, since if mark == item.mark else moment)
        self._seen = seen
        settle = self.state.config.service.settle_seconds
        return [
            item
            for item in waiting
            if moment - seen[item.name][1] >= settle
            and self._pauses.is_over((item.name, item.mark))
        ]

    def _finish_moved(self, waiting: Sequence[Waiting]) -> None:
        """Finish rows whose watcher is gone and whose file has been moved, or taken away."""
        here = {(item.name, item.mark) for item in waiting}
        rows = self.claims.open_rows()
        self._pauses.keep({*here, *((row.name, row.mark) for row in rows)})
        for row in rows:
            key = (row.name, row.mark)
            if key not in here and self.claims.is_free(row) and self._pauses.is_over(key):
                self._finish(row)

    def _finish(self, row: InboxFile) -> bool:
        """Take over the row of a file that has been moved, and do what is left."""

        def work(row: InboxFile) -> bool:
            if row.state == CLAIMED:
                self.claims.forget(row)
            else:
                found = self.inbox.filed(row.state, row.name, row.mark)
                self._conclude(row, moved=found[0] if found is not None else "")
            return True

        def claim() -> InboxFile | None:
            return row if self.claims.take_over(row) else None

        return self._try(row.name, row.mark, claim, work)

    def _take(self, item: Waiting) -> bool:
        """Claim a file and do everything with it; False where it is another watcher's, or later."""

        def work(row: InboxFile) -> bool:
            try:
                self._process(row, item)
            except Changed:
                log.warning("%s changed while it was read; it is looked at again", item.name)
                self.claims.forget(row)
                return False
            return True

        return self._try(item.name, item.mark, lambda: self.claims.claim(item), work)

    def _try(
        self,
        name: str,
        mark: str,
        claim: Callable[[], InboxFile | None],
        work: Callable[[InboxFile], bool],
    ) -> bool:
        """Claim a row and work on it; whatever goes wrong, the other files must not wait for it."""
        row = None
        try:
            row = claim()
            if row is None:
                return False
            with self.claims.beating(row):
                is_taken = work(row)
        except Lost:
            log.warning("%s is another watcher's by now", name)
            return False
        except Exception as error:
            seconds, is_new = self._pauses.begin((name, mark), str(error))
            text = "%s is tried again in %.0f s: %s"
            log.error(text, name, seconds, error, exc_info=is_new)
            if row is not None:
                self.claims.give_back(row, _stored(f"tried again later: {error}"))
            return False
        self._pauses.forget((name, mark))
        return is_taken

    def _process(self, row: InboxFile, item: Waiting) -> None:
        # Recorded by one that was killed: its report says more than a second ingest could.
        filed = self.inbox.filed(row.state, item.name, item.mark) if row.state != CLAIMED else None
        target, report = filed if filed is not None else ("", self._read(row, item))
        boundary("ingested", item.name)
        is_same = self.inbox.find(item.name) == item
        is_accepted = report["outcome"] == ACCEPTED
        if not is_same and not is_accepted:
            # It may be refused only because half of it was read.
            raise Changed
        if not is_same:
            log.warning("%s changed after it was read; it is looked at again", item.name)
        row = self.claims.change(
            row, state=report["outcome"], batch=report.get("id"), message=report["message"]
        )
        level = logging.INFO if is_accepted else logging.WARNING
        log.log(level, "inbox: %s %s: %s", item.name, report["outcome"], report["message"])
        boundary("recorded", item.name)
        moved = self.inbox.file_under(row.state, item, report, target) if is_same else ""
        boundary("moved", item.name)
        self._conclude(row, moved=moved)

    def _read(self, row: InboxFile, item: Waiting) -> dict[str, Any]:
        """Ingest a file and return its report; raises Changed where it is another file by now."""
        folder = self.state.uploads / f"inbox-{row.id}"
        try:
            path = self.inbox.fetch(item.name, folder)
            boundary("claimed", item.name)
            return _stored(self._ingest(path, item))
        except FileNotFoundError as error:
            if self.inbox.find(item.name) is not None:
                raise
            raise Changed from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _ingest(self, path: Path, item: Waiting) -> dict[str, Any]:
        """Return the file's report; a file that is refused has one, too."""
        stream = self._stream(item.name)
        file = {"file": item.name, "time": now().isoformat(timespec="seconds")}

        def check() -> None:
            if self.inbox.find(item.name) != item:
                raise Changed

        try:
            kind = chosen_kind(self.state.config)
            found = ingest_into(self.state, path, kind=kind, stream=stream, check=check)
        except UserError as error:
            # Where the copy lay is nobody's business.
            text = str(error).replace(str(path), item.name)
            return {**file, **refusal_json(error, stream), "outcome": REFUSED, "message": text}
        return {**file, **report_json(found, drift_headline(self.state, found))}

    def _conclude(self, row: InboxFile, *, moved: str) -> None:
        """Do what follows from an outcome, and finish the row."""
        is_accepted = row.state == ACCEPTED
        if is_accepted and row.batch is not None:
            launching.batch_arrived(self.state, self._stream(row.name), row.batch)
        boundary("extended", row.name)
        status = HTTPStatus.OK if is_accepted else HTTPStatus.UNPROCESSABLE_ENTITY
        line = launching.audit_row(
            "inbox", row.name, status=status, moved=moved, reason=row.message
        )
        self.claims.change(row, line, finished=now())

    def _stream(self, name: str) -> str:
        folder, _, _ = name.rpartition("/")
        return folder or self.state.config.ingest.stream


@contextmanager
def watching(state: State) -> Iterator[Watcher]:
    """Run a watcher in a thread while the block runs."""
    watcher = Watcher(state)
    thread = threading.Thread(target=watcher.run, name="watcher", daemon=True)
    thread.start()
    try:
        yield watcher
    finally:
        watcher.stop()
        thread.join(STOP_SECONDS)


def _stored(value: Any) -> Any:
    """Return a report, or a part of one, as files and databases can hold it.

    A row may have half characters and zero bytes.
    """
    if isinstance(value, str):
        return storable(value).replace("\0", "\\x00")
    if isinstance(value, dict):
        return {_stored(key): _stored(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stored(item) for item in value]
    return value


def last_look(state: State) -> float | None:
    """Return the time of the last look of any watcher on this folder, in seconds; None for none."""
    try:
        return (state.folder / SIGN).stat().st_mtime
    except FileNotFoundError:
        return None
