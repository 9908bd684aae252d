"""The runner with stages that only count: what is run, what is kept, what is refused, what resumes.

Nodes run in real processes forked by the real server.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import fake_stages
import pytest
from rich.console import Console

from rlhf import compose, runner, worker
from rlhf.artifacts import NodeDir, read_json, read_jsonl, write_json
from rlhf.errors import ArtifactError, ConfigError, LeaseError, StageError
from rlhf.fingerprint import STAGES
from rlhf.launch.operator import launch_here
from rlhf.lease import process_start, run_lock
from rlhf.operate import changed_files, clean_run, export_version
from rlhf.plan import Plan
from rlhf.versions import list_versions, overrule, promoted_version

FAKES = dict.fromkeys(STAGES, "fake_stages")
ONE_ROUND = ("rounds.limit=1", "rounds.schedule=[ppo]")
Overrides = Callable[..., list[str]]


def go(overrides: list[str]) -> tuple[runner.Prepared, str]:
    """Run with fake stages; returns what was prepared and everything that was printed."""
    out = StringIO()
    prepared = runner.run(compose.load(overrides), Console(file=out, width=200), stages=FAKES)
    return prepared, out.getvalue()


def folder_of(overrides: list[str]) -> Path:
    runs = next(text for text in overrides if text.startswith("paths.runs="))
    return Path(runs.partition("=")[2]) / "quickstart"


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    found = folder.rglob("manifest.json")
    return {str(path.parent.relative_to(folder)): read_json(path) for path in found}


def comparable(folder: Path) -> dict[str, Any]:
    """Return what must be equal after any number of kills: digests, metrics, models."""
    return {
        name: (manifest["digest"], manifest["fingerprint"], steps_of(folder / name))
        for name, manifest in manifests(folder).items()
    }


def steps_of(folder: Path) -> list[tuple[int, int]]:
    return [(row["step"], row["total"]) for row in read_jsonl(folder / "metrics.jsonl")]


def restore(whole: dict[str, Any], overrides: list[str], *without: str) -> Path:
    """Copy the uninterrupted run, without some of its nodes, to where the overrides point."""
    folder = folder_of(overrides)
    root = folder.parent.parent
    shutil.copytree(whole["folder"].parent.parent, root, dirs_exist_ok=True)
    for name in without:
        shutil.rmtree(folder / name)
    return folder


LAST = ("round-01/ppo", "round-01/evaluate")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One uninterrupted round, and what a second call did to it."""
    root = tmp_path_factory.mktemp("whole")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    overrides = [
        "recipe=quickstart",
        f"paths.runs={root / 'runs'}",
        f"paths.store={root / 'store'}",
        "toy.sft_rows=12",
        "toy.prompts_per_kind=4",
        "toy.open_rows=6",
        "tracking.mode=none",
        "compute.num_threads=1",
        *ONE_ROUND,
    ]
    first, text = go(overrides)
    folder = folder_of(overrides)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    second, text_again = go(overrides)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    return {
        "folder": folder,
        "first": first,
        "text": text,
        "second": second,
        "overrides": overrides,
        "text_again": text_again,
        "touched": sorted(str(p.relative_to(folder)) for p in after if before.get(p) != after[p]),
        "comparable": comparable(folder),
    }


def test_every_node_ends_with_a_manifest_that_names_its_origin(whole: dict[str, Any]) -> None:
    folder, plan = whole["folder"], whole["first"].plan
    assert set(manifests(folder)) == {node.name for node in plan.nodes}
    manifest = read_json(folder / "round-01/ppo/manifest.json")
    reward = read_json(folder / "round-01/reward-safety/manifest.json")
    assert manifest["inputs"]["reward_safety"] == reward["digest"]
    assert manifest["num_threads"] == 1
    assert manifest["exact"] is True
    assert manifest["wall_seconds"] > 0
    assert manifest["peak_memory_mb"] > 1
    assert manifest["source_hash"] == reward["source_hash"]
    assert manifest["versions"]["python"]
    for name in ("config.yaml", "provenance.json", "inputs.json", "metrics.jsonl"):
        assert name in manifest["files"]
    assert not (folder / "round-01/ppo/checkpoints").exists()
    assert not (folder / "round-01/ppo/lease.json").exists()
    assert "lease.json" not in manifest["files"]


def test_every_node_says_what_it_took_and_what_was_expected(whole: dict[str, Any]) -> None:
    folder, plan = whole["folder"], whole["first"].plan
    rows = read_json(folder / "estimate.json")["nodes"]
    assert [row["node"] for row in rows] == [node.name for node in plan.nodes]
    for row in rows:
        manifest = read_json(folder / row["node"] / "manifest.json")
        assert 0 < manifest["device_seconds"] <= manifest["wall_seconds"] + 1
        energy = manifest["energy"]
        assert energy["method"] in ("measured", "estimated")
        assert manifest["energy_kwh"] == energy["kwh"] >= 0
        assert energy["co2_kg"] == pytest.approx(energy["kwh"] * 1.1 * 0.385)
        assert row["flops"] > 0
        assert not (folder / row["node"] / "energy").exists()


def test_a_run_that_another_process_runs_is_left_alone(whole: dict[str, Any]) -> None:
    with run_lock(whole["folder"]):
        with pytest.raises(LeaseError, match="another process runs"):
            go(whole["overrides"])
        out = StringIO()
        launch_here(compose.load(whole["overrides"]), whole["folder"], Console(file=out, width=200))
    assert "another process runs quickstart already" in out.getvalue()
    assert not (whole["folder"] / "background.json").exists()


def test_a_second_call_runs_nothing_and_says_so(whole: dict[str, Any]) -> None:
    assert "nothing to do: all 8 nodes of run quickstart are done" in whole["text_again"]
    assert "ingested" not in whole["text_again"]
    assert whole["second"].todo == ()
    assert whole["touched"] == ["versions.json"]


def test_simulated_batches_reach_later_nodes_by_their_digest(whole: dict[str, Any]) -> None:
    folder = whole["folder"]
    batch = read_json(folder / "round-01/collect/batch.json")
    reward = read_json(folder / "round-01/reward-safety/inputs.json")
    assert {"kind": "batch", "id": "round-01", "digest": batch["digest"], "round": 1} in reward[
        "data"
    ]
    evaluate = read_json(folder / "round-01/evaluate/inputs.json")
    assert evaluate["models"]["candidate"]["name"] == "v1"
    assert evaluate["models"]["promoted"]["name"] == "v0"


def test_versions_are_listed_with_their_state(whole: dict[str, Any]) -> None:
    rows = read_json(whole["folder"] / "versions.json")
    assert [(row["name"], row["node"], row["state"]) for row in rows] == [
        ("v0", "sft", "promoted"),
        ("v1", "round-01/ppo", "promoted"),
    ]


def test_a_round_more_runs_only_that_round(whole: dict[str, Any], small_run: Overrides) -> None:
    folder = restore(whole, small_run())
    before = manifests(folder)
    prepared, _ = go(small_run("rounds.limit=2", "rounds.schedule=[ppo]"))

    assert {node.round for node in prepared.todo} == {2}
    after = manifests(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 7
    assert compose.load_frozen(folder).rounds.limit == 2


def test_a_refused_version_stays_and_the_next_round_starts_from_the_last_promoted(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore(whole, small_run(), "round-01/evaluate")
    monkeypatch.setenv("FAKE_REFUSE", "1")
    prepared, _ = go(small_run("rounds.limit=2", "rounds.schedule=[ppo]"))
    folder = folder_of(small_run())

    reward = read_json(folder / "round-02/reward-safety/inputs.json")
    assert reward["models"]["init"]["name"] == "v0"
    ppo = read_json(folder / "round-02/ppo/inputs.json")
    assert ppo["models"]["policy"]["path"] == str(folder / "sft/model")
    collect = read_json(folder / "round-02/collect/inputs.json")
    assert collect["models"]["newest"]["name"] == "v1"
    states = [item.state for item in list_versions(prepared.config, prepared.plan, folder)]
    assert states == ["promoted", "refused", "promoted"]
    assert promoted_version(folder, 1) == "v0"
    assert promoted_version(folder, 2) == "v2"


def test_the_promoted_version_is_the_newest_that_was_promoted_or_chosen(tmp_path: Path) -> None:
    """Against the rounds gone through from the first one on."""
    choices: list[bool | str] = [True, False, "v0", "v2"]
    for case, rounds in enumerate(product(choices, repeat=3)):
        folder = tmp_path / str(case)
        expected, overrules = "v0", {}
        for k, choice in enumerate(rounds, start=1):
            evaluate = folder / f"round-0{k}/evaluate"
            write_json(evaluate / "decision.json", {"promoted": choice is True})
            write_json(evaluate / "manifest.json", {"files": {}})
            if isinstance(choice, str):
                overrules[str(k)] = {"version": choice}
                write_json(folder / "overrules.json", overrules)
                expected = choice
            elif choice:
                expected = f"v{k}"
            assert promoted_version(folder, k) == expected, rounds[:k]
        (folder / "round-03/evaluate/manifest.json").unlink()
        with pytest.raises(ArtifactError, match="round-03/evaluate is not finished"):
            promoted_version(folder, 3)


def test_an_operator_may_overrule_until_the_next_round_starts(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore(whole, small_run(), "round-01/evaluate")
    monkeypatch.setenv("FAKE_REFUSE", "1")
    prepared, _ = go(small_run(*ONE_ROUND))
    config, plan, folder = prepared.config, prepared.plan, prepared.folder

    with pytest.raises(ConfigError, match="needs a reason"):
        overrule(config, plan, folder, version="v1", reason=" ")
    with pytest.raises(ConfigError, match=r"v9 .*choose one of v0, v1"):
        overrule(config, plan, folder, version="v9", reason="x")
    assert overrule(config, plan, folder, version="v1", reason="read the samples") == 1
    assert promoted_version(folder, 1) == "v1"
    row = read_json(folder / "versions.json")[1]
    assert (row["state"], row["overruled"]) == ("promoted", "read the samples")

    later, _ = go(small_run("rounds.limit=2", "rounds.schedule=[ppo]"))
    init = read_json(folder / "round-02/reward-safety/inputs.json")["models"]["init"]
    assert init["name"] == "v1"
    # Round 2 is evaluated now, so the choice would be about round 2.
    assert overrule(config, later.plan, folder, version="v0", reason="back") == 2
    (folder / "round-02/evaluate/manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"too late: round-02/"):
        overrule(config, later.plan, folder, version="v0", reason="back")


def test_a_result_setting_changed_under_a_done_node_is_refused_with_the_difference(
    whole: dict[str, Any], small_run: Overrides
) -> None:
    folder = restore(whole, small_run())
    frozen = (folder / "run.yaml").read_bytes()

    with pytest.raises(
        ConfigError, match=r"round-01/ppo is done.*ppo.kl_coef: 0.05 -> 0.5.*run=NEW.*rerun"
    ):
        go(small_run(*ONE_ROUND, "ppo.kl_coef=0.5"))
    assert (folder / "run.yaml").read_bytes() == frozen


def test_on_change_rerun_deletes_that_node_and_what_depends_on_it(
    whole: dict[str, Any], small_run: Overrides
) -> None:
    folder = restore(whole, small_run())
    before = manifests(folder)
    prepared, _ = go(small_run(*ONE_ROUND, "ppo.kl_coef=0.5", "on_change=rerun"))

    assert [node.name for node in prepared.todo] == ["round-01/ppo", "round-01/evaluate"]
    after = manifests(folder)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"round-01/ppo", "round-01/evaluate"}
    frozen = compose.load_frozen(folder)
    assert frozen.ppo.kl_coef == 0.5
    assert frozen.on_change.name == "refuse"


def test_rerunning_a_simulated_collect_replaces_its_batch(
    whole: dict[str, Any], small_run: Overrides
) -> None:
    folder = restore(whole, small_run())
    prepared, text = go(small_run(*ONE_ROUND, "collect.num_pairs=7", "on_change=rerun"))

    assert "dropped round-01/collect" in text
    assert "round-01/reward-safety" in [node.name for node in prepared.todo]
    assert len(manifests(folder)) == 8


@pytest.mark.parametrize(
    "harmless", ["tracking.project=other", "ppo.micro_batch_size=2", "sft.micro_batch_size=1"]
)
def test_an_execution_setting_does_not_touch_done_nodes(
    whole: dict[str, Any], small_run: Overrides, harmless: str
) -> None:
    restore(whole, small_run())
    config = compose.load(small_run(*ONE_ROUND, harmless))
    prepared = runner.prepare(config, Console(file=StringIO()), stages=FAKES)
    assert prepared.todo == ()


def test_a_failing_node_is_named_with_its_log_and_the_next_call_goes_on(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore(whole, small_run(), "round-01/reward-safety", *LAST)
    monkeypatch.setenv("FAKE_FAIL", "round-01/reward-safety")
    with pytest.raises(
        StageError, match=r"(?s)node round-01/reward-safety failed.*planted failure.*rlhf run run="
    ):
        go(small_run(*ONE_ROUND))
    folder = folder_of(small_run())
    assert not (folder / "round-01/ppo").exists()
    monkeypatch.delenv("FAKE_FAIL")
    prepared, _ = go(small_run(*ONE_ROUND))
    assert prepared.todo[0].name == "round-01/reward-safety"
    assert read_jsonl(folder / "round-01/reward-safety/metrics.jsonl")[0]["loaded"] is False


REWARDS = tuple(
    f"round-01/{role}-{axis}" for role in ("reward", "judge") for axis in ("helpfulness", "safety")
)


def test_independent_nodes_run_side_by_side(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes that wait for each other end only if both run at once; no result changes."""
    folder = restore(whole, small_run(), *REWARDS[:2], *LAST)
    monkeypatch.setenv("FAKE_MEET", ",".join(REWARDS[:2]))
    prepared, text = go(small_run(*ONE_ROUND, "compute.parallel_nodes=2"))

    assert [node.name for node in prepared.todo] == [*REWARDS[:2], *LAST]
    for name in REWARDS[:2]:
        assert (folder / name / "arrived").exists()
        (folder / name / "arrived").unlink()
    ended = [line.split()[1] for line in text.splitlines() if " done in " in line]
    assert sorted(ended[:2]) == sorted(REWARDS[:2])
    assert ended[2:] == list(LAST)
    assert [text.count(f"[{k}/4]") for k in range(6)] == [0, 1, 1, 1, 1, 0]
    totals = {name: entry[2] for name, entry in comparable(folder).items()}
    assert totals == {name: entry[2] for name, entry in whole["comparable"].items()}


@pytest.mark.parametrize("parallel", [1, 2])
def test_no_more_nodes_run_at_once_than_asked_for(
    parallel: int, whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore(whole, small_run(), *REWARDS[1:], *LAST)
    running: set[str] = set()
    seen: list[int] = []
    start, wait = runner.NodeServer.start, runner.NodeServer.wait

    def counted_start(self: runner.NodeServer, node: str) -> None:
        running.add(node)
        seen.append(len(running))
        start(self, node)

    def counted_wait(self: runner.NodeServer, on_wait: Callable[[], None]) -> tuple[str, int]:
        name, code = wait(self, on_wait)
        running.remove(name)
        return name, code

    monkeypatch.setattr(runner.NodeServer, "start", counted_start)
    monkeypatch.setattr(runner.NodeServer, "wait", counted_wait)
    go(small_run(*ONE_ROUND, f"compute.parallel_nodes={parallel}"))
    assert len(seen) == 5
    assert max(seen) == parallel


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_failure_stops_what_depends_on_it_and_nothing_else(
    parallel: int, whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = restore(whole, small_run(), *REWARDS, *LAST)
    monkeypatch.setenv("FAKE_FAIL", REWARDS[0])
    with pytest.raises(StageError) as caught:
        go(small_run(*ONE_ROUND, f"compute.parallel_nodes={parallel}"))

    assert f"node {REWARDS[0]} failed with exit code 1" in str(caught.value)
    for name in (*REWARDS[1:], *LAST):
        assert f"node {name} " not in str(caught.value)
    assert not NodeDir(folder / REWARDS[0]).is_done()
    assert all(NodeDir(folder / name).is_done() for name in REWARDS[1:])
    assert not any((folder / name).exists() for name in LAST)

    monkeypatch.delenv("FAKE_FAIL")
    later, _ = go(small_run(*ONE_ROUND, f"compute.parallel_nodes={parallel}"))
    assert [node.name for node in later.todo] == [REWARDS[0], *LAST]


def test_all_failures_are_reported_at_the_end(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = restore(whole, small_run(), *REWARDS, *LAST)
    monkeypatch.setenv("FAKE_FAIL", f"{REWARDS[0]},{REWARDS[3]}")
    monkeypatch.setenv("FAKE_MEET", f"{REWARDS[0]},{REWARDS[3]}")
    with pytest.raises(StageError) as caught:
        go(small_run(*ONE_ROUND, "compute.parallel_nodes=4"))

    for name in REWARDS:
        failed = name in (REWARDS[0], REWARDS[3])
        assert (f"node {name} failed with exit code 1" in str(caught.value)) == failed
        assert NodeDir(folder / name).is_done() != failed
    assert not any((folder / name).exists() for name in LAST)


@pytest.mark.parametrize(
    "where",
    [
        "step-2:round-01/ppo",
        "before-temp:round-01/ppo/manifest.json",
        "before-rename:round-01/ppo/manifest.json",
        "after-rename:round-01/ppo/manifest.json",
        "before-rename:round-01/ppo/inputs.json",
        "before-rename:round-01/ppo/checkpoints/step-00000003",
    ],
)
def test_a_killed_node_goes_on_and_ends_the_same(
    where: str, whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = restore(whole, small_run(), *LAST)
    monkeypatch.setenv("RLHF_KILL_AT", where)
    with pytest.raises(StageError, match="ended by signal 9"):
        go(small_run(*ONE_ROUND))
    monkeypatch.delenv("RLHF_KILL_AT")
    saved = fake_stages.read_steps(folder / "round-01/ppo")
    was_done = NodeDir(folder / "round-01/ppo").is_done()
    # What the killed start had used, an hour, counts in the end.
    earlier = {"seconds": 3600.0, "joules": None, "source": "the first start"}
    write_json(folder / "round-01/ppo/energy/first.json", earlier)
    assert was_done == where.startswith("after-rename")
    prepared, _ = go(small_run(*ONE_ROUND))

    assert [node.name for node in prepared.todo if node.stage != "evaluate"] == (
        [] if was_done else ["round-01/ppo"]
    )
    rows = read_jsonl(folder / "round-01/ppo/metrics.jsonl")
    if where.startswith("step"):
        assert saved == [1, 2]
        assert [row["loaded"] for row in rows] == [False, False, True, True]
    assert comparable(folder) == whole["comparable"]
    assert not (folder / "round-01/ppo/checkpoints").exists()
    if not was_done:
        assert read_json(folder / "round-01/ppo/manifest.json")["device_seconds"] > 3600.0
    assert not (folder / "round-01/ppo/energy").exists()


def test_kill_9_of_the_runner_ends_its_node_and_the_next_call_takes_over(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(small_run())
    script = (
        "import sys; from rich.console import Console; from rlhf import compose, runner; "
        "from rlhf.fingerprint import STAGES; "
        "runner.run(compose.load(sys.argv[1:]), Console(), "
        "stages=dict.fromkeys(STAGES, 'fake_stages'))"
    )
    monkeypatch.setenv("FAKE_SLEEP", "1.5")
    child = subprocess.Popen([sys.executable, "-c", script, *small_run(*ONE_ROUND)])
    lease = folder / "sft/lease.json"
    wait_for(lambda: len(steps_of(folder / "sft")) >= 2)
    worker = read_json(lease)["pid"]
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_for(lambda: process_start(worker) is None)
    assert lease.exists()
    monkeypatch.delenv("FAKE_SLEEP")
    go(small_run(*ONE_ROUND))

    assert True in [row["loaded"] for row in read_jsonl(folder / "sft/metrics.jsonl")]
    assert comparable(folder) == whole["comparable"]


def wait_for(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.02)


def test_an_execution_change_inside_an_unfinished_node_ends_exactness(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = restore(whole, small_run(), *LAST)
    monkeypatch.setenv("RLHF_KILL_AT", "step-2:round-01/ppo")
    with pytest.raises(StageError):
        go(small_run(*ONE_ROUND))
    monkeypatch.delenv("RLHF_KILL_AT")
    go(small_run(*ONE_ROUND, "ppo.micro_batch_size=3"))

    assert read_json(folder / "round-01/ppo/manifest.json")["exact"] is False
    assert read_json(folder / "round-01/evaluate/manifest.json")["exact"] is True
    assert "ppo.micro_batch_size: 32 -> 3" in (folder / "round-01/ppo/log.txt").read_text()


def test_a_result_change_inside_an_unfinished_node_is_refused(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore(whole, small_run(), *LAST)
    monkeypatch.setenv("RLHF_KILL_AT", "step-2:round-01/ppo")
    with pytest.raises(StageError):
        go(small_run(*ONE_ROUND))
    monkeypatch.delenv("RLHF_KILL_AT")
    with pytest.raises(ConfigError, match=r"round-01/ppo has started with other values"):
        go(small_run(*ONE_ROUND, "ppo.gamma=0.9"))


def test_a_damaged_input_is_found_when_it_is_consumed(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = restore(whole, small_run(), *LAST)
    monkeypatch.setenv("RLHF_KILL_AT", "step-1:round-01/ppo")
    with pytest.raises(StageError):
        go(small_run(*ONE_ROUND))
    monkeypatch.delenv("RLHF_KILL_AT")
    weights = folder / "round-01/reward-safety/model/weights.json"
    weights.write_text(weights.read_text().swapcase())
    with pytest.raises(StageError, match=r"reward-safety/model/weights.json changed after"):
        go(small_run(*ONE_ROUND))


def test_the_toy_world_of_a_run_is_fixed(whole: dict[str, Any]) -> None:
    base = ["run=quickstart", f"paths.runs={whole['folder'].parent}"]
    with pytest.raises(ConfigError, match=r"toy world .*toy.sft_rows: 12 -> 13.*run=NEW"):
        go([*base, "toy.sft_rows=13"])


def test_another_recipe_is_refused_for_a_run_that_exists(whole: dict[str, Any]) -> None:
    base = ["run=quickstart", f"paths.runs={whole['folder'].parent}"]
    with pytest.raises(ConfigError, match=r"recipe=smollm2 cannot be used for run=quickstart"):
        go([*base, "recipe=smollm2"])


def test_nothing_is_written_for_an_impossible_model(small_run: Overrides, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.path=nowhere is not a model folder"):
        go(small_run("model.path=nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_holds_the_model_and_its_lineage(whole: dict[str, Any], tmp_path: Path) -> None:
    prepared = whole["first"]
    args = (prepared.config, prepared.plan, prepared.folder)
    target = tmp_path / "out" / "v1"
    export_version(*args, version="v1", target=target)

    source = whole["folder"] / "round-01/ppo/model/weights.json"
    assert (target / "weights.json").read_bytes() == source.read_bytes()
    card = (target / "README.md").read_text()
    batch = read_json(whole["folder"] / "round-01/collect/batch.json")
    assert f"| batch | round-01 | {batch['digest']} |" in card
    assert "| sft |" in card
    with pytest.raises(ConfigError, match="is not empty"):
        export_version(*args, version="v1", target=target)
    with pytest.raises(ConfigError, match=r"v7 .*there is v0, v1"):
        export_version(*args, version="v7", target=tmp_path / "other")


def test_clean_keeps_what_later_rounds_need(
    whole: dict[str, Any], small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore(whole, small_run(), "round-01/evaluate")
    monkeypatch.setenv("FAKE_REFUSE", "1")
    prepared, _ = go(small_run("rounds.limit=2", "rounds.schedule=[ppo]"))
    folder = prepared.folder
    freed = {name for name, _ in clean_run(prepared.config, prepared.plan, folder)}

    assert freed == {
        str(folder / f"round-01/{name}/model")
        for name in (
            "ppo",
            "reward-helpfulness",
            "reward-safety",
            "judge-helpfulness",
            "judge-safety",
        )
    }
    monkeypatch.setenv("FAKE_REFUSE", "")
    assert "nothing to do" in go(small_run("rounds.limit=2", "rounds.schedule=[ppo]"))[1]
    more, _ = go(small_run("rounds.limit=3", "rounds.schedule=[ppo]"))
    assert {node.round for node in more.todo} == {3}


class Tracked:
    """Stands for the tracker of a node; remembers how the block ended."""

    ends: ClassVar[list[type[BaseException] | None]] = []

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.ends.append(kind)

    def log(self, row: Any) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_nodes_tracking_is_closed_whichever_way_it_ends(
    whole: dict[str, Any],
    small_run: Overrides,
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    overrides = small_run(*ONE_ROUND)
    folder = restore(whole, overrides, *LAST)
    monkeypatch.setattr(worker, "Tracker", Tracked)
    monkeypatch.setattr(Tracked, "ends", [])
    monkeypatch.setenv("FAKE_FAIL", LAST[0] if fails else "")
    config, plan = compose.load(overrides), whole["first"].plan
    if fails:
        with pytest.raises(RuntimeError, match="planted failure"):
            worker.work(config, plan, folder, LAST[0], stages=FAKES)
    else:
        worker.work(config, plan, folder, LAST[0], stages=FAKES)
    assert Tracked.ends == [RuntimeError if fails else None]
    assert NodeDir(folder / LAST[0]).is_done() is not fails


def test_verify_finds_a_changed_file(whole: dict[str, Any], tmp_path: Path) -> None:
    plan: Plan = whole["first"].plan
    checked, changed = changed_files(plan, whole["folder"])
    assert checked > 20
    assert changed == []
    folder = tmp_path / "run"
    write_json(folder / "sft/model/weights.json", "a")
    write_json(
        folder / "sft/manifest.json", {"files": {"model/weights.json": {"sha256": "0", "size": 4}}}
    )
    assert changed_files(plan, folder) == (1, [str(folder / "sft/model/weights.json")])


def test_a_node_for_several_machines_is_refused_before_anything_is_written(
    small_run: Overrides,
) -> None:
    overrides = small_run("resources.ppo.nodes=2", *ONE_ROUND)
    with pytest.raises(ConfigError, match=r"resources\.ppo\.nodes=2 cannot work with rlhf run"):
        go(overrides)
    assert not folder_of(overrides).exists()


def test_a_job_computes_in_the_environment_of_a_node_that_is_started_here(
    small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads and allocator count from a process's very start, so `rlhf stage` starts once more."""
    for name in ("GLIBC_TUNABLES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    overrides = small_run()
    prepared = runner.prepare(compose.load(overrides), Console(file=StringIO()), stages=FAKES)
    code = (
        "import json, os, sys\n"
        "def execve(path, arguments, environment):\n"
        "    print(json.dumps([arguments, dict(environment)]), flush=True)\n"
        "    os._exit(0)\n"
        "os.execve = execve\n"
        "from rlhf.cli import main\n"
        "main(sys.argv[1:])"
    )
    where = [f"run={prepared.config.run}", f"paths.runs={prepared.config.paths.runs}"]
    command = [sys.executable, "-c", code, "stage", "sft", *where]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    arguments, environment = json.loads(done.stdout)
    assert arguments[1:5] == ["-m", "rlhf.cli", "stage", "sft"]
    expected = worker.process_environment(prepared.config)
    assert "mmap_threshold" in expected["GLIBC_TUNABLES"]
    assert expected.items() <= environment.items()
