from typing import Any

import micro_models as micro

from rlhf.data.records import Comparison
from rlhf.data.split import prompt_key
from rlhf.inference.comparisons import Sides, cap_by_prompt, encode, exchange, score_sides
from rlhf.inference.scoring import HfScorer
from rlhf.processes import Processes


def comparison(number: int, prompt: int, **changes: Any) -> Comparison:
    messages: Any = [{"role": "user", "content": f"question {prompt}"}]
    values = {"strength": "better", "axis": "safety", "source": "s", "batch_id": "b", **changes}
    return Comparison(f"{number}", messages, "fish", "the cat eats hay", **values)


def test_cap_keeps_whole_prompts_in_hash_order() -> None:
    rows = [comparison(i, i // 3) for i in range(12)]
    kept = cap_by_prompt(rows, 7)
    keys = sorted({prompt_key(row.prompt) for row in rows})
    assert {prompt_key(row.prompt) for row in kept} == set(keys[:2])
    assert len(kept) == 6


def test_cap_holds_per_axis_and_batch() -> None:
    rows = [comparison(i, i, axis="safety" if i % 2 else "helpfulness") for i in range(20)]
    rows += [comparison(20 + i, i, batch_id="c") for i in range(20)]
    kept = cap_by_prompt(rows, 4)
    assert len(kept) == 12


def test_one_prompt_is_kept_even_if_it_is_too_large() -> None:
    assert len(cap_by_prompt([comparison(i, 0) for i in range(5)], 2)) == 5


def test_a_larger_cap_keeps_the_same_rows_and_more() -> None:
    rows = [comparison(i, i) for i in range(30)]
    few, more = ({row.id for row in cap_by_prompt(rows, cap)} for cap in (5, 12))
    assert few < more
    assert cap_by_prompt(rows, None) == rows


def test_over_long_sides_are_left_out() -> None:
    rows = [comparison(0, 0), comparison(1, 0)]
    rows[1].rejected = "hay " * 50
    fitting = encode(rows, micro.tokenizer(), 30)
    assert [sides.comparison.id for sides in fitting] == ["0"]
    assert fitting[0].chosen_ids[-1] == micro.EOS


def test_exchange_moves_text_and_labels() -> None:
    row = comparison(0, 0, chosen_safe=True, rejected_safe=False)
    other = exchange(row)
    assert (other.chosen, other.rejected) == (row.rejected, row.chosen)
    assert (other.chosen_safe, other.rejected_safe) == (False, True)
    assert exchange(other) == row


def test_scores_reach_their_sides_over_several_chunks() -> None:
    scorer = HfScorer(micro.scorer(), micro.tokenizer(), max_length=64)
    lists = micro.token_lists(600)
    sides = [Sides(comparison(i, i), lists[i], lists[300 + i]) for i in range(300)]
    calls: list[tuple[int, int]] = []
    pairs = score_sides(
        scorer, sides, on_chunk=lambda *call: calls.append(call), processes=Processes()
    )
    assert calls == [(256, 300), (300, 300)]
    expected = scorer.score_ids(lists)
    for index in (0, 1, 255, 256, 299):
        assert abs(pairs[index].chosen_score - float(expected[index])) < 1e-5
        assert abs(pairs[index].rejected_score - float(expected[300 + index])) < 1e-5
        assert pairs[index].chosen_tokens == len(lists[index])
