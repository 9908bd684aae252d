"""Tables: what only the service knows.

Times are UTC. With a lost database weeks, their tasks, verdicts and skips come back from the files
of `service.folder`, people without their tokens; drafts, the audit log and the rest do not.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
"""Names of constraints, so that migrations can change them on every database."""

ROLES = ("viewer", "annotator", "operator")
"""What people may do: read; read tasks and judge; everything."""


def now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)


class UtcTime(TypeDecorator[datetime]):
    """A moment in UTC; SQLite stores none with its zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store UTC."""
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Read UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Every table."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {  # noqa: RUF012
        datetime: UtcTime(),
        dict[str, Any]: JSON(),
        str: String(200),
        float: Double(),
    }


class User(Base):
    """Somebody, by name; without a token nobody signs in as them where tokens are needed."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str]
    created: Mapped[datetime] = mapped_column(default=now)

    tokens: Mapped[list[Token]] = relationship(back_populates="user")


class Token(Base):
    """An access token; only the SHA-256 of its 256 random bits is stored."""

    __tablename__ = "tokens"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    digest: Mapped[str] = mapped_column(unique=True)
    created: Mapped[datetime] = mapped_column(default=now)
    expires: Mapped[datetime | None]
    revoked: Mapped[datetime | None]

    user: Mapped[User] = relationship(back_populates="tokens")


class BrowserSession(Base):
    """A signed-in browser; the cookie's SHA-256, and the secret that its forms carry."""

    __tablename__ = "sessions"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    token_id: Mapped[int | None] = mapped_column(ForeignKey("tokens.id"))
    """The token it was opened with; it ends with that."""
    csrf: Mapped[str]
    created: Mapped[datetime] = mapped_column(default=now)
    expires: Mapped[datetime]

    user: Mapped[User] = relationship()
    token: Mapped[Token | None] = relationship()


class Audit(Base):
    """A write and how it was answered: one that somebody asked for, or that the watcher made."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[datetime] = mapped_column(default=now, index=True)
    user: Mapped[str]
    role: Mapped[str]
    action: Mapped[str]
    """Method and route, such as POST /api/v1/runs/{run}/launch; or what the watcher did."""
    target: Mapped[str] = mapped_column(String(500))
    status: Mapped[int]
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Idempotency(Base):
    """The answer to a write with an idempotency key, given again when the key comes again.

    While the first request is under way, `status` is 0 and `body` says which server works on it.
    """

    __tablename__ = "idempotency"
    __table_args__ = (UniqueConstraint("user", "key"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    user: Mapped[str]
    key: Mapped[str]
    request: Mapped[str]
    """SHA-256 of method, path and body."""
    status: Mapped[int] = mapped_column(default=0)
    body: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created: Mapped[datetime] = mapped_column(default=now)


class Launch(Base):
    """A launch that was asked for through the service, by a person or by the watcher."""

    __tablename__ = "launches"

    id: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[str] = mapped_column(index=True)
    user: Mapped[str]
    state: Mapped[str]
    """wanted (the run is busy; it is launched when it is not), launched, or failed."""
    launcher: Mapped[str]
    recipe: Mapped[str | None]
    """Of a new run; None goes on with one."""
    settings: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """What it changes, by dotted name."""
    output: Mapped[str] = mapped_column(Text, default="")
    """What `rlhf launch` said: job ids, or why not."""
    created: Mapped[datetime] = mapped_column(default=now)
    changed: Mapped[datetime] = mapped_column(default=now, onupdate=now)


class InboxFile(Base):
    """A file of the inbox; the row is the claim that keeps other watchers away from it."""

    __tablename__ = "inbox_files"
    __table_args__ = (UniqueConstraint("inbox", "name", "mark"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    inbox: Mapped[str] = mapped_column(String(500))
    name: Mapped[str] = mapped_column(String(500))
    mark: Mapped[str]
    """Size and time, or the etag: another file under the name has another mark."""
    state: Mapped[str]
    """claimed, accepted or refused."""
    owner: Mapped[str]
    """Watcher that claimed it: host, process and start."""
    claimed: Mapped[datetime] = mapped_column(default=now)
    finished: Mapped[datetime | None]
    batch: Mapped[str | None]
    message: Mapped[str] = mapped_column(Text, default="")


class Week(Base):
    """Pairs that are annotated together and become one batch; `name` is the batch's."""

    __tablename__ = "weeks"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    stream: Mapped[str]
    run: Mapped[str]
    node: Mapped[str]
    """Collect node whose pairs they are."""
    state: Mapped[str]
    """open, closing (no more verdicts, the batch is under way) or closed."""
    created: Mapped[datetime] = mapped_column(default=now)
    closed: Mapped[datetime | None]
    settings: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Task(Base):
    """A pair to judge; `pair` is its row of pairs.jsonl, models included, which nobody is shown.

    A qualification item has the known answer in `gold`.
    """

    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("week_id", "pair_id"),
        Index("ix_tasks_next", "week_id", "is_qualification", "position"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    week_id: Mapped[int] = mapped_column(ForeignKey("weeks.id"), index=True)
    pair_id: Mapped[str]
    position: Mapped[int]
    axis: Mapped[str]
    pair: Mapped[dict[str, Any]]
    is_qualification: Mapped[bool] = mapped_column(default=False)
    gold: Mapped[dict[str, Any] | None]
    needed: Mapped[int]
    """Annotators who are to judge it."""
    taken: Mapped[int] = mapped_column(default=0)
    """Annotators who judge it or have judged it; raised only while it is below `needed`."""


class Assignment(Base):
    """A task in the hands of an annotator; nobody gets a task twice."""

    __tablename__ = "assignments"
    __table_args__ = (UniqueConstraint("task_id", "user_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)
    """Random name under which the page knows it."""
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id"), index=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    state: Mapped[str]
    """open, done, skipped, or expired (given back after `assignment_minutes`)."""
    swapped: Mapped[bool]
    """Whether response_b stands on the left."""
    assigned: Mapped[datetime] = mapped_column(default=now)
    touched: Mapped[datetime] = mapped_column(default=now)
    draft: Mapped[dict[str, Any] | None]
    """What has been typed and not submitted."""

    task: Mapped[Task] = relationship()


class Annotation(Base):
    """A verdict; responses are named as in the pair, not as they were shown."""

    __tablename__ = "annotations"

    id: Mapped[int] = mapped_column(primary_key=True)
    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignments.id"), unique=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id"), index=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    preferred: Mapped[str]
    """a or b."""
    strength: Mapped[str]
    safe_a: Mapped[bool | None]
    safe_b: Mapped[bool | None]
    comment: Mapped[str] = mapped_column(Text, default="")
    seconds: Mapped[float | None]
    """Time that the page was in view since it was last loaded."""
    submitted: Mapped[datetime] = mapped_column(default=now)
