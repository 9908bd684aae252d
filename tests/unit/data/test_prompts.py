"""Kinds of prompts and the keyed order."""

from __future__ import annotations

from rlhf.data.prompts import by_kind, keyed_order, prompt_kind
from rlhf.data.records import Prompt
from rlhf.toy import World


def prompt(id: str, *, is_safety: bool = False, **meta: str) -> Prompt:
    return Prompt(id, [{"role": "user", "content": id}], is_safety, "test", meta=dict(meta))


def test_the_tag_decides_before_the_mark() -> None:
    assert prompt_kind(prompt("a", is_safety=True, expected="comply")) == "safety"
    assert prompt_kind(prompt("b", expected="comply")) == "benign"
    assert prompt_kind(prompt("c", expected="refuse")) == "ordinary"
    assert prompt_kind(prompt("d")) == "ordinary"


def test_the_toy_world_has_all_kinds() -> None:
    kinds = by_kind(World(0).prompt_set(5, 4, 3))
    assert {kind: len(rows) for kind, rows in kinds.items()} == {
        "safety": 4,
        "benign": 3,
        "ordinary": 5,
    }


def test_the_order_follows_the_seed_and_survives_growth() -> None:
    few = [prompt(f"p{i}") for i in range(20)]
    many = few + [prompt(f"q{i}") for i in range(20)]
    ordered = [row.id for row in keyed_order(many, seed=3)]
    assert [row.id for row in keyed_order(few[::-1], seed=3)] == [
        id for id in ordered if id.startswith("p")
    ]
    assert ordered != [row.id for row in many]
    assert ordered != [row.id for row in keyed_order(many, seed=4)]
