"""Claims: the rows of the database that keep other watchers away from a file of the inbox."""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from sqlalchemy import case, delete, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from rlhf.lease import HEARTBEAT_SECONDS, Holder, is_gone, this_process
from rlhf.service.database.models import Audit, InboxFile, now
from rlhf.service.inbox import Inbox, Waiting
from rlhf.service.state import State

log = logging.getLogger(__name__)

CLAIMED = "claimed"
HOLDER = ("host", "space", "boot", "pid", "start", "token")
"""What a claim says of its owner."""


class Lost(Exception):
    """Another watcher has taken a row over, because this one showed no sign of life."""


class Claims:
    """The claims of one watcher on the files of an inbox."""

    def __init__(self, state: State, inbox: Inbox) -> None:
        self._state, self._inbox = state, inbox
        self._token = secrets.token_hex(8)

    def open_rows(self) -> list[InboxFile]:
        """Return the rows of the inbox that are not finished, whoever owns them."""
        with self._state.reading() as session:
            rows = select(InboxFile).where(
                InboxFile.inbox == self._inbox.key, InboxFile.finished.is_(None)
            )
            return list(session.scalars(rows))

    def claim(self, item: Waiting) -> InboxFile | None:
        """Return the row that makes a file this watcher's; None where it is another's."""
        with self._state.reading() as session:
            row = session.scalar(
                select(InboxFile).where(
                    InboxFile.inbox == self._inbox.key,
                    InboxFile.name == item.name,
                    InboxFile.mark == item.mark,
                )
            )
        if row is not None:
            if row.finished is None and not self.is_free(row):
                return None
            # A finished row is that of a file which was put back, or has been moved meanwhile.
            if row.finished is not None and self._inbox.find(item.name) != item:
                return None
            if not self.take_over(row):
                return None
            if row.finished is None and row.state != CLAIMED:
                return row
            return self.change(row, state=CLAIMED, finished=None, batch=None, message="")
        row = InboxFile(
            inbox=self._inbox.key,
            name=item.name,
            mark=item.mark,
            state=CLAIMED,
            owner=self._owner(),
            message="",
        )
        try:
            with self._state.transaction() as session:
                session.add(row)
        except IntegrityError:
            return None
        return row

    def take_over(self, row: InboxFile) -> bool:
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
        with self._state.transaction() as session:
            return session.connection().execute(mine).rowcount == 1

    def _owner(self) -> str:
        holder = this_process(self._token)
        short = replace(holder, host=holder.host[:64])
        return json.dumps([getattr(short, name) for name in HOLDER])

    def is_free(self, row: InboxFile) -> bool:
        """Tell whether nobody works on a row: given back, this watcher's own, or of a dead one."""
        if not row.owner:
            return True
        holder = Holder(
            **dict(zip(HOLDER, json.loads(row.owner), strict=True)),
            heartbeat=row.claimed.timestamp(),
        )
        return holder.token == self._token or is_gone(holder, now=time.time())

    def change(self, row: InboxFile, *added: Audit, **values: Any) -> InboxFile:
        """Change a row that this watcher owns, and add others with it; raises Lost."""
        mine = (InboxFile.id == row.id, InboxFile.owner == self._owner())
        with self._state.transaction() as session:
            changed = session.connection().execute(update(InboxFile).where(*mine).values(**values))
            if changed.rowcount != 1:
                raise Lost
            session.add_all(added)
            return session.get_one(InboxFile, row.id)

    def give_back(self, row: InboxFile, reason: str) -> None:
        """Leave a row to whoever tries next; an outcome's message stays."""
        message = case((InboxFile.state == CLAIMED, reason), else_=InboxFile.message)
        with suppress(Lost):
            self.change(row, owner="", message=message)

    def forget(self, row: InboxFile) -> None:
        """Delete a row that this watcher owns: the file is looked at as if for the first time."""
        mine = (InboxFile.id == row.id, InboxFile.owner == self._owner())
        with self._state.transaction() as session:
            session.execute(delete(InboxFile).where(*mine))

    @contextmanager
    def beating(self, row: InboxFile) -> Iterator[None]:
        """Renew a claim while the block runs, so that watchers elsewhere see it is alive."""
        end = threading.Event()

        def beat() -> None:
            while not end.wait(HEARTBEAT_SECONDS):
                try:
                    self.change(row, claimed=now())
                except Lost:
                    # The next change says so.
                    return
                except (SQLAlchemyError, OSError) as error:
                    log.warning("the claim of %s is not renewed: %s", row.name, error)

        thread = threading.Thread(target=beat, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
