"""The client against servers that are absent, slow, broken or another program."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlhf.config import GeneratorSettings
from rlhf.errors import ConfigError, StageError
from rlhf.inference import vllm_client
from rlhf.inference.vllm_client import TOKEN_VARIABLE, ServerClient, is_loopback


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "RETRY_SECONDS", (0.0, 0.0))


@contextmanager
def answering(*answers: tuple[int, str]) -> Iterator[tuple[str, list[str]]]:
    """Serve these answers in turn, the last one for ever; status 0 hangs up."""
    left, asked = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Authorization", ""))
            status, text = left.pop(0) if len(left) > 1 else left[0]
            if status:
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def client(url: str, **settings: float) -> ServerClient:
    return ServerClient(GeneratorSettings(url=url, **settings), root=Path())


def test_loopback_is_known_without_a_name_server() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.1", "localhost.example.org")))


def test_a_server_elsewhere_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=rf"http://gpu-7:8000 .* {TOKEN_VARIABLE}"):
        client("http://gpu-7:8000")
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    client("http://gpu-7:8000")


def test_an_absent_server_is_named_with_its_remedy() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(StageError, match=rf"{url} does not answer .* rlhf.inference.vllm_server"):
        client(url).health()


def test_a_server_that_comes_back_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret-of-mine")
    caplog.set_level(logging.DEBUG)
    with answering((0, ""), (0, ""), (200, '{"max_length": 3}')) as (url, asked):
        assert client(url).health() == {"max_length": 3}
    assert asked == ["Bearer secret-of-mine"] * 3
    assert "trying again" in caplog.text
    assert "secret-of-mine" not in caplog.text


def test_a_server_that_stays_away_is_given_up() -> None:
    with answering((0, "")) as (url, asked), pytest.raises(StageError, match="does not answer"):
        client(url).health()
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("status", "text", "kind", "match"),
    [
        (401, '{"error": "no"}', ConfigError, TOKEN_VARIABLE),
        (403, '{"error": "not below"}', ConfigError, "not below"),
        (409, '{"error": "another architecture"}', ConfigError, "another architecture"),
        (400, '{"error": "odd"}', StageError, "status 400 .odd.: see the server's log"),
        (200, "<html>", ConfigError, "another kind of server"),
        (404, "[]", ConfigError, "another kind of server"),
        (307, "", ConfigError, "another kind of server"),
    ],
)
def test_refusals_are_not_repeated(
    status: int, text: str, kind: type[Exception], match: str
) -> None:
    with answering((status, text)) as (url, asked), pytest.raises(kind, match=match):
        client(url).health()
    assert len(asked) == 1


def test_a_slow_server_is_not_asked_twice() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StageError, match=r"generator\.timeout_seconds=0\.2"):
            client(url, timeout_seconds=0.2).health()


def test_proxies_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with answering((200, "{}")) as (url, _):
        assert client(url).health() == {}
