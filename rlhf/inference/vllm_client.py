"""The client of `rlhf.inference.vllm_server`: weights go by folder, tokens by HTTP."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf.config import Config, GeneratorSettings
from rlhf.errors import ConfigError, StageError
from rlhf.inference.vllm import Batch

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "RLHF_GENERATOR_TOKEN"
RETRY_SECONDS = (1.0, 2.0, 4.0)
"""Pauses between attempts at a server that does not answer; it may be starting again."""


class ServerClient:
    """A vLLM engine behind HTTP; folders are named relative to `root`, which both sides see."""

    def __init__(self, settings: GeneratorSettings, *, root: Path) -> None:
        self._settings = settings
        self._root = root.resolve()
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        host = urlsplit(settings.url).hostname or ""
        if not self._token and not is_loopback(host):
            raise ConfigError(
                f"generator.url={settings.url} is not on this machine and needs a token: set "
                f"{TOKEN_VARIABLE} to the same secret here and where the server runs"
            )

    def health(self) -> dict[str, Any]:
        """Return what the server says about itself."""
        return self._call("GET", "/health", None)

    def load(self, weights: Path) -> None:
        """Let the server answer with the weights of this folder from now on."""
        self._call("POST", "/reload", {"weights": self._relative(weights)})

    def sample(self, weights: Path, batch: Batch) -> list[list[int]]:
        """Return a response for each prompt of the batch, sampled with exactly these weights.

        The weights are named again because another node may have had its own loaded meanwhile.
        """
        body = {"weights": self._relative(weights), **asdict(batch)}
        rows: list[list[int]] = self._call("POST", "/generate", body)["token_ids"]
        return rows

    def _relative(self, weights: Path) -> str:
        return weights.resolve().relative_to(self._root).as_posix()

    def _call(self, method: str, path: str, body: Any) -> dict[str, Any]:
        """Ask the server; an attempt that gets no answer is repeated, one that is refused is not.

        Repeating is safe: a request names its weights and its seeds.
        """
        for pause in (*RETRY_SECONDS, None):
            try:
                status, text = self._request(method, path, body)
                break
            except TimeoutError as error:
                raise StageError(
                    f"{self._settings.url}{path} gave no answer within generator.timeout_seconds="
                    f"{self._settings.timeout_seconds}: raise it, or lower sampling.batch_size"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                if pause is None:
                    raise StageError(
                        f"generator.url={self._settings.url} does not answer ({error}): start the "
                        "server with `python -m rlhf.inference.vllm_server`, or correct the URL"
                    ) from error
                log.warning("%s does not answer (%s); trying again", self._settings.url, error)
                time.sleep(pause)
        return self._answer(path, status, text)

    def _request(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        # No proxies and no redirects: the token goes to this address only.
        parts = urlsplit(self._settings.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert parts.hostname is not None
        connection = kind(parts.hostname, parts.port, timeout=self._settings.timeout_seconds)
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, path, payload, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _answer(self, path: str, status: int, text: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ConfigError(
                f"generator.url={self._settings.url} answers {path} with status {status} and no "
                "JSON object: it is another kind of server; correct the URL"
            )
        if status == 200:
            return answer
        reason = answer.get("error")
        if status == 401:
            raise ConfigError(
                f"generator.url={self._settings.url} refuses the token: set {TOKEN_VARIABLE} to "
                "the same secret here and where the server runs"
            )
        if status in (403, 409):
            raise ConfigError(f"generator.url={self._settings.url} refuses {path}: {reason}")
        raise StageError(
            f"generator.url={self._settings.url} failed at {path} with status {status} ({reason}): "
            "see the server's log"
        )


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, without asking a name server."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_server(config: Config) -> None:
    """Refuse a server that lacks the token, is absent, or cannot serve this run's model."""
    found = ServerClient(config.generator, root=Path(config.paths.runs)).health()
    settings = config.model
    if (
        found.get("precision") != settings.precision.name
        or found.get("max_length", 0) < settings.max_length
    ):
        raise ConfigError(
            f"generator.url={config.generator.url} has {found}, which does not suit this run: "
            f"start the server with --max-length {settings.max_length} "
            f"--precision {settings.precision.name}"
        )
