"""Writes to runs: start, go on, end, promote; refusals in the command line's words."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from rlhf.errors import ConfigError, LauncherError
from rlhf.service import launching
from rlhf.service.api import runs
from rlhf.service.database.models import Audit, Launch, now
from rlhf.service.pages import reports
from rlhf.service.problems import MEDIA_TYPE
from rlhf.service.state import State

Calls = list[dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Calls of launching, which start nothing."""
    calls: Calls = []

    def launch(state: State, run: str, **given: Any) -> Launch:
        calls.append({"run": run, **given})
        row = Launch(run=run, user=given["user"], state="launched", launcher="local", output="said")
        row.id, row.created, row.changed = 1, now(), now()
        return row

    def cancel(state: State, run: str, **given: Any) -> str:
        calls.append({"run": run, **given})
        return "cancelled"

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(launching, "cancel", cancel)
    return calls


def refused(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    return str(response.json()["detail"])


def audit(state: State) -> Audit:
    """Return the newest row of the audit log."""
    with state.reading() as session:
        return session.query(Audit).order_by(Audit.id.desc()).limit(1).one()


def test_a_run_is_started_from_a_recipe(client: TestClient, state: State, launches: Calls) -> None:
    order = {"recipe": "quickstart", "run": "mine", "settings": {"seed": 3}}
    response = client.post("/api/v1/runs", json=order)
    assert response.status_code == 202
    assert response.json()["output"] == "said"
    wanted = {"run": "mine", "user": "local", "recipe": "quickstart", "settings": {"seed": 3}}
    assert launches == [wanted]
    row = audit(state)
    assert (row.user, row.action, row.status) == ("local", "POST /api/v1/runs", 202)
    assert row.detail == {"run": "mine", "recipe": "quickstart", "settings": {"seed": 3}}
    client.post("/api/v1/runs", json={"recipe": "quickstart"})
    assert launches[1]["run"] == "quickstart"


@pytest.mark.usefixtures("run")
def test_a_run_that_exists_is_not_started_again(client: TestClient, launches: Calls) -> None:
    response = client.post("/api/v1/runs", json={"recipe": "quickstart", "run": "made-up"})
    assert "POST /api/v1/runs/made-up/launch" in refused(response, 409)
    assert launches == []


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("order", "said"),
    [
        ({"recipe": "nothing"}, "choose one of"),
        ({"recipe": "../quickstart"}, "choose one of"),
        ({"recipe": "quickstart", "run": "../up"}, "cannot name a run"),
        ({"recipe": "quickstart", "settings": {"paths.runs": "/tmp"}}, "paths.runs cannot be set"),
        ({"recipe": "quickstart", "settings": {"model.path": "x"}}, "model.path cannot be set"),
        ({"recipe": "quickstart", "settings": {"generator.url": "x"}}, "cannot be set"),
        ({"recipe": "quickstart", "settings": {"launcher.kind": "slurm"}}, "cannot be set"),
        ({"recipe": "quickstart", "settings": {"service.port": 1}}, "cannot be set"),
        ({"recipe": "quickstart", "settings": {"seed": "$(id)"}}, "give a whole number"),
        ({"recipe": "quickstart", "settings": {"seed": True}}, "give a whole number"),
        ({"recipe": "quickstart", "settings": {"model.precision": "fp8"}}, "one of fp32, bf16"),
        ({"recipe": "quickstart", "settings": {"seed": [1]}}, "settings"),
        ({"recipe": "quickstart", "other": 1}, "other"),
        ({"recipe": "a\u0000b"}, "null character"),
        ({}, "recipe"),
    ],
)
def test_a_start_that_cannot_work_is_refused(
    client: TestClient, state: State, order: dict[str, Any], said: str
) -> None:
    assert said in refused(client.post("/api/v1/runs", json=order), 422)
    assert not state.runs.exists() or not [*state.runs.glob("*/*")]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_half_characters_are_refused(client: TestClient) -> None:
    for body in (
        b'{"recipe": "\\ud800"}',
        b'{"recipe": "quickstart", "settings": {"\\ud800": 1}}',
        b'{"recipe": "quickstart", "settings": {"seed": "\\ud800"}}',
        b'{"recipe": "quickstart", "\\ud800": 1}',
    ):
        response = client.post(
            "/api/v1/runs", content=body, headers={"Content-Type": "application/json"}
        )
        refused(response, 422)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_bodies_that_are_no_json_are_refused(client: TestClient) -> None:
    for body in (b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"recipe": 1e999}', b"null"):
        response = client.post(
            "/api/v1/runs", content=body, headers={"Content-Type": "application/json"}
        )
        assert response.status_code in (400, 422), body[:20]
        assert response.headers["content-type"] == MEDIA_TYPE


@pytest.mark.usefixtures("run")
def test_a_run_goes_on_and_ends(client: TestClient, state: State, launches: Calls) -> None:
    assert client.post("/api/v1/runs/made-up/launch").status_code == 202
    order = {"settings": {"rounds.limit": 4}}
    assert client.post("/api/v1/runs/made-up/launch", json=order).status_code == 202
    assert audit(state).detail == order
    response = client.post("/api/v1/runs/made-up/cancel", json={"node": "round-01/evaluate"})
    assert response.json() == {"run": "made-up", "output": "cancelled"}
    assert client.post("/api/v1/runs/made-up/cancel").status_code == 200
    assert launches == [
        {"run": "made-up", "user": "local", "settings": {}},
        {"run": "made-up", "user": "local", "settings": {"rounds.limit": 4}},
        {"run": "made-up", "user": "local", "node": "round-01/evaluate"},
        {"run": "made-up", "user": "local", "node": ""},
    ]
    infinite = client.post(
        "/api/v1/runs/made-up/launch",
        content=b'{"settings": {"ppo.kl_coef": NaN}}',
        headers={"Content-Type": "application/json"},
    )
    assert "finite number" in refused(infinite, 422)
    assert "there is made-up" in refused(client.post("/api/v1/runs/other/launch"), 404)
    assert "there is made-up" in refused(client.post("/api/v1/runs/other/cancel"), 404)
    response = client.post("/api/v1/runs/made-up/cancel", json={"node": "../sft"})
    assert "there is sft" in refused(response, 404)
    assert len(launches) == 4


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("seed=x cannot work: give a number"), 422), (LauncherError("no squeue"), 502)],
)
@pytest.mark.usefixtures("run")
def test_the_launcher_s_words_reach_the_caller(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def launch(*args: Any, **given: Any) -> Launch:
        raise error

    monkeypatch.setattr(launching, "launch", launch)
    assert refused(client.post("/api/v1/runs/made-up/launch"), status) == str(error)


def test_an_operator_overrules_a_promotion_with_a_reason(
    client: TestClient, state: State, run: Path
) -> None:
    address = "/api/v1/runs/made-up/promote"
    order = {"version": "v3", "reason": "the judges were wrong \u2014 all agree"}
    response = client.post(address, json=order)
    assert response.json() == {"run": "made-up", "round": 3, **order}
    overrules = json.loads((run / "overrules.json").read_text(encoding="utf-8"))
    assert overrules["3"]["reason"] == order["reason"]
    versions = client.get("/api/v1/runs/made-up/versions").json()["items"]
    assert versions[3]["overruled"] == order["reason"]
    assert client.get("/api/v1/runs/made-up").json()["version"] == "v3"
    assert audit(state).detail == order

    assert "needs a reason" in refused(
        client.post(address, json={"version": "v1", "reason": " "}), 422
    )
    assert "choose one of v0, v1, v2, v3" in refused(
        client.post(address, json={"version": "v9", "reason": "why"}), 422
    )
    refused(client.post("/api/v1/runs/other/promote", json=order), 404)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.usefixtures("run")
def test_two_promotions_at_once_come_one_after_the_other(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[int] = []
    most: list[int] = []

    def overrule(*_: Any, **given: Any) -> int:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return 3

    monkeypatch.setattr(runs, "overrule", overrule)
    monkeypatch.setattr(reports, "overrule", overrule)
    order = {"version": "v3", "reason": "why"}
    with ThreadPoolExecutor(4) as pool:
        sent = [
            *(pool.submit(client.post, "/api/v1/runs/made-up/promote", json=order) for _ in "ab"),
            *(pool.submit(client.post, "/runs/made-up/promote", data=order) for _ in "ab"),
        ]
        assert [item.result().status_code for item in sent] == [200] * 4
    assert most == [1] * 4
