"""Collect: which pairs annotators see, and what comes back from the simulated ones."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rlhf.artifacts import NodeDir, read_json, read_jsonl, write_jsonl
from rlhf.config import Annotators, Collect, Config, Data, Paths, Rounds, Sampling, Toy
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import Kind, Message, Prompt
from rlhf.inference.generation import Response
from rlhf.nodes import DataInput, Inputs, ModelInput, Node, NodeContext
from rlhf.stages import collect
from rlhf.toy import World

Write = Callable[[str, list[Message], float, str], str]


class StubVersion:
    """Answers with a plain function of (name, prompt, temperature, key)."""

    def __init__(self, name: str, write: Write, limit: int = 10_000) -> None:
        self.name = name
        self.write = write
        self.limit = limit
        self.calls: list[tuple[float, int]] = []

    def fitting(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Prompt]:
        return [
            prompt
            for prompt in prompts
            if len(prompt.prompt[-1]["content"]) + max_new_tokens < self.limit
        ]

    def generate(
        self,
        prompts: Sequence[list[Message]],
        *,
        num_samples: int,
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[Response]]:
        assert num_samples == 1
        self.calls.append((sampling.temperature, len(prompts)))
        texts = [
            self.write(self.name, prompt, sampling.temperature, key)
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        return [[Response(i, 0, [1], text, True)] for i, text in enumerate(texts)]


def by_key(name: str, prompt: list[Message], temperature: float, key: str) -> str:
    """Answer differently for every model, prompt, temperature and key."""
    digest = hashlib.blake2b(f"{name}/{temperature}/{key}".encode(), digest_size=4).hexdigest()
    return f"the fox eats {digest} ."


def same(name: str, prompt: list[Message], temperature: float, key: str) -> str:
    return "i cannot help with that ."


def make_context(
    tmp_path: Path,
    prompts: list[Prompt],
    *,
    num_pairs: int = 6,
    shard_prompts: int = 4,
    annotators: Annotators = Annotators.simulated,
    same_weights: bool = False,
) -> NodeContext:
    config = Config(
        recipe="test",
        run="test",
        seed=5,
        paths=Paths(runs=str(tmp_path / "runs"), store=str(tmp_path / "store")),
        data=Data(stream="sim-test", heldout_share=0.3),
        toy=Toy(enabled=True),
        collect=Collect(
            annotators=annotators,
            num_pairs=num_pairs,
            shard_prompts=shard_prompts,
            temperatures=[0.5, 1.5],
        ),
        rounds=Rounds(limit=2),
    )
    store = Store(Path(config.paths.store), config.data.stream)
    if not store.ids(Kind.prompts):
        source = tmp_path / "prompts.jsonl"
        write_jsonl(source, [row.to_json() for row in prompts])
        for row in (rows := read_jsonl(source)):
            del row["heldout"]
        write_jsonl(source, rows)
        ingest_file(
            source, store, kind=Kind.prompts, id="set", heldout_share=0.3, heldout_salt="rlhf"
        )
    node = Node("round-02/collect", "collect", 2, (), {})
    models = {
        "newest": ModelInput("unused", "v1", "d1"),
        "other": ModelInput(
            "unused", "v1" if same_weights else "v0", "d1" if same_weights else "d0"
        ),
    }
    inputs = Inputs(models, (DataInput("prompts", "set", "digest"),))
    directory = NodeDir(tmp_path / "node")
    return NodeContext(config, node, inputs, directory, seed=77)


def collect_with(context: NodeContext, write: Write, limit: int = 10_000) -> dict[str, StubVersion]:
    opened: dict[str, StubVersion] = {}

    def open_version(context: NodeContext, role: str) -> StubVersion:
        opened[role] = StubVersion(context.inputs.models[role].name, write, limit)
        return opened[role]

    collect.run(context, open_version=open_version)
    return opened


@pytest.fixture(scope="module")
def toy_prompts() -> list[Prompt]:
    return World(5).prompt_set(30, 20, 20)


def pairs_of(context: NodeContext) -> list[dict]:
    return read_jsonl(context.directory.path / "pairs.jsonl")


def test_pairs_come_from_both_versions_at_two_temperatures(tmp_path, toy_prompts) -> None:
    context = make_context(tmp_path, toy_prompts, num_pairs=20, annotators=Annotators.people)
    collect_with(context, by_key)
    pairs = pairs_of(context)
    assert [pair["axis"] for pair in pairs] == ["helpfulness"] * 20 + ["safety"] * 20
    assert set(pairs[0]) == {
        *("id", "axis", "prompt", "response_a", "response_b"),
        *("model_a", "model_b", "temperature_a", "temperature_b"),
    }
    for pair in pairs:
        assert {pair["model_a"], pair["model_b"]} == {"v0", "v1"}
        assert {pair["temperature_a"], pair["temperature_b"]} == {0.5, 1.5}
    # Order and temperature are assigned independently: all four cases occur.
    assert len({(pair["model_a"], pair["temperature_a"]) for pair in pairs}) == 4
    # Training and held-out prompts are both collected.
    store = Store(Path(context.config.paths.store), "sim-test")
    heldout = {json.dumps(p.prompt): p.heldout for p in store.prompts("set")}
    assert {heldout[json.dumps(pair["prompt"])] for pair in pairs} == {True, False}


def test_responses_match_their_recorded_model_and_temperature(tmp_path, toy_prompts) -> None:
    def labelled(name: str, prompt: list[Message], temperature: float, key: str) -> str:
        return f"{name} at {temperature}"

    context = make_context(tmp_path, toy_prompts, num_pairs=16, annotators=Annotators.people)
    collect_with(context, labelled)
    for pair in pairs_of(context):
        for side in ("a", "b"):
            expected = f"{pair[f'model_{side}']} at {pair[f'temperature_{side}']}"
            assert pair[f"response_{side}"] == expected


def test_benign_look_alikes_are_shared_between_the_axes_and_no_prompt_is_on_both(
    toy_prompts,
) -> None:
    safety, helpfulness = (
        collect.prompts_for_axis(toy_prompts, axis=axis, seed=1)
        for axis in ("safety", "helpfulness")
    )
    expected = [prompt.meta["expected"] for prompt in safety]
    assert expected == ["refuse", "comply"] * 10 + ["refuse"] * 10
    counts = Counter(prompt.meta["expected"] for prompt in helpfulness)
    assert counts == {"answer": 30, "comply": 10}
    # The look-alikes are not bunched together.
    assert any(prompt.meta["expected"] == "comply" for prompt in helpfulness[:15])
    assert {prompt.id for prompt in [*safety, *helpfulness]} == {p.id for p in toy_prompts}
    assert len(safety) + len(helpfulness) == len(toy_prompts)
    assert helpfulness != collect.prompts_for_axis(toy_prompts, axis="helpfulness", seed=2)
    few_benign = [p for p in toy_prompts if p.is_safety] + [
        p for p in toy_prompts if p.meta["expected"] == "comply"
    ][:3]
    rest = collect.prompts_for_axis(few_benign, axis="safety", seed=1)
    assert [prompt.is_safety for prompt in rest] == [True, False] + [True] * 19


def test_in_round_1_one_version_is_loaded_once_and_sampled_twice(tmp_path, toy_prompts) -> None:
    context = make_context(tmp_path, toy_prompts, same_weights=True, annotators=Annotators.people)
    opened = collect_with(context, lambda name, prompt, temperature, key: key)
    assert list(opened) == ["newest"]
    pairs = pairs_of(context)
    assert len(pairs) == 12
    for pair in pairs:
        assert pair["model_a"] == pair["model_b"] == "v1"
        assert pair["temperature_a"] != pair["temperature_b"]
        assert pair["response_a"] != pair["response_b"]


def test_identical_and_empty_pairs_are_replaced_from_further_prompts(
    tmp_path, toy_prompts, caplog
) -> None:
    def sometimes_same(name: str, prompt: list[Message], temperature: float, key: str) -> str:
        choice = int(key.split("/")[1][-5:]) % 3  # the number in the prompt's id
        if choice == 0:
            return "the same ."
        return " " if choice == 1 and name == "v0" else by_key(name, prompt, temperature, key)

    caplog.set_level(logging.INFO)
    context = make_context(tmp_path, toy_prompts, num_pairs=8, annotators=Annotators.people)
    collect_with(context, sometimes_same)
    pairs = pairs_of(context)
    assert len(pairs) == 16
    for pair in pairs:
        assert int(pair["id"][-5:]) % 3 == 2
    assert "skipped" in caplog.text
    assert "identical" in caplog.text
    assert "empty" in caplog.text


def test_running_out_of_prompts_is_said(tmp_path, toy_prompts, caplog) -> None:
    context = make_context(tmp_path, toy_prompts, num_pairs=500, annotators=Annotators.people)
    collect_with(context, by_key)
    axes = [pair["axis"] for pair in pairs_of(context)]
    assert (axes.count("helpfulness"), axes.count("safety")) == (40, 30)
    assert "only 30 of 500 pairs" in caplog.text


def test_over_long_prompts_are_left_out_and_counted(tmp_path, toy_prompts, caplog) -> None:
    context = make_context(tmp_path, toy_prompts, num_pairs=500, annotators=Annotators.people)
    collect_with(context, by_key, limit=40 + 64)
    pairs = pairs_of(context)
    assert 0 < len(pairs) < 70
    assert all(len(pair["prompt"][-1]["content"]) < 40 for pair in pairs)
    assert f"left out {70 - len(pairs)} over-long prompts" in caplog.text


def test_finished_shards_are_not_sampled_again(tmp_path, toy_prompts) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, total: int) -> None:
        if step == 16:
            raise Killed

    context = make_context(tmp_path, toy_prompts, num_pairs=20, shard_prompts=16)
    context.directory._on_step = kill
    with pytest.raises(Killed):
        collect_with(context, by_key)
    assert not (context.directory.path / "pairs.jsonl").exists()
    context.directory._on_step = None
    opened = collect_with(context, by_key)
    # 20 pairs per axis are a shard of 16 and one of MIN_SHARD = 16; the first is there already.
    assert sum(number for _, number in opened["newest"].calls) == 14 + 16 + 16
    resumed = pairs_of(context)

    straight = make_context(tmp_path / "straight", toy_prompts, num_pairs=20, shard_prompts=16)
    collect_with(straight, by_key)
    assert pairs_of(straight) == resumed


def test_people_get_pairs_and_directions(tmp_path, toy_prompts, caplog) -> None:
    caplog.set_level(logging.INFO)
    context = make_context(tmp_path, toy_prompts, annotators=Annotators.people)
    collect_with(context, by_key)
    assert not (context.directory.path / "batch.json").exists()
    assert "pairs.jsonl" in caplog.text
    assert "rlhf ingest" in caplog.text


def test_simulated_annotators_deliver_the_rounds_batch(tmp_path, toy_prompts) -> None:
    context = make_context(tmp_path, toy_prompts, num_pairs=10)
    collect_with(context, by_key)
    batch = read_json(context.directory.path / "batch.json")
    store = Store(Path(context.config.paths.store), "sim-test")
    assert store.ids(Kind.batch) == ["round-02"]
    rows = store.comparisons(Kind.batch, "round-02")
    assert batch == {
        "stream": "sim-test",
        "id": "round-02",
        "digest": store.digest(Kind.batch, "round-02"),
        "rows": len(rows),
    }
    pairs = {pair["id"]: pair for pair in pairs_of(context)}
    world = World(5)
    for row in rows:
        pair = pairs[row.id]
        side = "a" if row.chosen == pair["response_a"] else "b"
        assert row.model_chosen == pair[f"model_{side}"]
        assert row.model_rejected != row.model_chosen
        assert row.meta["temperature_chosen"] == pair[f"temperature_{side}"]
        assert row.axis == pair["axis"]
        expected = world.rate(
            pair["prompt"],
            pair["response_a"],
            pair["response_b"],
            axis=row.axis,
            id=row.id,
            seed=77,
        )
        assert (row.chosen, row.strength, row.tie) == (
            expected.chosen,
            expected.strength,
            expected.tie,
        )


def test_collecting_again_adds_nothing(tmp_path, toy_prompts) -> None:
    context = make_context(tmp_path, toy_prompts)
    collect_with(context, by_key)
    first = (context.directory.path / "batch.json").read_bytes()
    collect_with(context, by_key)
    assert (context.directory.path / "batch.json").read_bytes() == first
