"""The tables of the first release."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create every table."""
    _people()
    _operation()
    _weeks()
    _verdicts()


def _people() -> None:
    op.create_table(
        "users",
        _id(),
        _text("name"),
        _text("role"),
        _time("created"),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
    )
    op.create_table(
        "tokens",
        _id(),
        _number("user_id"),
        _text("digest"),
        _time("created"),
        _time("expires", nullable=True),
        _time("revoked", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_tokens_user_id_users"),
        sa.UniqueConstraint("digest", name="uq_tokens_digest"),
    )
    op.create_index("ix_tokens_user_id", "tokens", ["user_id"])
    op.create_table(
        "sessions",
        _id(),
        _text("digest"),
        _number("user_id"),
        _number("token_id", nullable=True),
        _text("csrf"),
        _time("created"),
        _time("expires"),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_sessions_user_id_users"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="fk_sessions_token_id_tokens"),
        sa.UniqueConstraint("digest", name="uq_sessions_digest"),
    )
    op.create_index("ix_sessions_user_id", "sessions", ["user_id"])


def _operation() -> None:
    op.create_table(
        "audit",
        _id(),
        _time("time"),
        _text("user"),
        _text("role"),
        _text("action"),
        _text("target", 500),
        _number("status"),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_time", "audit", ["time"])
    op.create_table(
        "idempotency",
        _id(),
        _text("user"),
        _text("key"),
        _text("request"),
        _number("status"),
        sa.Column("body", sa.JSON(), nullable=False),
        _time("created"),
        sa.PrimaryKeyConstraint("id", name="pk_idempotency"),
        sa.UniqueConstraint("user", "key", name="uq_idempotency_user_key"),
    )
    op.create_table(
        "launches",
        _id(),
        _text("run"),
        _text("user"),
        _text("state"),
        _text("launcher"),
        _text("recipe", nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        _time("created"),
        _time("changed"),
        sa.PrimaryKeyConstraint("id", name="pk_launches"),
    )
    op.create_index("ix_launches_run", "launches", ["run"])
    op.create_table(
        "inbox_files",
        _id(),
        _text("inbox", 500),
        _text("name", 500),
        _text("mark"),
        _text("state"),
        _text("owner"),
        _time("claimed"),
        _time("finished", nullable=True),
        _text("batch", nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_inbox_files"),
        sa.UniqueConstraint("inbox", "name", "mark", name="uq_inbox_files_inbox_name_mark"),
    )


def _weeks() -> None:
    op.create_table(
        "weeks",
        _id(),
        *(_text(name) for name in ("name", "stream", "run", "node", "state")),
        _time("created"),
        _time("closed", nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_weeks"),
        sa.UniqueConstraint("name", name="uq_weeks_name"),
    )
    op.create_table(
        "tasks",
        _id(),
        _number("week_id"),
        _text("pair_id"),
        _number("position"),
        _text("axis"),
        sa.Column("pair", sa.JSON(), nullable=False),
        sa.Column("is_qualification", sa.Boolean(), nullable=False),
        sa.Column("gold", sa.JSON(), nullable=True),
        _number("needed"),
        _number("taken"),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.ForeignKeyConstraint(["week_id"], ["weeks.id"], name="fk_tasks_week_id_weeks"),
        sa.UniqueConstraint("week_id", "pair_id", name="uq_tasks_week_id_pair_id"),
    )
    op.create_index("ix_tasks_week_id", "tasks", ["week_id"])
    op.create_index("ix_tasks_next", "tasks", ["week_id", "is_qualification", "position"])


def _verdicts() -> None:
    op.create_table(
        "assignments",
        _id(),
        _text("key"),
        _number("task_id"),
        _number("user_id"),
        _text("state"),
        sa.Column("swapped", sa.Boolean(), nullable=False),
        _time("assigned"),
        _time("touched"),
        sa.Column("draft", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_assignments"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_assignments_task_id_tasks"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_assignments_user_id_users"),
        sa.UniqueConstraint("key", name="uq_assignments_key"),
        sa.UniqueConstraint("task_id", "user_id", name="uq_assignments_task_id_user_id"),
    )
    op.create_index("ix_assignments_task_id", "assignments", ["task_id"])
    op.create_index("ix_assignments_user_id", "assignments", ["user_id"])
    op.create_table(
        "annotations",
        _id(),
        *(_number(name) for name in ("assignment_id", "task_id", "user_id")),
        _text("preferred"),
        _text("strength"),
        sa.Column("safe_a", sa.Boolean(), nullable=True),
        sa.Column("safe_b", sa.Boolean(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=True),
        _time("submitted"),
        sa.PrimaryKeyConstraint("id", name="pk_annotations"),
        sa.ForeignKeyConstraint(
            ["assignment_id"],
            ["assignments.id"],
            name="fk_annotations_assignment_id_assignments",
        ),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_annotations_task_id_tasks"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_annotations_user_id_users"),
        sa.UniqueConstraint("assignment_id", name="uq_annotations_assignment_id"),
    )
    op.create_index("ix_annotations_task_id", "annotations", ["task_id"])
    op.create_index("ix_annotations_user_id", "annotations", ["user_id"])


def _id() -> sa.Column[Any]:
    return sa.Column("id", sa.Integer(), nullable=False)


def _number(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer(), nullable=nullable)


def _text(name: str, length: int = 200, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.String(length), nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
