"""A service over made-up runs, its database in each of the kinds that teams use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
from report_run import make_run
from sqlalchemy import create_engine

from rlhf.config import Config, Paths, Service
from rlhf.service.app import create_app
from rlhf.service.database.connect import FILE
from rlhf.service.database.migrate import migrate
from rlhf.service.state import State, open_state

testclient = pytest.importorskip("fastapi.testclient")

TABLES = "with_tables"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[postgres.Server]:
    """A PostgreSQL of this session; its database TABLES has the service's tables."""
    reason = postgres.install()
    if reason:
        pytest.skip(reason)
    with postgres.running() as server:
        with server.connect() as connection:
            connection.execute(f"CREATE DATABASE {TABLES}")
        engine = create_engine(server.url(TABLES))
        migrate(engine)
        # A template may have no connections.
        engine.dispose()
        yield server


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded database with the service's tables, to be copied."""
    path = tmp_path_factory.mktemp("tables") / FILE
    engine = create_engine(f"sqlite:///{path}")
    migrate(engine)
    engine.dispose()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str | None]:
    """URL of a database with empty tables; None is SQLite in the service's folder."""
    if request.param == "sqlite":
        folder = tmp_path / "service"
        folder.mkdir()
        shutil.copy(request.getfixturevalue("empty_sqlite"), folder / FILE)
        yield None
        return
    server: postgres.Server = request.getfixturevalue("postgresql")
    with server.database(TABLES) as name:
        yield server.url(name)


@pytest.fixture
def config(tmp_path: Path, database: str | None) -> Config:
    return Config(
        recipe="none",
        paths=Paths(runs=str(tmp_path / "runs"), store=str(tmp_path / "store")),
        service=Service(
            folder=str(tmp_path / "service"), database=database, poll_seconds=0.1, settle_seconds=0
        ),
    )


@pytest.fixture
def state(config: Config) -> Iterator[State]:
    opened = open_state(config)
    yield opened
    opened.engine.dispose()


@pytest.fixture
def client(state: State) -> Iterator[testclient.TestClient]:
    with testclient.TestClient(create_app(state), base_url="http://127.0.0.1:8400") as opened:
        yield opened


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with runs/ and store/ of a made-up run, to be copied."""
    root = tmp_path_factory.mktemp("made")
    make_run(root, rounds=3)
    return root


@pytest.fixture
def run(state: State, made: Path) -> Path:
    """Folder of a made-up run of three rounds, without models, whose store is the service's."""
    shutil.copytree(made / "runs", state.runs, dirs_exist_ok=True)
    shutil.copytree(made / "store", state.store, dirs_exist_ok=True)
    folder = state.runs / "made-up"
    settings = folder / "run.yaml"
    here = str(state.runs.parent)
    settings.write_text(settings.read_text(encoding="utf-8").replace(str(made), here))
    return folder
