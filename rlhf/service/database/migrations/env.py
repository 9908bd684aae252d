"""Alembic's entry: migrate over the connection that `migrate` opened."""

from __future__ import annotations

from alembic import context

from rlhf.service.database.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite changes columns by copying the table.
    render_as_batch=True,
)
context.run_migrations()
