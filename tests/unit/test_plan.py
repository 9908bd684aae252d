"""The plan: rounds that never change, nodes and edges, for every way to run."""

from __future__ import annotations

import copy
from functools import cache

import pytest

from rlhf import compose
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.plan import Plan, build_plan, check_sets, parse_symbol, waiting_batches

PEOPLE = ("recipe=smollm2", "model=toy", "rounds.batches_per_round=1", "rounds.limit=null")


def listing(*batches: str) -> dict[str, dict[str, str]]:
    sets = {"sft": {"a": "1"}, "open": {"b": "2"}, "prompts": {"c": "3"}}
    return {"batch": {name: f"digest-{name}" for name in batches}, **sets}


@cache
def config_of(*overrides: str) -> Config:
    return compose.load(overrides)


def plan_of(*overrides: str, batches: tuple[str, ...] = (), previous: Plan | None = None) -> Plan:
    return build_plan(config_of(*PEOPLE, *overrides), listing(*batches), previous)


def inputs(plan: Plan, name: str) -> dict[str, str]:
    return dict(plan.node(name).inputs)


def names(plan: Plan, round_: int) -> list[str]:
    return [node.name.rpartition("/")[2] for node in plan.nodes if node.round == round_]


def test_people_get_their_pairs_last_and_simulated_annotators_go_first() -> None:
    people = plan_of(batches=("w1",))
    simulated = build_plan(config_of("recipe=quickstart"), listing(), None)

    rewards = ["reward-helpfulness", "reward-safety"]
    judged = ["judge-helpfulness", "judge-safety", "evaluate"]
    assert names(people, 1) == [*rewards, "rejection", *judged, "collect"]
    assert names(simulated, 1) == ["collect", *rewards, "rejection", *judged]
    assert names(simulated, 2) == ["collect", *rewards, "ppo", *judged]
    assert people.node("round-01/collect").after == ("round-01/rejection", "sft")
    assert "round-01/collect" in simulated.node("round-01/reward-safety").after
    assert [item.batches for item in simulated.rounds] == [("round-01",), ("round-02",)]


def test_collect_compares_the_two_newest_versions() -> None:
    people = plan_of(batches=("w1", "w2"))
    simulated = build_plan(config_of("recipe=quickstart"), listing(), None)

    assert inputs(people, "round-01/collect")["newest"] == "version(1)"
    assert inputs(people, "round-01/collect")["other"] == "version(0)"
    assert inputs(simulated, "round-01/collect")["newest"] == "version(0)"
    assert inputs(simulated, "round-01/collect")["other"] == "version(0)"
    assert inputs(simulated, "round-02/collect")["newest"] == "version(1)"
    assert inputs(simulated, "round-02/collect")["other"] == "version(0)"


def test_every_parent_comes_before_its_child() -> None:
    simulated = build_plan(compose.load(["recipe=quickstart", "rounds.limit=5"]), listing(), None)
    for plan in (simulated, plan_of(batches=("w1", "w2", "w3"))):
        seen: set[str] = set()
        for node in plan.nodes:
            assert set(node.after) <= seen, node.name
            seen.add(node.name)


def test_a_round_waits_for_the_evaluation_of_the_one_before_and_collect_does_not() -> None:
    plan = build_plan(config_of("recipe=quickstart"), listing(), None)
    for node in plan.nodes:
        if node.round == 2:
            waits = "round-01/evaluate" in node.after
            assert waits is (node.stage != "collect"), node.name


def test_the_plan_is_a_pure_function() -> None:
    config = compose.load([*PEOPLE])
    stock = listing("w1", "w2")
    before, stock_before = copy.deepcopy(config), copy.deepcopy(stock)

    first, second = build_plan(config, stock, None), build_plan(config, stock, None)

    assert first == second
    assert (config, stock) == (before, stock_before)
    assert Plan.from_json(first.to_json()) == first


def test_a_new_batch_appends_a_round_and_changes_nothing_before_it() -> None:
    old = plan_of(batches=("w1", "w2"))
    new = plan_of(batches=("w1", "w2", "w3"), previous=old)

    assert new.rounds[:2] == old.rounds
    assert new.nodes[: len(old.nodes)] == old.nodes
    assert new.rounds[2].batches == ("w3",)
    assert {node.round for node in new.nodes[len(old.nodes) :]} == {3}


def test_rounds_keep_their_batches_and_stage_when_order_schedule_or_size_change() -> None:
    old = plan_of(batches=("w1", "w2"))
    new = plan_of(
        "rounds.schedule=[ppo]",
        "rounds.batches_per_round=2",
        batches=("w0", "w1", "w2", "w3"),
        previous=old,
    )

    assert new.rounds[:2] == old.rounds
    assert new.rounds[2].batches == ("w0", "w3")
    assert [item.stage for item in new.rounds] == ["rejection", "ppo", "ppo"]


@pytest.mark.parametrize(
    ("size", "limit", "expected", "waiting"),
    [
        (1, "null", [("a",), ("b",), ("c",)], []),
        (2, "null", [("a", "b")], ["c"]),
        (1, "2", [("a",), ("b",)], ["c"]),
        (3, "5", [("a", "b", "c")], []),
        (4, "null", [], ["a", "b", "c"]),
    ],
)
def test_batches_fill_rounds_in_ingest_order(
    size: int, limit: str, expected: list[tuple[str, ...]], waiting: list[str]
) -> None:
    batches = ("a", "b", "c")
    plan = plan_of(f"rounds.batches_per_round={size}", f"rounds.limit={limit}", batches=batches)

    assert [item.batches for item in plan.rounds] == expected
    assert waiting_batches(plan, listing(*batches)) == waiting


def test_the_schedule_is_cycled() -> None:
    plan = plan_of("rounds.schedule=[rejection,rejection,ppo]", batches=("a", "b", "c", "d", "e"))
    assert [item.stage for item in plan.rounds] == [
        "rejection",
        "rejection",
        "ppo",
        "rejection",
        "rejection",
    ]


def test_a_lower_limit_keeps_planned_rounds() -> None:
    old = plan_of(batches=("w1", "w2"))
    assert plan_of("rounds.limit=1", batches=("w1", "w2"), previous=old).rounds == old.rounds


def test_combined_round_starts_ppo_from_its_rejection_output() -> None:
    plan = plan_of("rounds.schedule=[rejection_ppo]", batches=("w1", "w2"))

    assert names(plan, 1)[2:4] == ["rejection", "ppo"]
    assert inputs(plan, "round-02/rejection")["policy"] == "promoted(1)"
    ppo = inputs(plan, "round-02/ppo")
    assert ppo["policy"] == ppo["reference"] == "output(round-02/rejection)"
    assert "round-02/rejection" in plan.node("round-02/ppo").after
    assert plan.improves(2) == "round-02/ppo"
    assert "round-02/ppo" in plan.node("round-02/evaluate").after


def test_ppo_wiring_follows_reference_and_critic_settings() -> None:
    default = inputs(plan_of("rounds.schedule=[ppo]", batches=("w1", "w2")), "round-02/ppo")
    assert default == {
        "policy": "promoted(1)",
        "reference": "promoted(1)",
        "critic": "output(round-02/reward-helpfulness)",
        "reward_helpfulness": "output(round-02/reward-helpfulness)",
        "reward_safety": "output(round-02/reward-safety)",
        "prompts": "set(prompts)",
    }
    other = inputs(
        plan_of(
            "rounds.schedule=[ppo]",
            "ppo.reference=sft",
            "ppo.critic_init=policy",
            batches=("w1", "w2"),
        ),
        "round-02/ppo",
    )
    assert other["reference"] == "version(0)"
    assert other["critic"] == "promoted(1)"


@pytest.mark.parametrize(
    ("init", "symbol"), [("promoted", "promoted(1)"), ("sft", "version(0)"), ("base", "model")]
)
def test_rejection_fine_tunes_from_the_chosen_weights(init: str, symbol: str) -> None:
    plan = plan_of(
        "rounds.schedule=[rejection]", f"rejection.init={init}", batches=("w1", "w2", "w3")
    )
    assert inputs(plan, "round-02/rejection")["init"] == symbol
    third = inputs(plan, "round-03/rejection")
    assert third["pool_1"] == "node(round-01/rejection)"
    assert third["pool_2"] == "node(round-02/rejection)"
    assert "sft" not in third


def test_demonstrations_are_replayed_only_when_asked_for() -> None:
    plan = plan_of("rejection.sft_share=0.1", batches=("w1",))
    assert inputs(plan, "round-01/rejection")["sft"] == "set(sft)"


def test_a_reward_model_starts_from_promoted_weights_and_its_own_earlier_head() -> None:
    plan = plan_of(batches=("w1", "w2"))

    first = inputs(plan, "round-01/reward-safety")
    assert first == {"init": "promoted(0)", "batches": "batches(1)", "open": "set(open)"}
    second = inputs(plan, "round-02/reward-safety")
    assert second["init"] == "promoted(1)"
    assert second["previous"] == "output(round-01/reward-safety)"
    judge = plan.node("round-02/judge-safety")
    assert judge.inputs["previous"] == "output(round-01/judge-safety)"
    assert dict(judge.options) == {"axis": "safety", "role": "judge"}
    assert judge.stage == "reward"


def test_an_evaluation_reads_the_answers_of_every_earlier_one() -> None:
    plan = plan_of(batches=("w1", "w2", "w3"))

    def history(round_: int) -> dict[str, str]:
        roles = inputs(plan, f"round-{round_:02d}/evaluate")
        return {role: symbol for role, symbol in roles.items() if role.startswith("history_")}

    assert history(1) == {}
    assert history(2) == {"history_1": "node(round-01/evaluate)"}
    assert history(3) == {
        "history_1": "node(round-01/evaluate)",
        "history_2": "node(round-02/evaluate)",
    }
    assert {"round-01/evaluate", "round-02/evaluate"} <= set(plan.node("round-03/evaluate").after)


def test_an_evaluation_reads_the_ppo_node_of_its_round_where_there_is_one() -> None:
    plan = plan_of("rounds.schedule=[rejection,ppo,rejection_ppo]", batches=("w1", "w2", "w3"))
    assert "ppo" not in inputs(plan, "round-01/evaluate")
    assert inputs(plan, "round-02/evaluate")["ppo"] == "node(round-02/ppo)"
    assert inputs(plan, "round-03/evaluate")["ppo"] == "node(round-03/ppo)"
    assert "round-03/ppo" in plan.node("round-03/evaluate").after


SWEEP = "rejection.temperatures=[0.7,1.0,1.3]"


def test_a_sweep_comes_before_all_that_samples_for_its_round() -> None:
    plan = plan_of("rounds.schedule=[rejection]", "rounds.sampling_jobs=2", SWEEP, batches=("w1",))
    made = ["sweep", "sample-0", "sample-1", "rejection"]
    assert names(plan, 1)[2:6] == made
    sweep = plan.node("round-01/sweep")
    assert dict(sweep.options) == {"for": "round-01/rejection"}
    assert dict(sweep.inputs) == {
        "policy": "promoted(0)",
        "reward_helpfulness": "output(round-01/reward-helpfulness)",
        "reward_safety": "output(round-01/reward-safety)",
        "prompts": "set(prompts)",
    }
    for name in made[1:]:
        assert inputs(plan, f"round-01/{name}")["sweep"] == "node(round-01/sweep)"
        assert sweep.name in plan.node(f"round-01/{name}").after


def test_there_is_a_sweep_only_where_it_is_asked_for_and_the_round_samples() -> None:
    asked = plan_of(SWEEP, "rounds.schedule=[rejection,ppo,rejection_ppo]", batches=("a", "b", "c"))
    assert [n.name for n in asked.nodes if n.stage == "sweep"] == [
        "round-01/sweep",
        "round-03/sweep",
    ]
    plain = plan_of(batches=("a", "b", "c"))
    assert [n.name for n in plain.nodes if n.stage == "sweep"] == []
    assert all("sweep" not in n.inputs for n in plain.nodes)


def test_existing_reward_models_replace_their_nodes() -> None:
    plan = plan_of("reward.path.safety=models/safe", batches=("w1", "w2"))

    assert "reward-safety" not in names(plan, 1) + names(plan, 2)
    assert "reward-helpfulness" in names(plan, 1)
    for node in ("round-01/rejection", "round-02/ppo", "round-02/evaluate"):
        assert inputs(plan, node)["reward_safety"] == "path(safety)"


def test_without_fine_tuning_version_zero_is_the_given_model() -> None:
    plan = plan_of("sft.skip=true", "model.path=models/chat", batches=("w1",))

    assert "sft" not in [node.name for node in plan.nodes]
    assert plan.improves(0) == ""
    assert plan.node("round-01/reward-safety").after == ()


def test_another_recipe_is_refused() -> None:
    old = plan_of(batches=("w1",))
    config = compose.load(["recipe=quickstart", "run=smollm2"])
    with pytest.raises(ConfigError, match=r"recipe=quickstart.*started as recipe=smollm2"):
        build_plan(config, listing("w1"), old)


@pytest.mark.parametrize("kind", ["sft", "prompts", "open"])
def test_a_missing_set_is_named_with_the_command_that_adds_it(kind: str) -> None:
    stock = {**listing("w1"), kind: {}}
    with pytest.raises(ConfigError, match=rf"rlhf ingest FILE ingest.kind={kind}"):
        check_sets(compose.load([*PEOPLE]), stock)


def test_open_comparisons_are_not_needed_when_judges_learn_from_batches() -> None:
    config = compose.load([*PEOPLE, "judge.data=batches", "judge.share=0.2"])
    check_sets(config, {**listing("w1"), "open": {}})


def test_downstream_is_everything_that_depends_on_a_node() -> None:
    plan = plan_of(batches=("w1", "w2"))
    affected = {node.name for node in plan.downstream("round-02/reward-safety")}
    assert affected == {"round-02/ppo", "round-02/evaluate", "round-02/collect"}
    assert len(plan.downstream("sft")) == len(plan.nodes) - 1


def test_symbols_are_split() -> None:
    assert parse_symbol("model") == ("model", "")
    assert parse_symbol("promoted(3)") == ("promoted", "3")
    assert parse_symbol("output(round-01/reward-safety)") == ("output", "round-01/reward-safety")


def test_sampling_jobs_share_the_work_of_a_rejection_node_and_stay_as_the_round_began() -> None:
    schedule = "rounds.schedule=[rejection]"
    plan = plan_of(schedule, "rounds.sampling_jobs=2", batches=("w1",))
    shards = [plan.node(f"round-01/sample-{number}") for number in range(2)]
    merge = plan.node("round-01/rejection")
    assert [dict(node.options) for node in shards] == [
        {"shard": number, "of": 2, "for": merge.name} for number in range(2)
    ]
    assert {node.name for node in shards} < set(merge.after)
    assert inputs(plan, merge.name)["sampled_1"] == "node(round-01/sample-1)"
    assert shards[0].after == shards[1].after
    # Nothing but the sampling differs from a round without such jobs.
    alone = plan_of(schedule, batches=("w1",))
    assert [node for node in plan.nodes if node.stage != "sample"] == [
        node if node.name != merge.name else merge for node in alone.nodes
    ]

    later = plan_of(schedule, "rounds.sampling_jobs=3", batches=("w1", "w2"), previous=plan)
    assert [item.sampling_jobs for item in later.rounds] == [2, 3]
    assert Plan.from_json(later.to_json()) == later
    assert names(plan_of("rounds.sampling_jobs=2", batches=("w1", "w2")), 2)[2] == "ppo"


def test_corrections_reach_the_rounds_that_have_not_started() -> None:
    config = config_of(*PEOPLE, "rounds.limit=2")
    stock = listing("w1", "w2")
    old = build_plan(config, stock, None)
    assert (old.as_of, [item.as_of for item in old.rounds]) == (0, [0, 0])
    later = {**stock, "tombstones": {"000000007/batch/w1": "d", "000000012/sft/a": "e"}}
    for started, expected in (
        (-1, (12, 12, 12)),
        (0, (0, 12, 12)),
        (1, (0, 0, 12)),
        (2, (0, 0, 0)),
    ):
        plan = build_plan(config, later, old, started=started)
        assert (plan.as_of, *(item.as_of for item in plan.rounds)) == expected
        assert [plan.rows_as_of(k) for k in range(3)] == list(expected)
        assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_written_before_there_were_corrections_reads_as_without_any() -> None:
    tree = plan_of(batches=("w1",)).to_json()
    del tree["as_of"]
    del tree["rounds"][0]["as_of"]
    plan = Plan.from_json(tree)
    assert (plan.as_of, plan.rounds[0].as_of) == (0, 0)
