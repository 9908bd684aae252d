"""Evaluate: which prompts are asked, how the verdict comes about, and what it may not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import metrics
from rlhf.artifacts import NodeDir, read_json, read_jsonl, write_json, write_jsonl
from rlhf.config import Config, Data, Evaluate, Paths, PromotionRule, Sampling, Toy
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
from rlhf.data.prompts import by_kind, prompt_kind
from rlhf.data.records import Kind, Message, Prompt
from rlhf.errors import DataError, StageError
from rlhf.inference.answers import SIDES
from rlhf.inference.generation import Response
from rlhf.inference.history import ROLES
from rlhf.models.loading import save_model
from rlhf.nodes import DataInput, Inputs, ModelInput, Node, NodeContext
from rlhf.stages import evaluate
from rlhf.stages.evaluate import SCORERS, choose_prompts
from rlhf.toy import World
from rlhf.toy.gold import Gold
from tests import micro_models

WORLD_SEED = 3
REFUSAL = "i cannot help with that ."
GOOD, BAD = "the good answer .", "the bad answer ."

WRITTEN = ("decision.json", "evaluation.json", "version_scores.jsonl", "responses.jsonl")

Write = Callable[[list[Message]], str]


class StubVersion:
    """Answers with a plain function; every token costs `nats` under this version."""

    def __init__(self, write: Write, *, nats: float = 1.0, finished: bool = True) -> None:
        self.write = write
        self.nats = nats
        self.finished = finished
        self.keys: list[str] = []

    def fitting(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Prompt]:
        return list(prompts)

    def generate(
        self,
        prompts: Sequence[list[Message]],
        *,
        num_samples: int,
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[Response]]:
        assert num_samples == 1
        self.keys += keys
        texts = [self.write(prompt) for prompt in prompts]
        return [
            [Response(i, 0, list(range(len(text.split()))), text, self.finished)]
            for i, text in enumerate(texts)
        ]

    def logprobs(
        self,
        prompts: Sequence[list[Message]],
        responses: Sequence[list[int]],
        *,
        temperature: float,
    ) -> list[float]:
        return [-self.nats * len(response) for response in responses]


def score_text(role: str, response: str) -> float:
    """Like good answers, dislike bad ones; refusals are safe but not helpful."""
    if response == REFUSAL:
        return 3.0 if role.endswith("safety") else -1.0
    return 2.0 if response == GOOD else -2.0


class Stubs:
    """Hands out stub models by role and remembers what was opened."""

    def __init__(
        self,
        candidate: StubVersion,
        promoted: StubVersion,
        score: Callable[[str, str], float] = score_text,
    ) -> None:
        self.versions = {"candidate": candidate, "promoted": promoted}
        self.score = score
        self.opened: list[str] = []
        self.scored: list[tuple[str, int]] = []

    def open_version(self, context: NodeContext, role: str) -> StubVersion:
        self.opened.append(role)
        return self.versions[role]

    def open_scorer(self, context: NodeContext, role: str) -> Any:
        self.opened.append(role)

        def scorer(prompts: Sequence[list[Message]], responses: Sequence[str]) -> torch.Tensor:
            assert len(prompts) == len(responses)
            self.scored.append((role, len(responses)))
            return torch.tensor([self.score(role, response) for response in responses])

        return scorer

    def run(self, context: NodeContext) -> dict[str, Any]:
        evaluate.run(context, open_version=self.open_version, open_scorer=self.open_scorer)
        return read_json(context.directory.path / "evaluation.json")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with a toy prompt set, about half of it held out."""
    root = tmp_path_factory.mktemp("evaluate")
    rows = [prompt.to_json() for prompt in World(WORLD_SEED).prompt_set(60, 60, 60)]
    for row in rows:
        del row["heldout"]
    write_jsonl(root / "prompts.jsonl", rows)
    ingest_file(
        root / "prompts.jsonl",
        Store(root / "store", "test"),
        kind=Kind.prompts,
        id="set",
        heldout_share=0.5,
        heldout_salt="rlhf",
    )
    return root / "store"


def make_context(
    store: Path, folder: Path, *, toy: bool = False, round_: int = 1, **changes: Any
) -> NodeContext:
    settings = {"num_prompts": 60, "shard_prompts": 25, "bootstrap_draws": 50, **changes}
    config = Config(
        recipe="test",
        run="test",
        seed=WORLD_SEED,
        paths=Paths(runs="unused", store=str(store)),
        data=Data(stream="test", heldout_share=0.5),
        toy=Toy(enabled=toy),
        evaluate=Evaluate(**settings),
    )
    roles = ("candidate", "promoted", *SCORERS)
    models = {role: ModelInput("unused", f"name-of-{role}", role) for role in roles}
    inputs = Inputs(models, (DataInput("prompts", "set", "digest"),))
    node = Node(f"round-{round_:02d}/evaluate", "evaluate", round_, (), {})
    return NodeContext(config, node, inputs, NodeDir(folder), seed=1000 + round_)


def always(text: str) -> Write:
    return lambda prompt: text


def decision(context: NodeContext) -> dict[str, Any]:
    return read_json(context.directory.path / "decision.json")


def failed(context: NodeContext) -> list[str]:
    return [reason["rule"] for reason in decision(context)["reasons"] if not reason["ok"]]


def test_a_better_version_is_promoted(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path)
    evaluation = Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD))).run(context)
    assert evaluation["win_rate"]["judge"]["all"]["mean"] == 1.0
    assert decision(context) == {
        "version": "v1",
        "against": "name-of-promoted",
        "promoted": True,
        "reasons": decision(context)["reasons"],
    }
    assert failed(context) == []
    assert evaluation["violation_rate"]["candidate"]["mean"] == 0.0
    assert evaluation["violation_rate"]["promoted"]["mean"] == 1.0
    shift = evaluation["scores"]["judge_helpfulness"]
    assert (shift["candidate"], shift["promoted"], shift["shift"]["mean"]) == (2.0, -2.0, 4.0)


def test_equal_versions_are_refused_at_exactly_one_half(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path)
    evaluation = Stubs(StubVersion(always(GOOD)), StubVersion(always(GOOD))).run(context)
    assert evaluation["win_rate"]["judge"]["all"]["mean"] == 0.5
    assert evaluation["kl"] == 0.0
    assert failed(context) == ["min_win_rate"]


def test_a_version_that_refuses_the_harmless_is_refused(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path)
    score = {REFUSAL: 5.0, BAD: -5.0}
    stubs = Stubs(
        StubVersion(always(REFUSAL)),
        StubVersion(always(BAD)),
        score=lambda role, response: score[response],
    )
    evaluation = stubs.run(context)
    assert evaluation["over_refusal_rate"]["candidate"]["mean"] == 1.0
    assert evaluation["over_refusal_rate"]["promoted"]["mean"] == 0.0
    assert failed(context) == ["max_over_refusal_increase"]


def test_a_version_that_never_ends_is_refused(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path)
    stubs = Stubs(StubVersion(always(GOOD), finished=False), StubVersion(always(BAD)))
    assert stubs.run(context)["finished_fraction"] == {"candidate": 0.0, "promoted": 1.0}
    assert failed(context) == ["min_finished_fraction"]


def test_only_length_does_not_promote(store: Path, tmp_path: Path) -> None:
    """A longer answer that both pairs like: the win rate is there, the length bound refuses."""
    context = make_context(store, tmp_path)
    stubs = Stubs(
        StubVersion(always("word " * 12)),
        StubVersion(always("word " * 6)),
        score=lambda role, response: float(len(response.split())),
    )
    evaluation = stubs.run(context)
    assert evaluation["win_rate"]["judge"]["longer"]["mean"] == 1.0
    assert evaluation["win_rate"]["judge"]["not_longer"]["n"] == 0
    assert failed(context) == ["max_length_ratio"]


def test_kl_is_measured_on_the_candidates_responses(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path, rule=PromotionRule(max_kl=7.9))
    # 4 tokens a response; -1 nat a token under the candidate, -3 under the promoted version.
    stubs = Stubs(StubVersion(always("a b c d"), nats=1.0), StubVersion(always("e f g"), nats=3.0))
    assert stubs.run(context)["kl"] == 4 * (3.0 - 1.0)
    assert "max_kl" in failed(context)


def test_the_judge_pair_decides_and_the_used_pair_is_reported(store: Path, tmp_path: Path) -> None:
    """Over-optimisation: the pair that was trained against loves what the judges dislike."""

    def score(role: str, response: str) -> float:
        return score_text(role, response) * (-1 if role.startswith("reward") else 1)

    context = make_context(store, tmp_path)
    stubs = Stubs(StubVersion(always(BAD)), StubVersion(always(GOOD)), score=score)
    win_rate = stubs.run(context)["win_rate"]
    assert (win_rate["judge"]["all"]["mean"], win_rate["used"]["all"]["mean"]) == (0.0, 1.0)
    assert not decision(context)["promoted"]
    assert set(stubs.opened) == {"candidate", "promoted", *SCORERS}


def test_a_gain_that_mostly_the_used_pair_sees_is_refused(store: Path, tmp_path: Path) -> None:
    """The judges prefer the version on three prompts of four, the used pair on all of them."""
    written = iter(range(1000))
    plain = "the plain answer ."
    judge = {GOOD: 2.0, plain: 1.5, BAD: 1.0}

    def score(role: str, response: str) -> float:
        used = role.startswith("reward") and response == BAD
        return judge[GOOD] if used else judge[response]

    context = make_context(store, tmp_path)
    candidate = StubVersion(lambda prompt: BAD if next(written) % 4 == 0 else GOOD)
    Stubs(candidate, StubVersion(always(plain)), score=score).run(context)
    assert failed(context) == ["max_win_rate_gap"]


def test_prompts_are_held_out_stratified_and_the_same_in_every_round(
    store: Path, tmp_path: Path
) -> None:
    first = make_context(store, tmp_path / "1", round_=1)
    second = make_context(store, tmp_path / "2", round_=2)
    versions = [StubVersion(always(GOOD)) for _ in range(4)]
    evaluation = Stubs(*versions[:2]).run(first)
    Stubs(*versions[2:]).run(second)
    assert evaluation["prompts"] == {"safety": 20, "benign": 20, "ordinary": 20}
    asked = [
        [row["prompt_id"] for row in read_jsonl(context.directory.path / "responses.jsonl")]
        for context in (first, second)
    ]
    assert asked[0] == asked[1]
    heldout = {prompt.id for prompt in Store(store, "test").prompts("set") if prompt.heldout}
    assert set(asked[0]) <= heldout
    # Both versions and both rounds draw with the same keys, one per prompt.
    assert versions[0].keys == versions[1].keys == versions[2].keys
    assert len(set(versions[0].keys)) == 60


def test_a_short_kind_leaves_its_share_to_the_others() -> None:
    prompts = [
        Prompt(f"{kind}{i}", [], kind == "safety", "t", meta={"expected": kind})
        for kind, number in (("safety", 2), ("comply", 30), ("other", 30))
        for i in range(number)
    ]
    chosen = choose_prompts(prompts, number=12, seed=0)
    counts = {kind: len(rows) for kind, rows in by_kind(chosen).items()}
    assert counts == {"safety": 2, "benign": 5, "ordinary": 5}
    assert len(choose_prompts(prompts, number=999, seed=0)) == 62
    assert {p.id for p in choose_prompts(prompts, number=12, seed=1)} != {p.id for p in chosen}


def test_no_heldout_prompt_is_a_user_error(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path)
    version = StubVersion(always(GOOD))
    version.fitting = lambda prompts, *, max_new_tokens: []  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"held-out prompts, none .* model\.max_length"):
        Stubs(version, version).run(context)


def test_a_score_that_is_no_number_stops_the_stage(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path)
    version = StubVersion(always(GOOD))
    with pytest.raises(StageError, match="judge_helpfulness gave a score that is not finite"):
        Stubs(version, version, score=lambda role, response: math.nan).run(context)
    assert not (context.directory.path / "decision.json").exists()


def test_equal_texts_tie_although_batches_change_the_last_digits(
    store: Path, tmp_path: Path
) -> None:
    """A scorer whose scores depend on the row's position, as float rounding does."""

    class Drifting(Stubs):
        def open_scorer(self, context: NodeContext, role: str) -> Any:
            return lambda prompts, responses: torch.arange(len(responses)) * 1e-4

    def write(prompt: list[Message]) -> str:
        return GOOD if len(prompt[-1]["content"]) % 2 else BAD

    context = make_context(store, tmp_path)
    Drifting(StubVersion(write), StubVersion(always(GOOD))).run(context)
    rows = read_jsonl(context.directory.path / "responses.jsonl")
    ties = [row for row in rows if row["responses"]["candidate"] == row["responses"]["promoted"]]
    assert 0 < len(ties) < len(rows)
    for row in ties:
        for scores in row["scores"].values():
            assert scores["candidate"] == scores["promoted"]


def test_responses_and_scores_stay_with_their_prompt(store: Path, tmp_path: Path) -> None:
    def echo(prompt: list[Message]) -> str:
        return "you asked " + prompt[-1]["content"]

    def length(role: str, response: str) -> float:
        return float(len(response))

    context = make_context(store, tmp_path, shard_prompts=7)
    Stubs(StubVersion(echo), StubVersion(always(GOOD)), score=length).run(context)
    for row in read_jsonl(context.directory.path / "responses.jsonl"):
        expected = "you asked " + row["prompt"][-1]["content"]
        assert row["responses"] == {"candidate": expected, "promoted": GOOD}
        for scores in row["scores"].values():
            assert scores == {"candidate": len(expected), "promoted": len(GOOD)}


def test_gold_is_reported_per_version(store: Path, tmp_path: Path) -> None:
    world = World(WORLD_SEED)
    context = make_context(store, tmp_path, toy=True)
    evaluation = Stubs(StubVersion(always(REFUSAL)), StubVersion(always("yes ."))).run(context)
    rows = read_jsonl(context.directory.path / "responses.jsonl")
    for version in ("candidate", "promoted"):
        golds = [
            (row["kind"], world.gold(row["prompt"], row["responses"][version])) for row in rows
        ]
        helpful = [gold.helpfulness for kind, gold in golds if kind != "safety"]
        gold = evaluation["gold"][version]
        assert gold["helpfulness"]["mean"] == pytest.approx(sum(helpful) / len(helpful))
        assert gold["violation_rate"]["mean"] == 0.0
    assert evaluation["gold"]["candidate"]["over_refusal_rate"]["mean"] == 1.0
    assert evaluation["gold"]["promoted"]["over_refusal_rate"]["mean"] == 0.0


def test_gold_never_reaches_the_decision(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: str, *, toy: bool) -> tuple[bytes, dict[str, Any]]:
        context = make_context(store, tmp_path / folder, toy=toy)
        evaluation = Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD))).run(context)
        return (context.directory.path / "decision.json").read_bytes(), evaluation

    true_decision, true_evaluation = run("true", toy=True)
    corrupted = Gold(helpfulness=0.123, severity=1.0, refused=True, over_refusal=True)
    monkeypatch.setattr(World, "gold", lambda self, prompt, response: corrupted)
    false_decision, false_evaluation = run("corrupted", toy=True)
    without_decision, without_evaluation = run("without", toy=False)
    assert true_decision == false_decision == without_decision
    assert false_evaluation["gold"] != true_evaluation["gold"]
    assert without_evaluation["gold"] is None
    for evaluation in (true_evaluation, false_evaluation, without_evaluation):
        del evaluation["gold"]
    assert true_evaluation == false_evaluation == without_evaluation


def test_the_decision_is_on_disk_before_gold_is_computed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(store, tmp_path, toy=True)

    def gold(self: World, prompt: list[Message], response: str) -> Gold:
        assert (tmp_path / "decision.json").exists()
        return Gold(helpfulness=0.0, severity=0.0, refused=False, over_refusal=False)

    monkeypatch.setattr(World, "gold", gold)
    Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD))).run(context)


@pytest.mark.parametrize("stop_at", [1, 4, 8])
def test_resume_repeats_no_finished_shard_and_ends_the_same(
    store: Path, tmp_path: Path, stop_at: int
) -> None:
    class Stopped(Exception):
        pass

    steps: list[tuple[int, int]] = []

    def stop(step: int, total: int) -> None:
        steps.append((step, total))
        if step == stop_at and len(steps) == stop_at:
            raise Stopped

    def stubs() -> Stubs:
        return Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD)))

    straight = make_context(store, tmp_path / "straight")
    stubs().run(straight)
    context = make_context(store, tmp_path / "resumed")
    context.directory._on_step = stop
    with pytest.raises(Stopped):
        stubs().run(context)
    resumed = stubs()
    resumed.run(context)
    # 60 prompts in shards of 25 are 3 shards for each of 2 versions, then 4 scorers.
    assert steps[-1] == (10, 10)
    done = max(0, stop_at - 3)
    assert len(resumed.versions["candidate"].keys) == 60 - min(60, 25 * stop_at)
    assert len(resumed.versions["promoted"].keys) == 60 - min(60, 25 * done)
    opened = [role for role in resumed.opened if role in SCORERS]
    assert opened == list(SCORERS[max(0, stop_at - 6) :])
    for name in (*WRITTEN, "metrics.jsonl"):
        ours = (context.directory.path / name).read_bytes()
        assert ours == (straight.directory.path / name).read_bytes(), name


def test_earlier_versions_are_scored_by_this_rounds_judges(store: Path, tmp_path: Path) -> None:
    """Three rounds; the judges of round k add 10 k, and v1 was refused."""

    def scores(round_: int) -> Callable[[str, str], float]:
        return lambda role, response: len(response) + 10.0 * round_

    texts = {"v0": "v", "v1": "vv", "v2": "vvv", "v3": "vvvv"}
    against = {1: "v0", 2: "v0", 3: "v2"}
    found = {}
    for k, promoted in against.items():
        context = make_context(store, tmp_path / str(k), round_=k)
        models = dict(context.inputs.models)
        models["promoted"] = replace(models["promoted"], name=promoted)
        for j in range(1, k):
            models[f"history_{j}"] = ModelInput(str(tmp_path / str(j)), f"round-{j}", "digest")
        stubs = Stubs(
            StubVersion(always(texts[f"v{k}"])), StubVersion(always(texts[promoted])), scores(k)
        )
        inputs = Inputs(models, context.inputs.data)
        found[k] = stubs.run(replace(context, inputs=inputs))["versions"]
    for k, versions in found.items():
        assert list(versions) == [f"v{j}" for j in range(k + 1)]
        for j in range(k + 1):
            helpful, safe = (versions[f"v{j}"][role] for role in ROLES)
            # 20 prompts of each kind; the benign ones are not tagged is_safety.
            assert (helpful["mean"], helpful["n"]) == (j + 1 + 10 * k, 40)
            assert (safe["mean"], safe["n"]) == (j + 1 + 10 * k, 20)


def test_a_node_killed_before_its_evaluation_is_written_scores_nothing_again(
    store: Path, tmp_path: Path
) -> None:
    context = make_context(store, tmp_path)
    straight = Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD))).run(context)
    (tmp_path / "evaluation.json").unlink()
    resumed = Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD)))
    assert resumed.run(context) == straight
    assert resumed.opened == ["candidate", "promoted"]


def test_every_model_is_opened_once(store: Path, tmp_path: Path) -> None:
    stubs = Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD)))
    stubs.run(make_context(store, tmp_path))
    assert stubs.opened == ["candidate", "promoted", *SCORERS]


def test_a_response_is_written_with_all_that_is_known_of_it(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path, toy=True)
    world = World(WORLD_SEED)
    Stubs(StubVersion(always(REFUSAL)), StubVersion(always(BAD), finished=False)).run(context)
    rows = read_jsonl(tmp_path / "responses.jsonl")
    sources = {prompt.id: prompt.source for prompt in Store(store, "test").prompts("set")}
    assert len(rows) == 60
    for row in rows:
        assert row["source"] == sources[row["prompt_id"]]
        assert row["num_tokens"] == {"candidate": 6, "promoted": 4}
        assert row["finished"] == {"candidate": True, "promoted": False}
        assert row["refused"] == {"candidate": True, "promoted": False}
        is_safety = row["kind"] == "safety"
        unsafe = {"candidate": False, "promoted": True} if is_safety else dict.fromkeys(SIDES)
        assert row["unsafe"] == unsafe
        for side, text in (("candidate", REFUSAL), ("promoted", BAD)):
            gold = world.gold(row["prompt"], text)
            assert row["gold"][side] == {
                "helpfulness": gold.helpfulness,
                "violation": gold.violation,
                "over_refusal": gold.over_refusal,
            }


def test_outside_the_toy_world_there_is_no_gold(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path)
    Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD))).run(context)
    for row in read_jsonl(tmp_path / "responses.jsonl"):
        assert row["gold"] == dict.fromkeys(SIDES)


def test_the_rows_add_up_to_the_rates(store: Path, tmp_path: Path) -> None:
    def mixed(prompt: list[Message]) -> str:
        return (GOOD, BAD, REFUSAL)[len(prompt[-1]["content"]) % 3]

    context = make_context(store, tmp_path)
    evaluation = Stubs(StubVersion(mixed), StubVersion(always(GOOD))).run(context)
    rows = read_jsonl(tmp_path / "responses.jsonl")
    for side in SIDES:
        unsafe = [row["unsafe"][side] for row in rows if row["kind"] == "safety"]
        refused = [row["refused"][side] for row in rows if row["kind"] == "benign"]
        for rate, found in (("violation_rate", unsafe), ("over_refusal_rate", refused)):
            assert evaluation[rate][side]["mean"] == pytest.approx(sum(found) / len(found))
    assert 0 < evaluation["violation_rate"]["candidate"]["mean"] < 1
    by_name = {(r["version"], r["prompt_id"]): r for r in read_jsonl(tmp_path / WRITTEN[2])}
    assert len(by_name) == 2 * 60
    for row in rows:
        for role in ROLES:
            assert by_name["v1", row["prompt_id"]][role] == row["scores"][role]["candidate"]


def test_a_gain_that_length_earns_leaves_nothing_within_buckets(
    store: Path, tmp_path: Path
) -> None:
    """Both versions write 1 to 9 words; the candidate often more, and the judge counts words."""

    def words(extra: int) -> Write:
        return lambda prompt: "word " * (1 + (len(prompt[-1]["content"]) + extra) % 9)

    context = make_context(store, tmp_path)
    stubs = Stubs(
        StubVersion(lambda prompt: words(0)(prompt) + "word word"),
        StubVersion(words(0)),
        score=lambda role, response: float(len(response.split())),
    )
    found = stubs.run(context)["length_controlled"]
    assert list(found) == ["helpfulness", "safety"]
    assert (found["helpfulness"]["gain"]["n"], found["safety"]["gain"]["n"]) == (40, 20)
    assert found["helpfulness"]["gain"]["mean"] == 2.0
    assert abs(found["helpfulness"]["within_buckets"]["mean"]) < 0.5
    assert sum(row["n"] for row in found["helpfulness"]["buckets"]) == 80


def with_ppo(context: NodeContext, folder: Path, *, text: str) -> NodeContext:
    """Give the node a PPO node that answered 30 held-out prompts of each axis twice."""
    stored = Store(Path(context.config.paths.store), "test").prompts("set")
    asked = [prompt for prompt in stored if prompt.heldout]
    rows = [
        {
            "iteration": iteration,
            "prompt_id": prompt.id,
            "kl_to_start": float(iteration),
            "finished": True,
            "num_tokens": 4,
            "text": text if iteration else GOOD,
            "score_helpfulness": float(iteration),
            "score_safety": float(iteration),
        }
        for iteration in (0, 3)
        for prompt in asked
    ]
    write_jsonl(folder / "heldout.jsonl", rows)
    write_json(folder / "ppo.json", {"best_iteration": 3})
    models = {**context.inputs.models, "ppo": ModelInput(str(folder), "round-01/ppo", "digest")}
    return replace(context, inputs=Inputs(models, context.inputs.data))


def test_the_canary_sees_over_optimisation_and_never_reaches_the_decision(
    store: Path, tmp_path: Path
) -> None:
    written: dict[str, dict[str, bytes]] = {}
    verdicts = {}
    for name, text in (("none", None), ("fine", GOOD), ("hacked", BAD)):
        context = make_context(store, tmp_path / name)
        if text is not None:
            context = with_ppo(context, tmp_path / f"ppo-{name}", text=text)
        stubs = Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD)))
        stubs.run(context)
        assert stubs.opened == ["candidate", "promoted", *SCORERS]
        # Both versions' answers in a call of their own; what follows is for the judges alone.
        calls = {role: [n for scored, n in stubs.scored if scored == role] for role in SCORERS}
        assert {role: sizes[0] for role, sizes in calls.items()} == dict.fromkeys(SCORERS, 120)
        assert [len(calls[role]) for role in ROLES] == [2 if text is None else 3] * 2
        assert [len(calls[role]) for role in SCORERS if role not in ROLES] == [1, 1]
        found = tmp_path / name / "over_optimisation.json"
        verdicts[name] = read_json(found)["verdict"]["verdict"] if found.exists() else None
        written[name] = {file: (tmp_path / name / file).read_bytes() for file in WRITTEN}
    assert verdicts == {"none": None, "fine": "no sign", "hacked": "over-optimising"}
    assert written["none"] == written["fine"] == written["hacked"]


def test_the_decision_is_on_disk_before_the_canary_is_read(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluate.over_optimisation
    seen = []

    def look(*arguments: Any) -> dict[str, Any]:
        seen.append((tmp_path / "node" / "decision.json").exists())
        return plain(*arguments)

    monkeypatch.setattr(evaluate, "over_optimisation", look)
    context = with_ppo(make_context(store, tmp_path / "node"), tmp_path / "ppo", text=BAD)
    Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD))).run(context)
    assert seen == [True]


def test_an_earlier_version_without_a_score_stops_the_stage(store: Path, tmp_path: Path) -> None:
    first = make_context(store, tmp_path / "1")
    Stubs(StubVersion(always("old one .")), StubVersion(always(BAD))).run(first)
    second = make_context(store, tmp_path / "2", round_=2)
    models = {**second.inputs.models, "history_1": ModelInput(str(tmp_path / "1"), "1", "digest")}
    second = replace(second, inputs=Inputs(models, second.inputs.data))

    def score(role: str, response: str) -> float:
        return math.nan if response == "old one ." else 1.0

    with pytest.raises(StageError, match=r"judge_helpfulness gave .* \(versions, v1\)"):
        Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD)), score=score).run(second)


def test_metrics_carry_our_names(store: Path, tmp_path: Path) -> None:
    context = make_context(store, tmp_path, round_=2)
    Stubs(StubVersion(always(GOOD)), StubVersion(always(BAD))).run(context)
    [row] = read_jsonl(context.directory.metrics.path)
    assert row == {
        "step": 2,
        metrics.EVAL_WIN_RATE: 1.0,
        metrics.EVAL_VIOLATION_RATE: 0.0,
        metrics.EVAL_OVER_REFUSAL_RATE: 0.0,
        metrics.EVAL_KL: 0.0,
        metrics.EVAL_RESPONSE_LENGTH: 4.0,
    }


def test_the_fixture_has_all_kinds(store: Path) -> None:
    heldout = [prompt for prompt in Store(store, "test").prompts("set") if prompt.heldout]
    assert {prompt_kind(prompt) for prompt in heldout} == {"safety", "benign", "ordinary"}


def test_real_models_with_equal_weights_are_refused(store: Path, tmp_path: Path) -> None:
    """The whole stage with micro models: the same weights twice give ties, KL 0 and a refusal."""
    for name, model in (("lm", micro_models.policy()), ("rm", micro_models.scorer())):
        save_model(model, micro_models.tokenizer(), tmp_path / name)
    context = make_context(
        store, tmp_path / "node", toy=True, num_prompts=12, sampling=Sampling(max_new_tokens=6)
    )
    models = {
        role: replace(model, path=str(tmp_path / ("rm" if role in SCORERS else "lm")))
        for role, model in context.inputs.models.items()
    }
    evaluate.run(replace(context, inputs=Inputs(models, context.inputs.data)))
    evaluation = read_json(context.directory.path / "evaluation.json")
    assert evaluation["win_rate"]["judge"]["all"]["mean"] == 0.5
    assert evaluation["kl"] == 0.0
    assert evaluation["gold"]["candidate"] == evaluation["gold"]["promoted"]
    assert "min_win_rate" in failed(context)
