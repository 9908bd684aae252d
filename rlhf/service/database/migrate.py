"""Bring the tables to this program's version."""

from __future__ import annotations

from importlib.resources import as_file, files

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from rlhf.errors import ConfigError
from rlhf.service.database.connect import PASSWORD

LOCK = 7239014
"""Advisory lock of PostgreSQL: servers that start together migrate one after the other."""


def migrate(engine: Engine) -> None:
    """Run the migrations that are missing; raises ConfigError where that is impossible."""
    with as_file(files("rlhf.service.database") / "migrations") as folder:
        settings = AlembicConfig()
        settings.set_main_option("script_location", str(folder).replace("%", "%%"))
        try:
            with engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
                _upgrade(connection, settings)
        except DBAPIError as error:
            reason = (str(error.orig).strip() or type(error.orig).__name__).splitlines()[0]
            raise ConfigError(
                f"service.database={engine.url.render_as_string()} cannot be used: {reason}; start "
                f"it, check the URL, and put a password into {PASSWORD}"
            ) from error


def _upgrade(connection: Connection, settings: AlembicConfig) -> None:
    current = MigrationContext.configure(connection).get_current_revision()
    script = ScriptDirectory.from_config(settings)
    known = {revision.revision for revision in script.walk_revisions()}
    if current is not None and current not in known:
        raise ConfigError(
            f"the tables of service.database are of revision {current}, which this program does "
            "not know: install the version of rlhf that made them, or a newer one"
        )
    if current != script.get_current_head():
        settings.attributes["connection"] = connection
        command.upgrade(settings, "head")
