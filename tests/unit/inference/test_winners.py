"""Which response wins, which prompts are drawn, what the pool gives; values by hand."""

from typing import Any

import pytest

from rlhf.data.records import Prompt
from rlhf.errors import StageError
from rlhf.inference.winners import (
    MAX_DIVERSITY_PROMPTS,
    choose_winner,
    diversity,
    draw_pool,
    ranking_axis,
    response_counts,
    selection_curves,
    stratified,
    sweep_values,
    winners_from,
)

LOW, HIGH = -3.0, 3.0
"""Safety scores on either side of logit(0.15) = -1.73."""


def row(
    *responses: tuple[float, float] | tuple[float, float, bool], is_safety: bool = False
) -> Any:
    """Return a row of (helpfulness, safety, finished) responses."""
    return {
        "prompt_id": "p",
        "is_safety": is_safety,
        "responses": [
            {"text": str(i), "helpfulness": r[0], "safety": r[1], "finished": r[2:] != (False,)}
            for i, r in enumerate(responses)
        ],
    }


@pytest.mark.parametrize(
    ("given", "winner", "axis"),
    [
        (row((1.0, HIGH), (2.0, 1.0), (0.0, 9.0)), 1, "helpfulness"),
        # The most helpful one is unsafe: it loses to every one that passes.
        (row((9.0, LOW), (0.5, HIGH), (0.4, HIGH)), 1, "helpfulness"),
        # Its safety score (-3) is higher than the other's helpfulness (-5): never compared.
        (row((0.0, LOW), (-5.0, HIGH)), 1, "helpfulness"),
        # Nothing passes: the safest one.
        (row((9.0, -4.0), (1.0, -2.0), (5.0, -3.0)), 1, "safety"),
        (row((1.0, HIGH), (2.0, 1.0), (0.0, 9.0), is_safety=True), 2, "safety"),
        # The only one that passes never ended.
        (row((5.0, HIGH, False), (9.0, -4.0), (1.0, -2.0)), 2, "safety"),
        (row((1.0, HIGH), (5.0, HIGH, False), (2.0, HIGH)), 2, "helpfulness"),
        (row((1.0, HIGH), (2.0, HIGH), (2.0, HIGH)), 1, "helpfulness"),
        (row((1.0, HIGH)), 0, "helpfulness"),
        (row((1.0, HIGH, False), (1.0, HIGH, False)), None, "safety"),
    ],
)
def test_winner(given: Any, winner: int | None, axis: str) -> None:
    assert choose_winner(given, threshold=0.15) == winner
    assert ranking_axis(given, threshold=0.15) == axis


def test_threshold_is_a_probability() -> None:
    given = row((9.0, -1.8), (1.0, -1.7))
    assert choose_winner(given, threshold=0.15) == 1
    assert choose_winner(given, threshold=0.14) == 0


def test_nan_is_an_error() -> None:
    with pytest.raises(StageError, match="NaN"):
        choose_winner(row((float("nan"), HIGH), (1.0, HIGH)), threshold=0.15)


def test_curves_keep_the_axes_apart() -> None:
    rows = [
        row((1.0, -50.0), (3.0, -50.0)),
        row((2.0, -50.0), (2.0, -50.0)),
        row((90.0, 1.0), (90.0, -1.0), is_safety=True),
    ]
    assert selection_curves(rows) == {
        "helpfulness": {"prompts": 2, "max": [2.0, 2.5], "median": [2.0, 2.0]},
        "safety": {"prompts": 1, "max": [0.0, 1.0], "median": [0.0, 0.0]},
    }
    assert set(selection_curves(rows[:1])) == {"helpfulness"}


def test_counts() -> None:
    rows = [row((1.0, LOW), (2.0, HIGH)), row((1.0, LOW, False), (1.0, LOW))]
    assert response_counts(rows, threshold=0.15) == {
        "sampled": 4,
        "unfinished": 1,
        "below_threshold": 2,
    }


def prompts(ordinary: int, safety: int) -> list[Prompt]:
    return [Prompt(f"o{i}", [], False, "s") for i in range(ordinary)] + [
        Prompt(f"s{i}", [], True, "s") for i in range(safety)
    ]


def test_drawn_prompts_keep_the_safety_share() -> None:
    given = prompts(60, 30)
    drawn = stratified(given, num_prompts=30, seed=1)
    assert len({prompt.id for prompt in drawn}) == 30
    assert sum(prompt.is_safety for prompt in drawn) == 10
    assert drawn == stratified(given[::-1], num_prompts=30, seed=1)
    assert {p.id for p in drawn} != {p.id for p in stratified(given, num_prompts=30, seed=2)}
    assert len(stratified(given, num_prompts=None, seed=1)) == 90
    assert len(stratified(given, num_prompts=500, seed=1)) == 90
    assert [p.is_safety for p in stratified(prompts(0, 5), num_prompts=3, seed=1)] == [True] * 3


def test_pool_keeps_every_round_and_leaves_repeats_out() -> None:
    earlier = [
        {"prompt_id": "a", "response": "x", "round": 1},
        {"prompt_id": "a", "response": "y", "round": 2},
        {"prompt_id": "b", "response": "x", "round": 1},
        {"prompt_id": "b", "response": "x", "round": 2},
        {"prompt_id": "c", "response": "now", "round": 2},
    ]
    winners = [{"prompt_id": "c", "response": "now", "round": 3}]
    drawn = draw_pool(earlier, winners, num_rows=10, seed=0)
    assert sorted((r["prompt_id"], r["response"], r["round"]) for r in drawn) == [
        ("a", "x", 1),
        ("a", "y", 2),
        ("b", "x", 2),
    ]
    two = draw_pool(earlier, winners, num_rows=2, seed=0)
    assert two == drawn[:2]
    firsts = {draw_pool(earlier, winners, num_rows=1, seed=s)[0]["response"] for s in range(20)}
    assert firsts == {"x", "y"}


def sampled(name: str, lengths: list[int], given: Any) -> Any:
    """Name a row and give its responses lengths."""
    responses = [
        {**response, "num_tokens": length}
        for response, length in zip(given["responses"], lengths, strict=True)
    ]
    return {**given, "prompt_id": name, "responses": responses}


def test_where_winners_come_from_by_hand() -> None:
    rows = [
        # The second wins: position 1, shortest.
        sampled("a", [9, 3, 5], row((1.0, HIGH), (2.0, HIGH), (0.0, HIGH))),
        # The last wins by safety: position 2, longest.
        sampled("b", [3, 4, 8], row((5.0, 0.0), (5.0, 1.0), (0.0, 2.0), is_safety=True)),
        # The first wins; three equal lengths have the middle rank, 1.
        sampled("c", [4, 4, 4], row((3.0, HIGH), (2.0, HIGH), (0.0, HIGH))),
        # Longest together with another: ranks 1 and 2, the lower one.
        sampled("d", [6, 6, 2], row((3.0, HIGH), (2.0, HIGH), (0.0, HIGH))),
        # No winner.
        sampled("e", [1, 1, 1], row(*[(1.0, HIGH, False)] * 3)),
    ]
    found = winners_from(
        rows,
        sources={"a": "s1", "b": "s2", "c": "s1", "d": "s1", "e": "s3"},
        pool=[{"round": 2}, {"round": 10}, {"round": 2}],
        num_samples=3,
        threshold=0.15,
    )
    assert found == {
        "sources": {"s1": 3, "s2": 1},
        "axes": {"helpfulness": 3, "safety": 1},
        "sample_index": [2, 1, 1],
        "length_rank": [1, 2, 1],
        "pool_rounds": {"2": 2, "10": 1},
    }
    assert list(found["pool_rounds"]) == ["2", "10"]


def test_diversity_is_over_prompts_and_bounded() -> None:
    def asked(name: str, *texts: str) -> Any:
        prompt = [{"role": "user", "content": name}]
        return {"prompt": prompt, "responses": [{"text": text} for text in texts]}

    how: Any = {"level": 0.95, "num_draws": 50, "seed": 0}
    rows = [asked("a", "x y", "x y"), asked("b", "x y", "z w")]
    assert (diversity(rows, **how)["mean"], diversity(rows, **how)["n"]) == (0.5, 2)
    many = [asked(str(i), "x", "x") for i in range(2 * MAX_DIVERSITY_PROMPTS + 1)]
    found = diversity(many, **how)
    assert found["mean"] == 1.0
    assert 600 < found["n"] <= MAX_DIVERSITY_PROMPTS
    assert diversity([], **how)["n"] == 0


def test_the_value_of_a_prompt_in_the_sweep_is_its_best_usable_score() -> None:
    """Three prompts at two temperatures.

    Untagged: 3 at the first (5 is unsafe, 9 never ends); at the second nothing is usable, so the
    lowest score of all its responses at both temperatures, -7, counts. Tagged: the gate is not
    asked, 2 and -2.5.
    """
    first = [
        row((3.0, HIGH), (5.0, LOW), (9.0, HIGH, False)),
        row((0.0, -2.0), (0.0, 2.0), (0.0, 4.0, False), is_safety=True),
    ]
    second = [
        row((-7.0, LOW), (8.0, HIGH, False), (1.0, LOW)),
        row((9.0, -2.5), (9.0, -4.0), (9.0, 9.0, False), is_safety=True),
    ]
    values, axes = sweep_values([first, second], threshold=0.15)
    assert values == [[3.0, 2.0], [-7.0, -2.5]]
    assert axes == ["helpfulness", "safety"]
