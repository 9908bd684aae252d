"""Many at once on a real server that is killed in the middle: nothing acknowledged is lost.

50 people read and 20 judge; the server dies by SIGKILL halfway and is started again on its port.
The default suite has fewer people for some seconds, `pytest -m slow` the whole minute.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import served
from sqlalchemy import func, select

from rlhf.data.records import STRENGTHS
from rlhf.service.annotation import journal_file
from rlhf.service.annotation.journal import restore
from rlhf.service.annotation.weeks import create_week, folder_of
from rlhf.service.database.models import Annotation, Assignment, Task, User
from rlhf.service.state import State

WEEK = "made-up-week"
READER_PAUSE, ANNOTATOR_PAUSE = 1.0, 0.3
AWAY_PAUSE = 0.5
"""Between two tries to reach a server that is away."""
ANSWER_SECONDS = 60
ENOUGH = 2
"""Verdicts of an annotator that each half has to bring, however long it takes."""
PATHS = (
    "/",
    "/runs/made-up",
    "/batches",
    "/api/v1/runs",
    "/api/v1/runs/made-up",
    "/api/v1/runs/made-up/nodes",
    "/api/v1/streams/weekly/batches",
    f"/api/v1/weeks/{WEEK}",
    "/healthz",
)


@dataclass(frozen=True)
class Crowd:
    """Who comes for how long, to how many pairs."""

    seconds: int
    readers: int
    annotators: int
    pairs: int


FEW = Crowd(seconds=3, readers=8, annotators=6, pairs=400)
MANY = Crowd(seconds=60, readers=50, annotators=20, pairs=4000)


@dataclass
class Seen:
    """What clients saw, together: seconds of every answer by what was asked, and wrong answers."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    broken: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def table(self) -> str:
        """Return a line per question: number, p50, p95, p99 in milliseconds."""
        lines = [f"{'':34}{'n':>7}{'p50':>8}{'p95':>8}{'p99':>8}  ms"]
        for name, found in sorted(self.seconds.items()):
            cuts = statistics.quantiles(found, n=100) if len(found) > 1 else [found[0]] * 99
            marks = "".join(f"{1000 * cuts[q - 1]:8.0f}" for q in (50, 95, 99))
            lines.append(f"{name:34}{len(found):7}{marks}")
        return "\n".join(lines)


class Client(threading.Thread):
    """Somebody with a connection, who asks again when the server is away."""

    def __init__(self, port: int, token: str, seen: Seen, end: threading.Event) -> None:
        super().__init__(daemon=True)
        self.port, self.seen, self.end = port, seen, end
        self.headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self.connection = self._connect()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.end.is_set():
                self.act()
        except BaseException as error:
            self.error = error
            raise

    def act(self) -> None:
        raise NotImplementedError

    def ask(self, name: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return status and answer; as often as it takes, the same question after a break."""
        text = json.dumps(body) if body is not None else None
        give_up = time.monotonic() + ANSWER_SECONDS
        while True:
            begin = time.monotonic()
            try:
                self.connection.request(method, path, text, self.headers)
                answer = self.connection.getresponse()
                data = answer.read()
            except (OSError, http.client.HTTPException):
                if begin > give_up:
                    raise
                self.connection.close()
                self.connection = self._connect()
                with self.seen.lock:
                    self.seen.broken += 1
                time.sleep(AWAY_PAUSE)
                continue
            with self.seen.lock:
                self.seen.seconds[name].append(time.monotonic() - begin)
                if answer.status >= 500:
                    self.seen.wrong.append(f"{method} {path}: {answer.status} {data[:300]!r}")
            is_json = "json" in answer.headers.get("Content-Type", "")
            return answer.status, json.loads(data) if is_json else data

    def expect(self, wanted: int, name: str, method: str, path: str, body: Any = None) -> Any:
        """Return an answer whose status is noted as wrong unless it is what was wanted."""
        status, answer = self.ask(name, method, path, body)
        if status != wanted:
            with self.seen.lock:
                self.seen.wrong.append(f"{method} {path}: {status}, not {wanted}: {answer!r:.300}")
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)


class Reader(Client):
    """Opens pages and asks the API, in some order."""

    def __init__(self, number: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.draw = random.Random(number)

    def act(self) -> None:
        path = self.draw.choice(PATHS)
        self.expect(200, f"GET {path}", "GET", path)
        self.end.wait(READER_PAUSE * self.draw.uniform(0.5, 1.5))


class Annotator(Client):
    """Judges one pair after the other; `given` is what was acknowledged."""

    def __init__(self, name: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.annotator = name
        self.draw = random.Random(name)
        self.given: dict[str, dict[str, Any]] = {}
        self.skipped: set[str] = set()

    def act(self) -> None:
        offer = self.expect(200, "POST tasks/next", "POST", "/api/v1/tasks/next")
        task = offer["task"]
        assert task is not None, "the week is too small for this test"
        key = task["key"]
        assert key not in self.given, "a pair came again"
        path = f"/api/v1/assignments/{key}"
        verdict = self._verdict()
        if self.draw.random() < 0.5:
            kept = {**verdict, "seconds": None, "saved": 1}
            del kept["seconds"]
            self.expect(200, "PUT draft", "PUT", f"{path}/draft", kept)
        self.end.wait(ANNOTATOR_PAUSE * self.draw.uniform(0.5, 1.5))
        if self.draw.random() < 0.05:
            self.expect(200, "POST skip", "POST", f"{path}/skip", {"reason": "unclear"})
            self.skipped.add(key)
            return
        self.expect(200, "POST submit", "POST", f"{path}/submit", verdict)
        self.given[key] = verdict
        if self.draw.random() < 0.2:
            self.expect(200, "POST submit again", "POST", f"{path}/submit", verdict)
        if self.draw.random() < 0.1:
            other = {**verdict, "comment": "another one"}
            self.expect(409, "POST submit other", "POST", f"{path}/submit", other)

    def _verdict(self) -> dict[str, Any]:
        return {
            "preferred": self.draw.choice(["left", "right"]),
            "strength": self.draw.choice(STRENGTHS),
            "safe_left": self.draw.random() < 0.8,
            "safe_right": self.draw.random() < 0.8,
            "comment": f"{self.annotator} {self.draw.random()}",
            "seconds": round(self.draw.uniform(1, 60), 3),
        }


def pairs(number: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"pair-{i}",
            "axis": ("helpfulness", "safety")[i % 2],
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "response_a": f"answer a {i}",
            "response_b": f"answer b {i}",
            "model_a": "v1",
            "model_b": "v0",
            "temperature_a": 0.8,
            "temperature_b": 1.2,
        }
        for i in range(number)
    ]


@pytest.mark.parametrize(
    "crowd", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_nothing_acknowledged_is_lost_or_doubled_by_a_kill(
    state: State, run: Path, crowd: Crowd
) -> None:
    create_week(
        state,
        name=WEEK,
        stream="weekly",
        run=run.name,
        node="round-03/collect",
        pairs=pairs(crowd.pairs),
    )
    names = [f"annotator-{i}" for i in range(crowd.annotators)]
    tokens = {name: served.make_token(state, name, "annotator") for name in names}
    viewer = served.make_token(state, "viewer", "viewer")
    served.make_token(state, "olga", "operator")
    seen, end = Seen(), threading.Event()

    with served.serving(state.config, "service.tokens=true") as first:
        shared = (seen, end)
        annotators = [Annotator(name, first.port, tokens[name], *shared) for name in names]
        readers = [Reader(i, first.port, viewer, *shared) for i in range(crowd.readers)]
        guest = Client(first.port, viewer, Seen(), end)
        for path in PATHS:
            assert guest.ask(path, "GET", path)[0] == 200
        for client in (*annotators, *readers):
            client.start()
        wait_for_verdicts(annotators, crowd.seconds / 2)
        first.kill()
        with served.serving(
            state.config, "service.tokens=true", f"service.port={first.port}"
        ) as second:
            wait_for_verdicts(annotators, crowd.seconds / 2)
            end.set()
            for client in (*annotators, *readers):
                client.join()
            assert second.stop() == 0

    given = {key: verdict for client in annotators for key, verdict in client.given.items()}
    print(f"\n{state.engine.dialect.name}: {crowd}: {len(given)} verdicts, {seen.broken} breaks")
    print(seen.table())
    assert [client.error for client in (*annotators, *readers) if client.error] == []
    assert seen.wrong == []
    assert given
    check_database(state, annotators)
    check_journal(state, annotators)
    assert restore(state).entries == 0


def wait_for_verdicts(annotators: Sequence[Annotator], seconds: float) -> None:
    """Wait so long, and until there are ENOUGH more verdicts."""

    def count() -> int:
        return sum(len(client.given) for client in annotators)

    before, end = count(), time.monotonic() + seconds
    while time.monotonic() < end or count() < before + ENOUGH * len(annotators):
        assert all(client.is_alive() for client in annotators)
        time.sleep(0.05)


def check_database(state: State, annotators: Sequence[Annotator]) -> None:
    """Compare what is stored with what was acknowledged."""
    query = (
        select(Assignment.key, Assignment.swapped, User.name, Annotation)
        .join(Annotation, Annotation.assignment_id == Assignment.id)
        .join(User, User.id == Assignment.user_id)
    )
    with state.reading() as session:
        rows = session.execute(query).all()
        stored = {key: (name, swapped, found) for key, swapped, name, found in rows}
        assert len(stored) == len(rows)
        done = set(session.scalars(select(Assignment.key).where(Assignment.state == "done")))
        skipped = set(session.scalars(select(Assignment.key).where(Assignment.state == "skipped")))
        kept = dict(
            session.execute(
                select(Assignment.task_id, func.count())
                .where(Assignment.state.in_(("open", "done")))
                .group_by(Assignment.task_id)
            ).all()
        )
        tasks = session.scalars(select(Task)).all()
    assert done == set(stored)
    for client in annotators:
        assert client.skipped <= skipped
        for key, verdict in client.given.items():
            name, swapped, found = stored[key]
            assert name == client.annotator
            assert (found.comment, found.strength) == (verdict["comment"], verdict["strength"])
            assert found.seconds == verdict["seconds"]
            assert found.preferred == ("a" if (verdict["preferred"] == "left") != swapped else "b")
    # A verdict whose answer the kill swallowed was sent again, so nothing else is there either.
    assert done == {key for client in annotators for key in client.given}
    assert {task.taken for task in tasks} > {0}
    for task in tasks:
        assert kept.get(task.id, 0) <= task.needed
        assert task.taken <= task.needed


def check_journal(state: State, annotators: Sequence[Annotator]) -> None:
    """Compare the journal with what was acknowledged: each verdict once."""
    lines = (folder_of(state, WEEK) / journal_file.JOURNAL).read_text().splitlines()
    counts = Counter(json.loads(line)["key"] for line in lines)
    assert set(counts.values()) == {1}
    acknowledged = {key for client in annotators for key in (*client.given, *client.skipped)}
    assert set(counts) == acknowledged
