"""What the API says: pages of lists, problem documents, and the OpenAPI description."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from rlhf.config import Config
from rlhf.service import facts
from rlhf.service.access import new_token
from rlhf.service.api import models, paging
from rlhf.service.api.idempotency import KEY_HEADER
from rlhf.service.app import create_app
from rlhf.service.database.models import Audit
from rlhf.service.problems import MEDIA_TYPE, Problem
from rlhf.service.state import State, open_state

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

LISTS = (
    "/api/v1/runs",
    "/api/v1/runs/made-up/nodes",
    "/api/v1/runs/made-up/versions",
    "/api/v1/runs/made-up/samples?node=round-01/evaluate",
    "/api/v1/streams",
    "/api/v1/streams/weekly/batches",
    "/api/v1/audit",
)
SINGLE = (
    "/api/v1/runs/made-up",
    "/api/v1/runs/made-up/metrics?node=round-02/ppo",
    "/api/v1/runs/made-up/log?node=sft",
    "/api/v1/runs/made-up/report",
    "/api/v1/streams/weekly/batches/week-2",
)


def answer(client: TestClient, path: str) -> Any:
    response = client.get(path)
    assert response.status_code == 200, response.text
    return response.json()


def walk(client: TestClient, path: str, *, limit: int) -> list[Any]:
    """Return all items of a list, page by page."""
    found: list[Any] = []
    join = "&" if "?" in path else "?"
    following = f"{path}{join}limit={limit}"
    while True:
        page = answer(client, following)
        assert len(page["items"]) <= limit
        found += page["items"]
        if page["next_cursor"] is None:
            return found
        assert len(page["items"]) == limit
        following = f"{path}{join}limit={limit}&cursor={page['next_cursor']}"


@pytest.fixture
def audited(state: State) -> None:
    with state.transaction() as session:
        for number in range(7):
            session.add(Audit(user="u", role="viewer", action="a", target=str(number), status=200))


@on_sqlite
@pytest.mark.parametrize("path", LISTS)
@pytest.mark.usefixtures("run", "audited")
def test_the_pages_of_a_list_make_the_list(client: TestClient, path: str) -> None:
    whole = walk(client, path, limit=200)
    assert whole
    assert walk(client, path, limit=1) == whole
    assert walk(client, path, limit=3) == whole


@on_sqlite
@pytest.mark.parametrize("path", LISTS)
@pytest.mark.usefixtures("run")
def test_what_is_no_page_is_refused(client: TestClient, path: str) -> None:
    for query in (
        "limit=0",
        "limit=201",
        "limit=x",
        "cursor=nonsense",
        "cursor=",
        "cursor=W10",
        f"cursor={paging.encode(-1)}",
        "cursor=" + "A" * 700,
        "cursor=%ff",
    ):
        response = client.get(f"{path}{'&' if '?' in path else '?'}{query}")
        assert response.status_code == 422, query
        assert response.headers["content-type"] == MEDIA_TYPE


@pytest.mark.usefixtures("audited")
def test_the_audit_log_comes_newest_first(client: TestClient) -> None:
    assert [row["target"] for row in walk(client, "/api/v1/audit", limit=2)] == [*"6543210"]


@on_sqlite
@pytest.mark.parametrize("path", SINGLE)
@pytest.mark.usefixtures("run")
def test_single_answers_fit_their_models(client: TestClient, path: str) -> None:
    assert answer(client, path)


@on_sqlite
@pytest.mark.usefixtures("run")
def test_the_api_says_what_the_facts_are(client: TestClient, state: State) -> None:
    opened = facts.open_run(state, "made-up")
    nodes = walk(client, "/api/v1/runs/made-up/nodes", limit=10)
    assert [node["name"] for node in nodes] == [node.name for node in opened.plan.nodes]
    assert nodes[-1]["after"] == list(opened.plan.nodes[-1].after)
    assert answer(client, "/api/v1/runs/made-up/report") == facts.run_report(state, opened)
    metrics = answer(
        client,
        "/api/v1/runs/made-up/metrics?node=round-02/ppo&name=rollout/kl&after=10&before=14",
    )
    assert [row["step"] for row in metrics["rows"]] == [11, 12, 13]
    assert metrics["rows"][0].keys() == {"step", "rollout/kl"}
    versions = walk(client, "/api/v1/runs/made-up/versions", limit=50)
    assert versions[1]["state"] == "promoted"
    assert all("path" not in version for version in versions)


@on_sqlite
@pytest.mark.usefixtures("run")
def test_unknown_names_and_addresses_are_problems_that_help(client: TestClient) -> None:
    for path, said in (
        ("/api/v1/runs/other", "there is made-up"),
        ("/api/v1/runs/made-up/log?node=nowhere", "there is sft"),
        ("/api/v1/streams/other/batches", "there is weekly"),
        ("/api/v1/streams/weekly/batches/other", "week-1, week-2, week-3"),
        ("/api/v1/nowhere", "openapi.json"),
        ("/nowhere", "openapi.json"),
    ):
        response = client.get(path)
        assert response.status_code == 404
        assert response.headers["content-type"] == MEDIA_TYPE
        tree = response.json()
        assert said in tree["detail"]
        assert (tree["status"], tree["title"]) == (404, "Not Found")


@on_sqlite
def test_other_methods_are_refused_as_problems(client: TestClient) -> None:
    for path in ("/api/v1/runs", "/api/v1/nowhere", "/", "/healthz"):
        for method in ("HEAD", "OPTIONS", "TRACE", "DELETE", "PATCH", "QQ"):
            response = client.request(method, path)
            assert response.status_code in (404, 405), f"{method} {path}"
            assert response.headers["content-type"] == MEDIA_TYPE
            if response.status_code == 405:
                assert response.headers["allow"]


@on_sqlite
@pytest.mark.parametrize(
    "path", ["/api/v1/runs/%00", "/%00", "/api/v1/\ud7ff", "/api/v1/" + "x" * 9000]
)
def test_odd_addresses_are_answered(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404
    assert client.post(path).status_code in (404, 405)


def test_a_zero_byte_in_an_address_can_be_audited(client: TestClient, state: State) -> None:
    assert client.post("/api/v1/runs/%00/launch", json={}).status_code == 404
    with state.reading() as session:
        assert session.query(Audit).one().target == "/api/v1/runs/\\0/launch"
    assert client.get("/audit?user=%00").status_code == 200


@pytest.fixture
def tokens(config: Config) -> dict[str, str]:
    """Headers of each role, for a service that asks for tokens."""
    state = open_state(config)
    with state.transaction() as session:
        made = {
            role: new_token(session, name=f"a {role}", role=role, days=None)
            for role in ("viewer", "annotator", "operator")
        }
    state.engine.dispose()
    return {role: f"Bearer {token}" for role, token in made.items()}


@on_sqlite
def test_reading_needs_a_token_where_tokens_are_needed(
    config: Config, tokens: dict[str, str]
) -> None:
    strict = open_state(replace(config, service=replace(config.service, tokens=True)))
    with TestClient(create_app(strict), base_url="http://127.0.0.1") as client:
        for path in (*LISTS, *SINGLE, "/metrics"):
            assert client.get(path).status_code == 401, path
        viewer, operator = ({"Authorization": tokens[role]} for role in ("viewer", "operator"))
        assert client.get("/api/v1/runs", headers=viewer).status_code == 200
        assert client.get("/metrics", headers=viewer).status_code == 200
        assert client.get("/api/v1/audit", headers=viewer).status_code == 403
        assert client.get("/api/v1/audit", headers=operator).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200
    strict.engine.dispose()


@pytest.mark.parametrize(
    "place",
    [0, 7, paging.MAX_NUMBER - 1, "", "made-up", "\u00e4 \u20ac", "\u4e2d" * 85, "\udcff" * 80],
)
def test_a_cursor_leads_back_to_its_place(place: int | str) -> None:
    cursor = paging.encode(place)
    assert len(cursor) <= 600
    assert paging.decode(cursor, type(place)()) == place


def test_pages_of_names_are_whole_while_names_come_and_go() -> None:
    names = ["a", "b", "c", "d", "e"]
    first, following = paging.cut_names(names, cursor=None, limit=2)
    assert first == ["a", "b"]
    second, following = paging.cut_names(["a", "bb", *names[3:]], cursor=following, limit=2)
    assert second == ["bb", "d"]
    assert paging.cut_names(names, cursor=following, limit=2) == (["e"], None)
    assert paging.cut_names(names, cursor=following, limit=1) == (["e"], None)
    assert paging.cut(names, cursor=None, limit=5) == (names, None)


@pytest.mark.parametrize("place", [-1, True, None, 1.5, paging.MAX_NUMBER, "text"])
def test_a_cursor_of_another_list_is_refused(place: Any) -> None:
    with pytest.raises(Problem, match="cursor is not one"):
        paging.decode(paging.encode(place), 0)


@pytest.mark.parametrize(
    ("model", "row"),
    [
        (models.RunModel, facts.RunSummary),
        (models.NodeModel, facts.NodeRow),
        (models.StreamModel, facts.StreamRow),
        (models.BatchModel, facts.BatchRow),
    ],
)
def test_models_hold_every_fact(model: Any, row: Any) -> None:
    assert list(model.model_fields) == [field.name for field in fields(row)]


@on_sqlite
def test_the_description_says_what_everything_is(client: TestClient) -> None:
    schema = answer(client, "/api/v1/openapi.json")
    paths = schema["paths"]
    assert all(path.startswith(("/api/v1/", "/healthz", "/readyz", "/metrics")) for path in paths)
    said = schema["components"]["schemas"]
    assert "HTTPValidationError" not in said
    for path, operations in paths.items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            assert operation["description"], where
            assert operation["tags"], where
            assert MEDIA_TYPE in operation["responses"]["default"]["content"], where
            names = {item["name"] for item in operation.get("parameters", [])}
            assert (KEY_HEADER in names) == (method == "post"), where
            if "annotation" in operation["tags"]:
                continue
            for item in operation.get("parameters", []):
                assert item["in"] == "path" or item["description"], f"{where} {item['name']}"
    for module in (models, paging):
        for name in dir(module):
            for field, item in said.get(name, {}).get("properties", {}).items():
                is_reference = "$ref" in item
                assert is_reference or item.get("description"), f"{name}.{field}"
