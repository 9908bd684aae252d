"""Reward-model training: the ranking loss with a margin, and the safety auxiliary loss.

Deviation from the paper: it names a safety auxiliary loss without printing its formula; ours is the
cross-entropy of algo.losses on the safety labels (Table 29 shows what such a loss is for).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from rlhf import metrics
from rlhf.algo.losses import ranking_loss, safety_auxiliary_loss
from rlhf.artifacts import NodeDir
from rlhf.config import Config, Optimizer
from rlhf.data.collate import length_grouped_order, pad_right
from rlhf.models.packing import scores_of
from rlhf.training.steps import Micro, Steps
from rlhf.training.trainer import StepTrainer, arguments, train_in_place

UNLABELLED = -1
"""Safety label of a response that nobody labelled; 1 is safe, 0 unsafe."""


@dataclass(frozen=True, slots=True)
class RankedPair:
    """An encoded comparison: two token lists that end in EOS, and the margin between them."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None


class RankingTrainer(StepTrainer, RewardTrainer):
    """TRL's RewardTrainer with a margin on every row and the safety auxiliary loss.

    The ranking loss is divided by the pairs of the optimizer step, the auxiliary loss by its
    labelled responses.
    """

    def __init__(self, *args: Any, safety_loss_weight: float, **kwargs: Any):
        self._safety_loss_weight = safety_loss_weight
        super().__init__(*args, **kwargs)

    def collate(self, rows: list[dict[str, Any]]) -> Micro:
        """Stack the chosen sides [B] on the rejected sides [B], padded on the right."""
        sides = ("chosen", "rejected")
        input_ids = [row[f"{side}_ids"] for side in sides for row in rows]
        safe = [row[f"{side}_safe"] for side in sides for row in rows]
        return {
            "input_ids": pad_right(input_ids, self.processing_class.pad_token_id),
            "attention_mask": pad_right([[1] * len(ids) for ids in input_ids], 0),
            "margins": torch.tensor([row["margin"] for row in rows], dtype=torch.float32),
            "safe": torch.tensor(safe),
        }

    def length(self, row: dict[str, Any]) -> int:
        """Return the tokens of the longer side."""
        return max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    def counts(self, micros: list[Micro]) -> Mapping[str, int]:
        """Count pairs, and responses with a safety label."""
        return {
            "pairs": sum(len(m["margins"]) for m in micros),
            "labelled": sum(int((m["safe"] != UNLABELLED).sum()) for m in micros),
        }

    def micro_loss(self, model: nn.Module, inputs: Micro, counts: Mapping[str, int]) -> Tensor:
        """Sum the ranking losses over the pair count; add the weighted auxiliary loss."""
        scores_2B = scores_of(
            self.model, inputs["input_ids"], inputs["attention_mask"], wrapped=model
        )
        chosen_B, rejected_B = scores_2B.chunk(2)
        num_pairs = counts["pairs"]
        loss = ranking_loss(chosen_B, rejected_B, inputs["margins"]).sum() / num_pairs
        gaps_B = (chosen_B - rejected_B).detach()
        wins_B = (gaps_B > 0).float() + 0.5 * (gaps_B == 0).float()
        self.add(metrics.REWARD_ACCURACY, wins_B.sum() / num_pairs)
        self.add(metrics.REWARD_GAP, gaps_B.sum() / num_pairs)
        if self._safety_loss_weight == 0 or counts["labelled"] == 0:
            return loss
        safe_2B = inputs["safe"]
        safety_sum, _ = safety_auxiliary_loss(scores_2B, safe_2B, safe_2B != UNLABELLED)
        safety_loss = safety_sum / counts["labelled"]
        self.add(metrics.TRAIN_SAFETY_LOSS, safety_loss)
        return loss + self._safety_loss_weight * safety_loss


def train_ranking(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[RankedPair],
    *,
    optimizer: Optimizer,
    epochs: int,
    batch_size: int,
    micro_batch_size: int,
    safety_loss_weight: float,
    config: Config,
    directory: NodeDir,
    seed: int,
) -> None:
    """Train a scorer in place on encoded pairs, resuming from the directory's checkpoint.

    `safety_loss_weight` 0 turns the auxiliary loss off. Batches group pairs by their longer side,
    in an order that depends on the seed and the lengths alone. Writes metrics.jsonl and
    checkpoints; with LoRA also adapter/.
    """
    lengths = [max(len(row.chosen_ids), len(row.rejected_ids)) for row in rows]
    steps = Steps(
        order=length_grouped_order(lengths, batch_size=batch_size, epochs=epochs, seed=seed),
        micro_batch_size=micro_batch_size,
        optimizer=optimizer,
    )
    dataset = Dataset.from_dict(
        {
            "chosen_ids": [row.chosen_ids for row in rows],
            "rejected_ids": [row.rejected_ids for row in rows],
            "margin": [row.margin for row in rows],
            "chosen_safe": [_label(row.chosen_safe) for row in rows],
            "rejected_safe": [_label(row.rejected_safe) for row in rows],
        }
    )
    settings = RewardConfig(
        **arguments(config=config, steps=steps, directory=directory, seed=seed),
        disable_dropout=True,
        center_rewards_coefficient=None,
    )

    def build(trained: Any) -> RankingTrainer:
        return RankingTrainer(
            model=trained,
            args=settings,
            train_dataset=dataset,
            processing_class=tokenizer,
            steps=steps,
            directory=directory,
            config=config,
            safety_loss_weight=safety_loss_weight,
        )

    train_in_place(model, build, config=config, directory=directory, task_type="SEQ_CLS", seed=seed)


def _label(safe: bool | None) -> int:
    return UNLABELLED if safe is None else int(safe)
