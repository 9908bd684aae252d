"""Connections: SQLite in the service's folder, or PostgreSQL by URL."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from rlhf.config import Service
from rlhf.errors import ConfigError

FILE = "service.db"
PASSWORD = "RLHF_DATABASE_PASSWORD"
PASSWORD_FILE = "RLHF_DATABASE_PASSWORD_FILE"
"""Names the file that holds the password, as containers get it."""
READING = "rlhf_reading"
"""Execution option of connections that write nothing, and so need not wait for writers."""
BUSY_MILLISECONDS = 30_000
"""Longest wait for another writer of the embedded database."""
CONNECT_SECONDS = 10
"""Longest wait for a server that does not answer, unless the URL has a connect_timeout."""


def open_engine(settings: Service, folder: Path) -> Engine:
    """Open the database; raises ConfigError for a URL of another kind."""
    if settings.database is None:
        return _open_sqlite(folder / FILE)
    try:
        url = make_url(settings.database)
    except ArgumentError as error:
        raise ConfigError(
            f"service.database={settings.database} is no URL: write "
            "postgresql+psycopg://USER@HOST/NAME, or null for SQLite"
        ) from error
    if url.get_backend_name() != "postgresql":
        raise ConfigError(
            f"service.database={settings.database} is no PostgreSQL: write "
            "postgresql+psycopg://USER@HOST/NAME, or null for SQLite"
        )
    password = _password()
    url = url.set(drivername="postgresql+psycopg")
    has_own = "connect_timeout" in url.query
    # A connection that the server closed is replaced before it is used.
    return create_engine(
        url.set(password=password) if password else url,
        connect_args={} if has_own else {"connect_timeout": CONNECT_SECONDS},
        pool_pre_ping=True,
        pool_size=20,
    )


def _password() -> str | None:
    """Return the password of the environment; raises ConfigError for a file that is not there."""
    path = os.environ.get(PASSWORD_FILE)
    if path is None:
        return os.environ.get(PASSWORD)
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"{PASSWORD_FILE}={path} cannot be read ({error.strerror}): write the password into "
            "it, readable by the user that runs this"
        ) from error


def _open_sqlite(path: Path) -> Engine:
    # Put together from parts: a folder's name may hold what has a meaning in a URL.
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": BUSY_MILLISECONDS / 1000},
        pool_size=20,
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _: Any) -> None:
        # SQLAlchemy begins transactions itself, below.
        connection.isolation_level = None
        # Readers do not wait for the writer; a commit is on the disk before it is acknowledged.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        # Immediate: a reader that writes later would fail where another has written meanwhile.
        is_reading = connection.get_execution_options().get(READING, False)
        connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")

    return engine
