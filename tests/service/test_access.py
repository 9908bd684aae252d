"""Who gets in, who does not, what a browser can be tricked into, and what every answer says."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import anyio
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import sessionmaker

from rlhf import serving
from rlhf.errors import ConfigError
from rlhf.service import facts, launching
from rlhf.service.access import (
    COOKIE,
    CSRF_HEADER,
    clean_name,
    find_user,
    new_token,
    revoke_tokens,
)
from rlhf.service.app import create_app
from rlhf.service.database.models import Audit, BrowserSession, Token, User, now
from rlhf.service.guards import FORM_BYTES, HEADERS, PROXIES, host_name
from rlhf.service.heads import FORM_TYPE, UPLOAD_TYPE
from rlhf.service.pages.login import local_path
from rlhf.service.problems import DATABASE_SILENT, DISK_FULL
from rlhf.service.state import State

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

BASE = "http://127.0.0.1:8400"
WRITE = "/api/v1/runs"
ORDER = {"recipe": "none-such"}
IN = 422
"""Answer to ORDER of somebody who was let in."""

Open = Callable[..., TestClient]


@pytest.fixture
def opened(state: State) -> Iterator[Open]:
    """Clients of the service with other settings."""
    clients = []

    def make(**service: Any) -> TestClient:
        changed = replace(state.config.service, **service)
        app = create_app(replace(state, config=replace(state.config, service=changed)))
        clients.append(TestClient(app, base_url=BASE, follow_redirects=False).__enter__())
        return clients[-1]

    yield make
    for client in clients:
        client.__exit__()


@pytest.fixture
def token(state: State) -> str:
    with state.transaction() as session:
        return new_token(session, name="olga", role="operator", days=None)


def sign_in(client: TestClient, state: State, **form: str) -> str:
    """Open a session; returns its secret."""
    assert client.post("/login", data=form or {"name": "Olga"}).status_code == 303
    with state.reading() as session:
        return (
            session.scalars(select(BrowserSession).order_by(BrowserSession.id.desc())).first().csrf
        )


def write(client: TestClient, **headers: Any) -> int:
    return client.post(WRITE, json=ORDER, headers=headers).status_code


def rows(state: State) -> list[tuple[str, str, int]]:
    with state.reading() as session:
        found = session.scalars(select(Audit).order_by(Audit.id))
        return [(row.user, row.action, row.status) for row in found]


# What a browser can be tricked into


@on_sqlite
@pytest.mark.parametrize("tokens", [False, True])
def test_a_write_needs_its_sessions_secret(
    opened: Open, state: State, token: str, tokens: bool
) -> None:
    client = opened(tokens=tokens)
    secret = sign_in(client, state, token=token, name="Olga")
    for wrong in ("", "wrong", secret[:-1], "\u00e4"):
        assert write(client, **{CSRF_HEADER: wrong.encode()}) == 403
        answer = client.post("/runs", data={"csrf": wrong})
        assert answer.status_code == 403
        assert "load the page again" in answer.json()["detail"]
    assert write(client) == 403
    # A browser adds these by itself where a proxy asks for them.
    assert write(client, Authorization="Basic b2xnYTpvbGdh") == 403
    assert client.post("/runs", data={}).status_code == 403
    assert write(client, **{CSRF_HEADER: secret}) == IN
    assert client.post("/runs", data={"csrf": secret}).status_code == IN
    kind = {"Content-Type": "Application/X-WWW-Form-Urlencoded; charset=utf-8"}
    assert client.post("/runs", content=f"csrf={secret}", headers=kind).status_code == IN
    assert write(client, Authorization=f"Bearer {token}") == IN
    assert client.get("/api/v1/runs").status_code == 200


@on_sqlite
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("how", ["cookie", "token", "nothing"])
def test_other_sites_cannot_write(
    opened: Open, state: State, token: str, tokens: bool, how: str
) -> None:
    client = opened(tokens=tokens)
    own = {}
    if how == "cookie":
        own = {CSRF_HEADER: sign_in(client, state, token=token, name="Olga")}
    elif how == "token":
        own = {"Authorization": f"Bearer {token}"}
    for foreign in (
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:8401"},
        {"Origin": "http://["},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": BASE},
    ):
        answer = client.post(WRITE, json=ORDER, headers={**own, **foreign})
        assert answer.status_code == 403, foreign
        assert "another site's page" in answer.json()["detail"]
        assert client.post("/login", data={"name": "x"}, headers=foreign).status_code == 403
    for fine in ({"Origin": BASE, "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        is_in = how != "nothing" or not tokens
        assert write(client, **own, **fine) == (IN if is_in else 401)


@on_sqlite
def test_only_known_hosts_are_answered(opened: Open) -> None:
    def status(client: TestClient, host: str) -> int:
        return client.get("/api/v1/runs", headers={"Host": host}).status_code

    plain = opened()
    for host in ("127.0.0.1", "localhost:1", "LOCALHOST", "[::1]", "[::1]:8400"):
        assert status(plain, host) == 200, host
    strange = ("evil.example", "", "[::1", "::1:8400", "127.0.0.1.evil.example", "localhost:x")
    for host in strange:
        assert status(plain, host) == 421, host
    named = opened(allowed_hosts=["RLHF.example.org"])
    assert status(named, "rlhf.EXAMPLE.org:8443") == 401
    assert status(named, "evil.example") == 421
    assert {status(opened(tokens=True), host) for host in ("evil.example", "127.0.0.1")} == {401}
    assert status(opened(host="::1"), "[::1]:8400") == 200


def test_hosts_are_read_as_browsers_write_them() -> None:
    for text in ("Example.org", "example.org:80", "example.org:"):
        assert host_name(text) == "example.org"
    assert host_name("[fe80::1]:80") == host_name("fe80::1") == "fe80::1"


@on_sqlite
def test_a_proxy_in_between_needs_tokens(opened: Open, token: str) -> None:
    plain, strict = opened(), opened(tokens=True)
    for name in PROXIES:
        answer = plain.get("/api/v1/runs", headers={name: "192.0.2.7"})
        assert answer.status_code == 403
        assert "service.tokens=true" in answer.json()["detail"]
        signed = {name: "192.0.2.7", "Authorization": f"Bearer {token}"}
        assert strict.get("/api/v1/runs", headers=signed).status_code == 200
    assert opened(allowed_hosts=["rlhf.example.org"]).get("/api/v1/runs").status_code == 401


# Sessions


@on_sqlite
def test_cookies_are_hidden_and_safe_behind_https(opened: Open, token: str) -> None:
    for tokens, hours in ((True, 12), (False, 365 * 24)):
        for origin, is_secure in (("https://127.0.0.1:8400", True), (BASE, False), (None, False)):
            client = opened(tokens=tokens)
            headers = {"Origin": origin} if origin else {}
            form = {"token": token, "name": "Olga"}
            said = client.post("/login", data=form, headers=headers).headers["Set-Cookie"]
            parts = {part.strip().lower() for part in said.split(";")}
            assert {"httponly", "samesite=lax", "path=/", f"max-age={hours * 3600}"} <= parts
            assert ("secure" in parts) is is_secure


@on_sqlite
def test_sessions_end(opened: Open, state: State, token: str) -> None:
    client = opened(tokens=True)

    def end_token(**values: Any) -> None:
        with state.transaction() as session:
            for row in session.scalars(select(Token)):
                for name, value in values.items():
                    setattr(row, name, value)

    def revoke() -> None:
        with state.transaction() as session:
            assert revoke_tokens(session, name="olga") == 1

    def expire() -> None:
        with state.transaction() as session:
            session.scalars(select(BrowserSession)).one().expires = now()

    def sign_out() -> None:
        with state.reading() as session:
            secret = session.scalars(select(BrowserSession)).one().csrf
        cookie = client.cookies[COOKIE]
        assert client.post("/logout", data={"csrf": secret}).status_code == 303
        assert COOKIE not in client.cookies
        client.cookies.set(COOKIE, cookie)

    ends = (revoke, lambda: end_token(expires=now()), expire, sign_out)
    for end in ends:
        end_token(revoked=None, expires=None)
        client.cookies.clear()
        sign_in(client, state, token=token)
        assert client.get(WRITE).status_code == 200
        end()
        assert client.get(WRITE).status_code == 401
        with state.transaction() as session:
            for row in session.scalars(select(BrowserSession)):
                row.expires = now()
    # Those that are over go when the next one is opened.
    end_token(revoked=None, expires=None)
    sign_in(client, state, token=token)
    with state.reading() as session:
        assert len(session.scalars(select(BrowserSession)).all()) == 1


@on_sqlite
def test_a_name_is_no_token(opened: Open, state: State) -> None:
    client = opened()
    sign_in(client, state, name="  Olga   of Oslo ")
    assert "Olga of Oslo" in client.get("/login").text
    strict = opened(tokens=True)
    strict.cookies = client.cookies
    assert strict.get(WRITE).status_code == 401
    for name in ("", " ", "x" * 101, "a\x00b", "a\u202eb"):
        assert client.post("/login", data={"name": name}).status_code in (403, 422)
        with pytest.raises(ConfigError, match="is no name"):
            clean_name(name)


@pytest.mark.parametrize(
    "target",
    ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:x", "", "/a\nb"],
)
def test_signing_in_leads_nowhere_else(target: str) -> None:
    assert local_path(target) == "/"
    assert local_path("/runs/x?rounds=all#end") == "/runs/x?rounds=all#end"


@on_sqlite
def test_a_refused_sign_in_needs_one_connection(opened: Open, state: State) -> None:
    engine = create_engine(state.engine.url, pool_size=1, max_overflow=0, pool_timeout=1)
    config = replace(state.config, service=replace(state.config.service, tokens=True))
    narrow = State(config, engine, sessionmaker(engine, expire_on_commit=False))
    with TestClient(create_app(narrow), base_url=BASE) as client:
        assert client.post("/login", data={"token": "none"}).status_code == 403
    engine.dispose()
    assert rows(state) == [("(nobody)", "POST /login", 403)]


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_two_first_sign_ins_under_one_name_are_one_user(state: State) -> None:
    found: list[User] = []

    def second() -> None:
        with state.transaction() as session:
            found.append(find_user(session, "ann", role="operator"))

    thread = threading.Thread(target=second)
    with state.transaction() as session:
        found.append(find_user(session, "ann", role="operator"))
        thread.start()
        # It looks, finds nobody, and waits for the row of the first.
        time.sleep(0.5)
    thread.join(30)
    assert [user.id for user in found] == [found[0].id] * 2


# Bodies


@on_sqlite
@pytest.mark.parametrize("kind", [UPLOAD_TYPE, "application/json", FORM_TYPE])
def test_a_large_body_is_refused_wherever_it_is_sent(opened: Open, kind: str) -> None:
    client = opened()
    data = b"x" * (FORM_BYTES + 1)
    for path in (WRITE, "/login", "/nowhere", "/api/v1/streams/a/b/batches"):
        answer = client.post(path, content=data, headers={"Content-Type": kind})
        assert answer.status_code == 413, path
        assert "bytes at most" in answer.json()["detail"]
    for key in ({}, {"Idempotency-Key": "k"}):
        pieces = (data[at : at + 2**16] for at in range(0, len(data), 2**16))
        headers = {"Content-Type": kind, **key}
        assert client.post(WRITE, content=pieces, headers=headers).status_code == 413


@on_sqlite
def test_nothing_of_an_upload_is_read_before_its_sender_is_known(
    state: State, opened: Open
) -> None:
    app = opened(tokens=True).app
    for kind in (UPLOAD_TYPE, "application/json", FORM_TYPE):
        taken, sent = [], []

        async def receive(taken: list[int] = taken) -> Any:
            taken.append(1)
            return {"type": "http.request", "body": b"a=b&" * 1000, "more_body": True}

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        head = {"host": "127.0.0.1", "content-type": kind, "cookie": f"{COOKIE}=x"}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/api/v1/streams/weekly/batches",
            "query_string": b"name=a.jsonl",
            "headers": [(name.encode(), value.encode()) for name, value in head.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        anyio.run(app, scope, receive, send)
        assert sent[0]["status"] in (401, 403)
        assert taken == []


# Answers


@on_sqlite
def test_every_answer_has_the_headers(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    client, strict = opened(), opened(tokens=True)
    away = OperationalError("SELECT", {}, Exception("connection refused"))
    errors = {
        500: ZeroDivisionError(),
        503: away,
        507: OSError(errno.ENOSPC, "No space left on device"),
    }

    def fail(error: Exception) -> Any:
        def known(_: State) -> list[str]:
            raise error

        for name in ("known_runs", "list_runs"):
            monkeypatch.setattr(facts, name, known)
        return client.get(WRITE)

    answers = {
        200: client.get("/healthz"),
        401: strict.get(WRITE),
        403: client.post(WRITE, headers={"Origin": "null"}),
        404: client.get("/nowhere"),
        413: client.post(WRITE, content=b"x" * (FORM_BYTES + 1)),
        421: client.get("/", headers={"Host": "evil.example"}),
        **{status: fail(error) for status, error in errors.items()},
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert answers[401].headers["WWW-Authenticate"] == "Bearer"
    assert answers[503].json()["detail"] == DATABASE_SILENT
    assert answers[507].json()["detail"] == DISK_FULL
    assert fail(PoolTimeoutError("QueuePool")).status_code == 503
    page = client.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 503
    assert page.headers["Content-Type"].startswith("text/html")
    asset = client.get("/static/style.css")
    assert asset.headers["Cache-Control"] == "no-cache"


# The audit log


@on_sqlite
def test_a_write_that_fails_is_audited(
    opened: Open, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: Any, **given: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(launching, "launch", launch)
    client = opened()
    assert client.post(WRITE, json={"recipe": "quickstart"}).status_code == 500
    assert rows(state) == [("local", f"POST {WRITE}", 500)]


@on_sqlite
def test_what_nobody_asks_for_is_not_audited_and_neither_are_drafts(
    opened: Open, state: State, token: str
) -> None:
    client = opened(tokens=True)
    for path in (WRITE, "/nowhere", "/logout"):
        assert client.post(path).status_code in (303, 401, 404)
    signed = {"Authorization": f"Bearer {token}"}
    assert client.post("/api/v1/tasks/next", headers=signed).status_code == 200
    answer = client.put("/api/v1/assignments/x/draft", json={}, headers=signed)
    assert answer.status_code == 404
    assert rows(state) == []
    assert client.post("/api/v1/assignments/x/skip", json={"reason": "r"}, headers=signed)
    assert rows(state) == [("olga", "POST /api/v1/assignments/{key}/skip", 404)]


@on_sqlite
def test_tokens_that_the_command_line_makes_and_ends_are_audited(
    state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"role": "", "days": "", "revoke": "false"}
    serving.token(state.config, " ann ", **{**plain, "role": "viewer", "days": "30"})
    serving.token(state.config, "ann", **{**plain, "revoke": "true"})
    with state.reading() as session:
        found = session.scalars(select(Audit).order_by(Audit.id)).all()
    assert [(row.user, row.action, row.target) for row in found] == [
        ("(terminal)", "token", "ann")
    ] * 2
    assert [row.detail for row in found] == [{"role": "viewer", "days": 30}, {"revoked": 1}]
    for name, given in (
        ("ann", {"role": "viewer", "days": "\u00b2"}),
        ("a\nb\x00", {"role": "viewer"}),
        ("", {"role": "viewer"}),
        ("nobody", {"revoke": "true"}),
        ("ann", {}),
    ):
        with pytest.raises(ConfigError):
            serving.token(state.config, name, **{**plain, **given})
    assert len(rows(state)) == 2
    assert capsys.readouterr().out.startswith("rlhf_")
