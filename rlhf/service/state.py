"""What every request needs: the configuration, the database, the folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.requests import Request

from rlhf.config import Config
from rlhf.service.database.connect import READING, open_engine
from rlhf.service.database.migrate import migrate


@dataclass(frozen=True, slots=True)
class State:
    """The service's configuration, its database and the folders that it works in."""

    config: Config
    engine: Engine
    sessions: sessionmaker[Session]

    @property
    def runs(self) -> Path:
        """Folder of all runs."""
        return Path(self.config.paths.runs)

    @property
    def store(self) -> Path:
        """Folder of all streams."""
        return Path(self.config.paths.store)

    @property
    def folder(self) -> Path:
        """Folder of what only the service has."""
        return Path(self.config.service.folder)

    @property
    def uploads(self) -> Path:
        """Folder of files on their way into the store."""
        return self.folder / "uploads"

    @property
    def weeks(self) -> Path:
        """Folder of the weeks' pairs, journals and batch files."""
        return self.folder / "weeks"

    @property
    def inbox(self) -> str:
        """Folder or URL of the inbox."""
        return self.config.service.inbox or str(self.folder / "inbox")

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a session that commits at the end of the block, and rolls back on an error."""
        with self.sessions.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a session that writes nothing."""
        bind = self.engine.execution_options(**{READING: True})
        with self.sessions(bind=bind) as session:
            yield session


def open_state(config: Config) -> State:
    """Create the service's folder and tables where they are missing, and open them.

    Raises ConfigError for a database that cannot be reached or is newer than this program.
    """
    folder = Path(config.service.folder)
    folder.mkdir(parents=True, exist_ok=True)
    engine = open_engine(config.service, folder)
    migrate(engine)
    return State(config, engine, sessionmaker(engine, expire_on_commit=False))


def state_of(request: Request) -> State:
    """Return the state of the application that a request came to (a FastAPI dependency)."""
    found: State = request.app.state.service
    return found
