"""Uploads: the rules and words of `rlhf ingest`, in bounded memory, and nothing left behind."""

from __future__ import annotations

import errno
import gzip
import json
import os
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi.testclient import TestClient

from rlhf.artifacts import sha256_file
from rlhf.config import Config
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import STRENGTHS, Kind
from rlhf.errors import DataError
from rlhf.service import launching
from rlhf.service.api import batches
from rlhf.service.api.idempotency import KEY_HEADER, REPLAYED
from rlhf.service.app import create_app
from rlhf.service.database.models import Audit
from rlhf.service.problems import MEDIA_TYPE
from rlhf.service.state import State, open_state

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

ADDRESS = "/api/v1/streams/weekly/batches"
TYPE = {"Content-Type": "application/octet-stream"}


def comparison(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "id": f"c{number}",
        "prompt": f"question {number} about owls and their {number % 7} ways",
        "chosen": f"answer {number} " + "yes " * (number % 11),
        "rejected": f"other {number} " + "no " * (number % 13),
        "strength": STRENGTHS[number % 4],
        "axis": "helpfulness",
        "source": "vendor-a",
        **changed,
    }


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


GOOD = jsonl([comparison(number) for number in range(50)])
BAD = jsonl([comparison(number, strength="much") for number in range(30)])


def upload(client: TestClient, data: Any = GOOD, **query: Any) -> Any:
    headers = {**TYPE, **query.pop("headers", {})}
    return client.post(
        ADDRESS, params={"name": "week-1.jsonl", **query}, content=data, headers=headers
    )


def refused(response: Any, status: int = 422) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    return str(response.json()["detail"])


def left(state: State) -> list[str]:
    """Return the files of the store and of the uploads, hidden ones too."""
    found = [*state.store.rglob("*"), *state.uploads.rglob("*")]
    return sorted(path.name for path in found if path.is_file() and path.name != ".lock")


def test_an_upload_is_what_ingest_makes_of_the_file(
    client: TestClient, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "week-1.jsonl"
    path.write_bytes(GOOD)
    data = state.config.data
    wanted = ingest_file(
        path,
        Store(tmp_path / "other", "weekly"),
        kind=None,
        heldout_share=data.heldout_share,
        heldout_salt=data.heldout_salt,
    )
    response = upload(client)
    assert response.status_code == 201, response.text
    tree = response.json()
    assert (tree["added"], tree["kind"], tree["id"]) == (True, "batch", "week-1")
    assert (tree["digest"], tree["counts"]) == (wanted.digest, wanted.counts)
    assert tree["message"] == wanted.message
    assert tree["drift"] == "drift of week-1: the first batch, nothing to compare with"
    assert Store(state.store, "weekly").digest(Kind.batch, "week-1") == wanted.digest
    assert not [*state.uploads.iterdir()]
    with state.reading() as session:
        row = session.query(Audit).one()
    assert (row.action, row.status) == ("POST /api/v1/streams/{stream}/batches", 201)
    assert row.detail["file"] == "week-1.jsonl"

    again = upload(client)
    assert (again.status_code, again.json()["added"]) == (200, False)
    assert "are in stream weekly already" in again.json()["message"]


def test_bad_rows_are_refused_in_ingest_s_words(
    client: TestClient, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "week-1.jsonl"
    path.write_bytes(BAD)
    data = state.config.data
    with pytest.raises(DataError) as caught:
        ingest_file(
            path,
            Store(tmp_path / "other", "weekly"),
            kind=Kind.batch,
            heldout_share=data.heldout_share,
            heldout_salt=data.heldout_salt,
        )
    response = upload(client, BAD, kind="batch")
    detail = refused(response)
    assert detail == str(caught.value).replace(f"{path.parent}{os.sep}", "")
    assert "week-1.jsonl: 30 of 30 rows are bad" in detail
    assert str(state.folder) not in response.text
    tree = response.json()
    assert [row["line"] for row in tree["refused"]] == list(range(1, 31))
    assert tree["counts"]["refused"] == 30
    assert left(state) == []


@pytest.mark.parametrize(
    ("data", "query", "said"),
    [
        (b"", {}, "week-1.jsonl"),
        (b"{", {"kind": "batch"}, "week-1.jsonl"),
        (GOOD, {"name": "week-1.parquet"}, "week-1.parquet"),
        (GOOD, {"name": "../week-1.jsonl"}, "name is no name"),
        (GOOD, {"name": ".hidden"}, "name is no name"),
        (GOOD, {"name": "a/b"}, "name is no name"),
        (GOOD, {"name": "a\0b"}, "name is no name"),
        (GOOD, {"name": "x" * 101}, "at most 100"),
        (GOOD, {"id": "../up"}, "id is no name"),
        (GOOD, {"kind": "other"}, "query.kind"),
        (GOOD, {"on_bad_row": "other"}, "query.on_bad_row"),
        (GOOD, {"axis": "other"}, "query.axis"),
    ],
)
def test_what_cannot_be_taken_in_is_refused_and_leaves_nothing(
    client: TestClient, state: State, data: bytes, query: dict[str, str], said: str
) -> None:
    response = upload(client, data, **query)
    assert said in refused(response)
    assert str(state.folder) not in response.text
    assert left(state) == []


@pytest.mark.parametrize("stream", ["..", "%2e%2e", ".hidden", "a%00b", "x" * 101, "%E2%82%AC"])
def test_streams_with_odd_names_are_refused(client: TestClient, state: State, stream: str) -> None:
    response = client.post(
        f"/api/v1/streams/{stream}/batches?name=a.jsonl", content=GOOD, headers=TYPE
    )
    assert response.status_code in (404, 405, 422)
    assert left(state) == []
    assert not [*state.store.parent.rglob("stream.json")]


def test_half_characters_in_bad_rows_can_be_told(client: TestClient, state: State) -> None:
    rows = [comparison(number) for number in range(20)] + [comparison(99, strength="\ud800")]
    response = upload(client, jsonl(rows), kind="batch")
    assert "line 21" in refused(response)
    assert [row["line"] for row in response.json()["refused"]] == [21]
    response = upload(client, jsonl(rows), kind="batch", on_bad_row="quarantine")
    assert response.status_code == 201
    assert [row["line"] for row in response.json()["refused"]] == [21]
    assert client.get(f"{ADDRESS}/week-1").json()["refused"][0]["line"] == 21


def test_options_reach_ingest(client: TestClient, state: State) -> None:
    rows = [comparison(number) for number in range(20)] + [comparison(99, strength="much")]
    for row in rows:
        del row["axis"]
    response = upload(
        client,
        gzip.compress(jsonl(rows)),
        name="week-1.jsonl.gz",
        id="mine",
        axis="safety",
        kind="batch",
        on_bad_row="quarantine",
    )
    assert response.status_code == 201, response.text
    tree = response.json()
    assert (tree["id"], tree["counts"]["refused"]) == ("mine", 1)
    assert tree["refused"][0]["line"] == 21
    rows_of = Store(state.store, "weekly").comparisons(Kind.batch, "mine")
    assert {row.axis for row in rows_of} == {"safety"}


def test_only_bytes_are_an_upload(client: TestClient, state: State) -> None:
    for kind in ("application/json", "text/plain", "multipart/form-data; boundary=x"):
        response = upload(client, headers={"Content-Type": kind})
        assert "application/octet-stream" in refused(response, 415)
    assert left(state) == []


@pytest.fixture
def small(config: Config) -> Iterator[tuple[TestClient, State]]:
    """A service that takes uploads of one MiB."""
    state = open_state(replace(config, service=replace(config.service, max_upload_mb=1)))
    with TestClient(create_app(state), base_url="http://127.0.0.1") as client:
        yield client, state
    state.engine.dispose()


def test_too_large_an_upload_is_broken_off(small: tuple[TestClient, State]) -> None:
    client, state = small
    line = jsonl([comparison(1)])
    data = line * (2**20 // len(line) + 1)
    said = refused(upload(client, data), 413)
    assert "service.max_upload_mb" in said
    # In pieces of unknown number no length says so ahead.
    pieces = (data[at : at + 1000] for at in range(0, len(data), 1000))
    assert "service.max_upload_mb" in refused(upload(client, pieces), 413)
    assert left(state) == []
    assert not [*state.uploads.iterdir()]


def test_memory_does_not_grow_with_the_upload(tmp_path: Path, database: None) -> None:
    size, piece = 64 * 2**20, b"x" * 2**16

    class Sender:
        async def stream(self) -> AsyncIterator[bytes]:
            for _ in range(size // len(piece)):
                yield piece

    tracemalloc.start()
    digest = anyio.run(lambda: batches._receive(Sender(), tmp_path / "file"))  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * batches.PIECE_BYTES
    assert digest == sha256_file(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size == size


def test_a_disk_that_takes_parts_gets_all_of_them(tmp_path: Path, database: None) -> None:
    data = GOOD * 1000

    class Slow(FileIO):
        def write(self, piece: Any) -> int:
            return super().write(piece[:1000])

    class Place:
        def open(self, mode: str, buffering: int) -> FileIO:
            return Slow(tmp_path / "file", mode)

    class Sender:
        async def stream(self) -> AsyncIterator[bytes]:
            yield data

    digest = anyio.run(batches._receive, Sender(), Place())
    assert digest == sha256_file(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size == len(data)


def test_an_upload_that_breaks_off_leaves_nothing(state: State) -> None:
    app = create_app(state)
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": GOOD[:100], "more_body": True}]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": ADDRESS,
        "raw_path": ADDRESS.encode(),
        "query_string": b"name=week-1.jsonl",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/octet-stream")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    anyio.run(app, scope, receive, send)
    assert sent[0]["status"] == 400
    assert left(state) == []
    assert not [*state.uploads.iterdir()]


def test_a_full_disk_is_said(
    client: TestClient, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(batches.os, "fsync", full)
    assert "disk is full" in refused(upload(client), 507)
    monkeypatch.undo()
    assert left(state) == []
    assert upload(client).status_code == 201


def test_a_batch_makes_plans_longer(
    client: TestClient, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[str] = []

    def extend(_: State, stream: str) -> list[launching.Extended]:
        streams.append(stream)
        return [launching.Extended("mine", (4, 5))]

    monkeypatch.setattr(launching, "extend", extend)
    assert upload(client).json()["extended"] == [{"run": "mine", "rounds": [4, 5]}]
    # A kill may have come between the rows and the plans.
    again = upload(client).json()
    assert (again["added"], again["extended"]) == (False, [{"run": "mine", "rounds": [4, 5]}])
    refused(upload(client, BAD, kind="batch", name="week-2.jsonl"))
    assert streams == ["weekly", "weekly"]


def test_a_key_makes_an_upload_happen_once(client: TestClient, state: State) -> None:
    headers = {KEY_HEADER: "k"}
    first = upload(client, headers=headers)
    again = upload(client, headers=headers)
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert (REPLAYED in first.headers, again.headers[REPLAYED]) == (False, "true")
    with state.reading() as session:
        rows = session.query(Audit).order_by(Audit.id).all()
    assert ["replayed" in row.detail for row in rows] == [False, True]
    changed = GOOD.replace(b"owls", b"cows")
    assert "another request" in refused(upload(client, changed, headers=headers))
    assert "another request" in refused(upload(client, headers=headers, name="week-2.jsonl"))
    bad = upload(client, BAD, headers={KEY_HEADER: "bad"}, kind="batch", name="week-3.jsonl")
    same = upload(client, BAD, headers={KEY_HEADER: "bad"}, kind="batch", name="week-3.jsonl")
    assert (bad.json(), same.headers[REPLAYED]) == (same.json(), "true")
    assert Store(state.store, "weekly").ids(Kind.batch) == ["week-1"]
    assert KEY_HEADER in refused(upload(client, headers={KEY_HEADER: "a b"}))
    assert not [*state.uploads.iterdir()]


def test_what_a_killed_server_left_goes_away(client: TestClient, state: State) -> None:
    old, new, other = (state.uploads / name for name in ("upload-old", "upload-new", "kept"))
    for folder in (old, new, other):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x")
    for folder in (old, other):
        os.utime(folder, (1, 1))
    upload(client)
    assert sorted(path.name for path in state.uploads.iterdir()) == ["kept", "upload-new"]
