"""Files of the inbox are taken in once: when they are complete, whoever looks, whenever it dies."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from people_run import RUN, STREAM, comparisons, make_people_run, write_batch
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from watch_process import settings_of

from rlhf import runner
from rlhf.artifacts import read_json, write_jsonl
from rlhf.data.ledger import Store
from rlhf.data.records import Kind
from rlhf.errors import ConfigError
from rlhf.faults import KILL_VARIABLE
from rlhf.launch.local import PLAN
from rlhf.service import claims, launching, watch
from rlhf.service.database.models import Audit, InboxFile, Launch
from rlhf.service.inbox import Inbox, drop, open_inbox
from rlhf.service.pauses import LONGEST_SECONDS, RETRY_SECONDS, Pauses
from rlhf.service.state import State, open_state
from rlhf.service.watch import Watcher, last_look, watching

PROGRAM = Path(__file__).parents[1] / "watch_process.py"
WAIT_SECONDS = 60
BOUNDARIES = (
    "claimed:week",
    "before-rename:week-01",
    "after-rename:week-01",
    "ingested:week",
    "recorded:week",
    "after-rename:report.json",
    "moved:week",
    "before-rename:plan.json",
    "extended:week",
)


def with_service(state: State, **settings: Any) -> State:
    service = replace(state.config.service, **settings)
    return replace(state, config=replace(state.config, service=service))


@pytest.fixture(params=["local", "memory"])
def watched(request: pytest.FixtureRequest, state: State) -> Iterator[State]:
    """A service whose inbox is a folder, or a file system that is not this machine's."""
    if request.param == "local":
        yield state
        return
    url = f"memory://inbox-{secrets.token_hex(8)}"
    yield with_service(state, inbox=url)
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.fixture
def put(watched: State, tmp_path: Path) -> Callable[..., None]:
    """Return a function that drops rows, by default those of a batch, under a name."""
    folder = tmp_path / "outside"

    def put_file(name: str, rows: list[dict[str, Any]] | None = None) -> None:
        path = folder / Path(name).name
        stem = path.name.partition(".")[0]
        write_jsonl(path, comparisons(stem) if rows is None else rows)
        drop(watched, path, name)

    return put_file


def tree(inbox: Inbox) -> list[str]:
    """Return every file of an inbox, without the lock."""
    found = (path.removeprefix(f"{inbox.root}/") for path in inbox.fs.find(inbox.root))
    return sorted(name for name in found if not name.endswith(".lock"))


def report_of(inbox: Inbox, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(inbox.fs.cat_file(f"{inbox.root}/{name}.report.json"))
    return found


def rows_of(state: State) -> list[InboxFile]:
    with state.reading() as session:
        return list(session.scalars(select(InboxFile).order_by(InboxFile.id)))


def batches(state: State, stream: str = STREAM) -> list[str]:
    return Store(state.store, stream).ids(Kind.batch)


def audited(state: State) -> list[str]:
    with state.reading() as session:
        rows = session.scalars(select(Audit).where(Audit.action == "inbox").order_by(Audit.id))
        return [row.target for row in rows]


# What becomes of a file


def test_a_batch_goes_into_the_store_and_lies_with_its_report(
    watched: State, put: Callable[..., None]
) -> None:
    put("week-01.jsonl")
    watcher = Watcher(watched)
    assert watcher.look_once() == ["week-01.jsonl"]
    assert watcher.look_once() == []
    assert batches(watched) == ["week-01"]
    assert tree(watcher.inbox) == [
        "accepted/week-01.jsonl",
        "accepted/week-01.jsonl.report.json",
    ]
    report = report_of(watcher.inbox, "accepted/week-01.jsonl")
    assert (report["outcome"], report["id"], report["added"]) == ("accepted", "week-01", True)
    assert report["counts"]["accepted"] == 12
    assert report["message"].startswith("added batch week-01 to stream weekly: 12 of 12 rows")
    assert "first batch" in report["drift"] or report["drift"]
    [row] = rows_of(watched)
    assert (row.state, row.batch, row.message) == ("accepted", "week-01", report["message"])
    assert row.finished is not None
    assert audited(watched) == ["week-01.jsonl"]
    assert last_look(watched) is not None
    assert list(watched.uploads.glob("*")) == []


def test_a_bad_file_is_refused_with_its_rows(watched: State, put: Callable[..., None]) -> None:
    rows = comparisons("week-01")
    rows[3]["strength"] = "hugely_better"
    del rows[5]["chosen"]
    put("week-01.jsonl", rows)
    watcher = Watcher(watched)
    assert watcher.look_once() == ["week-01.jsonl"]
    assert batches(watched) == []
    assert tree(watcher.inbox) == ["refused/week-01.jsonl", "refused/week-01.jsonl.report.json"]
    report = report_of(watcher.inbox, "refused/week-01.jsonl")
    assert report["outcome"] == "refused"
    assert [row["line"] for row in report["refused"]] == [4, 6]
    assert report["counts"]["refused"] == 2
    assert report["message"].startswith("week-01.jsonl: 2 of 12 rows are bad, so nothing was added")
    assert str(watched.folder) not in json.dumps(report)
    [row] = rows_of(watched)
    assert (row.state, row.batch) == ("refused", None)
    assert row.finished is not None


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("week 01.jsonl", b'{"id": "1"}\n'),
        ("empty.jsonl", b""),
        ("notes.txt", b"see you on Monday"),
        ("week.jsonl.gz", b"\x1f\x8b broken"),
        ("week.parquet", b"PAR1 broken PAR1"),
        ("binary.jsonl", bytes(range(256))),
    ],
)
def test_what_is_no_batch_file_is_refused(
    watched: State, tmp_path: Path, name: str, data: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    drop(watched, path, name)
    assert Watcher(watched).look_once() == [name]
    [row] = rows_of(watched)
    assert (row.state, row.batch) == ("refused", None)
    assert not (watched.store / STREAM / "batches").exists()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_names_are_no_patterns(watched: State, put: Callable[..., None]) -> None:
    put("a[b].jsonl")
    put("ab.jsonl")
    watcher = Watcher(watched)
    assert watcher.look_once() == ["a[b].jsonl", "ab.jsonl"]
    names = [name for name in tree(watcher.inbox) if not name.endswith(".report.json")]
    assert names == ["accepted/ab.jsonl", "refused/a[b].jsonl"]
    assert batches(watched) == ["ab"]


def test_what_a_bad_row_holds_can_be_stored(state: State) -> None:
    inbox = open_inbox(state).local
    text = json.dumps({"half \ud800, zero \0": 1}) + "\n"
    (inbox / "week-01.jsonl").write_text(text, encoding="ascii")
    assert Watcher(state).look_once() == ["week-01.jsonl"]
    [row] = rows_of(state)
    assert row.state == "refused"
    assert r"half \ud800, zero \x00" in row.message
    report = read_json(inbox / "refused" / "week-01.jsonl.report.json")
    assert report["message"] == row.message


def test_a_folder_names_the_stream(watched: State, put: Callable[..., None]) -> None:
    put("other/week-01.jsonl")
    put("week-02.jsonl")
    watcher = Watcher(watched)
    assert watcher.look_once() == ["other/week-01.jsonl", "week-02.jsonl"]
    assert (batches(watched, "other"), batches(watched)) == (["week-01"], ["week-02"])
    assert "accepted/other/week-01.jsonl" in tree(watcher.inbox)


def test_nothing_is_overwritten(watched: State, put: Callable[..., None]) -> None:
    watcher = Watcher(watched)
    for number in (1, 2, 3):
        put("week-01.jsonl", comparisons("week-01") if number < 3 else comparisons("other"))
        assert watcher.look_once() == ["week-01.jsonl"]
    names = [name for name in tree(watcher.inbox) if not name.endswith(".report.json")]
    assert names == [
        "accepted/week-01-2.jsonl",
        "accepted/week-01.jsonl",
        "refused/week-01.jsonl",
    ]
    again = report_of(watcher.inbox, "accepted/week-01-2.jsonl")
    assert "all rows are in stream weekly already" in again["message"]
    assert "never changes" in report_of(watcher.inbox, "refused/week-01.jsonl")["message"]
    assert batches(watched) == ["week-01"]


def test_a_refused_file_that_is_put_back_is_tried_again(state: State, tmp_path: Path) -> None:
    rows = comparisons("week-01")
    drop(state, write_rows(tmp_path / "week-01.jsonl", [{**rows[0], "axis": "none"}]), "w.jsonl")
    inbox = open_inbox(state).local
    Watcher(state).look_once()
    refused = inbox / "refused" / "w.jsonl"
    refused.rename(inbox / "w.jsonl")
    assert Watcher(state).look_once() == ["w.jsonl"]
    assert [row.state for row in rows_of(state)] == ["refused"]
    assert refused.exists() or (inbox / "refused" / "w-2.jsonl").exists()
    assert not (inbox / "w.jsonl").exists()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_jsonl(path, rows)
    return path


# When a file is complete


def test_a_file_is_taken_when_it_has_not_changed_for_a_while(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    watcher = Watcher(with_service(state, settle_seconds=5.0))
    text = write_batch(tmp_path / "week-01.jsonl").read_text().splitlines(keepends=True)
    path = watcher.inbox.local / "week-01.jsonl"
    path.write_text("".join(text[:5]))
    assert watcher.look_once() == []
    clock[0] += 4.9
    with path.open("a") as file:
        file.write("".join(text[5:]))
    assert watcher.look_once() == []
    clock[0] += 4.9
    assert watcher.look_once() == []
    clock[0] += 0.2
    assert watcher.look_once() == ["week-01.jsonl"]
    assert Store(state.store, STREAM).manifest(Kind.batch, "week-01")["rows"] == 12


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("cut", ["inside a line", "between two lines"])
def test_a_file_that_grows_while_it_is_read_is_looked_at_again(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    watcher = Watcher(state)
    whole = write_batch(tmp_path / "week-01.jsonl").read_bytes()
    path = watcher.inbox.local / "week-01.jsonl"
    half = whole[: whole.index(b"\n", len(whole) // 2) + 1]
    path.write_bytes(half if cut == "between two lines" else whole[:-40])
    ingest = watch.ingest_into

    def slow(*arguments: Any, check: Callable[[], None], **options: Any) -> Any:
        def late() -> None:
            path.write_bytes(whole)
            check()

        try:
            return ingest(*arguments, check=late, **options)
        finally:
            path.write_bytes(whole)

    monkeypatch.setattr(watch, "ingest_into", slow)
    assert watcher.look_once() == []
    assert rows_of(state) == []
    monkeypatch.setattr(watch, "ingest_into", ingest)
    assert watcher.look_once() == ["week-01.jsonl"]
    assert Store(state.store, STREAM).manifest(Kind.batch, "week-01")["rows"] == 12


def test_what_is_still_written_or_is_no_file_stays(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = Watcher(state)
    inbox = watcher.inbox.local
    (inbox / "deep" / "er").mkdir(parents=True)
    names = [".week.jsonl", "week.jsonl.tmp", "week.jsonl.part", "deep/er/week.jsonl"]
    for name in names:
        (inbox / name).write_text("{}")
    (inbox / "link.jsonl").symlink_to("/etc/hostname")
    os.mkfifo(inbox / "pipe.jsonl")
    unnamed = [os.fsdecode(b"week-\xff.jsonl"), f"{'w' * 200}.jsonl"]
    for name in unnamed:
        (inbox / name).write_text("{}")
    assert watcher.look_once() == watcher.look_once() == []
    assert all((inbox / name).exists() for name in (*names, *unnamed))
    said = [line.partition(" stays in the inbox: ")[2] for line in caplog.messages]
    assert sorted(said) == ["its name is not UTF-8", "its name is too long"]


def test_a_file_that_goes_away_is_forgotten(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher(state)
    drop(state, write_batch(tmp_path / "week-01.jsonl"), "week-01.jsonl")
    fetch = watcher.inbox.fetch

    def lost(name: str, folder: Path) -> Path:
        (watcher.inbox.local / name).unlink()
        return fetch(name, folder)

    monkeypatch.setattr(watcher.inbox, "fetch", lost)
    assert watcher.look_once() == []
    assert rows_of(state) == []


def test_dropping_shows_the_whole_file_or_none(watched: State, tmp_path: Path) -> None:
    path = write_batch(tmp_path / "week-01.jsonl", 3000)
    watcher = Watcher(watched)
    sizes = set()
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            sizes.update(item.size for item in watcher.inbox.waiting())

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(5):
        drop(watched, path, "week-01.jsonl")
    end.set()
    thread.join()
    sizes.update(item.size for item in watcher.inbox.waiting())
    assert sizes == {path.stat().st_size}


# What goes wrong


def test_a_failure_that_is_not_the_files_is_tried_again_and_others_go_on(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    for name in ("week-01", "week-02"):
        drop(state, write_batch(tmp_path / f"{name}.jsonl"), f"{name}.jsonl")
    ingest = watch.ingest_into

    def failing(state: State, path: Path, **options: Any) -> Any:
        if path.name == "week-01.jsonl":
            raise OSError(28, "No space left on device")
        return ingest(state, path, **options)

    monkeypatch.setattr(watch, "ingest_into", failing)
    watcher = Watcher(state)
    assert watcher.look_once() == ["week-02.jsonl"]
    [first, _] = rows_of(state)
    assert (first.state, first.finished) == ("claimed", None)
    assert "No space left" in first.message
    monkeypatch.setattr(watch, "ingest_into", ingest)
    assert watcher.look_once() == []
    clock[0] += RETRY_SECONDS
    assert watcher.look_once() == ["week-01.jsonl"]
    assert batches(state) == ["week-02", "week-01"]


def test_each_pause_is_twice_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    pauses = Pauses()
    assert pauses.begin("a", "no answer") == (RETRY_SECONDS, True)
    assert pauses.begin("a", "no answer") == (2 * RETRY_SECONDS, False)
    assert pauses.begin("a", "full") == (4 * RETRY_SECONDS, True)
    assert pauses.is_over("b")
    assert not pauses.is_over("a")
    clock[0] += 4 * RETRY_SECONDS
    assert pauses.is_over("a")
    assert max(pauses.begin("a", "full")[0] for _ in range(10)) == LONGEST_SECONDS
    pauses.forget("a")
    assert pauses.begin("a", "full") == (RETRY_SECONDS, True)
    pauses.keep([])
    assert pauses.is_over("a")


def test_the_thread_outlives_a_look_that_fails(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    find = Inbox.waiting

    def failing(inbox: Inbox) -> Any:
        if not failed.is_set():
            failed.set()
            raise ConnectionError("the file system is away")
        return find(inbox)

    reopened = []
    monkeypatch.setattr(Inbox, "waiting", failing)
    monkeypatch.setattr(Inbox, "reopen", lambda inbox: reopened.append(inbox))
    drop(state, write_batch(tmp_path / "week-01.jsonl"), "week-01.jsonl")
    with watching(state):
        wait_until(lambda: any(row.finished for row in rows_of(state)))
    assert batches(state) == ["week-01"]
    assert len(reopened) == 1


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_an_inbox_that_went_away_is_not_empty(state: State) -> None:
    url = f"memory://inbox-{secrets.token_hex(8)}"
    inbox = Watcher(with_service(state, inbox=url)).inbox
    inbox.fs.rm(url, recursive=True)
    inbox.reopen()
    with pytest.raises(FileNotFoundError):
        inbox.waiting()
    inbox.create()
    assert inbox.waiting() == []


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("key", "value"), [("axis", "taste"), ("stream", "a/b"), ("kind", "x")])
def test_settings_that_would_refuse_every_file_are_refused(
    state: State, key: str, value: str
) -> None:
    config = replace(state.config, ingest=replace(state.config.ingest, **{key: value}))
    with pytest.raises(ConfigError, match=rf"ingest\.{key}={value}"):
        Watcher(replace(state, config=config))


def test_an_inbox_that_cannot_be_opened_is_named(state: State) -> None:
    with pytest.raises(ConfigError, match=r"service\.inbox=nosuch://x cannot be opened"):
        Watcher(with_service(state, inbox="nosuch://x"))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# Runs


def test_a_batch_extends_the_plan_and_is_launched_if_so_set(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_people_run(state)
    called: list[list[str]] = []

    def call(arguments: list[str]) -> str:
        called.append(arguments)
        return "launched"

    monkeypatch.setattr(launching, "run_command", call)
    drop(state, write_batch(tmp_path / "week-01.jsonl"), "week-01.jsonl")
    Watcher(state).look_once()
    assert [item.batches for item in runner.read_plan(folder).rounds] == [("week-01",)]
    assert called == []
    drop(state, write_batch(tmp_path / "week-02.jsonl"), "week-02.jsonl")
    Watcher(with_service(state, autolaunch=True)).look_once()
    assert len(runner.read_plan(folder).rounds) == 2
    assert [arguments[:2] for arguments in called] == [["launch", f"run={RUN}"]]
    with state.reading() as session:
        assert [row.state for row in session.scalars(select(Launch))] == ["launched"]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_run_that_cannot_be_read_keeps_nothing_else_waiting(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    folder, other = make_people_run(state), make_people_run(state, "run=another")
    plan = (folder / PLAN).read_bytes()
    (folder / PLAN).unlink()
    (folder / PLAN).mkdir()
    for name in ("week-01.jsonl", "week-02.jsonl"):
        drop(state, write_batch(tmp_path / name), name)
    watcher = Watcher(state)
    assert watcher.look_once() == watcher.look_once() == []
    assert batches(state) == ["week-01", "week-02"]
    assert watcher.inbox.waiting() == []
    assert len(runner.read_plan(other).rounds) == 2
    assert [(row.state, row.finished) for row in rows_of(state)] == [("accepted", None)] * 2
    assert audited(state) == []

    (folder / PLAN).rmdir()
    (folder / PLAN).write_bytes(plan)
    clock[0] += RETRY_SECONDS
    watcher.look_once()
    assert len(runner.read_plan(folder).rounds) == 2
    assert all(row.finished for row in rows_of(state))
    assert all(row.message.startswith("added batch") for row in rows_of(state))
    assert audited(state) == ["week-01.jsonl", "week-02.jsonl"]


# Kills, and other watchers


def start(state: State, folder: Path, number: int, kill_at: str = "") -> subprocess.Popen[str]:
    """Start a watcher in another process that ends when so many files are taken in."""
    settings = folder / f"settings-{secrets.token_hex(4)}.json"
    settings.write_text(settings_of(state))
    environment = {**os.environ, **({KILL_VARIABLE: kill_at} if kill_at else {})}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(settings), str(number)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
def test_after_a_kill_the_next_look_finishes_once(
    state: State, tmp_path: Path, boundary: str
) -> None:
    folder = make_people_run(state)
    drop(state, write_batch(tmp_path / "week-01.jsonl"), "week-01.jsonl")
    killed = start(state, tmp_path, 1, kill_at=boundary)
    said = killed.communicate()[1]
    assert killed.returncode == -9, said

    watcher = Watcher(state)
    watcher.look_once()
    assert watcher.inbox.waiting() == []
    assert tree(watcher.inbox) == ["accepted/week-01.jsonl", "accepted/week-01.jsonl.report.json"]
    assert batches(state) == ["week-01"]
    report = report_of(watcher.inbox, "accepted/week-01.jsonl")
    assert report["counts"]["accepted"] == 12
    # From the report on, nothing is said a second time.
    is_written = boundary in BOUNDARIES[BOUNDARIES.index("after-rename:report.json") :]
    assert report["message"].startswith("added batch") or not is_written
    assert report["drift"] or not is_written
    assert audited(state) == ["week-01.jsonl"]
    [row] = rows_of(state)
    assert (row.state, row.batch) == ("accepted", "week-01")
    assert row.finished is not None
    assert [item.batches for item in runner.read_plan(folder).rounds] == [("week-01",)]
    assert list(state.uploads.glob("*")) == []
    assert watcher.look_once() == []


@pytest.mark.parametrize("apart", [False, True], ids=["one-database", "two-databases"])
def test_two_watchers_take_each_file_once(state: State, tmp_path: Path, apart: bool) -> None:
    states = [with_service(state, inbox=str(tmp_path / "inbox"))] * 2
    if apart:
        service = replace(states[0].config.service, folder=str(tmp_path / "b"), database=None)
        states[1] = open_state(replace(state.config, service=service))
    names = [f"week-{i:02}.jsonl" for i in range(8)]
    for name in names:
        drop(states[0], write_batch(tmp_path / name), name)
    started = [start(item, tmp_path, len(names)) for item in states]
    for process in started:
        said = process.communicate(timeout=WAIT_SECONDS)[1]
        assert process.returncode == 0, said
    watcher = Watcher(states[0])
    reports = [name for name in tree(watcher.inbox) if name.endswith(".report.json")]
    assert reports == [f"accepted/{name}.report.json" for name in names]
    assert all(
        report_of(watcher.inbox, name.removesuffix(".report.json"))["added"] for name in reports
    )
    assert sorted(batches(state)) == [name.removesuffix(".jsonl") for name in names]
    told = [name for item in ([state, states[1]] if apart else [state]) for name in audited(item)]
    assert sorted(told) == names


def test_two_watchers_of_one_remote_inbox_take_each_file_once(state: State, tmp_path: Path) -> None:
    remote = with_service(state, inbox=f"memory://inbox-{secrets.token_hex(8)}")
    names = [f"week-{i:02}.jsonl" for i in range(6)]
    for name in names:
        drop(remote, write_batch(tmp_path / name), name)
    watchers = [Watcher(remote) for _ in range(2)]
    together = threading.Barrier(2)

    def look(watcher: Watcher) -> None:
        together.wait()
        watcher.look_once()

    threads = [threading.Thread(target=look, args=(watcher,)) for watcher in watchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(audited(state)) == names
    assert {row.state for row in rows_of(state)} == {"accepted"}
    assert len(rows_of(state)) == len(names)


def test_a_stale_listing_does_not_take_a_moved_file_again(watched: State, put: Any) -> None:
    put("week-01.jsonl")
    quick, slow = Watcher(watched), Watcher(watched)
    [item] = slow.inbox.waiting()
    assert quick.look_once() == ["week-01.jsonl"]
    assert not slow._take(item)
    [row] = rows_of(watched)
    assert row.finished is not None
    assert audited(watched) == ["week-01.jsonl"]


def test_a_claim_of_a_living_process_is_left_alone(state: State, tmp_path: Path) -> None:
    drop(state, write_batch(tmp_path / "week-01.jsonl"), "week-01.jsonl")
    other, watcher = Watcher(state), Watcher(state)
    [item] = other.inbox.waiting()
    claim = other.claims.claim(item)
    assert claim is not None
    assert watcher.look_once() == []
    # Two that see it dead at once: one gets it.
    other.claims.change(claim, owner="")
    [row] = rows_of(state)
    assert [watcher.claims.take_over(row), other.claims.take_over(row)] == [True, False]
    with pytest.raises(claims.Lost):
        other.claims.change(claim, batch="mine")
    other.claims.forget(claim)
    assert [row.batch for row in rows_of(state)] == [None]


def test_a_claim_without_a_sign_of_life_is_taken_over(state: State, tmp_path: Path) -> None:
    drop(state, write_batch(tmp_path / "week-01.jsonl"), "week-01.jsonl")
    other, watcher = Watcher(state), Watcher(state)
    [item] = other.inbox.waiting()
    claim = other.claims.claim(item)
    far = json.loads(claim.owner)
    far[0] = "another-machine"
    set_values(state, owner=json.dumps(far))
    assert watcher.look_once() == []
    set_values(state, claimed=claim.claimed.replace(year=2020))
    assert watcher.look_once() == ["week-01.jsonl"]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_sign_of_life_that_fails_is_given_again(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.01)
    drop(state, write_batch(tmp_path / "week-01.jsonl"), "week-01.jsonl")
    watcher = Watcher(state)
    [item] = watcher.inbox.waiting()
    claim = watcher.claims.claim(item)
    change = watcher.claims.change
    failed = threading.Event()

    def failing(row: InboxFile, **values: Any) -> InboxFile:
        if not failed.is_set():
            failed.set()
            raise OperationalError("UPDATE", {}, Exception("the database is away"))
        return change(row, **values)

    monkeypatch.setattr(watcher.claims, "change", failing)
    with watcher.claims.beating(claim):
        wait_until(lambda: rows_of(state)[0].claimed > claim.claimed)
    assert failed.is_set()


def set_values(state: State, **values: Any) -> None:
    """Change every row of the inbox's files."""
    with state.transaction() as session:
        for row in session.scalars(select(InboxFile)):
            for name, value in values.items():
                setattr(row, name, value)


def test_reports_say_what_the_command_line_says(state: State, tmp_path: Path) -> None:
    drop(state, write_batch(tmp_path / "week-01.jsonl"), "week-01.jsonl")
    Watcher(state).look_once()
    report = read_json(open_inbox(state).local / "accepted" / "week-01.jsonl.report.json")
    shutil.rmtree(state.store)
    command = ["ingest", str(tmp_path / "week-01.jsonl"), f"paths.store={state.store}"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf.cli", *command], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{report['message']}\n{report['drift']}\n"
