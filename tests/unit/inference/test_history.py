"""Earlier answers, read from two evaluations and scored again by this round's judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.algo.comparison import Settings
from rlhf.artifacts import NodeDir, write_json, write_jsonl
from rlhf.config import Config, Paths
from rlhf.data.records import Message, Prompt
from rlhf.inference.history import (
    ROLES,
    earlier_texts,
    version_means,
    version_rows,
    versions_table,
)
from rlhf.inference.tables import score_columns
from rlhf.nodes import Inputs, ModelInput, Node, NodeContext

SETTINGS = Settings(level=0.95, num_draws=50, seed=0, gate_threshold=0.15, unsafe_threshold=0.5)
Texts = dict[str, dict[str, str]]


def make_prompt(name: str, *, is_safety: bool = False) -> Prompt:
    return Prompt(name, [{"role": "user", "content": f"ask {name}"}], is_safety, "t")


def add_evaluation(folder: Path, *, candidate: Texts, promoted: Texts) -> Path:
    """Write what an earlier round left; both sides are {version: {prompt id: response}}."""
    [(new, new_texts)], [(old, old_texts)] = candidate.items(), promoted.items()
    write_json(folder / "evaluation.json", {"candidate": new, "promoted": old})
    rows = [
        {"prompt_id": name, "responses": {"candidate": text, "promoted": old_texts[name]}}
        for name, text in new_texts.items()
    ]
    write_jsonl(folder / "responses.jsonl", rows)
    return folder


def make_context(folder: Path, history: Sequence[Path] = (), round_: int = 3) -> NodeContext:
    roles = {f"history_{j}": path for j, path in enumerate(history, start=1)}
    models = {role: ModelInput(str(path), role, role) for role, path in reversed(roles.items())}
    config = Config(recipe="test", run="test", paths=Paths(runs="unused", store="unused"))
    node = Node(f"round-{round_:02d}/evaluate", "evaluate", round_, (), {})
    return NodeContext(config, node, Inputs(models, ()), NodeDir(folder), seed=1)


class Judges:
    """Scores by the length of a text, safety negated, plus the row's position times `drift`."""

    def __init__(self, *, drift: float = 0.0) -> None:
        self.drift = drift
        self.opened: list[str] = []
        self.scored: list[tuple[str, str]] = []
        self.rows: list[dict[str, Any]] = []

    def open(self, context: NodeContext, role: str) -> Any:
        self.opened.append(role)

        def scorer(prompts: Sequence[list[Message]], responses: Sequence[str]) -> torch.Tensor:
            asked = [prompt[-1]["content"] for prompt in prompts]
            self.scored += zip(asked, responses, strict=True)
            sign = -1 if role == "judge_safety" else 1
            lengths = torch.tensor([float(len(text)) for text in responses])
            return sign * lengths + self.drift * torch.arange(len(responses))

        return scorer

    def score(self, context: NodeContext, prompts: Sequence[Prompt], texts: Texts) -> Any:
        table = versions_table(prompts, texts)
        scores = {role: score_columns(self.open(context, role), table) for role in ROLES}
        self.rows = version_rows(table, scores)
        return version_means(table, scores, SETTINGS)


def test_texts_of_every_version_come_from_the_evaluations_in_round_order(tmp_path: Path) -> None:
    # v1 was refused: round 2 is against v0 again, whose first answers count.
    first = add_evaluation(
        tmp_path / "1",
        candidate={"v1": {"a": "one a", "b": "one b"}},
        promoted={"v0": {"a": "zero a", "b": "zero b"}},
    )
    second = add_evaluation(
        tmp_path / "2",
        candidate={"v2": {"a": "two a", "b": "two b"}},
        promoted={"v0": {"a": "later a", "b": "later b"}},
    )
    assert earlier_texts(make_context(tmp_path / "3", [first, second])) == {
        "v0": {"a": "zero a", "b": "zero b"},
        "v1": {"a": "one a", "b": "one b"},
        "v2": {"a": "two a", "b": "two b"},
    }


def test_round_ten_comes_after_round_nine(tmp_path: Path) -> None:
    history = [
        add_evaluation(
            tmp_path / str(j),
            candidate={f"v{j}": {"a": f"new {j}"}},
            promoted={"base" if j == 1 else "v0": {"a": f"old {j}"}},
        )
        for j in range(1, 11)
    ]
    found = earlier_texts(make_context(tmp_path / "11", history, round_=11))
    assert found["v0"] == {"a": "old 2"}
    assert found["v10"] == {"a": "new 10"}
    assert len(found) == 12


def test_the_first_round_has_no_history(tmp_path: Path) -> None:
    assert earlier_texts(make_context(tmp_path, round_=1)) == {}


def test_each_judge_is_read_on_the_prompts_of_its_axis(tmp_path: Path) -> None:
    prompts = [make_prompt("h1"), make_prompt("h2"), make_prompt("s1", is_safety=True)]
    texts = {
        "v10": {"h1": "xx", "h2": "xxxx", "s1": "x"},
        "v2": {"h1": "x", "h2": "x", "s1": "xxxxx"},
    }
    found = Judges().score(make_context(tmp_path), prompts, texts)
    assert list(found) == ["v2", "v10"]
    assert list(found["v2"]) == ["judge_helpfulness", "judge_safety"]
    helpful, safe = found["v10"]["judge_helpfulness"], found["v10"]["judge_safety"]
    assert (helpful["mean"], helpful["n"]) == (3.0, 2)
    assert (safe["mean"], safe["n"]) == (-1.0, 1)
    assert helpful["low"] <= 3.0 <= helpful["high"]
    assert found["v2"]["judge_helpfulness"]["mean"] == 1.0
    assert found["v2"]["judge_safety"]["mean"] == -5.0


def test_only_prompts_that_all_versions_answered_count(tmp_path: Path) -> None:
    prompts = [make_prompt("a"), make_prompt("new"), make_prompt("b")]
    texts = {
        "v0": {"a": "x", "b": "xx", "gone": "y"},
        "v1": {"a": "xxx", "new": "z" * 99, "b": "xxxx"},
    }
    judges = Judges()
    found = judges.score(make_context(tmp_path), prompts, texts)
    assert found["v0"]["judge_helpfulness"]["mean"] == 1.5
    assert found["v1"]["judge_helpfulness"]["mean"] == 3.5
    assert {asked for asked, _ in judges.scored} == {"ask a", "ask b"}


def test_no_common_prompt_gives_no_value(tmp_path: Path) -> None:
    texts = {"v0": {"a": "x"}, "v1": {"b": "x"}}
    found = Judges().score(make_context(tmp_path), [make_prompt("b")], texts)
    nothing = {"mean": None, "low": None, "high": None, "n": 0}
    assert found["v0"]["judge_helpfulness"] == found["v1"]["judge_safety"] == nothing


def test_equal_answers_get_equal_scores_although_batches_differ(tmp_path: Path) -> None:
    """The score depends on the row's position, as float rounding makes it."""
    prompts = [make_prompt(name, is_safety=name == "s") for name in ("a", "b", "s")]
    texts = {
        "v0": {"a": "same", "b": "same", "s": "s"},
        "v1": {"a": "same", "b": "other", "s": "s"},
        "v2": {"a": "same", "b": "same", "s": "s"},
    }
    judges = Judges(drift=1e-3)
    context = make_context(tmp_path)
    found = judges.score(context, prompts, texts)
    assert found["v0"] == found["v2"]
    assert found["v0"]["judge_safety"] == found["v1"]["judge_safety"]
    assert found["v0"]["judge_helpfulness"] != found["v1"]["judge_helpfulness"]
    of = {(row["version"], row["prompt_id"]): row["judge_helpfulness"] for row in judges.rows}
    assert of["v0", "a"] == of["v1", "a"] == of["v2", "a"]
    # The same text as answer to another prompt is scored by itself.
    assert of["v0", "a"] != of["v0", "b"]
    # Two judges, each with 4 distinct answers of 9.
    assert len(judges.scored) == 8


def test_rows_hold_every_version_on_every_prompt_under_both_judges(tmp_path: Path) -> None:
    prompts = [make_prompt("a"), make_prompt("s", is_safety=True), make_prompt("new")]
    texts = {"v1": {"a": "xxx", "s": "x", "new": "x"}, "v0": {"a": "x", "s": "xx"}}
    judges = Judges()
    judges.score(make_context(tmp_path), prompts, texts)
    assert judges.rows == [
        {
            "version": version,
            "prompt_id": name,
            "kind": kind,
            "judge_helpfulness": float(len(texts[version][name])),
            "judge_safety": -float(len(texts[version][name])),
        }
        for version in ("v0", "v1")
        for name, kind in (("a", "ordinary"), ("s", "safety"))
    ]
