"""FLOP counts: by hand, and against what torch counts in the real stages' passes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForSequenceClassification

from rlhf.algo import flops
from rlhf.algo.flops import Lengths, ModelSize, Pass, Work
from rlhf.config import Sampling
from rlhf.inference.generation import HfGenerator
from rlhf.models.actor_critic import Measure, pack_responses
from rlhf.toy.model import build_model, build_tokenizer
from rlhf.training.sft import labelled_logits

# No vocabulary and no attention: every model is N = 1,000 weights.
PLAIN = ModelSize(trunk=1000, head=0, embedding=0, num_layers=0, attention_width=0)
LENGTHS = Lengths(prompt=30.0, response=10.0)


def test_size_of_llama_2_7b_and_70b() -> None:
    small = flops.llama_size(
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_size=128,
        vocab_size=32000,
        is_tied=False,
    )
    # Per layer 4 x 4096^2 + 3 x 4096 x 11008 + 2 x 4096 = 202,383,360; 32 of them and a norm of
    # 4,096 are 6,476,271,616; two tables of 131,072,000 make the 6,738,415,616 of the model card.
    assert small.trunk == 6_476_271_616
    assert (small.head, small.embedding) == (131_072_000, 131_072_000)
    assert small.parameters == 6_738_415_616
    large = flops.llama_size(
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_size=128,
        vocab_size=32000,
        is_tied=False,
    )
    assert large.parameters == 68_976_648_192


def test_a_piece_of_work_by_hand() -> None:
    size = ModelSize(trunk=100, head=20, embedding=20, num_layers=2, attention_width=8)
    # 2 x (100 x 5 + 20 x 3) = 1,120; attention 4 x 2 x 8 x 5 x 6 = 1,920; training three times it.
    work = Work(Pass.train, tokens=5, logits=3, context=6, factor=flops.TRAIN_FACTOR)
    assert flops.work_flops(size, work) == 3 * (1120 + 1920)
    assert flops.work_flops(size, Work(Pass.forward, 5, 3, 6)) == 1120 + 1920


def test_training_costs_6_and_forward_2_per_weight_and_token() -> None:
    tuned = flops.fine_tune(7, LENGTHS, epochs=2, factor=flops.TRAIN_FACTOR)
    assert flops.work_flops(PLAIN, tuned) == 6 * 1000 * (7 * 2 * 40)
    assert flops.work_flops(PLAIN, flops.score(7, LENGTHS)) == 2 * 1000 * (7 * 40)
    # Both sides of 5 comparisons.
    ranked = flops.rank(5, LENGTHS, epochs=1, factor=flops.TRAIN_FACTOR)
    assert flops.work_flops(PLAIN, ranked) == 6 * 1000 * (2 * 5 * 40)
    # Frozen weights need no gradient of their own.
    adapter = flops.rank(5, LENGTHS, epochs=1, factor=flops.ADAPTER_FACTOR)
    assert flops.work_flops(PLAIN, adapter) == 4 * 1000 * (2 * 5 * 40)


def test_a_ppo_iteration_of_equal_models_costs_24_per_weight_and_token() -> None:
    works = flops.ppo_iteration(8, LENGTHS, epochs=1, factor=flops.TRAIN_FACTOR)
    tokens = 8 * 40
    assert flops.total_flops(PLAIN, works) == 24 * 1000 * tokens
    by_kind = {kind: sum(w.tokens * w.factor for w in works if w.kind is kind) for kind in Pass}
    # Sampling once; two scores, old and reference log-probabilities and values; policy and critic.
    assert by_kind == {Pass.generate: tokens, Pass.forward: 5 * tokens, Pass.train: 6 * tokens}


def test_what_changes_a_ppo_iteration() -> None:
    kinds = {"epochs": 1, "factor": flops.TRAIN_FACTOR}
    base = flops.total_flops(PLAIN, flops.ppo_iteration(8, LENGTHS, **kinds))
    unit = 1000 * 8 * 40
    warmup = flops.ppo_iteration(8, LENGTHS, **kinds, trains_policy=False)
    assert flops.total_flops(PLAIN, warmup) == base - 6 * unit
    start = flops.ppo_iteration(8, LENGTHS, **kinds, has_start=True)
    assert flops.total_flops(PLAIN, start) == base + 2 * unit
    twice = flops.ppo_iteration(8, LENGTHS, epochs=2, factor=flops.TRAIN_FACTOR)
    assert flops.total_flops(PLAIN, twice) == base + 12 * unit


def test_best_of_k_reads_each_prompt_once_to_sample_and_k_times_to_score() -> None:
    works = flops.best_of(6, LENGTHS, num_samples=4)
    # Sampling: 6 x (30 + 4 x 10); scores: 2 x 6 x 4 x 40.
    assert flops.total_flops(PLAIN, works) == 2 * 1000 * (6 * 70 + 2 * 6 * 4 * 40)


def test_attention_of_sampling_by_hand() -> None:
    # Prompt of 2: each attends to 2; two responses of 2 each attend to 2 + 2 / 2 = 3 on average.
    work = flops.sample(1, Lengths(2, 2), num_samples=2)
    assert work.tokens == 6
    assert work.tokens * work.context == 2 * 2 + 4 * 3
    assert work.logits == 4


def test_seconds_use_the_utilisation_of_each_kind() -> None:
    found = [(Pass.generate, 1e12), (Pass.forward, 2e12), (Pass.train, 6e12)]
    seconds = flops.expected_seconds(
        found, peak=1e12, training_utilisation=0.5, generation_utilisation=0.01
    )
    assert seconds == pytest.approx(100 + 4 + 12)


TOY = flops.llama_size(
    hidden_size=96,
    intermediate_size=192,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_size=24,
    vocab_size=506,
    is_tied=True,
)
PROMPT, RESPONSE, ROWS = 24, 8, 4
SAME = Lengths(PROMPT, RESPONSE)


def eager_model():
    """Torch counts no FLOPs in the processor's fused attention: write it out."""
    model = build_model(0)
    model.set_attn_implementation("eager")
    return model


def counted(work) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def packed():
    rows = [([5 + i] * PROMPT, [9 + i] * RESPONSE) for i in range(ROWS)]
    return pack_responses(rows, pad_id=0, device=torch.device("cpu"))


def test_our_size_is_that_of_the_toy_model() -> None:
    model = build_model(0)
    assert TOY.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert TOY.head == model.get_output_embeddings().weight.numel()


def test_torch_counts_as_many_flops_in_fine_tuning() -> None:
    model, batch = eager_model(), packed()
    positions_BT = (torch.arange(PROMPT + RESPONSE) >= PROMPT).expand_as(batch.input_ids_BL)

    def step() -> None:
        logits = labelled_logits(
            model,
            model.get_output_embeddings(),
            {"input_ids": batch.input_ids_BL, "attention_mask": batch.attention_mask_BL},
            positions=positions_BT,
        )
        logits.sum().backward()

    expected = flops.work_flops(
        TOY, flops.fine_tune(ROWS, SAME, epochs=1, factor=flops.TRAIN_FACTOR)
    )
    # What is left: norms count as weights with us, and the embedding's gradient is no product.
    assert counted(step) == pytest.approx(expected, rel=0.01)


def test_torch_counts_as_many_flops_in_scoring_and_log_probabilities() -> None:
    model, batch = eager_model(), packed()
    scorer = LlamaForSequenceClassification(_scorer_config(model))
    scorer.set_attn_implementation("eager")

    def score() -> None:
        with torch.no_grad():
            scorer(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL)

    def rate() -> None:
        Measure(1.0, 0).logprobs_and_entropies(
            model.base_model, model.get_output_embeddings(), batch
        )

    for work, expected in (
        (score, flops.score(ROWS, SAME)),
        (rate, flops.log_probabilities(ROWS, SAME)),
    ):
        assert counted(work) == pytest.approx(flops.work_flops(TOY, expected), rel=0.01)


def _scorer_config(model):
    config = model.config
    config.num_labels = 1
    return config


def test_torch_counts_as_many_flops_in_sampling() -> None:
    model, tokenizer = eager_model(), build_tokenizer()
    generator = HfGenerator(model, tokenizer, max_length=256)
    prompt = [{"role": "user", "content": "tell me about the red fox and what the fox eats today"}]
    responses = []

    def sample() -> None:
        found = generator.generate(
            [prompt] * ROWS,
            num_samples=4,
            sampling=Sampling(temperature=1.0, max_new_tokens=24, batch_size=64),
            keys=[str(i) for i in range(ROWS)],
        )
        responses.extend(response for row in found for response in row)

    measured = counted(sample)
    read = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    written = sum(len(response.token_ids) for response in responses) / len(responses)
    work = flops.sample(ROWS, Lengths(read, written), num_samples=4)
    # A random model seldom ends by itself, so that hardly a finished row is decoded further. Torch
    # counts attention over the whole cache; the last token of each response is not read again.
    assert measured == pytest.approx(flops.work_flops(TOY, work), rel=0.03)
