"""The watcher: files of the inbox go into the store once they are complete, and plans grow.

A file is claimed by a row of the database, ingested, its outcome recorded, its report written, the
file moved, the plans of the stream's runs extended, and the row finished, in this order. Every step
can be done again, so that after a kill whoever looks next goes on where the last one ended.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError

from rlhf.errors import UserError
from rlhf.faults import boundary
from rlhf.intake import chosen_kind
from rlhf.lease import HEARTBEAT_SECONDS, Holder, is_gone, this_process
from rlhf.service import launching
from rlhf.service.database.models import InboxFile, now
from rlhf.service.inbox import ACCEPTED, REFUSED, Waiting, open_inbox
from rlhf.service.ingesting import drift_headline, ingest_into, refusal_json, report_json
from rlhf.service.state import State

log = logging.getLogger(__name__)

CLAIMED = "claimed"
HOLDER = ("host", "space", "boot", "pid", "start", "token")
"""What a claim says of its owner."""
RETRY_SECONDS = 60.0
"""Time until a file is tried again that failed for a reason which is not in it."""
STOP_SECONDS = 10.0
"""Longest wait for the file in work when the service stops; the next start goes on with it."""
SIGN = "watcher"
"""File whose time is that of the last look."""


class Watcher:
    """Looks into the inbox of a service; `run` is for a thread of its own."""

    def __init__(self, state: State) -> None:
        chosen_kind(state.config)
        self.state = state
        self.inbox = open_inbox(state)
        self._token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._seen: dict[str, tuple[str, float]] = {}
        self._later: dict[tuple[str, str], float] = {}

    def run(self) -> None:
        """Look again and again until `stop`."""
        while not self._stop.is_set():
            try:
                self.look_once()
            except Exception:
                # The thread has to outlive a database or a file system that is away for a while.
                log.exception("the look into %s failed; the next one follows", self.inbox.key)
            self._stop.wait(self.state.config.service.poll_seconds)

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
        launching.launch_wanted(self.state)
        (self.state.folder / SIGN).touch()
        return taken

    def _complete(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Return the files that have not changed for `settle_seconds`."""
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
            and moment >= self._later.get((item.name, item.mark), 0.0)
        ]

    def _take(self, item: Waiting) -> bool:
        """Claim a file and do everything with it; False where it is another watcher's, or later."""
        row = self._claim(item)
        if row is None:
            return False
        try:
            with self._beating(row):
                return self._process(row, item)
        except Exception as error:
            # Whatever it is, the other files must not wait for it.
            log.exception("%s is tried again in %.0f s", item.name, RETRY_SECONDS)
            self._later[item.name, item.mark] = time.monotonic() + RETRY_SECONDS
            self._change(row, owner="", message=f"tried again later: {error}")
            return False

    def _process(self, row: InboxFile, item: Waiting) -> bool:
        folder = self.state.uploads / f"inbox-{row.id}"
        try:
            path = self.inbox.fetch(item.name, folder)
            boundary("claimed", item.name)
            report = self._ingest(path, item)
        except FileNotFoundError:
            if self.inbox.find(item.name) is not None:
                raise
            self._forget(row)
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        boundary("ingested", item.name)
        is_same = self.inbox.find(item.name) == item
        is_accepted = report["outcome"] == ACCEPTED
        if not is_same:
            log.warning("%s changed while it was read; it is looked at again", item.name)
        if not is_same and not is_accepted:
            # It may be refused only because half of it was read.
            self._forget(row)
            return False
        row = self._change(
            row, state=report["outcome"], batch=report.get("id"), message=report["message"]
        )
        level = logging.INFO if is_accepted else logging.WARNING
        log.log(level, "inbox: %s %s: %s", item.name, report["outcome"], report["message"])
        boundary("recorded", item.name)
        moved = self.inbox.file_under(report["outcome"], item, report) if is_same else ""
        boundary("moved", item.name)
        self._conclude(row)
        launching.record(
            self.state,
            "inbox",
            item.name,
            status=HTTPStatus.OK if is_accepted else HTTPStatus.UNPROCESSABLE_ENTITY,
            moved=moved,
            reason=report["message"],
        )
        return True

    def _ingest(self, path: Path, item: Waiting) -> dict[str, Any]:
        """Return the file's report; a file that is refused has one, too."""
        stream = self._stream(item.name)
        file = {"file": item.name, "time": now().isoformat(timespec="seconds")}
        try:
            found = ingest_into(
                self.state, path, kind=chosen_kind(self.state.config), stream=stream
            )
        except UserError as error:
            # Where the copy lay is nobody's business.
            text = str(error).replace(str(path), item.name)
            return {**file, **refusal_json(error, stream), "outcome": REFUSED, "message": text}
        return {**file, **report_json(found, drift_headline(self.state, found))}

    def _conclude(self, row: InboxFile) -> None:
        """Do what follows from an outcome, and finish the row."""
        if row.state == ACCEPTED and row.batch is not None:
            launching.batch_arrived(self.state, self._stream(row.name), row.batch)
        boundary("extended", row.name)
        self._change(row, finished=now())

    def _finish_moved(self, waiting: Sequence[Waiting]) -> None:
        """Finish rows whose watcher is gone and whose file has been moved, or taken away."""
        here = {(item.name, item.mark) for item in waiting}
        for row in self._open_rows():
            if (row.name, row.mark) in here or not self._is_gone(row):
                continue
            if not self._take_over(row):
                continue
            if row.state == CLAIMED:
                self._forget(row)
            else:
                self._conclude(row)

    def _open_rows(self) -> list[InboxFile]:
        with self.state.reading() as session:
            rows = select(InboxFile).where(
                InboxFile.inbox == self.inbox.key, InboxFile.finished.is_(None)
            )
            return list(session.scalars(rows))

    def _claim(self, item: Waiting) -> InboxFile | None:
        """Return the row that makes a file this watcher's; None where it is another's."""
        with self.state.reading() as session:
            row = session.scalar(
                select(InboxFile).where(
                    InboxFile.inbox == self.inbox.key,
                    InboxFile.name == item.name,
                    InboxFile.mark == item.mark,
                )
            )
        if row is not None:
            if row.finished is None and not self._is_gone(row):
                return None
            # A finished row is that of a file which was put back, or has been moved meanwhile.
            if row.finished is not None and self.inbox.find(item.name) != item:
                return None
            if not self._take_over(row):
                return None
            return self._change(row, state=CLAIMED, finished=None, batch=None, message="")
        row = InboxFile(
            inbox=self.inbox.key,
            name=item.name,
            mark=item.mark,
            state=CLAIMED,
            owner=self._owner(),
            message="",
        )
        try:
            with self.state.transaction() as session:
                session.add(row)
        except IntegrityError:
            return None
        return row

    def _take_over(self, row: InboxFile) -> bool:
        """Become the owner of a row, unless another watcher was quicker."""
        mine = (
            update(InboxFile)
            .where(
                InboxFile.id == row.id,
                InboxFile.owner == row.owner,
                InboxFile.claimed == row.claimed,
            )
            .values(owner=self._owner(), claimed=now())
        )
        with self.state.transaction() as session:
            return session.connection().execute(mine).rowcount == 1

    def _owner(self) -> str:
        holder = this_process(self._token)
        short = replace(holder, host=holder.host[:64])
        return json.dumps([getattr(short, name) for name in HOLDER])

    def _is_gone(self, row: InboxFile) -> bool:
        """Tell whether nobody works on a row: given back, this watcher's own, or of a dead one."""
        if not row.owner:
            return True
        holder = Holder(
            **dict(zip(HOLDER, json.loads(row.owner), strict=True)),
            heartbeat=row.claimed.timestamp(),
        )
        return holder.token == self._token or is_gone(holder, now=time.time())

    def _change(self, row: InboxFile, **values: Any) -> InboxFile:
        with self.state.transaction() as session:
            kept = session.get_one(InboxFile, row.id)
            for name, value in values.items():
                setattr(kept, name, value)
        return kept

    def _forget(self, row: InboxFile) -> None:
        with self.state.transaction() as session:
            session.execute(delete(InboxFile).where(InboxFile.id == row.id))

    def _stream(self, name: str) -> str:
        folder, _, _ = name.rpartition("/")
        return folder or self.state.config.ingest.stream

    @contextmanager
    def _beating(self, row: InboxFile) -> Iterator[None]:
        """Renew a claim while the block runs, so that watchers elsewhere see it is alive."""
        end = threading.Event()

        def beat() -> None:
            while not end.wait(HEARTBEAT_SECONDS):
                self._change(row, claimed=now())

        thread = threading.Thread(target=beat, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


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


def last_look(state: State) -> float | None:
    """Return the time of the last look of any watcher on this folder, in seconds; None for none."""
    try:
        return (state.folder / SIGN).stat().st_mtime
    except FileNotFoundError:
        return None
