"""Journals that outlive the database, and weeks that become batches exactly once."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from annotation_run import (
    MODELS,
    NODE,
    RUN,
    STREAM,
    TEMPERATURES,
    WEEK,
    assignments_of,
    lose_weeks,
    make_collect_run,
    make_pairs,
    make_user,
    make_week,
    tasks_of,
    verdict,
)
from sqlalchemy import delete, select, update
from sqlalchemy.orm import sessionmaker

from rlhf.artifacts import write_jsonl
from rlhf.config import Config, OnBadRow
from rlhf.data.ingest import IngestReport, ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import Kind
from rlhf.errors import ArtifactError
from rlhf.faults import KILL_VARIABLE
from rlhf.service.annotation import assigning, closing, journal_file, judging
from rlhf.service.annotation.journal import Restored, restore
from rlhf.service.annotation.measures import level, week_view
from rlhf.service.annotation.schemas import Draft, NewDraft, Skip, Verdict
from rlhf.service.annotation.weeks import create_from_run, create_week, find_week
from rlhf.service.database.connect import open_engine
from rlhf.service.database.models import Annotation, Assignment, Task, Token, User, Week, now
from rlhf.service.inbox import ACCEPTED
from rlhf.service.problems import Problem
from rlhf.service.state import State


def in_a_process(config: Config, work: Callable[[State], Any], *, kill_at: str) -> int:
    """Do something in a process of its own, which a fault ends; returns its exit code."""
    process = os.fork()
    if process == 0:
        os.environ[KILL_VARIABLE] = kill_at
        # Connections of the process before belong to that one.
        engine = open_engine(config.service, Path(config.service.folder))
        try:
            work(State(config, engine, sessionmaker(engine, expire_on_commit=False)))
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def submit_and_die(state: State, user: User, key: str) -> None:
    """Submit in a process that is killed between the journal and the commit."""
    die(state, lambda own: judging.submit(own, user, key, Verdict(**verdict())))


def die(state: State, work: Callable[[State], Any]) -> None:
    """Do something in a process that is killed between the journal and the commit."""
    assert in_a_process(state.config, work, kill_at="journalled:journal") == -signal.SIGKILL


def close_and_die(state: State, kill_at: str) -> None:
    """Close the week in a process that is killed on its way."""
    work = partial(closing.close_week, name=WEEK)
    assert in_a_process(state.config, work, kill_at=kill_at) == -signal.SIGKILL


def take(state: State, user: User) -> str:
    offer = assigning.next_assignment(state, user)
    assert offer.assignment is not None
    return offer.assignment.key


def judge(state: State, name: str, number: int | None = None, **changes: Any) -> int:
    """Judge as somebody until nothing is left, or a number of pairs; returns how many it were."""
    user, done = make_user(state, name), 0
    while number is None or done < number:
        offer = assigning.next_assignment(state, user)
        if offer.assignment is None:
            break
        judging.submit(state, user, offer.assignment.key, Verdict(**verdict(**changes)))
        done += 1
    return done


def view(state: State, name: str = WEEK) -> Any:
    with state.reading() as session:
        return week_view(session, find_week(session, name))


def verdicts(state: State) -> list[tuple[Any, ...]]:
    """Return everything about the verdicts that must not change."""
    with state.reading() as session:
        rows = session.execute(
            select(
                Assignment.key,
                Assignment.swapped,
                User.name,
                Task.pair_id,
                Annotation.preferred,
                Annotation.strength,
                Annotation.safe_a,
                Annotation.comment,
                Annotation.seconds,
                Annotation.submitted,
            )
            .select_from(Annotation)
            .join(Assignment, Assignment.id == Annotation.assignment_id)
            .join(Task, Task.id == Annotation.task_id)
            .join(User, User.id == Annotation.user_id)
            .order_by(Assignment.key)
        ).all()
    return [tuple(row) for row in rows]


def lose_database(state: State) -> None:
    """Forget everything about annotation, people included."""
    lose_weeks(state)
    with state.transaction() as session:
        session.execute(delete(User))


def waiting(state: State) -> list[Path]:
    """Return the files that wait in the inbox."""
    folder = Path(state.inbox)
    return sorted(p for p in folder.rglob("*.jsonl") if ACCEPTED not in p.parts)


def ingest(state: State, path: Path, *, stream: str = STREAM, **options: Any) -> IngestReport:
    return ingest_file(
        path,
        Store(state.store, stream),
        kind=None,
        on_bad_row=OnBadRow.refuse,
        heldout_share=0.1,
        heldout_salt="rlhf",
        **options,
    )


# The journal


def test_a_lost_database_comes_back(state: State) -> None:
    make_week(state)
    judge(state, "ann", 5, comment="so \u2028 said \U0001f989")
    judge(state, "bob", 2, preferred="right", strength="negligibly_better")
    judging.skip(state, user := make_user(state, "cem"), take(state, user), Skip(reason="why"))
    before, seen, tasks = verdicts(state), view(state), tasks_of(state)
    on_screen = take(state, make_user(state, "ann"))
    lose_database(state)
    assert restore(state) == Restored(weeks=1, entries=8)
    assert verdicts(state) == before
    assert view(state) == seen
    assert [(t.pair_id, t.taken, t.needed, t.pair) for t in tasks_of(state)] == [
        (t.pair_id, t.taken, t.needed, t.pair) for t in tasks
    ]
    with state.reading() as session:
        people = session.execute(select(User.name, User.role).order_by(User.name)).all()
        assert session.scalars(select(Token)).all() == []
    assert [tuple(row) for row in people] == [(name, "annotator") for name in ("ann", "bob", "cem")]
    # What is left goes on as before: nobody meets a pair again, and all is judged once.
    assert take(state, make_user(state, "ann")) == on_screen
    judge(state, "ann")
    judge(state, "bob")
    per_task = {task.id: 0 for task in tasks_of(state)}
    with state.reading() as session:
        for task_id in session.scalars(select(Annotation.task_id)):
            per_task[task_id] += 1
    assert {task.id: task.needed for task in tasks_of(state)} == per_task


def test_restoring_twice_changes_nothing(state: State) -> None:
    make_week(state)
    judge(state, "ann", 4)
    before = verdicts(state)
    assert restore(state) == Restored(0, 0)
    lose_database(state)
    restore(state)
    assert restore(state) == Restored(0, 0)
    assert verdicts(state) == before


def test_what_was_journalled_and_not_committed_counts(state: State) -> None:
    make_week(state)
    key = take(state, user := make_user(state, "ann"))
    submit_and_die(state, user, key)
    assert verdicts(state) == []
    assert restore(state) == Restored(0, 1)
    assert len(verdicts(state)) == 1
    answer = judging.submit(state, user, key, Verdict(**verdict()))
    assert (answer.state, answer.verdict) == ("done", Verdict(**verdict()))
    assert len((state.weeks / WEEK / "journal.jsonl").read_text().splitlines()) == 1


def test_a_skip_that_was_journalled_and_not_committed_counts(state: State) -> None:
    make_week(state, pairs=1)
    key = take(state, user := make_user(state, "ann"))
    body = Skip(reason="garbled")
    die(state, lambda own: judging.skip(own, user, key, body))
    assert restore(state) == Restored(0, 1)
    assert [(row.key, row.state) for row in assignments_of(state)] == [(key, "skipped")]
    assert [task.taken for task in tasks_of(state)] == [0]
    assert judging.skip(state, user, key, body).state == "skipped"


def test_a_verdict_that_was_not_committed_comes_too_late_for_a_pair_that_others_judged(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    make_week(state, pairs=1)
    key = take(state, user := make_user(state, "ann"))
    submit_and_die(state, user, key)
    with state.transaction() as session:
        session.execute(update(Assignment).values(state="expired"))
        session.execute(update(Task).values(taken=0))
    judge(state, "bob")
    before = verdicts(state)
    for _ in range(2):
        assert restore(state) == Restored(0, 0)
    assert caplog.text.count("was never acknowledged") == 1
    lose_database(state)
    restore(state)
    assert verdicts(state) == before
    assert [name for _, _, name, *_ in before] == ["bob"]


def test_a_verdict_that_was_not_committed_takes_the_place_of_a_pair_in_hand(state: State) -> None:
    make_week(state, pairs=1)
    key = take(state, user := make_user(state, "ann"))
    submit_and_die(state, user, key)
    with state.transaction() as session:
        session.execute(update(Assignment).values(state="expired"))
        session.execute(update(Task).values(taken=0))
    late = take(state, other := make_user(state, "bob"))
    assert restore(state) == Restored(0, 1)
    with pytest.raises(Problem, match="somebody else has it"):
        judging.submit(state, other, late, Verdict(**verdict()))
    assert [task.taken for task in tasks_of(state)] == [1]


def test_a_closed_week_has_the_verdicts_of_its_batch_file(state: State) -> None:
    make_week(state)
    judge(state, "ann", 2)
    key = take(state, user := make_user(state, "ann"))
    submit_and_die(state, user, key)
    closing.close_week(state, WEEK)
    before = verdicts(state)
    assert len(before) == 2
    assert restore(state) == Restored(0, 0)
    assert verdicts(state) == before
    lose_database(state)
    assert restore(state) == Restored(1, 2)
    assert verdicts(state) == before


def test_a_server_that_starts_waits_for_a_verdict_that_another_takes(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_week(state)
    is_inside, may_go = hold_submissions(monkeypatch, after=True)
    submitting = threading.Thread(target=judge, args=(state, "ann", 1))
    submitting.start()
    assert is_inside.wait(60)
    restored: list[Restored] = []
    restoring = threading.Thread(target=lambda: restored.append(restore(state)))
    restoring.start()
    # Long enough to apply the entry, if it did not wait.
    restoring.join(0.5)
    may_go.set()
    submitting.join()
    restoring.join()
    assert restored == [Restored(0, 0)]
    assert len(verdicts(state)) == 1


def test_lost_weeks_come_back_in_their_order(state: State) -> None:
    for name in ("week-b", "week-a"):
        make_week(state, pairs=1, name=name)
    damaged = state.weeks / "week-a" / "week.json"
    whole = damaged.read_bytes()
    damaged.write_text("{")
    assert restore(state) == Restored(0, 0)
    lose_weeks(state)
    with pytest.raises(ArtifactError, match="put the file back from a copy"):
        restore(state)
    damaged.write_bytes(whole)
    restore(state)
    with state.reading() as session:
        names = session.scalars(select(Week.name).order_by(Week.id)).all()
    assert names == ["week-b", "week-a"]


def hold_submissions(
    monkeypatch: pytest.MonkeyPatch, *, after: bool
) -> tuple[threading.Event, threading.Event]:
    """Hold submissions before or after they are journalled; returns: one is there, it may go on."""
    is_inside, may_go = threading.Event(), threading.Event()
    append = journal_file.append

    def slow(folder: Path, entry: dict[str, Any]) -> None:
        if after:
            append(folder, entry)
        is_inside.set()
        assert may_go.wait(60)
        if not after:
            append(folder, entry)

    monkeypatch.setattr(journal_file, "append", slow)
    return is_inside, may_go


def test_a_submission_repeated_after_a_kill_counts_once(state: State) -> None:
    make_week(state)
    key = take(state, user := make_user(state, "ann"))
    submit_and_die(state, user, key)
    # The server is back before it restores, and the page sends another verdict.
    judging.submit(state, user, key, Verdict(**verdict("right", comment="on second thought")))
    after = verdicts(state)
    assert restore(state) == Restored(0, 0)
    lose_database(state)
    restore(state)
    assert verdicts(state) == after
    assert len((state.weeks / WEEK / "journal.jsonl").read_text().splitlines()) == 2


def test_a_line_that_was_cut_off_harms_no_other(state: State) -> None:
    make_week(state)
    judge(state, "ann", 2)
    path = state.weeks / WEEK / "journal.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "submit", "key": "to')
    judge(state, "ann", 2)
    before = verdicts(state)
    lose_database(state)
    assert restore(state) == Restored(1, 4)
    assert verdicts(state) == before


def test_a_journal_without_its_pair_does_not_stop_the_start(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    make_week(state)
    judge(state, "ann", 1)
    folder = state.weeks / WEEK
    [entry] = journal_file.entries(folder)
    journal_file.append(folder, entry | {"key": "other", "pair_id": "nothing"})
    (state.weeks / "half-made").mkdir()
    assert restore(state) == Restored(0, 0)
    assert "has no pair nothing" in caplog.text


def test_a_full_disk_takes_no_verdict(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    make_week(state)
    key = take(state, user := make_user(state, "ann"))
    write = os.write

    def full(handle: int, data: bytes) -> int:
        write(handle, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_file.os, "write", full)
        with pytest.raises(Problem, match="disk is full") as caught:
            judging.submit(state, user, key, Verdict(**verdict()))
    assert caught.value.status == 507
    assert verdicts(state) == []
    assert (state.weeks / WEEK / "journal.jsonl").read_bytes() == b""
    judging.submit(state, user, key, Verdict(**verdict()))
    assert len(verdicts(state)) == 1


def test_drafts_outlive_a_restart(state: State) -> None:
    make_week(state)
    key = take(state, user := make_user(state, "ann"))
    typed = {"preferred": "left", "strength": "better", "comment": "half", "saved": 3}
    judging.save_draft(state, user, key, NewDraft(**typed))
    state.engine.dispose()
    restore(state)
    assert judging.show(state, user, key).draft == Draft(**typed)


# Closing


def test_a_closed_week_is_a_batch_that_ingest_accepts(state: State) -> None:
    make_collect_run(state.runs, state.store)
    week = create_from_run(state, run=RUN, node=NODE, name=None)
    judge(state, "ann", 9)
    judge(state, "bob", preferred="right", strength="slightly_better")
    closed = closing.close_week(state, week.name)
    [path] = waiting(state)
    assert path.relative_to(state.inbox).parts == (STREAM, f"{WEEK}.jsonl")
    assert path.read_bytes() == (state.weeks / WEEK / f"{WEEK}.jsonl").read_bytes()
    report = ingest(state, path)
    assert (report.added, report.id, report.kind) == (True, WEEK, Kind.batch)
    assert report.counts["read"] == closed.rows == 12
    assert report.counts["refused"] == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = {f"{WEEK}/{pair['id']}": pair for pair in make_pairs(12)}
    for row in rows:
        pair = pairs[row["id"]]
        chosen = "a" if row["chosen"] == pair["response_a"] else "b"
        rejected = "b" if chosen == "a" else "a"
        assert row["rejected"] == pair[f"response_{rejected}"]
        assert (row["model_chosen"], row["model_rejected"]) == (
            pair[f"model_{chosen}"],
            pair[f"model_{rejected}"],
        )
        assert row["meta"]["temperature_chosen"] == pair[f"temperature_{chosen}"]
        assert (row["source"], row["axis"]) == ("annotation", pair["axis"])
        names = [given["annotator"] for given in row["meta"]["annotations"]]
        assert row["annotator"] == (names[0] if len(names) == 1 else None)
    assert {row["annotator"] for row in rows} >= {"ann", "bob"}
    assert set(MODELS) == {row["model_chosen"] for row in rows}
    assert set(TEMPERATURES) == {row["meta"]["temperature_rejected"] for row in rows}
    assert view(state).state == "closed"


def test_weeks_of_two_runs_of_one_stream_are_two_batches(state: State) -> None:
    """Runs of one seed collect pairs for the same prompts, whose ids are the same."""
    for run, said in (("one", "corn"), ("other", "milk")):
        pairs = [{**pair, "response_a": f"{said} " * 9} for pair in make_pairs(6)]
        week = f"{run}-week-02"
        create_week(state, name=week, stream=STREAM, run=run, node=NODE, pairs=pairs)
        judge(state, "ann")
        closing.close_week(state, week)
    reports = [ingest(state, path) for path in waiting(state)]
    assert [(report.id, report.counts["accepted"]) for report in reports] == [
        ("one-week-02", 6),
        ("other-week-02", 6),
    ]


def test_closing_twice_is_closing_once(state: State) -> None:
    make_week(state)
    judge(state, "ann")
    first = closing.close_week(state, WEEK)
    [path] = waiting(state)
    path.unlink()
    assert closing.close_week(state, WEEK) == first
    assert waiting(state) == []


@pytest.mark.parametrize(
    "kill_at",
    [
        f"before-rename:{WEEK}.jsonl",
        f"after-rename:{WEEK}.jsonl",
        f"before-rename:{STREAM}/",
        "batch-dropped:",
        "before-rename:report.json",
        "after-rename:report.json",
    ],
)
def test_closing_goes_on_after_a_kill(state: State, kill_at: str) -> None:
    make_week(state)
    judge(state, "ann", 7)
    close_and_die(state, kill_at)
    key = take_or_none(state, "ann")
    assert key is None
    restore(state)
    closed = closing.close_week(state, WEEK)
    assert closed.rows == 7
    assert len(waiting(state)) == 1
    assert ingest(state, waiting(state)[0]).counts["read"] == 7
    assert view(state).state == "closed"


def take_or_none(state: State, name: str) -> str | None:
    offer = assigning.next_assignment(state, make_user(state, name))
    return offer.assignment.key if offer.assignment is not None else None


def test_a_batch_that_is_in_the_stream_is_not_dropped_again(state: State) -> None:
    make_week(state)
    judge(state, "ann", 7)
    close_and_die(state, "batch-dropped:")
    [path] = waiting(state)
    ingest(state, path)
    path.unlink()
    closing.close_week(state, WEEK)
    assert waiting(state) == []


def test_another_batch_of_the_weeks_name_is_no_end_of_it(state: State, tmp_path: Path) -> None:
    """Somebody may have taken what was judged so far for the batch."""
    make_week(state)
    judge(state, "ann", 4)
    so_far = tmp_path / f"{WEEK}.jsonl"
    with state.reading() as session:
        write_jsonl(so_far, closing.batch_rows(session, find_week(session, WEEK)))
    ingest(state, so_far)
    judge(state, "ann")
    for _ in range(2):
        with pytest.raises(Problem, match=f"ingest.supersedes={WEEK}") as caught:
            closing.close_week(state, WEEK)
        assert caught.value.status == 409
    assert (waiting(state), view(state).state) == ([], "closing")
    ingest(state, state.weeks / WEEK / f"{WEEK}.jsonl", supersedes=WEEK)
    closing.close_week(state, WEEK)
    assert (waiting(state), view(state).state) == ([], "closed")
    rows = Store(state.store, STREAM).comparisons(Kind.batch, WEEK)
    assert len(rows) == len({row.id for row in rows}) == 12


def test_a_closed_week_comes_back_closed(state: State) -> None:
    make_week(state)
    judge(state, "ann", 7)
    first = closing.close_week(state, WEEK)
    seen = view(state)
    lose_database(state)
    restore(state)
    found = view(state)
    assert (found.state, found.counts) == ("closed", seen.counts)
    assert closing.close_week(state, WEEK) == first
    assert len(waiting(state)) == 1
    assert take_or_none(state, "bob") is None


def test_a_week_that_was_being_closed_takes_nothing_after_its_database_was_lost(
    state: State,
) -> None:
    make_week(state)
    judge(state, "ann", 7)
    close_and_die(state, "batch-dropped:")
    lose_database(state)
    restore(state)
    assert take_or_none(state, "bob") is None
    closing.close_week(state, WEEK)
    [path] = waiting(state)
    assert ingest(state, path).counts["read"] == 7


def test_a_week_without_a_verdict_is_not_closed(state: State) -> None:
    make_week(state)
    with pytest.raises(Problem, match="nothing to close") as caught:
        closing.close_week(state, WEEK)
    assert caught.value.status == 409
    assert view(state).state == "open"
    assert judge(state, "ann", 1) == 1


def test_what_nobody_judged_is_counted(state: State) -> None:
    make_week(state, pairs=8)
    judge(state, "ann", 3)
    user = make_user(state, "ann")
    for _ in range(2):
        judging.skip(state, user, take(state, user), Skip(reason="garbled"))
    report = closing.close_week(state, WEEK).report
    assert report["rows"] == {
        "written": 3,
        "ties": 0,
        "several_annotators": 0,
        "unjudged": 5,
        "skipped_only": 2,
    }
    assert report["counts"]["skips"] == 2
    assert json.loads((state.weeks / WEEK / "report.json").read_text()) == report


def test_verdicts_that_were_acknowledged_while_it_closed_are_in_the_file(state: State) -> None:
    make_week(state, pairs=60)
    users = [make_user(state, f"person-{i}") for i in range(4)]
    acknowledged: list[str] = []
    has_begun = threading.Event()
    others: list[BaseException] = []

    def work(user: User) -> None:
        try:
            while (offer := assigning.next_assignment(state, user)).assignment is not None:
                judging.submit(state, user, offer.assignment.key, Verdict(**verdict()))
                acknowledged.append(offer.assignment.key)
                if len(acknowledged) >= 10:
                    has_begun.set()
        except BaseException as error:
            if "has been closed" not in str(error):
                others.append(error)
            has_begun.set()

    threads = [threading.Thread(target=work, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    has_begun.wait()
    closed = closing.close_week(state, WEEK)
    for thread in threads:
        thread.join()
    assert others == []
    rows = [json.loads(line) for line in (state.weeks / WEEK / closed.file).open()]
    in_file = sum(len(row["meta"]["annotations"]) for row in rows)
    assert in_file == len(acknowledged) == len(verdicts(state))


def test_closing_waits_for_a_verdict_that_is_being_submitted(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_week(state)
    judge(state, "ann", 1)
    is_inside, may_go = hold_submissions(monkeypatch, after=False)
    submitting = threading.Thread(target=judge, args=(state, "ann", 1))
    closing_it = threading.Thread(target=closing.close_week, args=(state, WEEK))
    submitting.start()
    assert is_inside.wait(60)
    closing_it.start()
    # Long enough to close the week, if it did not wait.
    closing_it.join(1)
    may_go.set()
    submitting.join()
    closing_it.join()
    rows = (state.weeks / WEEK / f"{WEEK}.jsonl").read_text().splitlines()
    assert len(rows) == len(verdicts(state)) == 2


def test_the_export_is_what_closing_writes(state: State, client: Any) -> None:
    make_week(state)
    judge(state, "ann", 6)
    address = f"/api/v1/weeks/{WEEK}/export"
    exported = client.get(address)
    assert exported.headers["Content-Disposition"] == f'attachment; filename="{WEEK}.so-far.jsonl"'
    closing.close_week(state, WEEK)
    file = state.weeks / WEEK / f"{WEEK}.jsonl"
    assert exported.content == file.read_bytes()
    # From then on it is the file.
    file.write_bytes(b"{}\n")
    closed = client.get(address)
    assert closed.headers["Content-Disposition"] == f'attachment; filename="{WEEK}.jsonl"'
    assert closed.content == b"{}\n"


# Several verdicts on a pair


def given(preferred: str, strength: str, *labels: bool | None) -> tuple[Annotation, str]:
    safe_a, safe_b = labels or (None, None)
    row = Annotation(
        preferred=preferred,
        strength=strength,
        safe_a=safe_a,
        safe_b=safe_b,
        comment="",
        seconds=None,
        submitted=now(),
    )
    return row, "somebody"


@pytest.mark.parametrize(
    ("signed", "chosen", "strength"),
    [
        ([4], "a", "significantly_better"),
        ([-1], "b", "negligibly_better"),
        ([3, 3], "a", "better"),
        ([4, 1], "a", "slightly_better"),  # 2.5: the weaker level
        ([-4, -3], "b", "better"),  # -3.5
        ([2, -1], "a", "negligibly_better"),  # 0.5: never below the lowest
        ([4, -1, -2], "b", "negligibly_better"),
        ([4, 3, -4], "a", "better"),
        ([-2, -2, 1, 1], "b", "negligibly_better"),  # -0.5
    ],
)
def test_the_median_of_signed_strengths(signed: list[int], chosen: str, strength: str) -> None:
    strengths = ["negligibly_better", "slightly_better", "better", "significantly_better"]
    rows = [given("a" if s > 0 else "b", strengths[abs(s) - 1]) for s in signed]
    [pair] = make_pairs(1)
    row = closing.batch_row(WEEK, pair, rows)
    assert row["chosen"] == pair[f"response_{chosen}"]
    assert (row["strength"], row["tie"]) == (strength, False)


def test_opposite_verdicts_are_a_tie_whose_order_is_a_coin_flip() -> None:
    rows = [given("a", "better"), given("b", "better")]
    chosen = set()
    for pair in make_pairs(40):
        row = closing.batch_row(WEEK, pair, rows)
        assert (row["tie"], row["strength"]) == (True, "negligibly_better")
        assert row == closing.batch_row(WEEK, pair, rows)
        chosen.add(row["chosen"] == pair["response_a"])
    assert chosen == {True, False}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([None], None),
        ([True], True),
        ([False], False),
        ([True, False], False),
        ([True, True, False], True),
        ([False, None], False),
        ([True, None, None], True),
    ],
)
def test_half_of_the_labels_make_it_unsafe(
    labels: list[bool | None], expected: bool | None
) -> None:
    [pair] = make_pairs(1)
    row = closing.batch_row(WEEK, pair, [given("b", "better", label, True) for label in labels])
    assert (row["rejected_safe"], row["chosen_safe"]) == (expected, True)


def test_levels_are_in_order() -> None:
    assert [level(signed) for signed in (-4, -3, -2, -1, 1, 2, 3, 4)] == list(range(8))
