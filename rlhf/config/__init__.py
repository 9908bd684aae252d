"""The whole configuration as dataclasses: one field, one default, one sentence.

Every leaf is declared with `result` (it can change what a node produces, so it is part of the
node's fingerprint) or `execution` (where and how fast it runs). Values marked [paper] are stated in
"Llama 2: Open Foundation and Fine-Tuned Chat Models"; the others are ours, because the paper is
silent.
"""

from rlhf.config.base import (
    Annotators,
    CriticInit,
    Data,
    JudgeData,
    KlEstimator,
    Lora,
    Margin,
    Model,
    OnBadRow,
    OnChange,
    Optimizer,
    Paths,
    Precision,
    Reference,
    RejectionInit,
    RoundStage,
    Toy,
    TrackingMode,
    leaves,
)
from rlhf.config.run import Checkpoint, Compute, Config, Ingest, Rounds, Tracking
from rlhf.config.stages import (
    Collect,
    Evaluate,
    Gate,
    Judge,
    Ppo,
    PromotionRule,
    Rejection,
    Reward,
    RewardInit,
    Sampling,
    Sft,
)

__all__ = [
    "Annotators",
    "Checkpoint",
    "Collect",
    "Compute",
    "Config",
    "CriticInit",
    "Data",
    "Evaluate",
    "Gate",
    "Ingest",
    "Judge",
    "JudgeData",
    "KlEstimator",
    "Lora",
    "Margin",
    "Model",
    "OnBadRow",
    "OnChange",
    "Optimizer",
    "Paths",
    "Ppo",
    "Precision",
    "PromotionRule",
    "Reference",
    "Rejection",
    "RejectionInit",
    "Reward",
    "RewardInit",
    "RoundStage",
    "Rounds",
    "Sampling",
    "Sft",
    "Toy",
    "Tracking",
    "TrackingMode",
    "leaves",
]
