"""Whether the service is alive and ready, and its numbers for Prometheus."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import create_engine, event
from sqlalchemy.orm import sessionmaker

from rlhf.service.app import create_app
from rlhf.service.database.models import InboxFile, Week
from rlhf.service.problems import MEDIA_TYPE
from rlhf.service.state import State
from rlhf.service.watch import SIGN


def numbers(client: TestClient) -> dict[tuple[str, ...], float]:
    response = client.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_a_service_is_alive_and_ready(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_service_without_its_database_is_alive_and_not_ready(
    state: State, tmp_path: Path
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/nowhere/service.db")
    broken = State(state.config, engine, sessionmaker(engine))
    with TestClient(create_app(broken), base_url="http://127.0.0.1") as client:
        assert client.get("/healthz").status_code == 200
        response = client.get("/readyz")
        for answer in (client.get("/api/v1/audit"), client.post("/login", data={"name": "ann"})):
            assert (answer.status_code, answer.json()) == (503, response.json())
    assert response.status_code == 503
    assert response.headers["content-type"] == MEDIA_TYPE
    assert "database" in response.json()["detail"]
    assert str(tmp_path) not in response.text


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_service_whose_folders_are_closed_is_not_ready(
    client: TestClient, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = state.runs.parent / "runs"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["detail"].startswith("paths.runs cannot be written")


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_full_disk_is_said_and_the_service_is_not_ready(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(create_app(state), base_url="http://127.0.0.1") as client:
        assert client.get("/readyz").status_code == 200
        state.engine.dispose()

        @event.listens_for(state.engine, "connect")
        def fill(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA max_page_count=1")

        for number in range(200):
            name = {"name": f"{number:090}"}
            response = client.post("/login", data=name, follow_redirects=False)
            client.cookies.clear()
            if response.status_code != 303:
                break
        free = shutil.disk_usage(state.folder)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
        unready = client.get("/readyz")
    assert response.status_code == 507
    assert "free some space" in response.json()["detail"]
    assert unready.status_code == 503
    assert "paths.runs has less than 1 MiB left" in unready.json()["detail"]


@pytest.mark.usefixtures("run")
def test_numbers_say_what_was_asked_and_how_things_stand(client: TestClient, state: State) -> None:
    for _ in range(3):
        client.get("/api/v1/runs/made-up")
    client.get("/api/v1/runs/other")
    client.request("QQ", "/nowhere/at/all")
    with state.transaction() as session:
        session.add(Week(name="week-9", stream="weekly", run="r", node="n", state="open"))
        for name in ("a", "b"):
            session.add(
                InboxFile(inbox="i", name=name, mark="m", state="accepted", owner="o", message="")
            )
    found = numbers(client)
    route = "/api/v1/runs/{run}"
    assert found["rlhf_requests_total", "GET", route, "200"] == 3
    assert found["rlhf_requests_total", "GET", route, "404"] == 1
    assert found["rlhf_request_seconds_count", "GET", route] == 4
    assert found["rlhf_requests_total", "other", "other", "404"] == 1
    assert found["rlhf_runs", "done"] == 1
    assert found["rlhf_nodes", "done"] > 10
    assert found["rlhf_nodes", "running"] == 0
    assert found["rlhf_annotations", "week-9"] == 0
    assert found["rlhf_inbox_files", "accepted"] == 2
    assert ("rlhf_watcher_last_look_seconds",) not in found
    assert not any("nowhere" in label for sample in found for label in sample)

    (state.folder / SIGN).touch()
    os.utime(state.folder / SIGN, (1000, 1000))
    assert numbers(client)["rlhf_watcher_last_look_seconds",] == 1000
