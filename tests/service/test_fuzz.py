"""Requests that nobody would write, made from the OpenAPI description and a list of old tricks.

Nothing may break (5xx), answers are as described, no name leads out of the service's folders, and
nothing is written without the role for it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings

from rlhf.artifacts import write_jsonl
from rlhf.config import Config
from rlhf.service import launching
from rlhf.service.access import ROLES, new_token
from rlhf.service.app import create_app
from rlhf.service.database.models import Launch, now
from rlhf.service.problems import MEDIA_TYPE
from rlhf.service.state import State, open_state

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.python import asgi  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
DESCRIPTION = "/api/v1/openapi.json"
EXAMPLES = int(os.environ.get("RLHF_FUZZ_EXAMPLES", "80"))
"""Requests of each kind; more find more."""
NOBODY = "nobody"
OPEN = ("/healthz", "/readyz")
UNREAD = (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
SECRET = "the-secret-beside-the-service"
REAL = {
    "run": "made-up",
    "node": "round-03/evaluate",
    "stream": "weekly",
    "batch": "week-1",
    "version": "v2",
    "recipe": "quickstart",
}
"""Names that exist, which random texts never hit."""
METHODS = ("get", "post", "put", "patch", "delete")
NAMES = (
    "..",
    ".",
    "../secret",
    "..\\secret",
    "....//secret",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "%2e%2e",
    "%2e%2e%2fsecret",
    "%252e%252e%252fsecret",
    "a\0b",
    "\0",
    "~root",
    "made-up/../../secret",
    "made-up\n",
    "-rf",
    "$(id)",
    "'; DROP TABLE users; --",
    "\u202e\u0000\uffff",
    "\u00e9" * 3000,
    "\U0001f600" * 50,
    "A" * 8000,
    "9" * 5000,
    "NaN",
    "null",
)


@pytest.fixture(autouse=True)
def whole_floats() -> None:
    """Let the smallest floats be drawn: training in this process has them flushed to zero."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@dataclass(frozen=True)
class Target:
    """A service under fire: its state, its application, and the headers of each role."""

    state: State
    app: Any
    headers: dict[str, dict[str, str]]

    @property
    def root(self) -> Path:
        """Folder in which the service's folders lie."""
        return self.state.runs.parent

    def outside(self) -> set[str]:
        """Return the files that lie beside the service's folders."""
        own = {"runs", "store", "service"}
        parts = (path.relative_to(self.root) for path in self.root.rglob("*"))
        return {str(path) for path in parts if path.parts[0] not in own}


@pytest.fixture
def target(config: Config, run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """A service with tokens, a run, pairs to judge and a secret beside it; it launches nothing."""

    def launch(state: State, run: str, **given: Any) -> Launch:
        launching.overrides_of(given.get("settings") or {})
        if given.get("recipe") is not None:
            launching._check_new(run, given["recipe"])
        row = Launch(run=run, user=given["user"], state="launched", launcher="local", output="")
        row.id, row.created, row.changed = 1, now(), now()
        return row

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(launching, "cancel", lambda *args, **given: "cancelled")
    state = open_state(replace(config, service=replace(config.service, tokens=True)))
    with state.transaction() as session:
        tokens = {
            role: new_token(session, name=f"a-{role}", role=role, days=None) for role in ROLES
        }
    headers = {role: {"Authorization": f"Bearer {token}"} for role, token in tokens.items()}
    secret = state.runs.parent / "secret"
    secret.mkdir()
    for name in ("run.yaml", "plan.json", "stream.json", "manifest.json", "log.txt"):
        (secret / name).write_text(SECRET, encoding="utf-8")
    (secret.parent / "secret.jsonl").write_text(SECRET, encoding="utf-8")
    write_jsonl(run / "round-03/evaluate/samples.jsonl", [{"text": "a sample"}] * 5)
    yield Target(state, create_app(state), {NOBODY: {}, **headers})
    state.engine.dispose()


def operations(target: Target) -> list[tuple[str, str, dict[str, Any]]]:
    """Return method, path and description of every operation."""
    schema = target.app.openapi()
    return [
        (method, path, operation)
        for path, item in schema["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


@pytest.mark.parametrize(
    ("role", "database"),
    [*((role, "sqlite") for role in (NOBODY, *ROLES)), ("operator", "postgresql")],
    indirect=["database"],
)
def test_made_up_requests_get_described_answers(target: Target, role: str) -> None:
    before = target.outside()
    schema = schemathesis.openapi.from_asgi(DESCRIPTION, target.app)
    allowed = {
        HTTPStatus.UNAUTHORIZED: role == NOBODY,
        HTTPStatus.FORBIDDEN: role in ("viewer", "annotator"),
    }
    statuses: Counter[tuple[str, int]] = Counter()

    def fire(case: Any, session: Any) -> None:
        for name in ("Authorization", "authorization", "Cookie", "cookie"):
            case.headers.pop(name, None)
        if sum(statuses.values()) % 3:
            for place in (case.path_parameters, case.query, case.body):
                if isinstance(place, dict):
                    place.update({name: text for name, text in REAL.items() if name in place})
        response = case.call(session=session, headers=target.headers[role])
        case.validate_response(response, checks=CHECKS)
        statuses[f"{case.method} {case.path}", response.status_code] += 1
        assert SECRET not in response.text
        if response.status_code >= HTTPStatus.BAD_REQUEST:
            assert response.headers["content-type"] == [MEDIA_TYPE]
        for status, is_allowed in allowed.items():
            assert is_allowed or response.status_code != status
        is_open = case.path in OPEN or case.path == DESCRIPTION
        if role == NOBODY and not is_open and case.method.lower() in METHODS:
            # What is at no address, and a body that is no JSON, is refused before anybody asks who.
            is_unread = "JSON decode error" in response.text or response.status_code in UNREAD
            assert is_unread or response.status_code == HTTPStatus.UNAUTHORIZED

    with asgi.get_client(target.app) as session:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=EXAMPLES if role == "operator" else EXAMPLES // 2,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            @given(case=schema.as_strategy(mode))
            def check(case: Any) -> None:
                fire(case, session)

            check()
    assert target.outside() == before
    assert not [*target.state.uploads.glob("*")]
    if role == "operator":
        fine = {where for where, status in statuses if status < HTTPStatus.BAD_REQUEST}
        assert len(fine) >= len(operations(target)) / 3, sorted(statuses.items())


def requests_with(path: str, operation: dict[str, Any], name: str) -> list[str]:
    """Return addresses of an operation with a name in one place, and real ones elsewhere."""
    real = {"run": "made-up", "stream": "weekly", "batch": "week-1", "week": "w", "key": "k"}
    queries = [item for item in operation.get("parameters", []) if item["in"] == "query"]
    needed = "&".join(f"{item['name']}=sft" for item in queries if item.get("required"))
    places = [part for part in real if f"{{{part}}}" in path]
    found = []
    for place in places:
        for text in (quote(name, safe=""), quote(name, safe="/%")):
            address = path.replace(f"{{{place}}}", text)
            for part, value in real.items():
                address = address.replace(f"{{{part}}}", value)
            found.append(f"{address}?{needed}")
    plain = path
    for part, value in real.items():
        plain = plain.replace(f"{{{part}}}", value)
    for item in queries:
        others = [other for other in queries if other is not item and other.get("required")]
        rest = "".join(f"&{other['name']}=sft" for other in others)
        found.append(f"{plain}?{item['name']}={quote(name, safe='')}{rest}")
    return list(dict.fromkeys(found))


def test_no_name_leads_out_of_the_folders(target: Target) -> None:
    before = target.outside()
    is_embedded = target.state.engine.dialect.name == "sqlite"
    # What a database might not store is asked of each; the folders are the same.
    names = [name for name in NAMES if is_embedded or "\0" in name or len(name) > 1000]
    with TestClient(
        target.app, base_url="http://127.0.0.1", raise_server_exceptions=False
    ) as client:
        for method, path, operation in operations(target):
            is_upload = "application/octet-stream" in json.dumps(operation.get("requestBody", {}))
            for name in names:
                for address in requests_with(path, operation, name):
                    headers = dict(target.headers["operator"])
                    data = b"{}"
                    if is_upload:
                        headers["Content-Type"] = "application/octet-stream"
                    elif method != "get":
                        headers["Content-Type"] = "application/json"
                        data = json.dumps(
                            dict.fromkeys(("run", "node", "name", "version", "recipe"), name)
                        ).encode()
                    response = client.request(
                        method, address, headers=headers, content=None if method == "get" else data
                    )
                    where = f"{method} {address[:200]} -> {response.status_code}"
                    assert response.status_code < 500, where
                    assert SECRET not in response.text, where
                    assert "root:" not in response.text, where
    assert target.outside() == before
    assert {path.name for path in target.state.store.iterdir() if path.is_dir()} <= {"weekly"}
    assert {path.name for path in target.state.runs.iterdir() if path.is_dir()} == {"made-up"}


def least_role(method: str, path: str) -> str:
    """Return the role that a write takes."""
    is_annotation = path.startswith(("/api/v1/tasks/", "/api/v1/assignments/"))
    return "annotator" if is_annotation else "operator"


def test_no_write_without_its_role(target: Target) -> None:
    with target.state.reading() as session:
        tables = {
            table.name: len(session.execute(table.select()).all())
            for table in Launch.metadata.sorted_tables
            if table.name != "audit"
        }
    files = sorted(path for path in target.root.rglob("*") if "service.db" not in path.name)
    writes = [item for item in operations(target) if item[0] != "get"]
    assert len(writes) >= 10
    with TestClient(target.app, base_url="http://127.0.0.1") as client:
        for method, path, _ in writes:
            address = path
            for part in ("run", "stream", "batch", "week", "key"):
                real = {"run": "made-up", "stream": "weekly"}.get(part, "x")
                address = address.replace(f"{{{part}}}", real)
            for role in (NOBODY, *ROLES):
                if role != NOBODY and ROLES.index(role) >= ROLES.index(least_role(method, path)):
                    continue
                wanted = HTTPStatus.UNAUTHORIZED if role == NOBODY else HTTPStatus.FORBIDDEN
                for headers in ({}, {"Idempotency-Key": "k"}):
                    for kind, data in (
                        ("application/json", b"{}"),
                        ("application/octet-stream", b"x"),
                    ):
                        response = client.request(
                            method,
                            f"{address}?name=a.jsonl",
                            content=data,
                            headers={**target.headers[role], **headers, "Content-Type": kind},
                        )
                        assert response.status_code == wanted, f"{role} {method} {path}"
    with target.state.reading() as session:
        assert tables == {
            table.name: len(session.execute(table.select()).all())
            for table in Launch.metadata.sorted_tables
            if table.name != "audit"
        }
    found = sorted(path for path in target.root.rglob("*") if "service.db" not in path.name)
    assert found == files
