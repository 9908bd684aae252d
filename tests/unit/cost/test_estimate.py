"""Estimates: work per stage by hand, what they rest on, and that they stay as they were."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf import compose
from rlhf.algo.flops import Lengths, Pass
from rlhf.artifacts import read_json, write_json, write_manifest, write_text
from rlhf.config import Config
from rlhf.cost import estimate as estimates
from rlhf.cost import rates, tokens, work
from rlhf.cost.estimate import estimate, freeze_estimate
from rlhf.cost.show import estimate_table, scaled
from rlhf.cost.tokens import Set, Supply
from rlhf.data.records import AXES, Kind
from rlhf.fingerprint import STAGES
from rlhf.nodes import Node
from rlhf.plan import Plan, build_plan
from rlhf.supply import fill_from_toy_world, list_store, open_store
from rlhf.toy.model import build_tokenizer

SMALL = (
    "toy.sft_rows=60",
    "toy.prompts_per_kind=20",
    "toy.open_rows=40",
    "tracking.mode=none",
    "cost.training_utilisation=0.4",
    "cost.generation_utilisation=0.01",
)


def config_of(tmp_path: Path, *overrides: str) -> Config:
    paths = (f"paths.runs={tmp_path / 'runs'}", f"paths.store={tmp_path / 'store'}")
    return compose.load(["recipe=quickstart", *paths, *SMALL, *overrides])


def plan_of(config: Config) -> Plan:
    return build_plan(config, list_store(config), None)


def context_of(config: Config, name: str, **changed: Any) -> work.Context:
    plan = plan_of(config)
    node = plan.node(name)
    return work.Context(config, plan, replace(node, **changed), SUPPLY)


COMPARED = Lengths(prompt=20.0, response=10.0)
SUPPLY = Supply(
    sft=Set(train=100.0, heldout=10.0, lengths=Lengths(30.0, 12.0)),
    prompts=Set(train=50.0, heldout=8.0, lengths=Lengths(16.0, 0.0)),
    batches={
        "round-01": {axis: Set(40.0, 6.0, COMPARED) for axis in AXES},
        "round-02": {axis: Set(60.0, 4.0, COMPARED) for axis in AXES},
    },
    open={axis: Set(200.0, 20.0, COMPARED) for axis in AXES},
    response_share=0.5,
)


def found(context: work.Context) -> list[tuple[str, Pass, float]]:
    return [(task.model, task.work.kind, task.work.tokens) for task in work.tasks(context)]


def test_every_stage_has_its_work() -> None:
    assert set(STAGES) | {"sweep"} == set(work.STAGES)


def test_fine_tuning_by_hand(tmp_path: Path) -> None:
    config = config_of(tmp_path, "sft.epochs=3")
    # 100 rows of 42 tokens, three times.
    assert found(context_of(config, "sft")) == [("base", Pass.train, 100 * 42 * 3)]
    config = config_of(tmp_path, "sft.epochs=1", "sft.max_rows=7")
    assert found(context_of(config, "sft")) == [("base", Pass.train, 7 * 42)]


def test_reward_models_by_hand(tmp_path: Path) -> None:
    settings = ("reward.own_share_helpfulness=0.5", "judge.share=0.5", "reward.epochs=1")
    config = config_of(tmp_path, *settings, "reward.max_comparisons=null")
    # Round 1: 40 own and as many others of 40 + 0.5 * 400 left by the judges; both sides of 30.
    # Held out: 6 per axis, two passes of two sides.
    first = found(context_of(config, "round-01/reward-helpfulness"))
    assert first == [
        ("base", Pass.train, 2 * 80 * 30),
        ("base", Pass.forward, 2 * (2 * 12) * 30),
    ]
    # Round 2: 100 own and 100 others; 20 held out twice, and the 64 new ones before.
    second = found(context_of(config, "round-02/reward-helpfulness"))
    assert second == [
        ("base", Pass.train, 2 * 200 * 30),
        ("base", Pass.forward, 2 * (2 * 20 + 64) * 30),
    ]
    # The judge: half of its axis's open comparisons, its own axis once.
    judge = found(context_of(config, "round-02/judge-safety"))
    assert judge == [("base", Pass.train, 2 * 100 * 30), ("base", Pass.forward, 2 * 10 * 30)]


def test_caps_bound_the_work(tmp_path: Path) -> None:
    caps = ("reward.max_comparisons=50", "reward.max_heldout=3", "judge.max_comparisons=9")
    config = config_of(tmp_path, *caps, "reward.epochs=1")
    trained, scored = found(context_of(config, "round-02/reward-safety"))
    assert trained[2] == 2 * 50 * 30
    # Held out: at most 3 per axis and batch; before training at most 3 of the new batch.
    assert scored[2] == 2 * (2 * 4 * 3 + 3) * 30
    assert found(context_of(config, "round-02/judge-safety"))[0][2] == 2 * 9 * 30


def test_rejection_sampling_by_hand(tmp_path: Path) -> None:
    settings = ("rejection.num_samples=4", "rejection.epochs=1", "rejection.num_prompts=null")
    config = config_of(tmp_path, *settings, "rejection.pool_share=0.25", "rejection.sft_share=0.25")
    # Responses are half of 32 tokens. 50 prompts of 16 with 4 responses of 16, two scorers; 50
    # winners are half of the fine-tuning rows, and a first round has no pool.
    assert found(context_of(config, "round-01/rejection")) == [
        ("base", Pass.generate, 50 * (16 + 4 * 16)),
        ("helpfulness", Pass.forward, 200 * 32),
        ("safety", Pass.forward, 200 * 32),
        ("base", Pass.train, (50 + 25) * 32),
    ]
    inputs = {"policy": "promoted(1)", "pool_1": "node(round-01/rejection)", "sampled_0": "x"}
    later = context_of(config, "round-01/rejection", inputs=inputs)
    assert found(later) == [("base", Pass.train, (50 + 25 + 25) * 32)]
    shard = Node("round-01/sample-0", "sample", 1, (), {}, {"shard": 0, "of": 5})
    part = work.Context(config, plan_of(config), shard, SUPPLY)
    assert found(part)[0] == ("base", Pass.generate, 10 * (16 + 4 * 16))


def test_ppo_by_hand(tmp_path: Path) -> None:
    settings = (
        "ppo.iterations=10",
        "ppo.batch_size=4",
        "ppo.num_minibatches=2",
        "ppo.critic_warmup_iterations=2",
        "ppo.heldout_every=5",
        "ppo.heldout_prompts=100",
    )
    config = config_of(tmp_path, *settings)
    tasks = found(context_of(config, "round-02/ppo"))
    rolled, scored = 10 * 4 * 32, 3 * 8 * 32
    totals = {kind: sum(row[2] for row in tasks if row[1] is kind) for kind in Pass}
    assert totals[Pass.generate] == rolled + scored
    # Two scores, old and reference log-probabilities, values.
    assert totals[Pass.forward] == 5 * (rolled + scored)
    # The critic learns in 10 iterations, the policy in 8.
    assert totals[Pass.train] == (10 + 8) * 4 * 32


def test_evaluate_and_collect_by_hand(tmp_path: Path) -> None:
    config = config_of(tmp_path, "evaluate.num_prompts=100", "collect.num_pairs=15")
    tasks = found(context_of(config, "round-02/evaluate"))
    # 8 held-out prompts and two versions; both judges also score v0 to v2 again.
    assert tasks[0] == ("base", Pass.generate, 2 * 8 * 32)
    assert tasks[1] == ("base", Pass.forward, 2 * 8 * 32)
    assert tasks[-1] == ("base", Pass.forward, 2 * (2 * 8 + 3 * 8) * 32)
    # 15 pairs for each of two axes, two responses each.
    collected = found(context_of(config, "round-01/collect"))
    assert collected == [("base", Pass.generate, 60 * 32)]


def test_lora_trains_for_two_thirds(tmp_path: Path) -> None:
    full = work.tasks(context_of(config_of(tmp_path), "sft"))[0].work
    lora = work.tasks(context_of(config_of(tmp_path, "model.lora.enabled=true"), "sft"))[0].work
    assert (full.factor, lora.factor) == (3, 2)


def test_an_estimate_before_there_are_data(tmp_path: Path) -> None:
    config = config_of(tmp_path, "cost.peak_flops=1e9", "cost.price_per_device_hour=2")
    plan = plan_of(config)
    made = estimate(config, plan, tmp_path / "runs/quickstart")
    assert [row["node"] for row in made["nodes"]] == [node.name for node in plan.nodes]
    assert all(row["flops"] > 0 for row in made["nodes"])
    for name in ("flops", "device_hours", "kwh", "co2_kg", "cost"):
        assert made["totals"][name] == pytest.approx(sum(row[name] for row in made["nodes"]))
    row = made["nodes"][0]
    # Training at 0.4 of 1e9 FLOP/s; 10 W for the one thread; two dollars an hour.
    assert row["device_hours"] == pytest.approx(row["flops"] / 0.4e9 / 3600)
    assert row["kwh"] == pytest.approx(row["device_hours"] * 10 / 1000)
    assert row["co2_kg"] == pytest.approx(row["kwh"] * 1.1 * 0.385)
    assert row["cost"] == pytest.approx(2 * row["device_hours"])
    assert row["basis"] == "assumed: 0.4 of 1e+09 FLOP/s (cost.peak_flops), 0.01 while sampling"
    sampled = next(row for row in made["nodes"] if row["stage"] == "collect")
    assert sampled["device_hours"] == pytest.approx(sampled["flops"] / 0.01e9 / 3600)


def test_without_a_price_there_is_no_money(tmp_path: Path) -> None:
    made = estimate(
        config := config_of(tmp_path, "cost.peak_flops=1e9"), plan_of(config), tmp_path / "run"
    )
    assert made["totals"]["cost"] is None
    assert made["totals"]["kwh"] > 0


def test_data_are_counted_and_measured(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    fill_from_toy_world(config)
    store, plan = open_store(config), plan_of(config)
    supply = tokens.read_supply(config, plan, tmp_path / "run")
    manifest = store.manifest(Kind.sft, "toy-sft")
    assert supply.sft.train + supply.sft.heldout == pytest.approx(manifest["rows"])
    assert supply.sft.heldout == manifest["counts"]["heldout"]
    rows = store.manifest(Kind.open, "toy-open")["accepted_by"]["axis"]
    for axis in AXES:
        counted = supply.open[axis]
        assert counted.train + counted.heldout == pytest.approx(rows[axis])
    tokenizer = build_tokenizer()
    real = [
        len(tokenizer.apply_chat_template(row.messages)["input_ids"])
        for row in store.conversations("toy-sft")
    ]
    assert supply.sft.lengths.whole == pytest.approx(sum(real) / len(real), rel=0.25)
    # What is guessed before the world is written is not far off.
    assert tokens.TOY_LENGTHS.whole == pytest.approx(sum(real) / len(real), rel=0.35)
    # The batch that annotators have still to rate has the size that is asked for.
    batch = supply.batches["round-01"]["safety"]
    assert batch.train + batch.heldout == pytest.approx(config.collect.num_pairs)


def test_texts_over_the_limit_are_left_out(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    fill_from_toy_world(config)
    plan = plan_of(config)
    whole = tokens.read_supply(config, plan, tmp_path / "run").sft
    limit = int(whole.lengths.whole)
    for name in ("rejection", "ppo", "evaluate"):
        getattr(config, name).sampling.max_new_tokens = 4
    config.model.max_length = limit
    some = tokens.read_supply(config, plan, tmp_path / "run").sft
    assert 0 < some.train < whole.train
    assert some.lengths.whole < limit


def test_responses_are_as_long_as_in_the_newest_evaluation(tmp_path: Path) -> None:
    config = config_of(tmp_path, "cost.response_share=0.7")
    plan = plan_of(config)
    share, basis = tokens.response_share(config, plan, tmp_path)
    assert (share, basis) == (0.7, "responses 70% as long as allowed (cost.response_share)")
    write_json(
        tmp_path / "round-01/evaluate/evaluation.json", {"response_length": {"candidate": 8.0}}
    )
    share, basis = tokens.response_share(config, plan, tmp_path)
    assert share == 8.0 / 32
    assert basis == "responses as long as in the evaluation of round 1"


def finish(folder: Path, name: str, stage: str, *, seconds: float, **changed: Any) -> None:
    """Write a finished node as the worker does."""
    write_json(folder / name / "inputs.json", {})
    entries = {
        "node": name,
        "stage": stage,
        "device_seconds": seconds,
        "device_name": rates.cpu_model(),
        "num_threads": 1,
        **changed,
    }
    write_manifest(folder / name, entries)


def test_finished_nodes_give_the_rate_of_their_stage_and_size(tmp_path: Path) -> None:
    config = config_of(tmp_path, "cost.peak_flops=1e9")
    plan, folder = plan_of(config), tmp_path / "runs/quickstart"
    freeze_estimate(config, plan, folder)
    first = read_json(folder / "estimate.json")
    finish(folder, "sft", "sft", seconds=50.0)
    finish(folder, "round-01/collect", "collect", seconds=5.0, num_threads=8)
    other = config_of(tmp_path, "cost.peak_flops=1e9", "run=other")
    rows = {row["node"]: row for row in estimate(other, plan, tmp_path / "runs/other")["nodes"]}
    assert rows["sft"]["device_hours"] == pytest.approx(50 / 3600)
    assert rows["sft"]["basis"].startswith("measured: ")
    assert "1 finished node of this stage and size" in rows["sft"]["basis"]
    # Eight threads are another device.
    assert rows["round-01/collect"]["basis"].startswith("assumed")
    assert rows["round-01/evaluate"]["basis"].startswith("assumed")
    # Another size is another rate.
    shape = "model.shape={hidden_size: 8, intermediate_size: 8, num_layers: 1, num_heads: 1, "
    shape += "num_kv_heads: 1, vocab_size: 9}"
    larger = config_of(tmp_path, "cost.peak_flops=1e9", "model.path=nowhere", shape, "run=x")
    rows = {row["node"]: row for row in estimate(larger, plan, tmp_path / "runs/x")["nodes"]}
    assert rows["sft"]["basis"].startswith("assumed")
    assert first["nodes"][0]["basis"].startswith("assumed")


def test_rates_of_elsewhere_count_for_jobs_only(tmp_path: Path) -> None:
    config = config_of(tmp_path, "cost.peak_flops=1e9")
    folder = tmp_path / "runs/quickstart"
    freeze_estimate(config, plan_of(config), folder)
    finish(folder, "sft", "sft", seconds=50.0, device_name="a GPU")
    found = rates.measured_rates(tmp_path / "runs")
    parameters = read_json(folder / "estimate.json")["nodes"][0]["parameters"]
    assert found.of(config, "sft", parameters) is None
    slurm = config_of(tmp_path, "launcher=slurm")
    measured = found.of(slurm, "sft", parameters)
    assert measured is not None
    assert measured[1] == "a GPU"


def test_ppo_that_stopped_early_did_less(tmp_path: Path) -> None:
    write_json(tmp_path / "ppo.json", {"iterations": 4})
    write_text(tmp_path / "config.yaml", "sft:\n  iterations: 7\nppo:\n  iterations: 16\n")
    assert rates.done_share(tmp_path, "ppo") == 0.25
    assert rates.done_share(tmp_path, "sft") == 1.0
    assert rates.done_share(tmp_path / "none", "ppo") == 1.0


def test_a_rate_counts_what_ppo_did_and_not_what_was_planned(tmp_path: Path) -> None:
    config = config_of(tmp_path, "cost.peak_flops=1e9")
    folder = tmp_path / "runs/quickstart"
    freeze_estimate(config, plan_of(config), folder)
    row = estimates.frozen_rows(folder)["round-02/ppo"]
    write_json(folder / "round-02/ppo/ppo.json", {"iterations": config.ppo.iterations // 4})
    write_text(folder / "round-02/ppo/config.yaml", compose.freeze(config))
    finish(folder, "round-02/ppo", "ppo", seconds=10.0)
    found = rates.measured_rates(tmp_path / "runs").of(config, "ppo", row["parameters"])
    assert found is not None
    assert found[0].value == pytest.approx(row["flops"] / 4 / 10.0)


def test_a_frozen_estimate_of_a_started_node_never_changes(tmp_path: Path) -> None:
    config, folder = config_of(tmp_path, "cost.peak_flops=1e9"), tmp_path / "runs/quickstart"
    plan = plan_of(config)
    freeze_estimate(config, plan, folder)
    before = {row["node"]: row for row in read_json(folder / "estimate.json")["nodes"]}
    write_json(folder / "sft/inputs.json", {})
    faster = config_of(tmp_path, "cost.peak_flops=2e9", "rounds.limit=3")
    freeze_estimate(faster, plan_of(faster), folder)
    after = {row["node"]: row for row in read_json(folder / "estimate.json")["nodes"]}
    assert after["sft"] == before["sft"]
    collected = "round-01/collect"
    assert after[collected]["device_hours"] == pytest.approx(before[collected]["device_hours"] / 2)
    assert {name for name in after if name not in before} == {
        node.name for node in plan_of(faster).nodes if node.round == 3
    }


def test_an_estimate_that_says_the_same_is_not_written_again(tmp_path: Path) -> None:
    config, folder = config_of(tmp_path, "cost.peak_flops=1e9"), tmp_path / "runs/quickstart"
    plan = plan_of(config)
    freeze_estimate(config, plan, folder)
    for node in plan.nodes:
        write_json(folder / node.name / "inputs.json", {})
    before = (folder / "estimate.json").stat().st_mtime_ns
    freeze_estimate(config_of(tmp_path, "cost.peak_flops=9e9"), plan, folder)
    assert (folder / "estimate.json").stat().st_mtime_ns == before


def test_a_node_that_started_without_an_estimate_gets_none(tmp_path: Path) -> None:
    config, folder = config_of(tmp_path, "cost.peak_flops=1e9"), tmp_path / "runs/quickstart"
    write_json(folder / "sft/inputs.json", {})
    freeze_estimate(config, plan_of(config), folder)
    assert "sft" not in estimates.frozen_rows(folder)
    assert "round-01/collect" in estimates.frozen_rows(folder)


def test_the_table_says_on_what_it_rests(tmp_path: Path) -> None:
    config = config_of(tmp_path, "cost.peak_flops=1e9", "cost.price_per_device_hour=2")
    made = estimate(config, plan_of(config), tmp_path / "run")
    out = io.StringIO()
    Console(file=out, width=140).print(estimate_table(made, title="t"))
    text = out.getvalue()
    assert "round-02/evaluate" in text
    assert "USD" in text
    assert "0.4 of 1e+09 FLOP/s (cost.peak_flops), 0.01 while sampling" in " ".join(text.split())
    assert "responses 50% as long as allowed" in " ".join(text.split())


def test_an_unknown_model_says_so(tmp_path: Path) -> None:
    config = config_of(tmp_path, "model.path=nowhere")
    made = estimate(config, plan_of(config), tmp_path / "run")
    assert made["nodes"] == []
    assert made["totals"]["flops"] is None
    out = io.StringIO()
    Console(file=out, width=140).print(estimate_table(made, title="t"))
    assert "size of model.path is not known" in out.getvalue()


def test_large_numbers_are_short() -> None:
    assert [scaled(value) for value in (0, 999.0, 1e3, 8.412e15, 3.2e21)] == [
        "0",
        "999",
        "1k",
        "8.41P",
        "3.2Z",
    ]


def test_plan_prints_the_estimate_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from rlhf.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ' '.join(m for m in ('torch', 'transformers') if m in sys.modules) or 0)"
    )
    overrides = ["recipe=quickstart", f"paths.runs={tmp_path}", f"paths.store={tmp_path / 's'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *overrides],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "estimate of run quickstart" in done.stdout
    assert not any(tmp_path.iterdir())
