"""Migrations make the tables that the program expects, on both databases, whoever starts first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import postgres
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, inspect, select, text
from sqlalchemy.orm import Session

from rlhf.config import Service
from rlhf.errors import ConfigError
from rlhf.service.database import connect
from rlhf.service.database.connect import FILE, PASSWORD, PASSWORD_FILE, open_engine
from rlhf.service.database.migrate import migrate
from rlhf.service.database.models import Base, User

MIGRATE = """
import sys
from pathlib import Path
from rlhf.config import Service
from rlhf.service.database.connect import open_engine
from rlhf.service.database.migrate import migrate
print("ready", flush=True)
sys.stdin.readline()
migrate(open_engine(Service(folder=sys.argv[1], database=sys.argv[2] or None), Path(sys.argv[1])))
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    """Settings of a service whose database has no tables."""
    if request.param == "sqlite":
        yield Service(folder=str(tmp_path))
        return
    server: postgres.Server = request.getfixturevalue("postgresql")
    with server.database() as name:
        yield Service(folder=str(tmp_path), database=server.url(name))


@pytest.fixture
def engine(empty: Service) -> Iterator[Engine]:
    opened = open_engine(empty, Path(empty.folder))
    yield opened
    opened.dispose()


def differences(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        found = MigrationContext.configure(connection, opts={"compare_server_default": True})
        return compare_metadata(found, Base.metadata)


def test_empty_database_gets_exactly_the_tables_of_the_models(engine: Engine) -> None:
    migrate(engine)
    assert differences(engine) == []
    assert set(inspect(engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_constraints_have_the_names_of_the_models(engine: Engine) -> None:
    migrate(engine)
    found = inspect(engine)
    for table in Base.metadata.tables.values():
        keys = {key["name"] for key in found.get_foreign_keys(table.name)}
        assert keys == {key.name for key in table.foreign_key_constraints}
        assert found.get_pk_constraint(table.name)["name"] == f"pk_{table.name}"


def test_the_comparison_sees_a_difference(engine: Engine) -> None:
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX ix_tasks_next"))
    assert [change[0] for change in differences(engine)] == ["add_index"]


def test_second_migration_changes_nothing(engine: Engine) -> None:
    migrate(engine)
    with Session(engine) as session:
        session.add(User(name="ann", role="annotator"))
        session.commit()
    migrate(engine)
    with Session(engine) as session:
        assert session.scalars(select(User.name)).all() == ["ann"]


def test_servers_that_start_together_migrate_once(empty: Service, engine: Engine) -> None:
    arguments = [sys.executable, "-c", MIGRATE, empty.folder, empty.database or ""]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(arguments, **pipes, text=True) for _ in range(4)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, said
    assert differences(engine) == []


def test_tables_of_a_newer_program_are_refused(engine: Engine) -> None:
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match=r"revision 9999.*does not know: install"):
        migrate(engine)


def test_times_come_back_in_utc(engine: Engine) -> None:
    migrate(engine)
    east = datetime(2026, 3, 1, 1, 30, 0, 123456, tzinfo=timezone(timedelta(hours=3)))
    with Session(engine) as session:
        session.add(User(name="ann", role="viewer", created=east))
        session.commit()
    with Session(engine) as session:
        found = session.scalars(select(User.created)).one()
    assert found == east
    assert found.tzinfo is UTC


def test_database_that_is_away_is_named_without_a_password(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://rlhf@/none?host={tmp_path}"
    engine = open_engine(Service(folder=str(tmp_path), database=url), tmp_path)
    with pytest.raises(ConfigError, match=f"{PASSWORD}"):
        migrate(engine)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"x" * 5000)
    with pytest.raises(ConfigError, match=r"service\.database=sqlite.* cannot be used"):
        migrate(open_engine(Service(folder=str(tmp_path)), tmp_path))


def test_a_folder_of_any_name_holds_the_database(tmp_path: Path) -> None:
    folder = tmp_path / "a?b=c#d%20"
    folder.mkdir()
    engine = open_engine(Service(folder=str(folder)), folder)
    migrate(engine)
    engine.dispose()
    assert (folder / FILE).is_file()


def test_a_silent_server_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr(
        connect, "create_engine", lambda url, **more: given.append(more["connect_args"])
    )
    for query in ("", "?connect_timeout=60"):
        url = f"postgresql://rlhf@host/name{query}"
        open_engine(Service(folder=str(tmp_path), database=url), tmp_path)
    assert given == [{"connect_timeout": 10}, {}]


def test_password_comes_from_the_environment(
    postgresql: postgres.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgresql.database() as name:
        settings = Service(folder=str(tmp_path), database=postgresql.tcp_url(name))
        with pytest.raises(ConfigError, match=r"cannot be used: .*password"):
            migrate(open_engine(settings, tmp_path))
        monkeypatch.setenv(PASSWORD, postgres.PASSWORD)
        engine = open_engine(settings, tmp_path)
        migrate(engine)
        assert postgres.PASSWORD not in repr(engine.url)
        engine.dispose()
        monkeypatch.delenv(PASSWORD)
        secret = tmp_path / "secret"
        monkeypatch.setenv(PASSWORD_FILE, str(secret))
        with pytest.raises(ConfigError, match=rf"{PASSWORD_FILE}={secret} cannot be read"):
            open_engine(settings, tmp_path)
        secret.write_text(f"{postgres.PASSWORD}\n")
        engine = open_engine(settings, tmp_path)
        migrate(engine)
        engine.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://a@b/c",
        "postgresql://rlhf:secret@host/name",
        "postgresql://rlhf@host/name?password=secret",
        "postgresql:///name?host=h&sslpassword=secret",
        "no url at all",
    ],
)
def test_other_urls_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"service\.database") as caught:
        open_engine(Service(folder=str(tmp_path), database=url), tmp_path)
    assert "secret" not in str(caught.value)
