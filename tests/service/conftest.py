"""A service over made-up runs, its database in each of the kinds that teams use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from report_run import make_run

from rlhf.config import Config, Paths, Service
from rlhf.service.app import create_app
from rlhf.service.state import State, open_state

testclient = pytest.importorskip("fastapi.testclient")


@pytest.fixture(params=["sqlite"])
def database(request: pytest.FixtureRequest) -> str | None:
    """URL of an empty database; None is SQLite in the service's folder."""
    return None


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


@pytest.fixture
def run(state: State) -> Path:
    """Folder of a made-up run of three rounds, without models."""
    return make_run(state.runs)
