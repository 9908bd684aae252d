"""Facts about runs and streams: the same as on the command line, also while files are written."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf import datacheck
from rlhf.artifacts import write_json
from rlhf.data.ledger import Store
from rlhf.data.records import Kind
from rlhf.errors import LauncherError
from rlhf.launch.failures import OUT_OF_MEMORY, REMEDIES, Exit, note_exit, note_submission
from rlhf.launch.jobs import Job
from rlhf.lease import Lease
from rlhf.service import facts
from rlhf.service.facts import nodes, reports, runs
from rlhf.service.facts.files import MAX_TAIL, tail
from rlhf.service.problems import Problem
from rlhf.service.state import State

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

LAST = "round-03/evaluate"
HOSTILE = [
    "",
    ".",
    "..",
    "../made-up",
    "made-up/../made-up",
    "/etc",
    "made-up\0",
    "x" * 5000,
    "\ud800",
]


def unfinish(run: Path, name: str = LAST) -> Path:
    (run / name / "manifest.json").unlink()
    return run / name


def row_of(state: State, name: str = LAST) -> facts.NodeRow:
    rows = facts.node_rows(facts.open_run(state, "made-up"))
    return next(row for row in rows if row.name == name)


def opened(state: State) -> facts.Run:
    return facts.open_run(state, "made-up")


def append(path: Path, *lines: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_from_outside_is_looked_up_and_never_joined(
    state: State, run: Path, name: str
) -> None:
    opened = facts.open_run(state, "made-up")
    for look in (
        lambda: facts.open_run(state, name),
        lambda: facts.find_node(opened, name),
        lambda: facts.open_stream(state, name),
        lambda: facts.batch_report(state, "weekly", name),
    ):
        with pytest.raises(Problem) as caught:
            look()
        assert caught.value.status == HTTPStatus.NOT_FOUND
        assert len(str(caught.value)) < 1000
    with pytest.raises(Problem, match="there is made-up"):
        facts.open_run(state, name)


def test_a_summary_counts_nodes_and_names_what_needs_a_look(state: State, run: Path) -> None:
    (summary,) = facts.list_runs(state)
    total = len(facts.open_run(state, "made-up").plan.nodes)
    assert summary.counts == {"done": total, "running": 0, "stopped": 0, "waiting": 0}
    assert (summary.name, summary.recipe, summary.stream) == ("made-up", "made-up", "weekly")
    assert summary.rounds == 3
    assert summary.version == "v2"
    assert summary.started is not None
    assert summary.finished_at is not None
    assert summary.state == "done"

    folder = unfinish(run)
    shutil.rmtree(run / "round-03/judge-safety")
    lease = Lease(run / "round-03/rejection")
    unfinish(run, "round-03/rejection")
    lease.take()
    note_exit(folder, Exit("7", 0, -9, OUT_OF_MEMORY, 0.0))
    (summary,) = facts.list_runs(state)
    lease.release()
    assert summary.counts == {"done": total - 3, "running": 1, "stopped": 1, "waiting": 1}
    assert summary.running == ["round-03/rejection"]
    assert summary.failed == [LAST]
    assert summary.finished_at is None
    assert summary.state == "failed"
    assert replace(summary, failed=[]).state == "running"
    left = replace(summary, failed=[], running=[])
    assert left.state == "stopped"
    assert replace(left, counts={**left.counts, "stopped": 0}).state == "waiting"


def test_a_run_that_cannot_be_read_does_not_hide_the_others(state: State, run: Path) -> None:
    broken = state.runs / "broken"
    shutil.copytree(run, broken)
    (broken / "run.yaml").write_text("- no\n- settings\n", encoding="utf-8")
    (state.runs / "unplanned").mkdir()
    shutil.copy(run / "run.yaml", state.runs / "unplanned")
    found = {summary.name: summary for summary in facts.list_runs(state)}
    assert found.keys() == {"broken", "made-up"}
    assert "does not hold settings" in found["broken"].problem
    assert found["made-up"].problem == ""
    assert (found["broken"].state, found["made-up"].state) == ("failed", "done")


def test_what_happens_to_a_finished_node_is_seen_at_once(state: State, run: Path) -> None:
    def standing() -> tuple[str, str]:
        (summary,) = facts.list_runs(state)
        return row_of(state).state, summary.version

    assert standing() == ("done", "v2")
    evaluation = run / LAST / "evaluation.json"
    whole = evaluation.read_bytes()
    evaluation.write_bytes(whole[:-1])
    assert standing() == ("stopped", "v2")
    assert row_of(state).failure == ""
    evaluation.unlink()
    assert standing() == ("stopped", "v2")
    evaluation.write_bytes(whole)
    assert standing() == ("done", "v2")
    write_json(run / "overrules.json", {"3": {"version": "v3", "reason": "why"}})
    assert standing() == ("done", "v3")
    (run / "round-02/evaluate/evaluation.json").unlink()
    assert standing() == ("done", "v1")


def test_a_new_plan_is_seen_at_once(state: State, run: Path) -> None:
    before = facts.open_run(state, "made-up")
    assert facts.open_run(state, "made-up") is before
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    plan["rounds"].append({"round": 4, "stage": "ppo", "batches": ["week-4"]})
    write_json(run / "plan.json", plan)
    assert len(facts.open_run(state, "made-up").plan.rounds) == 4


def test_a_node_says_how_it_failed_and_what_to_do(state: State, run: Path) -> None:
    folder = unfinish(run)
    row = row_of(state)
    assert (row.state, row.failure, row.has_failed) == ("stopped", "killed", True)
    stamp = "2026-01-02 03:04:05,678"
    append(folder / "log.txt", f"{stamp} ERROR rlhf.worker: node failed\nMemoryError\n")
    assert row_of(state).failure == OUT_OF_MEMORY
    append(folder / "log.txt", f"{stamp} INFO rlhf.worker: begins\n")
    assert row_of(state).failure == "killed"
    append(folder / "log.txt", f"{stamp} ERROR rlhf.worker: DataError: week-1 is gone\n")
    assert row_of(state).failure == "bad_input"
    append(folder / "log.txt", f"{stamp} ERROR rlhf.worker: node failed\n", "Traceback\n")
    append(folder / "log.txt", *("  a frame of a long traceback\n" for _ in range(500)))
    row = row_of(state)
    assert (row.failure, row.has_failed) == ("error", True)
    assert row.remedy == REMEDIES["error"]
    text = "stopped on request after step 3 of 9; its state is saved"
    append(folder / "log.txt", f"{stamp} WARNING rlhf.worker: {text}\n")
    row = row_of(state)
    assert (row.failure, row.has_failed) == ("stopped", False)
    assert facts.node_row(opened(state), facts.find_node(opened(state), LAST)) == row
    note_exit(folder, Exit("7", 0, -9, OUT_OF_MEMORY, 0.0))
    row = row_of(state)
    assert row.failure == OUT_OF_MEMORY
    assert "evaluate.micro_batch_size" in row.remedy


def test_a_damaged_node_does_not_hide_the_others(state: State, run: Path) -> None:
    (run / LAST / "manifest.json").write_text('{"files": {', encoding="utf-8")
    rows = facts.node_rows(facts.open_run(state, "made-up"))
    damaged = [row for row in rows if row.state != "done"]
    assert [row.name for row in damaged] == [LAST]
    assert damaged[0].failure == "error"
    assert "is not valid JSON" in damaged[0].remedy


def test_the_scheduler_is_asked_once_for_all_who_look(
    state: State, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    scheduler = SimpleNamespace(poll=lambda: asked.append(1) or {})
    monkeypatch.setattr(nodes, "open_launcher", lambda config: scheduler)
    opened = facts.open_run(state, "made-up")
    facts.node_rows(opened)
    assert asked == []
    settings = json.loads((run / "run.yaml").read_text(encoding="utf-8"))
    write_json(run / "run.yaml", {**settings, "launcher": {"kind": "slurm"}})
    opened = facts.open_run(state, "made-up")
    facts.node_rows(opened)
    facts.node_rows(opened)
    unfinish(run)
    rows = facts.node_rows(opened, ask_scheduler=False)
    assert asked == [1]
    # What was killed and when it goes on, the scheduler knows.
    assert [(row.state, row.failure) for row in rows if row.name == LAST] == [("stopped", "")]


def test_a_silent_scheduler_is_named_and_keeps_nobody_waiting(
    state: State, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ends = threading.Event(), threading.Event()

    def poll() -> dict[str, Job]:
        asked.set()
        assert ends.wait(60)
        raise LauncherError("squeue did not answer within 30 s")

    monkeypatch.setattr(nodes, "_JOBS", nodes._Jobs())
    monkeypatch.setattr(nodes, "open_launcher", lambda config: SimpleNamespace(poll=poll))
    settings = json.loads((run / "run.yaml").read_text(encoding="utf-8"))
    write_json(run / "run.yaml", {**settings, "launcher": {"kind": "slurm"}})
    (run / LAST / "manifest.json").unlink()
    opened = facts.open_run(state, "made-up")
    first = threading.Thread(target=lambda: facts.node_rows(opened))
    first.start()
    assert asked.wait(60)
    assert [row.job for row in facts.node_rows(opened)] == [None] * len(opened.plan.nodes)
    ends.set()
    first.join()
    asked.clear()
    jobs = {row.name: row.job for row in facts.node_rows(opened) if row.job is not None}
    reason = "squeue did not answer within 30 s"
    assert jobs == {LAST: {"id": "", "state": "unknown", "reason": reason}}
    assert not asked.is_set()


def test_a_node_whose_job_is_queued_again_has_not_failed(state: State, run: Path) -> None:
    folder = run / LAST
    (folder / "manifest.json").unlink()
    note_exit(folder, Exit("7", 0, 1, "error", time.time() - 60))
    assert row_of(state).has_failed
    note_submission(folder)
    assert not row_of(state).has_failed
    note_exit(folder, Exit("8", 0, 1, "error", time.time() + 60))
    assert row_of(state).has_failed


def test_damaged_files_of_runs_do_not_hide_the_others(state: State, run: Path) -> None:
    for name, text in (("no-rounds", '{"run": "no-rounds"}'), ("no-file", "")):
        folder = run.with_name(name)
        folder.mkdir()
        (folder / "run.yaml").write_bytes((run / "run.yaml").read_bytes())
        (folder / "plan.json").write_text(text or (run / "plan.json").read_text())
    (run.with_name("no-file") / "run.yaml").unlink()
    (run.with_name("no-file") / "run.yaml").mkdir()
    problems = {item.name: item.problem for item in facts.list_runs(state)}
    assert problems["made-up"] == ""
    assert "is no plan" in problems["no-rounds"]
    assert "directory" in problems["no-file"]
    assert facts.list_streams(state)


def test_metrics_are_windowed_thinned_and_whole(state: State, run: Path) -> None:
    folder = run / "round-02/ppo"
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1000):
            row = {"step": step, "a": step / 2}
            row |= {"b": float("nan")} if step % 100 == 0 else {}
            row |= {"seldom": 0.5} if step == 500 else {}
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 1000, "a":')
    opened = facts.open_run(state, "made-up")
    node = facts.find_node(opened, "round-02/ppo")
    found = facts.read_metrics(opened, node, points=11)
    assert (found["total"], found["matched"], len(found["rows"])) == (1000, 1000, 11)
    steps = [row["step"] for row in found["rows"]]
    assert (steps[0], steps[-1]) == (0, 999)
    gaps = {after - before for before, after in pairwise(steps)}
    assert gaps <= {99, 100}
    assert found["available"] == ["a", "b", "seldom"]
    assert found["latest"] == {"a": 499.5, "seldom": 0.5}

    found = facts.read_metrics(opened, node, after=9, before=20, points=500)
    assert [row["step"] for row in found["rows"]] == list(range(10, 20))
    found = facts.read_metrics(opened, node, names=["b"], points=5)
    assert (found["total"], found["matched"]) == (1000, 10)
    assert found["rows"][0] == {"step": 0, "b": None}
    assert facts.read_metrics(opened, node, points=1)["rows"][0]["step"] == 999
    assert facts.read_metrics(opened, facts.find_node(opened, "sft"))["rows"] == []


def test_pages_of_samples_make_the_file(state: State, run: Path) -> None:
    opened = facts.open_run(state, "made-up")
    node = facts.find_node(opened, LAST)
    path = run / LAST / "responses.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    append(path, '{"prompt": "half of a li')
    found = []
    while len(found) < len(rows):
        part = facts.read_samples(opened, node, offset=len(found), limit=7)
        assert part["total"] == len(rows)
        found += part["items"]
    assert found == rows
    assert facts.read_samples(opened, node, offset=10**6)["items"] == []
    assert facts.read_samples(opened, facts.find_node(opened, "sft"))["file"] == ""


def test_pairs_that_people_judge_are_no_samples(state: State, run: Path) -> None:
    (run / LAST / "pairs.jsonl").write_text('{"model_a": "v1"}\n', encoding="utf-8")
    (run / LAST / "responses.jsonl").unlink()
    opened = facts.open_run(state, "made-up")
    assert facts.read_samples(opened, facts.find_node(opened, LAST))["items"] == []


def test_a_report_is_made_once_until_something_changes(
    state: State, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    gather = reports.gather
    monkeypatch.setattr(reports, "gather", lambda *a, **k: made.append(1) or gather(*a, **k))
    opened = facts.open_run(state, "made-up")
    together = [threading.Thread(target=facts.run_report, args=(state, opened)) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    first = facts.run_report(state, opened)
    assert made == [1]
    assert first["run"] == "made-up"
    assert all(batch["drift"] is not None for batch in first["batches"][1:])
    unfinish(run)
    second = facts.run_report(state, opened)
    assert made == [1, 1]
    assert second["nodes_done"] == first["nodes_done"] - 1
    write_json(run / "overrules.json", {})
    facts.run_report(state, opened)
    assert len(made) == 3


def test_a_report_of_a_run_that_goes_away_asks_for_patience(
    state: State, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any, **__: Any) -> None:
        (run / LAST / "manifest.json").unlink(missing_ok=True)
        raise FileNotFoundError("evaluation.json")

    monkeypatch.setattr(reports, "gather", lose)
    with pytest.raises(Problem) as caught:
        facts.run_report(state, opened(state))
    assert caught.value.status == HTTPStatus.SERVICE_UNAVAILABLE


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("accuracy.json", "{"),
        ("accuracy.json", "{}"),
        ("accuracy.json", "[]"),
        ("scores.jsonl", "{"),
    ],
)
def test_a_damaged_artifact_hides_the_report_and_nothing_else(
    client: Any, state: State, run: Path, file: str, content: str
) -> None:
    folder = run / "round-01/reward-safety"
    (folder / file).write_text(content, encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][file]["size"] = len(content)
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(Problem) as caught:
        facts.run_report(state, opened(state))
    assert caught.value.status == HTTPStatus.CONFLICT
    assert content == "[]" or str(folder / file) in str(caught.value)
    page = client.get("/runs/made-up", headers={"Accept": "text/html"})
    assert page.status_code == 200
    assert "the report of run made-up cannot be made" in page.text
    assert 'action="/runs/made-up/cancel"' in page.text
    assert 'aria-label="round-03/evaluate: done' in page.text


def test_many_runs_are_read_once_and_listed_in_pages(
    client: Any, state: State, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = opened(state).config
    shutil.copytree(state.store / "weekly", state.store / "other")
    for number in range(150):
        folder = state.runs / f"run-{number:03}"
        folder.mkdir()
        shutil.copy(run / "run.yaml", folder)
        plan = {"run": folder.name, "recipe": "q", "rounds": [], "nodes": []}
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    read, listed, known_runs = [], [], runs.known_runs
    monkeypatch.setattr(runs, "load_frozen", lambda folder: read.append(folder) or config)
    first = client.get("/live").text
    assert len(read) == 150
    assert client.get("/live").text == first
    assert first.count('class="card"') == 50
    assert 'href="/?offset=50"' in first
    last = client.get("/live?offset=100000").text
    assert last.count('class="card"') == 1
    assert 'href="/?offset=100"' in last
    monkeypatch.setattr(runs, "known_runs", lambda state: listed.append(1) or known_runs(state))
    assert client.get("/batches").status_code == 200
    assert listed == [1]
    assert len(read) == 150


def test_what_a_launched_process_said_last_is_kept(state: State, run: Path, client: Any) -> None:
    def has_ended() -> bool:
        (summary,) = facts.list_runs(state)
        return summary.has_ended_early

    assert not has_ended()
    write_json(run / "background.json", {"pid": os.getpid(), "start": 1})
    append(run / "background.txt", "a\n", "b\n", "rlhf: model.path=<gone> does not exist\n")
    assert not has_ended()
    shutil.rmtree(run / LAST)
    assert has_ended()
    said = facts.read_background(opened(state), lines=2)
    assert said == ["b", "rlhf: model.path=<gone> does not exist"]
    assert "model.path=&lt;gone&gt; does not exist" in client.get("/runs/made-up/live").text
    assert 'class="state stopped"' in client.get("/live").text
    lease = Lease(run / LAST)
    lease.take()
    assert not has_ended()
    lease.release()
    later = (run / "background.json").stat().st_mtime + 1
    os.utime(run / "plan.json", (later, later))
    assert not has_ended()


def test_the_end_of_a_log_is_never_nothing(state: State, run: Path) -> None:
    path = run / LAST / "log.txt"
    path.write_text("first\n" + "x" * 2 * MAX_TAIL, encoding="utf-8")
    [line] = tail(path, lines=5)
    assert set(line) == {"x"}
    path.write_text("".join(f"line {i}\n\n" for i in range(50_000)), encoding="utf-8")
    assert tail(path, lines=9000) == [f"line {i}" for i in range(41_000, 50_000)]


def test_versions_are_those_of_the_files(state: State, run: Path) -> None:
    recorded = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    found = facts.run_versions(facts.open_run(state, "made-up"))
    assert [(v.name, v.state) for v in found] == [(v["name"], v["state"]) for v in recorded]


def test_batches_come_in_order_with_their_drift_and_their_runs(state: State, run: Path) -> None:
    (stream,) = facts.list_streams(state)
    assert (stream.name, stream.sets["batch"], stream.newest) == ("weekly", 3, "week-3")
    assert (stream.runs, stream.withdrawals) == (["made-up"], 1)
    rows = facts.list_batches(state, "weekly")
    assert [row.id for row in rows] == ["week-1", "week-2", "week-3"]
    assert [row.used_by for row in rows] == [{"made-up": [k]} for k in (1, 2, 3)]
    store = Store(state.store, "weekly")
    for row in rows:
        assert row.headline == datacheck.batch_headline(state.config, store, row.id)
        assert row.counts["accepted"] == row.rows
    assert rows[2].verdict == "stop"
    assert stream.rows == sum(row.rows for row in rows)
    assert facts.list_batches(state, "weekly", start=1, stop=2) == rows[1:2]


def test_the_report_of_a_batch_has_drift_quality_and_rows_left_out(state: State, run: Path) -> None:
    found = facts.batch_report(state, "weekly", "week-3")
    assert found["manifest"]["id"] == "week-3"
    assert "files" not in found["manifest"]
    assert found["drift"]["against"] == ["week-1", "week-2"]
    assert {row["name"] for row in found["quality"]["rows"]} == {"ann-1", "ann-2", "ann-3"}
    assert found["used_by"] == {"made-up": [3]}
    counts = found["manifest"]["counts"]
    assert len(found["excluded"]) == counts["read"] - counts["accepted"] - counts["refused"]
    with pytest.raises(Problem):
        facts.batch_report(state, "weekly", "week-3", kind="prompts")


def test_another_store_s_batches_are_not_this_run_s(state: State, run: Path) -> None:
    settings = json.loads((run / "run.yaml").read_text(encoding="utf-8"))
    settings["paths"]["store"] = str(run)
    write_json(run / "run.yaml", settings)
    assert [row.used_by for row in facts.list_batches(state, "weekly")] == [{}, {}, {}]
    assert facts.list_streams(state)[0].runs == []


def test_an_empty_service_has_nothing(state: State) -> None:
    assert facts.list_runs(state) == []
    assert facts.list_streams(state) == []
    assert facts.known_runs(state) == []
    with pytest.raises(Problem, match="there is none"):
        facts.open_run(state, "x")


def test_the_kind_is_needed_where_two_sets_have_one_name(state: State, run: Path) -> None:
    store = Store(state.store, "weekly")
    target = store.path(Kind.open, "week-1")
    shutil.copytree(store.path(Kind.batch, "week-1"), target)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    write_json(target / "manifest.json", {**manifest, "kind": "open", "sequence": 9})
    assert facts.batch_report(state, "weekly", "week-1")["manifest"]["kind"] == "batch"
    found = facts.batch_report(state, "weekly", "week-1", kind="open")
    assert found["manifest"]["kind"] == "open"
    assert (found["drift"], found["quality"], found["used_by"]) == (None, None, {})
    assert [row.kind for row in facts.list_batches(state, "weekly")].count("open") == 1
