"""FLOPs of rounds and the time that limits allow."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import rows_needed, sizes_of
from benchmarks.contenders.roof import shapes
from benchmarks.limits import Demand, Roof, demand
from benchmarks.workload import Work
from rlhf.algo.flops import ModelSize

SIZE = ModelSize(trunk=100, head=20, embedding=0, num_layers=0, attention_width=0)
WORK = Work(
    prompts=[],
    prompt_ids=[[1, 2], [1, 2, 3, 4]],
    chats=[{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}] * 2,
    measured_chats=[],
    pairs=[{"chosen_ids": [1, 2, 3], "rejected_ids": [1], "margin": 0.0}] * 2,
    measured_pairs=[],
    text="",
)


def needed(suite: str, units: float, **sizes: float) -> Demand:
    found = demand(suite, SIZE, WORK, sizes=sizes, precision="fp32", facts={}, units=units)
    assert found is not None
    return found


def test_the_slower_limit_counts() -> None:
    roof = Roof(gemm_flops=10.0, read_bytes=5.0)
    assert Demand(100.0, 20.0).seconds(roof) == 10.0
    assert Demand(100.0, 60.0).seconds(roof) == 12.0


def test_fine_tuning_reads_all_tokens_and_has_logits_at_labels() -> None:
    # Two rows of 4 tokens, 2 labels each: 3 x 2 x (100 x 8 + 20 x 4).
    assert needed("sft", 4, steps=1, batch_size=2).flops == 6 * (800 + 80)


def test_ranking_has_no_logits() -> None:
    assert needed("reward", 2, steps=1, batch_size=2).flops == 6 * 100 * 8


def test_generation_reads_prompts_once_and_the_weights_for_every_token() -> None:
    # Prompts of 2 and 4 tokens; 2 samples of each, 12 tokens in all.
    found = needed("generation", 12, prompts=2, samples=2, new_tokens=5)
    assert found.flops == 2 * (100 * (6 + 12) + 20 * 12)
    assert found.weight_bytes == 5 * 4 * 120


def test_commands_have_no_flops() -> None:
    assert demand("startup", SIZE, WORK, sizes={}, precision="fp32", facts={}, units=1) is None


def test_shapes_are_those_of_a_llama() -> None:
    config = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    found = [(8, 8), (4, 8), (4, 8), (8, 8), (16, 8), (16, 8), (8, 16), (50, 8)]
    assert shapes(config) == found


def test_sizes_can_be_changed_and_must_exist() -> None:
    assert sizes_of(["sft.steps=9", "sft.lr=0.5"])["sft"]["steps"] == 9
    with pytest.raises(SystemExit, match=r"there is no sft\.step"):
        sizes_of(["sft.step=9"])


def test_there_are_rows_for_the_loss_that_is_compared() -> None:
    sizes = sizes_of(["sft.steps=4", "sft.check_steps=50", "sft.batch_size=8"])
    assert rows_needed(sizes)["chats"] == 400
