from pathlib import Path
from typing import Any

import micro_models as micro
import micro_stages
import pytest

from rlhf.artifacts import read_json
from rlhf.config import Config, Sft
from rlhf.data.records import Conversation
from rlhf.errors import DataError
from rlhf.models.loading import load_policy
from rlhf.nodes import NodeContext
from rlhf.stages import sft
from rlhf.toy import World


class Killed(Exception):
    pass


@pytest.fixture
def made(tmp_path: Path) -> Config:
    settings = micro_stages.config(tmp_path, every_steps=2)
    rows = [c.to_json() for c in World(0).sft_set(60)]
    micro_stages.add(settings, "sft", "first", rows[:40])
    micro_stages.add(settings, "sft", "second", rows[40:])
    micro_stages.save_policy(tmp_path / "base")
    return settings


def node(made: Config, name: str = "sft", **changes: Any) -> NodeContext:
    return micro_stages.context(
        made,
        name=name,
        stage="sft",
        models={"base": str(Path(made.paths.store).parent / "base")},
        data=[("sft", "first", 0), ("sft", "second", 0)],
        **changes,
    )


def conversation(*turns: tuple[str, str], heldout: bool = False) -> Conversation:
    messages: Any = [{"role": role, "content": text} for role, text in turns]
    return Conversation("id", messages, "source", heldout)


ASK, ANSWER = ("user", "what does the cat eat"), ("assistant", "the cat eats fish")


def test_writes_a_trained_model_and_its_counts(made: Config) -> None:
    context = node(made)
    sft.run(context)
    model = load_policy(context.directory.model, model=made.model, seed=0)
    assert micro.largest_difference(micro.weights(model), micro.weights(micro.policy())) > 0.0
    counts = read_json(context.directory.path / "data_counts.json")
    assert counts["read"] == counts["heldout"] + counts["trained"]
    assert counts["heldout"] > 0
    logged = micro.rows_without_time(context.directory.metrics)
    assert len(logged) == -(-counts["trained"] // 8)


def test_killed_stage_ends_with_the_same_weights(made: Config) -> None:
    straight = node(made, "straight")
    sft.run(straight)

    def die(done: int, _total: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        sft.run(node(made, "killed", on_step=die))
    again = node(made, "killed")
    saved = again.directory.last_checkpoint()
    assert saved is not None
    assert saved.step == 2
    sft.run(again)
    a, b = (load_policy(c.directory.model, model=made.model, seed=0) for c in (straight, again))
    assert micro.largest_difference(micro.weights(a), micro.weights(b)) == 0.0
    assert micro.rows_without_time(again.directory.metrics) == micro.rows_without_time(
        straight.directory.metrics
    )


def test_finished_model_is_not_trained_again(made: Config) -> None:
    sft.run(node(made))
    steps: list[int] = []
    sft.run(node(made, on_step=lambda done, _total: steps.append(done)))
    assert steps == []


def test_what_may_not_be_trained_on_is_counted() -> None:
    tokenizer = micro.tokenizer()
    rows, counts = sft.training_rows(
        [
            conversation(ASK, ANSWER),
            conversation(ASK, ANSWER, heldout=True),
            conversation(ASK, ("assistant", "fish " * 100)),
            conversation(ASK),
        ],
        tokenizer,
        settings=Sft(),
        max_length=40,
        seed=0,
    )
    assert len(rows) == 1
    labels = [label for label in rows[0].labels if label != -100]
    assert tokenizer.decode(labels) == "the cat eats fish<eos>"
    assert counts == {
        "read": 4,
        "heldout": 1,
        "over_long": 1,
        "no_answer": 1,
        "trained": 1,
        "trained_tokens": len(labels),
    }


def test_length_limit_is_inclusive() -> None:
    one = [conversation(ASK, ANSWER)]
    length = len(
        sft.training_rows(one, micro.tokenizer(), settings=Sft(), max_length=99, seed=0)[0][
            0
        ].labels
    )
    rows, _ = sft.training_rows(one, micro.tokenizer(), settings=Sft(), max_length=length, seed=0)
    assert len(rows) == 1
    with pytest.raises(DataError, match="no demonstration is left"):
        sft.training_rows(one, micro.tokenizer(), settings=Sft(), max_length=length - 1, seed=0)


def test_last_turn_only_leaves_earlier_answers_unlabelled() -> None:
    talk = [conversation(ASK, ANSWER, ASK, ("assistant", "hay"))]
    every, last = (
        sft.training_rows(
            talk,
            micro.tokenizer(),
            settings=Sft(last_turn_only=flag),
            max_length=99,
            seed=0,
        )[1]["trained_tokens"]
        for flag in (False, True)
    )
    assert last == 2
    assert every > last


def test_cap_takes_a_seeded_sample() -> None:
    talks = [conversation(ASK, ("assistant", f"{i}")) for i in range(20)]

    def kept(seed: int) -> list[list[int]]:
        rows, counts = sft.training_rows(
            talks, micro.tokenizer(), settings=Sft(max_rows=5), max_length=99, seed=seed
        )
        assert counts["over_cap"] == 15
        return [row.input_ids for row in rows]

    assert len(kept(0)) == 5
    assert kept(0) == kept(0)
    assert kept(0) != kept(1)
