"""Tables of responses: who is opened when, what is scored together, and what a kill repeats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.artifacts import NodeDir
from rlhf.config import Config
from rlhf.data.records import Message, Prompt
from rlhf.errors import StageError
from rlhf.inference.tables import Table, score_columns, score_tables
from rlhf.nodes import Inputs, Node, NodeContext

WANTED = {"judge": ["answers", "extra"], "used": ["answers"]}


def prompts(*names: str) -> list[Prompt]:
    return [Prompt(name, [{"role": "user", "content": name}], False, "t") for name in names]


TABLES = {
    "answers": Table(prompts("p", "q"), {"new": ["aa", "b"], "old": ["aa", "cccc"]}),
    "extra": Table(prompts("r"), {"0": ["ddd"], "5": ["dd"]}),
}


class Scorers:
    """Score by role, row and text; remember the calls."""

    def __init__(self, score: Callable[[str, str], float] | None = None) -> None:
        self.score = score or (lambda role, text: float(len(text)))
        self.opened: list[str] = []
        self.calls: list[list[str]] = []

    def open(self, context: NodeContext, role: str) -> Any:
        self.opened.append(role)

        def scorer(asked: Sequence[list[Message]], texts: Sequence[str]) -> torch.Tensor:
            assert len(asked) == len(texts)
            self.calls.append(list(texts))
            return torch.tensor([self.score(role, text) for text in texts])

        return scorer

    def run(self, folder: Path, steps: list[tuple[int, int]] | None = None) -> Any:
        directory = NodeDir(folder)
        if steps is not None:
            directory._on_step = lambda step, total: steps.append((step, total))
        node = Node("n", "evaluate", 1, (), {})
        context = NodeContext(Config(recipe="t"), node, Inputs({}, ()), directory, seed=0)
        return score_tables(context, TABLES, WANTED, open_scorer=self.open, done=7)


def test_every_model_is_opened_once_and_tables_are_scored_apart(tmp_path: Path) -> None:
    scorers, steps = Scorers(), []
    found = scorers.run(tmp_path, steps)
    assert scorers.opened == ["judge", "used"]
    # `aa` answers p twice and is scored once; the extra table has a call of its own.
    assert scorers.calls == [["aa", "b", "cccc"], ["ddd", "dd"], ["aa", "b", "cccc"]]
    assert found == {
        "judge": {
            "answers": {"new": [2.0, 1.0], "old": [2.0, 4.0]},
            "extra": {"0": [3.0], "5": [2.0]},
        },
        "used": {"answers": {"new": [2.0, 1.0], "old": [2.0, 4.0]}},
    }
    assert steps == [(8, 9), (9, 9)]


@pytest.mark.parametrize("left", [(), ("judge",), ("used",)])
def test_a_resumed_node_opens_only_models_without_scores(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    straight = Scorers().run(tmp_path)
    for role in left:
        (tmp_path / "shards" / f"scores-{role}.jsonl").unlink()
    resumed = Scorers()
    assert resumed.run(tmp_path) == straight
    assert tuple(resumed.opened) == left


@pytest.mark.parametrize("text", ["cccc", "dd"])
def test_a_score_that_is_no_number_is_named_and_never_kept(tmp_path: Path, text: str) -> None:
    """In the first table and in the second: earlier versions are checked like the new one."""
    broken = Scorers(lambda role, found: math.inf if found == text else 1.0)
    where = {"cccc": r"1 of 2 responses \(answers, old\)", "dd": r"1 of 1 responses \(extra, 5\)"}
    with pytest.raises(StageError, match=f"judge gave a score that is not finite to {where[text]}"):
        broken.run(tmp_path)
    assert not list(tmp_path.glob("shards/*"))


def test_no_prompts_need_no_call() -> None:
    def scorer(asked: Sequence[list[Message]], texts: Sequence[str]) -> torch.Tensor:
        raise AssertionError("there is nothing to score")

    assert score_columns(scorer, Table([], {"v0": [], "v1": []})) == {"v0": [], "v1": []}
