"""Idempotency keys: the same request again does nothing and gets the same answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from http import HTTPStatus
from typing import Any

import anyio
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from rlhf.config import Config
from rlhf.errors import LauncherError
from rlhf.lease import MISSED_SECONDS, this_process
from rlhf.service import launching
from rlhf.service.access import new_token
from rlhf.service.api import idempotency
from rlhf.service.api.idempotency import (
    HOLDER,
    KEPT,
    KEY_HEADER,
    REPLAYED,
    Answer,
    Claim,
    claim,
    settle,
)
from rlhf.service.app import create_app
from rlhf.service.database.models import Audit, Idempotency, Launch, now
from rlhf.service.problems import MEDIA_TYPE, Problem
from rlhf.service.state import State, open_state

START = {"recipe": "quickstart", "run": "mine"}


class Work:
    """Launches that are counted; `before` is called in each."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.before: Callable[[], Any] = lambda: None

    def launch(self, state: State, run: str, **given: Any) -> Launch:
        self.runs.append(run)
        self.before()
        said = f"launch {len(self.runs)}"
        row = Launch(run=run, user=given["user"], state="launched", launcher="local", output=said)
        row.id, row.created, row.changed = len(self.runs), now(), now()
        return row


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    found = Work()
    monkeypatch.setattr(launching, "launch", found.launch)
    return found


@pytest.fixture
def other(config: Config) -> Iterator[TestClient]:
    """A second server on the same database."""
    state = open_state(config)
    with TestClient(create_app(state), base_url="http://127.0.0.1:8401") as client:
        yield client
    state.engine.dispose()


def start(client: TestClient, key: str, order: Any = None, **headers: str) -> Any:
    return client.post("/api/v1/runs", json=order or START, headers={KEY_HEADER: key, **headers})


def test_the_same_request_again_gets_the_same_answer(
    client: TestClient, other: TestClient, state: State, work: Work
) -> None:
    first = start(client, "k")
    assert first.status_code == 202
    assert REPLAYED not in first.headers
    for server in (client, other):
        again = start(server, "k")
        assert again.headers[REPLAYED] == "true"
        assert (again.status_code, again.json()) == (first.status_code, first.json())
        assert again.headers["content-type"] == first.headers["content-type"]
    assert work.runs == ["mine"]
    with state.reading() as session:
        rows = session.scalars(select(Audit).order_by(Audit.id)).all()
    assert [row.detail.get("replayed", False) for row in rows] == [False, True, True]
    assert {row.user for row in rows} == {"local"}
    assert start(client, "another").json()["output"] == "launch 2"
    assert client.post("/api/v1/runs", json=START).json()["output"] == "launch 3"


@pytest.mark.parametrize(
    ("path", "order"),
    [
        ("/api/v1/runs", {**START, "run": "other"}),
        ("/api/v1/runs?x=1", START),
        ("/api/v1/runs/mine/launch", START),
    ],
)
def test_a_key_belongs_to_one_request(
    client: TestClient, work: Work, path: str, order: dict[str, Any]
) -> None:
    start(client, "k")
    response = client.post(path, json=order, headers={KEY_HEADER: "k"})
    assert response.status_code == 422
    assert response.headers["content-type"] == MEDIA_TYPE
    assert "was used for another request" in response.json()["detail"]
    assert work.runs == ["mine"]


def test_a_refusal_is_an_answer_too(client: TestClient, work: Work) -> None:
    order = {"recipe": "quickstart", "settings": {"seed": {}}}
    first, again = start(client, "k", order), start(client, "k", order)
    assert first.status_code == again.status_code == 422
    assert first.json() == again.json()
    assert again.headers["content-type"] == MEDIA_TYPE
    assert (REPLAYED in first.headers, again.headers[REPLAYED]) == (False, "true")


def test_an_error_that_time_mends_frees_the_key(client: TestClient, work: Work) -> None:
    for error, status in (
        (LauncherError("squeue does not answer"), 502),
        (Problem(HTTPStatus.CONFLICT, "the run is busy"), 409),
        (Problem(HTTPStatus.NOT_FOUND, "there is no such run yet"), 404),
    ):

        def fail(error: Exception = error) -> None:
            raise error

        work.before = fail
        assert start(client, "k").status_code == status
    work.before = lambda: None
    assert start(client, "k").status_code == 202
    assert len(work.runs) == 4


def test_a_bug_frees_the_key(state: State, work: Work) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    app = create_app(state)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        work.before = fail
        assert start(client, "k").status_code == 500
        work.before = lambda: None
        assert start(client, "k").status_code == 202


def test_a_first_request_under_way_is_a_conflict(
    client: TestClient, other: TestClient, work: Work
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(30)

    work.before = wait
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(start, client, "k")
        assert begun.wait(30)
        second = start(other, "k")
        go_on.set()
        assert first.result(30).status_code == 202
    assert second.status_code == 409
    assert "still under way" in second.json()["detail"]
    assert start(other, "k").headers[REPLAYED] == "true"
    assert work.runs == ["mine"]


def test_many_at_once_do_the_work_once(client: TestClient, other: TestClient, work: Work) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: start((client, other)[i % 2], "k"), range(24)))
    assert work.runs == ["mine"]
    statuses = {answer.status_code for answer in answers}
    assert 202 in statuses
    assert statuses <= {202, 409}
    done = [answer for answer in answers if answer.status_code == 202]
    assert all(answer.json() == done[0].json() for answer in done)
    assert sum(REPLAYED not in answer.headers for answer in done) == 1


@pytest.mark.parametrize("key", ["", "x" * 201, "a b", "\u00e4", "tab\there"])
def test_a_key_that_could_not_be_stored_is_refused(
    client: TestClient, work: Work, key: str
) -> None:
    response = client.post("/api/v1/runs", json=START, headers={KEY_HEADER.encode(): key.encode()})
    assert response.status_code == 422
    assert KEY_HEADER in response.json()["detail"]
    assert work.runs == []


def test_the_longest_key_fits(client: TestClient, work: Work) -> None:
    assert start(client, "~" * 200).status_code == 202
    assert start(client, "~" * 200).headers[REPLAYED] == "true"


def test_keys_are_their_caller_s_and_need_the_role(config: Config, work: Work) -> None:
    strict = open_state(replace(config, service=replace(config.service, tokens=True)))
    with strict.transaction() as session:
        made = {
            name: new_token(session, name=name, role=role, days=None)
            for name, role in (("ann", "operator"), ("bob", "operator"), ("eve", "viewer"))
        }
    signed = {name: {"Authorization": f"Bearer {token}"} for name, token in made.items()}
    with TestClient(create_app(strict), base_url="http://127.0.0.1") as client:
        assert start(client, "k").status_code == 401
        assert start(client, "k", **signed["eve"]).status_code == 403
        assert start(client, "k", **signed["ann"]).json()["user"] == "ann"
        assert start(client, "k", **signed["bob"]).json()["user"] == "bob"
        assert start(client, "k", **signed["ann"]).headers[REPLAYED] == "true"
        # A role that was given meanwhile counts: the refusal was not kept.
        with strict.transaction() as session:
            new_token(session, name="eve", role="operator", days=None)
        assert start(client, "k", **signed["eve"]).status_code == 202
        with strict.transaction() as session:
            new_token(session, name="eve", role="viewer", days=None)
            number = len(session.scalars(select(Idempotency)).all())
        assert number == 3
    strict.engine.dispose()
    assert len(work.runs) == 3


def test_a_claim_of_a_server_that_is_gone_ends(state: State) -> None:
    claimed = claim(state, "ann", "k", "digest")
    assert isinstance(claimed, Claim)
    with pytest.raises(Problem, match="under way"):
        claim(state, "ann", "k", "digest")
    own = this_process("")
    elsewhere = replace(own, host="elsewhere")

    def hold(holder: Any) -> None:
        with state.transaction() as session:
            session.get_one(Idempotency, claimed.id).body = {HOLDER: asdict(holder)}

    # Where it cannot be seen, its heartbeat counts.
    for alive in (own, elsewhere, replace(own, heartbeat=0.0)):
        hold(alive)
        with pytest.raises(Problem, match="under way"):
            claim(state, "ann", "k", "digest")
    hold(replace(elsewhere, heartbeat=time.time() - MISSED_SECONDS - 1))
    taken = claim(state, "ann", "k", "digest")
    assert isinstance(taken, Claim)
    claimed, first = taken, claimed
    hold(replace(own, start=own.start - 1))
    taken = claim(state, "ann", "k", "digest")
    assert isinstance(taken, Claim)
    for answer in (None, Answer(200, {})):
        settle(state, first, answer)
    # The first server comes back: its answer must not take the place of the second one's.
    for answer in (None, Answer(200, {})):
        settle(state, claimed, answer)
        with pytest.raises(Problem, match="under way"):
            claim(state, "ann", "k", "digest")
    settle(state, taken, Answer(200, {"a": 1}))
    assert claim(state, "ann", "k", "digest") == Answer(200, {"a": 1})


def test_a_claim_that_is_worked_on_is_renewed(
    client: TestClient, state: State, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "HEARTBEAT_SECONDS", 0.01)
    beats: set[float] = set()

    def wait() -> None:
        end = time.monotonic() + 30
        while len(beats) < 3 and time.monotonic() < end:
            with state.reading() as session:
                beats.add(session.scalars(select(Idempotency)).one().body[HOLDER]["heartbeat"])

    work.before = wait
    assert start(client, "k").status_code == 202
    assert len(beats) == 3
    assert start(client, "k").headers[REPLAYED] == "true"


@pytest.mark.usefixtures("run")
def test_no_kind_of_body_leads_around_a_key(client: TestClient, work: Work) -> None:
    headers = {KEY_HEADER: "k", "Content-Type": "application/octet-stream"}
    answers = [client.post("/api/v1/runs/made-up/launch", headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[1].headers[REPLAYED] == "true"
    assert work.runs == ["made-up"]


def test_answers_are_kept_for_a_while(client: TestClient, state: State, work: Work) -> None:
    start(client, "k")
    for age, number in ((KEPT * 0.99, 1), (KEPT * 1.01, 2)):
        with state.transaction() as session:
            session.scalars(select(Idempotency)).one().created = now() - age
        start(client, "k")
        assert len(work.runs) == number


def test_a_request_that_breaks_off_takes_no_key(state: State, work: Work) -> None:
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": b'{"recipe":', "more_body": True}]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"host": "127.0.0.1", "content-type": "application/json", KEY_HEADER.lower(): "k"}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/api/v1/runs",
        "raw_path": b"/api/v1/runs",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    anyio.run(create_app(state), scope, receive, send)
    assert sent[0]["status"] == 400
    assert work.runs == []
    with state.reading() as session:
        assert session.scalars(select(Idempotency)).all() == []


def test_pages_and_reads_take_no_keys(client: TestClient, state: State) -> None:
    client.get("/api/v1/runs", headers={KEY_HEADER: "k"})
    client.post("/nowhere", headers={KEY_HEADER: "k"})
    with state.reading() as session:
        assert session.scalars(select(Idempotency)).all() == []
