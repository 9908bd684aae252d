from pathlib import Path
from typing import Any

import micro_models as micro
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from rlhf.algo import head as head_module
from rlhf.algo.head import sum_token_logprobs
from rlhf.algo.masked import token_logprobs
from rlhf.config import Lora, Optimizer, Precision
from rlhf.data.chat import IGNORED, Encoded, encode_conversation
from rlhf.models import packing
from rlhf.training.sft import labelled_logits, labelled_logprob_sum


def plain_trl_loss(model: Any, rows: list[Encoded], folder: Path) -> float:
    """Return the loss that an unchanged SFTTrainer computes for the rows as one batch."""
    data = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            max_length=None,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=micro.tokenizer(),
    )
    return trainer.compute_loss(trainer.model, trainer.data_collator(data)).item()


def test_loss_equals_plain_trl(tmp_path: Path) -> None:
    rows = micro.conversations(8)
    expected = plain_trl_loss(micro.policy(), rows, tmp_path / "trl")
    directory = micro.train_sft(micro.policy(), rows, tmp_path / "ours")
    (row,) = micro.rows_without_time(directory.metrics)
    assert row["train/loss"] == pytest.approx(expected, abs=1e-5)


def test_loss_equals_a_loop_over_labelled_tokens(tmp_path: Path) -> None:
    """Slow second implementation: one row at a time, no padding, all logits."""
    rows, model = micro.conversations(5), micro.policy()
    total, count = 0.0, 0
    for row in rows:
        logprobs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(row.labels):
            if label != -100 and position > 0:
                total -= float(logprobs[position - 1, label])
                count += 1
    directory = micro.train_sft(model, rows, tmp_path, micro_batch_size=2)
    assert micro.rows_without_time(directory.metrics)[0]["train/loss"] == pytest.approx(
        total / count, abs=1e-5
    )


def test_head_sees_labelled_positions_only() -> None:
    model = micro.policy()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    positions = torch.tensor([[False, True, False, True], [True, False, False, False]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    few = labelled_logits(
        model,
        model.get_output_embeddings(),
        {"input_ids": ids, "attention_mask": mask},
        positions=positions,
    )
    every = model(input_ids=ids, attention_mask=mask).logits
    assert few.shape == (3, every.shape[-1])
    torch.testing.assert_close(few, every[positions])
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_give_the_loss_and_gradients_of_all_logits(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last block is smaller, and where the head is the embedding, too."""
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 2 * micro.VOCAB_SIZE)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    targets = torch.tensor([[6, 7, 8, IGNORED], [10, 1, IGNORED, IGNORED]])
    found = []
    for is_chunked in (False, True):
        model = micro.policy()
        if not tied:
            twin = torch.nn.Linear(32, micro.VOCAB_SIZE, bias=True)
            torch.nn.init.constant_(twin.bias, 0.1)
            torch.nn.init.orthogonal_(twin.weight, generator=torch.Generator().manual_seed(0))
            model.set_output_embeddings(twin)
        rows = {"input_ids": ids, "attention_mask": None}
        output = model.get_output_embeddings()
        if is_chunked:
            loss = labelled_logprob_sum(model, output, rows, targets=targets)
            assert "forward" not in output.__dict__
        else:
            kept = targets != IGNORED
            logits = labelled_logits(model, output, rows, positions=kept)
            loss = token_logprobs(logits, targets[kept]).sum()
        (loss / 5).backward()
        named = {name: p.grad for name, p in model.named_parameters()}
        found.append({"loss": loss.detach(), **named})
    assert all(grad.abs().max() > 0 for grad in found[0].values())
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_of_the_block_wise_sum_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 2 * 7)
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((5, 4), (7, 4), (7,))
    )
    tokens = torch.tensor([0, 6, 3, 3, 1])

    def total(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return sum_token_logprobs(states, weight, tokens, bias_V=bias)

    assert torch.autograd.gradcheck(total, (states, weight, bias))
    plain = token_logprobs(torch.nn.functional.linear(states, weight, bias), tokens).sum()
    torch.testing.assert_close(total(states, weight, bias), plain)


def test_rows_of_different_length_do_not_pad_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One packed pass, and one pass per length, train what one rectangle trains."""
    rows, trained, positions = micro.conversations(6), [], []
    for pass_tokens, packs in ((10**9, False), (-1, False), (-1, True)):
        monkeypatch.setitem(packing.PASS_TOKENS, "cpu", pass_tokens)
        monkeypatch.setattr(packing, "can_pack", lambda model, packs=packs: packs)
        monkeypatch.setattr(packing, "GROUP_TOKENS", 0)
        seen: list[int] = []
        model = micro.policy(dtype=torch.float64)
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs, seen=seen: seen.append(kwargs["input_ids"].numel()),
            with_kwargs=True,
        )
        micro.train_sft(model, rows, tmp_path / str(len(trained)), micro_batch_size=8)
        trained.append(model.state_dict())
        positions.append(seen)
    assert len(positions[2]) == len(positions[0]) < len(positions[1])
    tokens = sum(len(row.input_ids) for row in rows)
    assert sum(positions[2]) == sum(positions[1]) == tokens < sum(positions[0])
    for name, value in trained[0].items():
        for other in trained[1:]:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_micro_batching_changes_nothing(tmp_path: Path, dtype: torch.dtype, bound: float) -> None:
    """Three steps over 22 rows: the last batch holds 6, in micro-batches of 8, 1 and 5 + 1."""
    rows, trained, losses = micro.conversations(22), [], []
    for size in (8, 1, 5):
        model = micro.policy(dtype=dtype)
        directory = micro.train_sft(model, rows, tmp_path / str(size), micro_batch_size=size)
        trained.append(micro.weights(model))
        losses.append([row["train/loss"] for row in micro.rows_without_time(directory.metrics)])
    assert len(losses[0]) == 3
    start = micro.weights(micro.policy(dtype=dtype))
    assert micro.largest_difference(trained[0], start) > 1e-4
    for other in (1, 2):
        assert micro.largest_difference(trained[0], trained[other]) < bound
        assert losses[0] == pytest.approx(losses[other], abs=max(bound, 1e-6))


def test_prompt_tokens_are_not_trained(tmp_path: Path) -> None:
    """Rows that differ only in labels outside the answer give the same weights."""
    rows = micro.conversations(8)
    unanswered = Encoded([5, 6, 7, 8], [-100] * 4)
    trained = []
    for name, data in (("a", rows), ("b", [*rows, unanswered])):
        model = micro.policy()
        micro.train_sft(model, data, tmp_path / name, batch_size=16, micro_batch_size=16)
        trained.append(micro.weights(model))
    assert micro.largest_difference(*trained) < 1e-6


def test_a_step_without_any_label_is_harmless(tmp_path: Path) -> None:
    rows = [Encoded([5, 6, 7], [-100] * 3)]
    directory = micro.train_sft(micro.policy(), rows, tmp_path)
    assert micro.rows_without_time(directory.metrics)[0]["train/loss"] == 0.0


def test_learns_a_fixed_answer_with_its_eos(tmp_path: Path) -> None:
    tokenizer, model = micro.tokenizer(), micro.policy()
    questions = ["the cat eats", "the dog eats", "the cow eats", "the hen eats"]
    rows = [
        encode_conversation(
            tokenizer,
            [{"role": "user", "content": q}, {"role": "assistant", "content": "is 3"}],
        )
        for q in questions
    ]
    micro.train_sft(model, rows * 4, tmp_path, epochs=30, optimizer=Optimizer(lr=1e-2))
    row = rows[0]
    predicted = model(torch.tensor([row.input_ids])).logits[0].argmax(-1)
    for position, label in enumerate(row.labels):
        if label != -100:
            assert int(predicted[position - 1]) == label
    assert row.labels[-1] == tokenizer.eos_token_id


def test_lora_trains_an_adapter_and_leaves_a_plain_merged_model(tmp_path: Path) -> None:
    settings = micro.config()
    settings.model.lora = Lora(enabled=True, rank=4)
    model = micro.policy()
    before = micro.weights(model)
    directory = micro.train_sft(model, micro.conversations(16), tmp_path, config=settings)
    after = micro.weights(model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    assert (directory.path / "adapter" / "adapter_model.safetensors").is_file()


def test_bf16_keeps_fp32_master_weights(tmp_path: Path) -> None:
    settings = micro.config()
    settings.model.precision = Precision.bf16
    model = micro.policy()
    full = micro.train_sft(micro.policy(), micro.conversations(8), tmp_path / "fp32")
    half = micro.train_sft(model, micro.conversations(8), tmp_path / "bf16", config=settings)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact, rounded = (micro.rows_without_time(d.metrics)[0]["train/loss"] for d in (full, half))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-2)


def test_no_forward_of_the_trainer_stays_on_the_model(tmp_path: Path) -> None:
    model = micro.policy()
    micro.train_sft(model, micro.conversations(4), tmp_path)
    assert "forward" not in vars(model)
    assert not model.training
