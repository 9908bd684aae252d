"""A vLLM engine as a job of its own: `python -m rlhf.inference.vllm_server --model DIR`.

    GET  /health    what this server can do
    POST /reload    {"weights": FOLDER}: answer with these weights from now on
    POST /generate  {"weights": FOLDER, ...Batch}: one response per prompt, as token ids

Folders are named relative to --folder, and only safetensors below it are read. Beyond this machine
every request needs the token in RLHF_GENERATOR_TOKEN.
"""

from __future__ import annotations

import argparse
import hmac
import json
import logging
import math
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from rlhf.config import GeneratorSettings, Model, Paths, Precision
from rlhf.errors import ConfigError, RlhfError, UserError
from rlhf.inference.vllm import Backend, Batch, publish
from rlhf.inference.vllm_client import TOKEN_VARIABLE, is_loopback
from rlhf.inference.vllm_engine import Engine
from rlhf.models.loading import load_policy

log = logging.getLogger(__name__)

MAX_BODY = 256 * 2**20
"""Bytes of a request; a batch of 1,000 prompts of 4,096 tokens has 30 MB."""


class Refusal(Exception):
    """A request that gets an error status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Open(Protocol):
    """Starts the engine; tests pass their own."""

    def __call__(self, arguments: argparse.Namespace) -> Backend:
        """Return an engine with the weights of --model."""


class GeneratorServer(ThreadingHTTPServer):
    """Holds what the requests need. Bound at once, but deaf until the engine is there."""

    daemon_threads = True
    allow_reuse_address = True
    has_failed = False
    backend: Backend

    def __init__(self, arguments: argparse.Namespace, *, token: str) -> None:
        if not token and not is_loopback(arguments.host):
            raise ConfigError(
                f"--host {arguments.host} would let every machine in: set {TOKEN_VARIABLE} to a "
                "secret, here and where the nodes run, or use --host 127.0.0.1"
            )
        self.root = Path(arguments.folder).resolve()
        self.token = token
        self.health = {"max_length": arguments.max_length, "precision": arguments.precision}
        super().__init__((arguments.host, arguments.port), Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise ConfigError(
                f"cannot listen on {arguments.host}:{arguments.port} ({error.strerror}): "
                "choose another --port"
            ) from error

    def weights(self, name: object) -> Path:
        """Return a folder of weights by its relative name; Refusal for what must not be read."""
        if not isinstance(name, str) or not name:
            raise Refusal(400, "weights must name a folder")
        folder = (self.root / name).resolve()
        if not folder.is_relative_to(self.root):
            raise Refusal(403, f"{name} is not below the folder that this server was started with")
        return folder

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the end of a connection; end the server after anything else.

        An engine that failed once does not recover: the job fails and can be started again.
        """
        if isinstance(sys.exc_info()[1], OSError):
            log.info("%s went away", client_address)
            return
        log.exception("the engine failed")
        self.has_failed = True
        self.shutdown()


class Handler(BaseHTTPRequestHandler):
    """Answers JSON with JSON."""

    server: GeneratorServer
    timeout = 60.0

    def do_GET(self) -> None:
        self._respond("GET")

    def do_POST(self) -> None:
        self._respond("POST")

    def log_message(self, format: str, *args: Any) -> None:
        log.info(format, *args)

    def _respond(self, method: str) -> None:
        try:
            status, answer = 200, self._route(method)
        except Refusal as refusal:
            status, answer = refusal.status, {"error": str(refusal)}
        except RlhfError as error:
            status, answer = 409, {"error": str(error)}
        body = json.dumps(answer).encode()
        # What a refused request still sends must not be read as the next one.
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _route(self, method: str) -> dict[str, Any]:
        self._authorise()
        if (method, self.path) == ("GET", "/health"):
            return self.server.health
        if (method, self.path) not in (("POST", "/reload"), ("POST", "/generate")):
            raise Refusal(404, f"there is no {method} {self.path}")
        body = self._body()
        weights = self.server.weights(body.pop("weights", None))
        if self.path == "/reload":
            self.server.backend.load(weights)
            return {}
        batch = read_batch(body, max_length=self.server.health["max_length"])
        return {"token_ids": self.server.backend.sample(weights, batch)}

    def _authorise(self) -> None:
        given = self.headers.get("Authorization", "").encode()
        if self.server.token and not hmac.compare_digest(
            given, f"Bearer {self.server.token}".encode()
        ):
            raise Refusal(401, f"the token is missing or wrong; it is that of {TOKEN_VARIABLE}")

    def _body(self) -> dict[str, Any]:
        # A web page can make a browser send anything but this type without asking first.
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "the body must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            raise Refusal(413, f"Content-Length must be at most {MAX_BODY}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except ValueError as error:
            raise Refusal(400, "the body is not JSON") from error
        if not isinstance(body, dict):
            raise Refusal(400, "the body is not a JSON object")
        return body


def read_batch(body: dict[str, Any], *, max_length: int) -> Batch:
    """Return a request's batch; Refusal where a field is missing, odd or too long."""
    names = {entry.name for entry in fields(Batch)}
    if set(body) != names:
        raise Refusal(400, f"a batch has exactly {', '.join(sorted(names))}")
    batch = Batch(**body)
    top_k = 1 if batch.top_k is None else batch.top_k
    numbers = [batch.max_new_tokens, batch.eos_id, batch.pad_id, top_k]
    ok = (
        _are_integers(batch.seeds)
        and _are_integers(numbers)
        and isinstance(batch.prompts, list)
        and all(_are_integers(prompt) and prompt for prompt in batch.prompts)
        and isinstance(batch.temperature, int | float)
        and 0 <= batch.temperature < math.inf
        and isinstance(batch.top_p, int | float)
        and 0 < batch.top_p <= 1
        and batch.max_new_tokens > 0
        and top_k > 0
    )
    if not ok or len(batch.prompts) != len(batch.seeds):
        raise Refusal(400, "a batch has token ids per prompt, a seed per prompt, and numbers")
    longest = max(map(len, batch.prompts), default=0) + batch.max_new_tokens
    if longest > max_length:
        raise Refusal(400, f"{longest} tokens are more than --max-length {max_length}")
    return batch


def _are_integers(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; defaults are those of the configuration."""
    settings, model = GeneratorSettings(), Model()
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.inference.vllm_server",
        description="Answers prompts for the nodes of a run (generator.engine=vllm_server).",
    )
    parser.add_argument("--model", required=True, help="folder of a model like the run's")
    parser.add_argument("--folder", default=Paths().runs, help="paths.runs of the nodes")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--max-length", type=int, default=model.max_length, help="model.max_length")
    parser.add_argument(
        "--precision",
        choices=[choice.name for choice in Precision],
        default=model.precision.name,
        help="model.precision",
    )
    for name in ("gpu_memory_utilization", "cpu_kv_cache_gib"):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=getattr(settings, name),
            help=f"generator.{name}",
        )
    return parser.parse_args(argv)


def open_engine(arguments: argparse.Namespace) -> Engine:
    """Start vLLM with a copy of --model that has every token a node may send."""
    precision = Precision[arguments.precision]
    model = load_policy(arguments.model, model=Model(precision=precision), seed=0)
    settings = GeneratorSettings(
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        cpu_kv_cache_gib=arguments.cpu_kv_cache_gib,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = publish(model, model.state_dict, parent=Path(scratch), precision=precision)
        return Engine(
            folder, max_length=arguments.max_length, precision=precision, settings=settings
        )


def serve(arguments: argparse.Namespace, *, start: Open = open_engine) -> int:
    """Answer until a signal comes; returns 1 when the engine failed."""
    with GeneratorServer(arguments, token=os.environ.get(TOKEN_VARIABLE, "")) as server:
        server.backend = start(arguments)
        server.server_activate()
        log.info("serving %s on %s:%d", server.root, *server.server_address[:2])
        server.serve_forever()
        return int(server.has_failed)


def main() -> int:
    """Run the server; exit codes as of `rlhf`."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # So that the engine's process is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return serve(parse(sys.argv[1:]))
    except KeyboardInterrupt:
        return 0
    except RlhfError as error:
        log.error("%s", error)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
