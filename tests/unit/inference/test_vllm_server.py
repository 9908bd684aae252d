"""The server: who may ask, what may be read, and what the client makes of the answers."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_vllm
import micro_models as micro
import pytest
import torch

from rlhf.config import Config, Engine, Precision, Sampling
from rlhf.errors import ConfigError
from rlhf.inference import vllm_server
from rlhf.inference.generation import PolicyGenerator
from rlhf.inference.generators import check_generator, open_generator
from rlhf.inference.vllm import Batch, publish
from rlhf.inference.vllm_client import TOKEN_VARIABLE

PROMPTS = [[{"role": "user", "content": text}] for text in ("the cat", "a dog eats")]
BATCH: dict[str, Any] = {
    "prompts": [[5, 6]],
    "seeds": [1],
    "temperature": 1.0,
    "top_k": None,
    "top_p": 1.0,
    "max_new_tokens": 3,
    "eos_id": 1,
    "pad_id": 0,
}


class Recorder:
    """A backend that remembers what it was asked."""

    def __init__(self) -> None:
        self.loaded: list[Path] = []
        self.error: Exception | None = None

    def load(self, weights: Path) -> None:
        self.loaded.append(weights)

    def sample(self, weights: Path, batch: Batch) -> list[list[int]]:
        if self.error is not None:
            raise self.error
        return [[len(prompt), batch.eos_id] for prompt in batch.prompts]


Start = Callable[..., vllm_server.GeneratorServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Give a function that starts a server over tmp_path/runs in this process."""
    servers: list[vllm_server.GeneratorServer] = []

    def started(*extra: str, token: str = "", backend: Any = None) -> vllm_server.GeneratorServer:
        options = ["--model", "unused", "--folder", str(tmp_path / "runs"), "--port", "0"]
        arguments = vllm_server.parse([*options, "--max-length", "32", *extra])
        server = vllm_server.GeneratorServer(arguments, token=token)
        server.backend = backend or Recorder()
        server.server_activate()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    (tmp_path / "runs").mkdir()
    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(
    server: vllm_server.GeneratorServer,
    path: str,
    body: Any = None,
    *,
    token: str | None = None,
    kind: str = "application/json",
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    headers = {"Content-Type": kind}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    payload = body if isinstance(body, str) or body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, payload, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_beyond_this_machine_a_token_is_required(start: Start) -> None:
    for host in ("0.0.0.0", "", "::", "192.0.2.7"):
        with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
            start("--host", host)
    assert ask(start("--host", "0.0.0.0", token="secret"), "/health", token="secret")[0] == 200


@pytest.mark.parametrize("path", ["/health", "/reload", "/generate", "/nothing"])
def test_a_wrong_token_is_refused_everywhere(start: Start, path: str) -> None:
    server = start(token="secret")
    body = None if path == "/health" else {"weights": "node", **BATCH}
    for token in (None, "", "Secret", "secret2"):
        assert ask(server, path, body, token=token)[0] == 401
    assert ask(server, "/health", token="secret") == (
        200,
        {"max_length": 32, "precision": "fp32"},
    )


@pytest.mark.parametrize("name", ["../outside", "/etc", "node/../../outside", "link"])
def test_folders_elsewhere_are_refused(start: Start, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "outside")
    server = start()
    for path, body in (("/reload", {}), ("/generate", BATCH)):
        assert ask(server, path, {"weights": name, **body})[0] == 403
    assert server.backend.loaded == []


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": [[5, "6"]]},
        {"prompts": [[]]},
        {"prompts": [5]},
        {"prompts": [[5, -1]]},
        {"prompts": [[5], [6]]},
        {"prompts": [[5] * 30]},
        {"seeds": [2**63]},
        {"seeds": [True]},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": None},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": None},
        {"max_new_tokens": 0},
        {"eos_id": None},
        {"extra": 1},
        {"weights": 3},
        {"weights": ""},
    ],
    ids=str,
)
def test_odd_batches_are_refused(start: Start, change: dict[str, Any]) -> None:
    server = start()
    assert ask(server, "/generate", {"weights": "node", **BATCH}) == (200, {"token_ids": [[2, 1]]})
    assert ask(server, "/generate", {"weights": "node", **BATCH, **change})[0] == 400


def test_odd_requests_are_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    assert ask(server, "/generate", "{")[0] == 400
    assert ask(server, "/generate", "[]")[0] == 400
    assert ask(server, "/generate", {"weights": "node"})[0] == 400
    # What a page in a browser may send to any address without asking.
    assert ask(server, "/reload", '{"weights": "node"}', kind="text/plain")[0] == 415
    assert ask(server, "/stop", {})[0] == 404
    monkeypatch.setattr(vllm_server, "MAX_BODY", 10)
    assert ask(server, "/generate", {"weights": "node", **BATCH})[0] == 413


def test_a_failed_engine_ends_the_server(start: Start) -> None:
    server = start()
    server.backend.error = RuntimeError("the engine died")
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(server, "/generate", {"weights": "node", **BATCH})
    assert server.has_failed


def test_a_used_port_is_one_clear_message(start: Start) -> None:
    port = str(start().server_address[1])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
        start("--port", port)


def test_the_engine_starts_with_the_settings_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = fake_vllm.install(monkeypatch).made
    options = ["--model", "toy", "--max-length", "48", "--precision", "bf16"]
    vllm_server.open_engine(vllm_server.parse([*options, "--cpu-kv-cache-gib", "0.25"]))
    assert (made[0].max_model_len, made[0].dtype) == (48, "bfloat16")
    assert made[0].kv_cache_memory_bytes == 2**28
    assert not Path(made[0].model).exists()


# With its client


def remote(server: vllm_server.GeneratorServer, tmp_path: Path) -> Config:
    made = Config(recipe="test")
    made.generator.engine = Engine.vllm_server
    made.generator.url = f"http://127.0.0.1:{server.server_address[1]}"
    made.paths.runs = str(tmp_path / "runs")
    made.model.max_length = 32
    return made


def opened(made: Config, tmp_path: Path, name: str, seed: int) -> PolicyGenerator:
    return open_generator(
        made,
        micro.policy(seed),
        micro.tokenizer(),
        scratch=tmp_path / "runs" / name,
        device=torch.device("cpu"),
    )


def answers(generator: PolicyGenerator) -> list[list[list[int]]]:
    found = generator.generate(
        PROMPTS,
        num_samples=2,
        sampling=Sampling(temperature=1.0, max_new_tokens=5, batch_size=3),
        keys=["one", "two"],
    )
    return [[response.token_ids for response in responses] for responses in found]


def test_nodes_that_share_a_server_keep_their_weights(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    model = micro.policy(2)
    base = publish(model, model.state_dict, parent=tmp_path, precision=Precision.fp32)
    from rlhf.config import GeneratorSettings
    from rlhf.inference.vllm_engine import Engine as VllmEngine

    engine = VllmEngine(base, max_length=32, precision=Precision.fp32, settings=GeneratorSettings())
    made = remote(start(token="secret", backend=engine), tmp_path)
    check_generator(made)
    one, two = opened(made, tmp_path, "a/node", 0), opened(made, tmp_path, "b/node", 1)
    first, second = answers(one), answers(two)
    assert first != second
    assert (answers(one), answers(two)) == (first, second)
    local = remote(start(token="secret"), tmp_path)
    local.generator.engine = Engine.vllm
    assert answers(opened(local, tmp_path, "c/node", 0)) == first
    one.update_weights(micro.policy(1), micro.policy(1).state_dict)
    assert answers(one) == second


def test_another_model_than_the_servers_is_refused(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = remote(start(), tmp_path)
    made.model.max_length = 33
    with pytest.raises(ConfigError, match=r"--max-length 33 --precision fp32"):
        check_generator(made)
    made.model.max_length, made.model.precision = 32, Precision.bf16
    with pytest.raises(ConfigError, match="--precision bf16"):
        check_generator(made)
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
        check_generator(remote(start(token="secret"), tmp_path))
