"""Withdrawals and a run: who used the rows, what stays done, and what later rounds read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import fake_stages
import pytest
from rich.console import Console

from rlhf import compose, runner
from rlhf.artifacts import NodeDir, read_json, write_jsonl
from rlhf.cli import main
from rlhf.data.corrections import drop_gone, open_rows, withdraw
from rlhf.data.records import Kind
from rlhf.data.tombstones import Tombstone
from rlhf.fingerprint import STAGES
from rlhf.nodes import NodeContext
from rlhf.plan import Plan
from rlhf.resolve import inputs_from_json
from rlhf.runner import read_plan
from rlhf.supply import open_store
from rlhf.usage import find_usage

FAKES = dict.fromkeys(STAGES, "fake_stages")
MORE = ("rounds.schedule=[rejection]", "data.heldout_share=0.4", "toy.prompts_per_kind=8")
Overrides = Callable[..., list[str]]


def go(overrides: list[str]) -> Path:
    console = Console(file=StringIO(), width=200)
    return runner.run(compose.load(overrides), console, stages=FAKES).folder


def ids_file(tmp_path: Path, ids: list[str]) -> Path:
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(ids), encoding="utf-8")
    return path


def inputs(folder: Path, node: str) -> Any:
    return inputs_from_json(read_json(folder / node / "inputs.json"))


class Stage:
    """One finished round, and rows of every kind by whether they are held out."""

    def __init__(self, overrides: list[str], folder: Path) -> None:
        self.overrides = overrides
        self.folder = folder
        self.config = compose.load(overrides)
        self.store = open_store(self.config)
        self.rows = {
            "batch": self.store.comparisons(Kind.batch, "round-01"),
            "sft": self.store.conversations("toy-sft"),
            "prompts": self.store.prompts("toy-prompts"),
        }

    def pick(self, kind: str, *, heldout: bool, **more: Any) -> str:
        rows = [row for row in self.rows[kind] if row.heldout is heldout]
        return str(next(r.id for r in rows if all(getattr(r, k) == v for k, v in more.items())))

    def prepare(self, *more: str) -> Plan:
        config = compose.load([*self.overrides, *more])
        return runner.prepare(config, Console(file=StringIO()), stages=FAKES).plan


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round of fake stages, run once for all tests."""
    root = tmp_path_factory.mktemp("finished")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    go(
        [
            "recipe=quickstart",
            f"paths.runs={root / 'runs'}",
            f"paths.store={root / 'store'}",
            *("toy.sft_rows=12", "toy.open_rows=6", "tracking.mode=none", "compute.num_threads=1"),
            *("rounds.limit=1", *MORE),
        ]
    )
    return root


@pytest.fixture
def stage(finished: Path, small_run: Overrides, tmp_path: Path) -> Stage:
    """A copy of the finished round that believes to have been made where it lies."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs" / "quickstart" / "run.yaml"
    path.write_text(path.read_text().replace(str(finished), str(tmp_path)))
    return Stage(small_run("rounds.limit=1", *MORE), tmp_path / "runs" / "quickstart")


def test_finished_nodes_stay_and_the_next_round_leaves_the_rows_out(
    stage: Stage, small_run: Overrides, tmp_path: Path
) -> None:
    ids = [stage.pick(kind, heldout=False) for kind in ("batch", "sft", "prompts")]
    before = {p: p.read_bytes() for p in stage.folder.rglob("manifest.json")}
    stone = withdraw(stage.store, ids_file(tmp_path, ids), reason="asked to")
    go(small_run("rounds.limit=2", *MORE))
    after = {p: p.read_bytes() for p in stage.folder.rglob("manifest.json")}
    assert {path: after[path] for path in before} == before
    old, new = (inputs(stage.folder, f"round-0{k}/reward-helpfulness") for k in (1, 2))
    assert (old.as_of, new.as_of) == (0, stone.sequence)
    assert old.digests()["batch/round-01"] != new.digests()["batch/round-01"]
    assert old.digests()["open/toy-open"] == new.digests()["open/toy-open"]
    plan = read_plan(stage.folder)
    assert plan is not None
    assert (plan.as_of, [item.as_of for item in plan.rounds]) == (0, [0, stone.sequence])
    for read, gone in ((new, set(ids)), (old, set())):
        context = NodeContext(stage.config, plan.node("sft"), read, NodeDir(tmp_path), 0)
        rows = open_rows(context).comparisons(Kind.batch, "round-01")
        assert rows == [row for row in stage.rows["batch"] if row.id not in gone]
    assert not any(name.startswith("round-02") for name in used(stage, stone))


def test_a_planned_round_takes_in_what_came_before_its_first_node(
    stage: Stage, tmp_path: Path
) -> None:
    two = compose.load([*stage.overrides, "rounds.limit=2"])
    assert [item.as_of for item in stage.prepare("rounds.limit=2").rounds] == [0, 0]
    ids = ids_file(tmp_path, [stage.pick("batch", heldout=False)])
    stone = withdraw(stage.store, ids, reason="")
    assert [item.as_of for item in runner.draft(two)[0].rounds] == [0, stone.sequence]
    (stage.folder / "round-02/collect").mkdir(parents=True)
    (stage.folder / "round-02/collect/inputs.json").touch()
    assert [item.as_of for item in runner.draft(two)[0].rounds] == [0, 0]


def test_what_has_not_started_leaves_everything_out(stage: Stage, tmp_path: Path) -> None:
    fresh = ("run=fresh", f"data.stream={stage.store.stream}")
    assert stage.prepare(*fresh).as_of == 0
    ids = ids_file(tmp_path, [stage.pick("sft", heldout=False)])
    stone = withdraw(stage.store, ids, reason="")
    assert stage.prepare(*fresh).as_of == stone.sequence
    assert stage.prepare().as_of == 0


def test_rerunning_a_node_reads_the_stream_as_it_is_now(stage: Stage, tmp_path: Path) -> None:
    ids = ids_file(tmp_path, [stage.pick("sft", heldout=False)])
    stone = withdraw(stage.store, ids, reason="")
    plan = stage.prepare("sft.epochs=7", "on_change=rerun")
    assert (plan.as_of, plan.rounds[0].as_of) == (stone.sequence, stone.sequence)


def used(stage: Stage, stone: Tombstone) -> dict[str, dict[str, int]]:
    (run,) = find_usage(stage.folder.parent, stage.store, stone)
    assert run.run == "quickstart"
    assert all(node.done for node in run.nodes)
    return {node.node: dict(node.uses) for node in run.nodes}


def test_training_rows_are_traced_to_nodes_and_versions(stage: Stage, tmp_path: Path) -> None:
    id = stage.pick("batch", heldout=False, axis="safety")
    stone = withdraw(stage.store, ids_file(tmp_path, [id]), reason="")
    assert used(stage, stone) == {
        "round-01/reward-helpfulness": {"trained on": 1},
        "round-01/reward-safety": {"trained on": 1},
    }
    (run,) = find_usage(stage.folder.parent, stage.store, stone)
    assert run.versions == ("v1",)


def test_a_held_out_comparison_is_scored_and_led_to_no_version(
    stage: Stage, tmp_path: Path
) -> None:
    id = stage.pick("batch", heldout=True, axis="safety")
    write_jsonl(stage.folder / "round-01/judge-safety/scores.jsonl", [{"id": "another"}])
    stone = withdraw(stage.store, ids_file(tmp_path, [id]), reason="")
    assert used(stage, stone) == {
        "round-01/reward-helpfulness": {"scored": 1, "held out": 1},
        "round-01/reward-safety": {"scored": 1, "held out": 1},
        "round-01/judge-helpfulness": {"held out": 1},
        "round-01/judge-safety": {"held out": 1},
    }
    (run,) = find_usage(stage.folder.parent, stage.store, stone)
    assert run.versions == ()


def test_demonstrations_reach_every_version(stage: Stage, tmp_path: Path) -> None:
    ids = [stage.pick("sft", heldout=False), stage.pick("sft", heldout=True)]
    stone = withdraw(stage.store, ids_file(tmp_path, ids), reason="")
    assert used(stage, stone) == {"sft": {"trained on": 1, "held out": 1}}
    (run,) = find_usage(stage.folder.parent, stage.store, stone)
    assert run.versions == ("v0", "v1")


def test_prompts_are_told_by_the_lists_that_nodes_keep(stage: Stage, tmp_path: Path) -> None:
    won, other = [row.id for row in stage.rows["prompts"] if not row.heldout][:2]
    asked = stage.pick("prompts", heldout=True)
    write_jsonl(stage.folder / "round-01/rejection/winners.jsonl", [{"prompt_id": won}])
    write_jsonl(stage.folder / "round-01/evaluate/responses.jsonl", [{"prompt_id": asked}])
    stone = withdraw(stage.store, ids_file(tmp_path, [won, other, asked]), reason="")
    assert used(stage, stone) == {
        "round-01/collect": {"sampled for": 3},
        "round-01/rejection": {"trained on": 1, "sampled for": 1},
        "round-01/evaluate": {"scored": 1},
    }


def test_runs_of_other_stores_used_nothing(stage: Stage, tmp_path: Path) -> None:
    stone = withdraw(stage.store, ids_file(tmp_path, [stage.pick("sft", heldout=False)]), reason="")
    shutil.copytree(stage.folder, stage.folder.with_name("other"))
    path = stage.folder.with_name("other") / "run.yaml"
    path.write_text(path.read_text().replace(str(stage.store.root), str(tmp_path / "elsewhere")))
    assert [run.run for run in find_usage(stage.folder.parent, stage.store, stone)] == [
        "quickstart"
    ]


def test_what_was_written_about_withdrawn_or_corrected_prompts_is_dropped(
    stage: Stage, tmp_path: Path
) -> None:
    prompts = stage.rows["prompts"][:3]
    rows = [{"prompt_id": p.id, "prompt": p.prompt} for p in prompts]
    plan = read_plan(stage.folder)
    assert plan is not None

    def context() -> NodeContext:
        found = runner.Resolver(stage.config, plan, stage.folder, runner.list_store(stage.config))
        read = found.resolve(plan.node("round-01/collect"))
        return NodeContext(
            stage.config,
            plan.node("round-01/collect"),
            type(read)(read.models, read.data, stage.store.position()),
            NodeDir(tmp_path),
            0,
        )

    assert drop_gone(context(), rows) == rows
    withdraw(stage.store, ids_file(tmp_path, [prompts[0].id]), reason="")
    assert drop_gone(context(), rows) == rows[1:]
    new = {"id": prompts[1].id, "prompt": "quite another question", "is_safety": False}
    fix = tmp_path / "fix.jsonl"
    write_jsonl(fix, [new])
    data = stage.config.data
    fake_stages.ingest_file(
        fix,
        stage.store,
        kind=Kind.prompts,
        heldout_share=data.heldout_share,
        heldout_salt=data.heldout_salt,
        supersedes="toy-prompts",
    )
    assert drop_gone(context(), rows) == rows[2:]
    again = {"prompt_id": prompts[1].id, "prompt": [{"role": "user", "content": new["prompt"]}]}
    assert drop_gone(context(), [again]) == [again]


def test_the_command_withdraws_reports_and_refuses(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ids_file(tmp_path, [stage.pick("batch", heldout=False)])
    settings = [text for text in stage.overrides if text.startswith("paths.")]
    stream = f"ingest.stream={stage.config.data.stream}"
    assert main(["ingest", f"ingest.retract={path}", stream, *settings]) == 0
    text = capsys.readouterr().out
    assert "withdrew 1 rows" in text
    assert "round-01/reward-helpfulness: trained on 1" in text
    assert "versions that training on them led to: v1" in text
    assert "rounds that have not started leave these rows out" in text
    assert main(["ingest", f"ingest.retract={path}", stream, *settings]) == 0
    assert "withdrawn from stream" in capsys.readouterr().out
    assert main(["ingest", "week.jsonl", f"ingest.retract={path}", stream, *settings]) == 2
    assert "leave out the files" in capsys.readouterr().err
    assert main(["ingest", stream, *settings]) == 2
    assert "FILE is missing" in capsys.readouterr().err
