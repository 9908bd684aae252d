"""Supervised fine-tuning: the loss falls on answer tokens only (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rlhf.algo.head import sum_token_logprobs
from rlhf.algo.masked import token_logprobs
from rlhf.artifacts import NodeDir
from rlhf.config import Config, Optimizer
from rlhf.data.chat import IGNORED, Encoded
from rlhf.data.collate import length_grouped_order, pad_right
from rlhf.models.heads import has_plain_head
from rlhf.models.packing import arrange
from rlhf.training.steps import Micro, Steps
from rlhf.training.trainer import StepTrainer, arguments, train_in_place


class AnswerTrainer(StepTrainer, SFTTrainer):
    """TRL's SFTTrainer with the language-model head applied to labelled positions only, in blocks.

    The loss is the one of plain TRL: the mean negative log-probability over all labelled tokens of
    the optimizer step. Head and softmax are most of a small model's cost, and most positions of a
    conversation carry no label.
    """

    def collate(self, rows: list[dict[str, Any]]) -> Micro:
        """Pad on the right; `labels` are not shifted yet."""
        input_ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": pad_right(input_ids, self._pad_token_id),
            "attention_mask": pad_right([[1] * len(ids) for ids in input_ids], 0),
            "labels": pad_right([row["labels"] for row in rows], IGNORED),
        }

    def length(self, row: dict[str, Any]) -> int:
        """Return the tokens of a conversation."""
        return len(row["input_ids"])

    def counts(self, micros: list[Micro]) -> Mapping[str, int]:
        """Count the labels that have a token before them."""
        return {"labels": sum(int((m["labels"][:, 1:] != IGNORED).sum()) for m in micros)}

    def micro_loss(self, model: nn.Module, inputs: Micro, counts: Mapping[str, int]) -> Tensor:
        """Sum the negative log-probabilities of the labels, over the step's label count."""
        targets_BT = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        mask_BT, head = inputs["attention_mask"], self.model.get_output_embeddings()
        rows = arrange(self.model, inputs["input_ids"], mask_BT)
        targets = rows.like_tokens(targets_BT, mask_BT.bool(), fill=IGNORED)
        if self._engine is None and has_plain_head(self.model):
            logprob_sum = labelled_logprob_sum(model, head, rows.inputs, targets=targets)
        else:
            is_labelled = targets != IGNORED
            logits_NV = labelled_logits(model, head, rows.inputs, positions=is_labelled)
            logprob_sum = token_logprobs(logits_NV, targets[is_labelled]).sum()
        return -logprob_sum / max(counts["labels"], 1)

    @property
    def _pad_token_id(self) -> int:
        found: int = self.processing_class.pad_token_id
        return found


def labelled_logits(
    model: Any, head: nn.Module, inputs: Mapping[str, Any], *, positions: Tensor
) -> Tensor:
    """Return the logits [N, V] of the N True positions only, of a mask shaped like the tokens.

    `head` is the output layer inside `model`; it sees nothing but those positions.
    """

    def select(_module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (states[0][positions],)

    handle = head.register_forward_pre_hook(select)
    try:
        output = model(**inputs, use_cache=False)
    finally:
        handle.remove()
    logits_NV: Tensor = output.logits
    return logits_NV


def labelled_logprob_sum(
    model: Any, head: Any, inputs: Mapping[str, Any], *, targets: Tensor
) -> Tensor:
    """Return the sum of log-probabilities of all targets but IGNORED, a scalar.

    `targets` are shaped like the tokens: what each of them is followed by.
    `head` is the output layer inside `model`; for this pass it gives the sum instead of logits,
    which so never exist all at once. The model must return what its head gives.
    """
    is_labelled = targets != IGNORED

    def forward(states: Tensor) -> Tensor:
        return sum_token_logprobs(
            states[is_labelled], head.weight, targets[is_labelled], bias_V=head.bias
        )

    head.forward = forward
    try:
        output = model(**inputs, use_cache=False)
    finally:
        del head.forward
    logprob_sum: Tensor = output.logits
    return logprob_sum


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Encoded],
    *,
    optimizer: Optimizer,
    epochs: int,
    batch_size: int,
    micro_batch_size: int,
    config: Config,
    directory: NodeDir,
    seed: int,
) -> None:
    """Train `model` in place on encoded conversations, resuming from the directory's checkpoint.

    Rows of similar length share a batch, in an order that depends on the seed and the lengths
    alone. Writes metrics.jsonl and checkpoints; with LoRA also adapter/.
    """
    lengths = [len(row.input_ids) for row in rows]
    steps = Steps(
        order=length_grouped_order(lengths, batch_size=batch_size, epochs=epochs, seed=seed),
        micro_batch_size=micro_batch_size,
        optimizer=optimizer,
    )
    dataset = Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    )
    settings = SFTConfig(
        **arguments(config=config, steps=steps, directory=directory, seed=seed),
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        padding_free=False,
        completion_only_loss=False,
        assistant_only_loss=False,
    )

    def build(trained: Any) -> AnswerTrainer:
        return AnswerTrainer(
            model=trained,
            args=settings,
            train_dataset=dataset,
            processing_class=tokenizer,
            steps=steps,
            directory=directory,
            config=config,
        )

    train_in_place(
        model, build, config=config, directory=directory, task_type="CAUSAL_LM", seed=seed
    )
