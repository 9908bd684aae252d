"""`rlhf serve` as a process: where it listens, whom it lets in, how it ends."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import served
from people_run import write_batch
from sqlalchemy import select

from rlhf.config import Config
from rlhf.data.ledger import Store
from rlhf.data.records import Kind
from rlhf.errors import ConfigError
from rlhf.service import server
from rlhf.service.database.models import Token, User, now
from rlhf.service.inbox import drop
from rlhf.service.state import State

ONE_DATABASE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def serving(config: Config) -> Iterator[served.Served]:
    with served.serving(config) as found:
        yield found


def get(
    port: int, path: str, headers: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with closing(connection):
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_it_answers_says_nothing_of_itself_and_ends_in_order(serving: served.Served) -> None:
    status, headers, _ = get(serving.port, "/readyz")
    assert status == 200
    assert "Server" not in headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert serving.stop() == 0


def test_killed_and_started_again_on_the_same_port(config: Config, state: State) -> None:
    with served.serving(config) as first:
        status, _, body = get(first.port, "/api/v1/runs")
        assert (status, json.loads(body)["items"]) == (200, [])
        first.kill()
        with served.serving(config, f"service.port={first.port}") as second:
            assert second.port == first.port
            assert get(second.port, "/readyz")[0] == 200
            assert second.stop() == 0


@ONE_DATABASE
def test_its_watcher_takes_files_in(serving: served.Served, state: State, tmp_path: Path) -> None:
    drop(state, write_batch(tmp_path / "week-01.jsonl"), "week-01.jsonl")
    store = Store(state.store, "weekly")
    while not store.ids(Kind.batch):
        assert serving.process.poll() is None
        assert get(serving.port, "/healthz")[0] == 200
    assert serving.stop() == 0


@ONE_DATABASE
def test_who_asks_is_who_connects(config: Config, state: State) -> None:
    token = served.make_token(state, "ann", "operator")
    with served.serving(config, "service.tokens=true") as found:
        forged = {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": "localhost"}
        assert get(found.port, "/api/v1/runs", forged)[0] == 401
        assert get(found.port, "/api/v1/runs", {"Authorization": f"Bearer {token}"})[0] == 200


def refusal(config: Config, *more: str) -> str:
    done = subprocess.run(
        served.arguments(config, *more), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    return done.stderr


@ONE_DATABASE
@pytest.mark.parametrize("more", ["service.host=0.0.0.0", "service.tokens=true"])
def test_where_tokens_are_needed_an_operator_has_to_have_one(config: Config, more: str) -> None:
    said = refusal(config, more)
    assert f"{more} needs a token from everybody" in said
    assert "`rlhf token NAME role=operator`" in said


@ONE_DATABASE
def test_an_address_in_use_is_named(config: Config) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refusal(config, f"service.port={port}")
    assert f"service.port={port} cannot be used (Address already in use): end what listens" in said


@ONE_DATABASE
def test_an_inbox_that_cannot_be_opened_is_named_before_anything_listens(config: Config) -> None:
    assert "service.inbox=nosuch://x cannot be opened" in refusal(
        config, 'service.inbox="nosuch://x"'
    )


def test_only_an_operators_token_that_counts_opens_the_service(state: State) -> None:
    service = replace(state.config.service, tokens=True)
    strict = replace(state, config=replace(state.config, service=service))
    served.make_token(state, "vic", "viewer")
    served.make_token(state, "ann", "annotator")
    with pytest.raises(ConfigError, match="no operator has one"):
        server.check_access(strict)
    served.make_token(state, "olga", "operator")
    server.check_access(strict)
    for field in ("expires", "revoked"):
        with state.transaction() as session:
            olga = session.scalars(select(User).where(User.name == "olga")).one()
            token = session.scalars(select(Token).where(Token.user_id == olga.id)).one()
            token.expires = token.revoked = None
            server_says_no = now() - timedelta(seconds=1)
            setattr(token, field, server_says_no)
        with pytest.raises(ConfigError, match="no operator has one"):
            server.check_access(strict)
    server.check_access(state)
    for name, why in (("tokens", True), ("allowed_hosts", ["a.example", "b.example"])):
        service = replace(state.config.service, **{name: why})
        needs = replace(state, config=replace(state.config, service=service))
        said = str(why).lower().replace("'", "").replace(" ", "")
        with pytest.raises(ConfigError, match=re.escape(f"service.{name}={said} needs a token")):
            server.check_access(needs)


@ONE_DATABASE
def test_urls_of_both_families(config: Config) -> None:
    with closing(server.listen(replace_service(config, host="127.0.0.1"))) as listener:
        assert server.address_of(listener).startswith("http://127.0.0.1:")
        # What asyncio asks before it switches Nagle's delay off.
        assert listener.proto == socket.IPPROTO_TCP
    if socket.has_ipv6:
        with closing(server.listen(replace_service(config, host="::1"))) as listener:
            assert server.address_of(listener).startswith("http://[::1]:")


def replace_service(config: Config, **values: object) -> Config:
    return replace(config, service=replace(config.service, port=0, **values))
