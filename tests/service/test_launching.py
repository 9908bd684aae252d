"""Plans that grow with their stream, and launches that double nothing."""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from people_run import RUN, STREAM, make_people_run, prepare_people_run, write_batch
from sqlalchemy import select

from rlhf import runner
from rlhf.artifacts import read_json, write_json
from rlhf.compose import RUN_FILE
from rlhf.config import Launcher, LauncherKind
from rlhf.errors import ArtifactError, ConfigError, LauncherError
from rlhf.launch.local import PLAN
from rlhf.launch.operator import BACKGROUND, background_process
from rlhf.lease import process_start, run_lock
from rlhf.service import command, launching
from rlhf.service.database.connect import PASSWORD
from rlhf.service.database.models import Audit, Launch
from rlhf.service.ingesting import ingest_into
from rlhf.service.pauses import Pauses
from rlhf.service.problems import Problem
from rlhf.service.settings import open_settings, overrides_of
from rlhf.service.state import State

START_SECONDS = 60


@pytest.fixture
def people(state: State) -> Path:
    return make_people_run(state)


class Calls:
    """Stands in for the process of `rlhf launch`: what it was called with, and what it answers."""

    def __init__(self) -> None:
        self.arguments: list[list[str]] = []
        self.error: BaseException | None = None

    def __call__(self, arguments: list[str]) -> str:
        self.arguments.append(arguments)
        if self.error is not None:
            raise self.error
        return "process 1 runs people"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(launching, "run_command", found)
    return found


def add_batch(state: State, folder: Path, name: str, stream: str = STREAM) -> None:
    path = write_batch(folder / f"{name}.jsonl")
    assert ingest_into(state, path, kind=None, stream=stream).added


def work_in_background(folder: Path) -> None:
    """Make this process the one that works on a run."""
    row = {"pid": os.getpid(), "start": process_start(os.getpid())}
    write_json(folder / BACKGROUND, row)


def read_elsewhere(folder: Path, store: Path) -> None:
    """Make a run one that reads another store."""
    path = folder / RUN_FILE
    path.write_text(path.read_text().replace(str(store), f"{store}-elsewhere"))


def launches(state: State) -> list[tuple[str, str]]:
    with state.reading() as session:
        return [(row.run, row.state) for row in session.scalars(select(Launch).order_by(Launch.id))]


def audited(state: State, action: str) -> list[dict[str, Any]]:
    with state.reading() as session:
        return [row.detail for row in session.scalars(select(Audit).where(Audit.action == action))]


# Plans


def test_a_batch_makes_the_plans_of_its_subscribers_longer(
    state: State, people: Path, tmp_path: Path
) -> None:
    before = (people / RUN_FILE).read_bytes()
    assert launching.extend(state, STREAM) == []
    add_batch(state, tmp_path, "week-01")
    assert launching.extend(state, STREAM) == [(RUN, (1,))]
    add_batch(state, tmp_path, "week-02")
    add_batch(state, tmp_path, "week-03")
    assert launching.extend(state, STREAM) == [(RUN, (2, 3))]
    assert launching.extend(state, STREAM) == []
    plan = runner.read_plan(people)
    assert [item.batches for item in plan.rounds] == [("week-01",), ("week-02",), ("week-03",)]
    assert (people / RUN_FILE).read_bytes() == before
    assert [row["rounds"] for row in audited(state, "extend")] == [[1], [2, 3]]


def test_a_longer_plan_is_what_the_command_line_would_plan(
    state: State, people: Path, tmp_path: Path
) -> None:
    add_batch(state, tmp_path, "week-01")
    launching.extend(state, STREAM)
    longer = (people / PLAN).read_bytes()
    prepare_people_run(state.runs, state.store)
    assert (people / PLAN).read_bytes() == longer


def test_earlier_rounds_keep_the_rows_that_they_had(
    state: State, people: Path, tmp_path: Path
) -> None:
    add_batch(state, tmp_path, "week-01")
    launching.extend(state, STREAM)
    tree = read_json(people / PLAN)
    tree["rounds"][0]["as_of"] = tree["as_of"] = 77
    write_json(people / PLAN, tree)
    add_batch(state, tmp_path, "week-02")
    launching.extend(state, STREAM)
    plan = runner.read_plan(people)
    assert plan.as_of == plan.rounds[0].as_of == 77
    assert plan.rounds[1].as_of != 77


def test_only_runs_of_the_stream_with_people_subscribe(
    state: State, people: Path, tmp_path: Path
) -> None:
    make_people_run(state, "run=elsewhere", "data.stream=other")
    make_people_run(state, "run=toy", "collect.annotators=simulated", "rounds.limit=1")
    read_elsewhere(make_people_run(state, "run=other-store"), state.store)
    damaged = state.runs / "damaged" / RUN_FILE
    damaged.parent.mkdir()
    damaged.write_text("model: {path: [")
    assert launching.subscribers(state, STREAM) == [RUN]
    assert launching.subscribers(state, "other") == ["elsewhere"]


def test_a_run_that_refuses_is_logged_and_the_others_grow(
    state: State, people: Path, tmp_path: Path
) -> None:
    make_people_run(state, "run=another")
    tree = read_json(people / PLAN)
    write_json(people / PLAN, {**tree, "recipe": "another-recipe"})
    add_batch(state, tmp_path, "week-01")
    assert launching.extend(state, STREAM) == [("another", (1,))]
    [refused] = [row for row in audited(state, "extend") if "reason" in row]
    assert "another-recipe" in refused["reason"]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_plan_that_cannot_be_read_keeps_no_other_short(
    state: State, people: Path, tmp_path: Path
) -> None:
    another = make_people_run(state, "run=another")
    (another / PLAN).unlink()
    (another / PLAN).mkdir()
    tree = read_json(make_people_run(state, "run=older") / PLAN)
    del tree["rounds"]
    write_json(state.runs / "older" / PLAN, tree)
    add_batch(state, tmp_path, "week-01")
    assert launching.extend(state, STREAM) == [(RUN, (1,))]
    with pytest.raises(ArtifactError, match=r"another \(IsADirectoryError.*older .*is no plan"):
        launching.batch_arrived(state, STREAM, "week-01")


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_whoever_plans_holds_the_lock_of_the_plan(
    state: State, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = runner.draft
    held = []

    def checked(config: Any) -> Any:
        with (state.runs / f".{RUN}.{PLAN}.lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(False)
            except BlockingIOError:
                held.append(True)
        return draft(config)

    monkeypatch.setattr(runner, "draft", checked)
    add_batch(state, tmp_path, "week-01")
    launching.extend(state, STREAM)
    prepare_people_run(state.runs, state.store)
    assert held == [True, True]


def test_two_at_once_extend_once(state: State, people: Path, tmp_path: Path) -> None:
    add_batch(state, tmp_path, "week-01")
    together = threading.Barrier(4)
    found: list[Any] = []

    def work() -> None:
        together.wait()
        found.extend(launching.extend(state, STREAM))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(RUN, (1,))]


# Launches


def test_launch_passes_the_run_its_folders_and_settings(
    state: State, people: Path, calls: Calls
) -> None:
    row = launching.launch(state, RUN, user="ann", settings={"ppo.kl_coef": 0.02, "seed": "7"})
    assert (row.state, row.launcher, row.user) == ("launched", "local", "ann")
    assert row.output == "process 1 runs people"
    fixed = [f"run={RUN}", f"paths.runs={state.runs}", f"paths.store={state.store}"]
    assert calls.arguments == [["launch", *fixed, "detach=true", "ppo.kl_coef=0.02", "seed=7"]]


def test_a_new_run_gets_the_launcher_of_the_service(state: State, calls: Calls) -> None:
    launcher = Launcher(kind=LauncherKind.slurm, grace_seconds=77, follow=True)
    config = replace(state.config, launcher=launcher)
    row = launching.launch(replace(state, config=config), "true", user="ann", recipe="quickstart")
    assert row.launcher == "slurm"
    [arguments] = calls.arguments
    assert {"recipe=quickstart", 'run="true"', "launcher.kind=slurm"} <= set(arguments)
    assert {"launcher.grace_seconds=77", "launcher.follow=True"} <= set(arguments)
    assert not any(text.startswith("launcher.retries") for text in arguments)


@pytest.mark.parametrize("name", ["../people", "people/", "..", "", "none", "people\x00"])
def test_names_of_runs_are_looked_up(state: State, people: Path, calls: Calls, name: str) -> None:
    for action in (launching.launch, launching.cancel):
        with pytest.raises(Problem, match=RUN) as caught:
            action(state, name, user="ann")
        assert caught.value.status == HTTPStatus.NOT_FOUND
    assert calls.arguments == []


@pytest.mark.parametrize(
    ("run", "recipe"), [("../new", "quickstart"), ("new", "none-such"), ("new", "../quickstart")]
)
def test_new_names_are_checked(state: State, calls: Calls, run: str, recipe: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot name a run|choose one of .*quickstart"):
        launching.launch(state, run, user="ann", recipe=recipe)
    assert calls.arguments == []


def test_what_launch_says_no_to_is_raised_and_kept(
    state: State, people: Path, calls: Calls
) -> None:
    calls.error = LauncherError("sbatch is absent: install it")
    with pytest.raises(LauncherError, match="sbatch is absent"):
        launching.launch(state, RUN, user="ann")
    assert launches(state) == [(RUN, "failed")]
    calls.error = None
    launching.launch(state, RUN, user="ann")
    assert launches(state) == [(RUN, "failed"), (RUN, "launched")]


def test_a_busy_run_that_knows_its_plan_is_launched_already(
    state: State, people: Path, calls: Calls
) -> None:
    first = launching.launch(state, RUN, user="ann")
    work_in_background(people)
    again = launching.launch(state, RUN, user="bob")
    assert again.id == first.id
    assert len(calls.arguments) == 1
    with pytest.raises(Problem, match=r"seed=1 cannot take effect: wait"):
        launching.launch(state, RUN, user="bob", settings={"seed": 1})


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_busy_run_that_was_cancelled_goes_on_when_it_is_free(
    state: State, people: Path, calls: Calls
) -> None:
    launching.launch(state, RUN, user="ann")
    work_in_background(people)
    launching.cancel(state, RUN, user="bob")
    assert launches(state) == [(RUN, "failed")]
    # The process still saves its state.
    assert launching.launch(state, RUN, user="ann").state == "wanted"
    (people / BACKGROUND).unlink()
    assert launching.launch_wanted(state) == [RUN]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_busy_run_with_a_node_that_has_failed_goes_on_when_it_is_free(
    state: State, people: Path, calls: Calls
) -> None:
    launching.launch(state, RUN, user="ann")
    (people / "sft").mkdir()
    write_json(people / "sft" / "inputs.json", {})
    (people / "sft" / "log.txt").write_text("from an earlier launch")
    work_in_background(people)
    assert launching.launch(state, RUN, user="ann").state == "launched"
    os.utime(people / BACKGROUND, (1.0, 1.0))
    os.utime(people / PLAN, (1.0, 1.0))
    assert launching.launch(state, RUN, user="ann").state == "wanted"


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_run_of_another_store_is_not_launched(state: State, people: Path, calls: Calls) -> None:
    read_elsewhere(people, state.store)
    with pytest.raises(ConfigError, match=r"reads paths\.store=.*elsewhere and this service has"):
        launching.launch(state, RUN, user="ann")
    assert calls.arguments == []


def test_a_busy_run_with_a_longer_plan_is_launched_when_it_is_free(
    state: State, people: Path, tmp_path: Path, calls: Calls
) -> None:
    work_in_background(people)
    add_batch(state, tmp_path, "week-01")
    launching.extend(state, STREAM)
    assert launching.launch(state, RUN, user="ann").state == "wanted"
    assert launching.launch(state, RUN, user="bob").user == "ann"
    assert launching.launch_wanted(state) == []
    assert calls.arguments == []
    (people / BACKGROUND).unlink()
    assert launching.launch_wanted(state) == [RUN]
    assert launching.launch_wanted(state) == []
    assert launches(state) == [(RUN, "launched")]
    assert audited(state, "launch") == [{"user": "ann"}]


def test_a_wanted_launch_that_fails_is_told_and_not_repeated(
    state: State, people: Path, calls: Calls
) -> None:
    launching.want(state, RUN)
    launching.want(state, RUN)
    calls.error = ConfigError("data.heldout_share=0.3 differs")
    assert launching.launch_wanted(state) == []
    assert launching.launch_wanted(state) == []
    assert launches(state) == [(RUN, "failed")]
    assert audited(state, "launch") == [{"reason": "data.heldout_share=0.3 differs"}]


@pytest.mark.parametrize("recipe", [None, "quickstart"])
def test_a_launch_that_a_kill_cuts_off_is_repeated_as_it_was_ordered(
    state: State, people: Path, calls: Calls, recipe: str | None
) -> None:
    run = RUN if recipe is None else "new"
    calls.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        launching.launch(state, run, user="ann", recipe=recipe, settings={"seed": 7})
    assert launches(state) == [(run, "wanted")]
    calls.error = None
    assert launching.launch_wanted(state) == [run]
    assert "seed=7" in calls.arguments[0]
    assert calls.arguments[1] == calls.arguments[0]
    # The next order is another one.
    launching.want(state, RUN)
    launching.launch(state, RUN, user="ann")
    assert "seed=7" not in calls.arguments[2]


def test_a_wanted_launch_that_gets_no_answer_is_tried_again_after_a_pause(
    state: State, people: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pauses = Pauses()
    launching.want(state, RUN)
    calls.error = LauncherError("squeue did not answer")
    assert launching.launch_wanted(state, pauses) == []
    assert launching.launch_wanted(state, pauses) == []
    clock[0] += 60
    assert launching.launch_wanted(state, pauses) == []
    assert len(calls.arguments) == 2
    assert launches(state) == [(RUN, "wanted")]
    assert audited(state, "launch") == [{"reason": "squeue did not answer"}]
    calls.error = None
    clock[0] += 60
    assert launching.launch_wanted(state, pauses) == []
    clock[0] += 60
    assert launching.launch_wanted(state, pauses) == [RUN]
    assert launches(state) == [(RUN, "launched")]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_damaged_run_keeps_no_other_launch_waiting(
    state: State, people: Path, calls: Calls
) -> None:
    make_people_run(state, "run=another")
    for run in ("another", RUN):
        launching.want(state, run)
    (state.runs / "another" / PLAN).write_text("{}")
    assert launching.launch_wanted(state) == [RUN]
    assert sorted(launches(state)) == [("another", "wanted"), (RUN, "launched")]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_run_that_somebody_runs_by_hand_is_busy(state: State, people: Path, calls: Calls) -> None:
    with run_lock(people):
        assert launching.launch(state, RUN, user="ann").state == "wanted"
    assert not launching.is_busy(state, RUN)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_schedulers_take_only_what_is_missing_so_their_runs_are_busy_only_while_followed(
    state: State, calls: Calls
) -> None:
    folder = make_people_run(state, "launcher=slurm")
    with run_lock(folder):
        assert not launching.is_busy(state, RUN)
    assert launching.launch(state, RUN, user="ann").launcher == "slurm"
    work_in_background(folder)
    assert launching.is_busy(state, RUN)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_following_is_left_to_the_background(state: State, calls: Calls) -> None:
    make_people_run(state, "launcher=slurm", "launcher.follow=true")
    launching.launch(state, RUN, user="ann")
    assert "detach=true" in calls.arguments[0]
    assert not any("launcher.follow" in text for text in calls.arguments[0])


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_cancel_waits_for_a_launch_under_way(state: State, people: Path, calls: Calls) -> None:
    thread = threading.Thread(target=lambda: launching.cancel(state, RUN, user="ann"))
    with launching.alone(state, RUN, "launch"):
        thread.start()
        thread.join(0.2)
        assert calls.arguments == []
    thread.join()
    assert [arguments[0] for arguments in calls.arguments] == ["cancel"]


def test_cancel_ends_what_was_wanted(state: State, people: Path, calls: Calls) -> None:
    launching.want(state, RUN)
    assert launching.cancel(state, RUN, node="sft", user="ann") == "process 1 runs people"
    assert calls.arguments[0][0] == "cancel"
    assert calls.arguments[0][-1] == "node=sft"
    assert launches(state) == [(RUN, "wanted")]
    launching.cancel(state, RUN, user="ann")
    assert launches(state) == [(RUN, "failed")]
    with pytest.raises(Problem, match="sft") as caught:
        launching.cancel(state, RUN, node="../sft", user="ann")
    assert caught.value.status == HTTPStatus.NOT_FOUND


def test_autolaunch_wants_the_runs_that_have_a_round_of_the_batch(
    state: State, people: Path, tmp_path: Path
) -> None:
    make_people_run(state, "run=limited", "rounds.limit=1")
    service = replace(state.config.service, autolaunch=True)
    auto = replace(state, config=replace(state.config, service=service))
    add_batch(state, tmp_path, "week-01")
    launching.batch_arrived(state, STREAM, "week-01")
    assert launches(state) == []
    # As after a kill between the plan and its launch.
    assert launching.batch_arrived(auto, STREAM, "week-01") == []
    assert launches(state) == [("limited", "wanted"), (RUN, "wanted")]
    add_batch(state, tmp_path, "week-02")
    with state.transaction() as session:
        for row in session.scalars(select(Launch)):
            row.state = launching.LAUNCHED
    assert launching.batch_arrived(auto, STREAM, "week-02") == [(RUN, (2,))]
    assert launches(state)[2:] == [(RUN, "wanted")]


# The real command


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_refusal_of_the_real_command_is_the_error_it_was(state: State, people: Path) -> None:
    (people / "sft").mkdir()
    write_json(people / PLAN, {**read_json(people / PLAN), "recipe": "another-recipe"})
    with pytest.raises(ConfigError, match="started as recipe=another-recipe") as caught:
        launching.launch(state, RUN, user="ann")
    assert not str(caught.value).startswith("rlhf:")
    assert background_process(people) is None


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_the_command_does_not_see_the_databases_password(
    state: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "secret: ${{{PASSWORD}-none}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv(PASSWORD, "secret")
    monkeypatch.setattr(sys, "executable", str(program))
    assert launching.run_command(["launch"]) == "secret: none"


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("code", "error"), [(1, LauncherError), (2, ConfigError)])
def test_messages_of_several_lines_come_without_the_warnings(
    state: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, error: type[Exception]
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nprintf 'WARNING x\\nrlhf: a\\nb\\n' >&2\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(error) as caught:
        launching.run_command(["launch"])
    assert str(caught.value) == "a\nb"


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_command_that_does_not_answer_is_given_up(
    state: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(command, "LAUNCH_SECONDS", 0.1)
    with pytest.raises(LauncherError, match="did not answer within"):
        launching.run_command(["launch"])


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_two_real_launches_at_once_start_one_process_and_cancel_ends_it(
    state: State, people: Path
) -> None:
    rows: list[Launch] = []
    threads = [
        threading.Thread(target=lambda: rows.append(launching.launch(state, RUN, user="ann")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pid = background_process(people)
    assert pid is not None
    assert [row.state for row in rows] == ["launched", "launched"]
    assert rows[0].id == rows[1].id
    assert f"process {pid} runs {RUN}" in rows[0].output
    assert launching.is_busy(state, RUN)

    with pytest.raises(ConfigError, match="node=sft has no job of its own"):
        launching.cancel(state, RUN, node="sft", user="ann")
    said = launching.cancel(state, RUN, user="ann")
    assert f"process {pid} saves its state and stops" in said
    # Its parent is this test's launcher process, which has ended, so that init reaps it.
    end = time.monotonic() + START_SECONDS
    while background_process(people) is not None:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not launching.is_busy(state, RUN)


# Settings


def test_settings_that_may_be_changed_are_numbers_switches_and_choices() -> None:
    known = open_settings()
    assert {"seed", "ppo.kl_coef", "rounds.limit", "sft.skip", "reward.margin"} <= set(known)
    closed = ("paths.runs", "model.path", "generator.url", "launcher.kind", "on_change")
    for key in (
        *closed,
        "service.port",
        "recipe",
        "run",
        "ingest.on_bad_row",
        "tracking.mode",
        "data.stream",
    ):
        assert key not in known


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("seed", 3, "3"),
        ("seed", "-3", "-3"),
        ("ppo.kl_coef", 1e-6, "1e-06"),
        ("ppo.kl_coef", 1, "1.0"),
        ("ppo.kl_coef", "0.5", "0.5"),
        ("sft.skip", True, "true"),
        ("sft.skip", "False", "false"),
        ("rounds.limit", None, "null"),
        ("rounds.limit", "", "null"),
        ("reward.margin", "large", "large"),
    ],
)
def test_values_are_written_as_on_a_command_line(key: str, value: object, text: str) -> None:
    assert overrides_of({key: value}) == [f"{key}={text}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", True),
        ("seed", 1.5),
        ("seed", None),
        ("seed", "1 paths.runs=/"),
        ("seed", [1]),
        ("ppo.kl_coef", float("nan")),
        ("ppo.kl_coef", "inf"),
        ("ppo.kl_coef", "${oc.env:HOME}"),
        ("sft.skip", 1),
        ("sft.skip", "yes"),
        ("reward.margin", "huge"),
        ("reward.margin", 3),
    ],
)
def test_other_values_are_refused_with_what_is_wanted(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=.* cannot work: give "):
        overrides_of({key: value})


@pytest.mark.parametrize(
    "key",
    ["paths.runs", "service.port", "+new.key", "~seed", "hydra.run.dir", "seed\nx", "a" * 500],
)
def test_other_settings_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="cannot be set through the service"):
        overrides_of({key: "1"})
