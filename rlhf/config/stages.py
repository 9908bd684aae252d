"""Configuration of the stages: how each one trains, samples and decides."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rlhf.config.base import (
    Annotators,
    CriticInit,
    JudgeData,
    KlEstimator,
    Margin,
    Optimizer,
    Reference,
    RejectionInit,
    execution,
    require,
    result,
)


@dataclass
class Sft:
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = result(2)
    """Passes over the demonstrations [paper]."""
    batch_size: int = result(64)
    """Sequences per optimizer step, over all processes [paper]."""
    micro_batch_size: int = execution(16)
    """Sequences per forward pass and process."""
    last_turn_only: bool = result(False)
    """Train on the last assistant turn instead of every one."""
    max_rows: int | None = result(None)
    """Use only the first rows of the shuffled training set."""
    skip: bool = result(False)
    """Take model.path as v0."""


@dataclass
class RewardInit:
    """Existing reward models to use instead of training (starting midway)."""

    helpfulness: str | None = result(None)
    """Folder of an existing helpfulness reward model."""
    safety: str | None = result(None)
    """Folder of an existing safety reward model."""


@dataclass
class Reward:
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1.0e-5))
    epochs: int = result(1)
    """Passes over the mixture; more overfits [paper]."""
    batch_size: int = result(512)
    """Comparisons per optimizer step [paper]."""
    micro_batch_size: int = execution(16)
    """Comparisons per forward pass and process."""
    margin: Margin = result(Margin.small)
    """Margin table; the paper prints both and does not say which one the final models used."""
    safety_loss_weight: float = result(1.0)
    """Weight of the auxiliary safety loss on the safety axis; 0 is off; not in the paper."""
    own_share_helpfulness: float = result(0.5)
    """Share of helpfulness comparisons in the helpfulness mixture [paper: 50/50]."""
    own_share_safety: float = result(0.9)
    """Share of safety comparisons in the safety mixture [paper: 90/10]."""
    max_comparisons: int | None = result(None)
    """Cap on the mixture's size, newest batch first."""
    max_heldout: int | None = result(None)
    """Cap on held-out comparisons scored per axis and batch, whole prompts at a time."""
    path: RewardInit = field(default_factory=RewardInit)


@dataclass
class Judge:
    data: JudgeData = result(JudgeData.open)
    """What the judge pair is trained on; its prompts are never used by this run's reward models."""
    share: float = result(1.0)
    """Share of prompts of that data reserved for the judges."""
    max_comparisons: int | None = result(None)
    """Cap on each judge's training comparisons."""

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "judge.share", self.share, "give a share in (0, 1]")
        require(
            self.data is JudgeData.open or self.share < 1,
            "judge.share",
            self.share,
            "judge.data=batches must leave rows for the reward models; try judge.share=0.2",
        )


@dataclass
class Sampling:
    temperature: float = result(1.0)
    """Softmax temperature."""
    max_new_tokens: int = result(64)
    """Longest response in tokens, its EOS included."""
    batch_size: int = result(256)
    """Responses decoded together; shapes change the last float digits, so it is a result field."""
    top_k: int | None = result(None)
    """Draw from this many likeliest tokens only; 1 is greedy, null is all. Never in PPO."""
    top_p: float = result(1.0)
    """Draw from the fewest likeliest tokens that have this share; 1 is all. Never in PPO."""

    def check(self, key: str) -> None:
        """Refuse impossible values; `key` is where these settings stand in the configuration."""
        require(
            self.temperature > 0, f"{key}.temperature", self.temperature, "give a value above 0"
        )
        require(
            self.max_new_tokens > 1, f"{key}.max_new_tokens", self.max_new_tokens, "give at least 2"
        )
        require(
            self.top_k is None or self.top_k > 0,
            f"{key}.top_k",
            self.top_k,
            "give at least 1, or null for the whole vocabulary",
        )
        require(0 < self.top_p <= 1, f"{key}.top_p", self.top_p, "give a share in (0, 1]")


@dataclass
class Gate:
    threshold: float = result(0.15)
    """Safety probability below which the safety score replaces the helpfulness score [paper]."""


@dataclass
class Rejection:
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.2))
    num_samples: int = result(10)
    """Responses per prompt (K); the paper does not give it, later work uses 10 to 30."""
    num_prompts: int | None = result(None)
    """Prompts per round; null uses every training prompt."""
    temperatures: list[float] = result([])
    """Temperatures of the round's sweep, whose best one samples; empty: sampling.temperature."""
    sweep_prompts: int = result(100)
    """Prompts of the round that are sampled at every temperature of the sweep; not in the paper."""
    shard_prompts: int = result(64)
    """Prompts per checkpointed shard."""
    pool_share: float = result(0.3)
    """Share of fine-tuning rows that come from earlier rounds' winners; not in the paper."""
    sft_share: float = result(0.0)
    """Share of fine-tuning rows replayed from the demonstrations."""
    init: RejectionInit = result(RejectionInit.promoted)
    """Weights the fine-tuning starts from."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = result(1)
    """Passes over the winners."""
    batch_size: int = result(64)
    """Sequences per optimizer step."""
    micro_batch_size: int = execution(16)
    """Sequences per forward pass and process."""

    def __post_init__(self) -> None:
        share = self.pool_share + self.sft_share
        require(
            share < 1,
            "rejection.pool_share + sft_share",
            share,
            "leave room for this round's winners",
        )
        self._check_temperatures()

    def _check_temperatures(self) -> None:
        given = self.temperatures
        require(
            all(0 < value < math.inf for value in given),
            "rejection.temperatures",
            given,
            "give temperatures above 0",
        )
        require(
            len(set(given)) == len(given),
            "rejection.temperatures",
            given,
            "name each temperature once",
        )
        require(
            len(given) != 1,
            "rejection.temperatures",
            given,
            "a sweep compares at least two; for a single one set rejection.sampling.temperature",
        )


@dataclass
class Ppo:
    sampling: Sampling = field(default_factory=Sampling)
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(
            lr=1.0e-6, lr_floor=1.0, warmup_fraction=0.0, warmup_steps_min=0
        )
    )
    critic_lr: float | None = result(None)
    """Learning rate of the value model; null takes the policy's."""
    iterations: int = result(200)
    """Rollout batches at most; the paper trains 200 to 400 [paper]."""
    batch_size: int = result(512)
    """Rollouts per iteration [paper]."""
    num_minibatches: int = result(8)
    """Optimizer steps per pass over a rollout batch [paper: 512 / 64]."""
    num_ppo_epochs: int = result(1)
    """Passes over each rollout batch [paper]."""
    micro_batch_size: int = execution(64)
    """Rollouts per forward pass and process."""
    kl_coef: float = result(0.01)
    """KL penalty; 0.01 for 7B and 13B, 0.005 above [paper]."""
    kl_estimator: KlEstimator = result(KlEstimator.k1)
    """Estimator inside the reward."""
    clip_range: float = result(0.2)
    """Policy ratio clip [paper]."""
    value_clip_range: float = result(0.2)
    """Value clip."""
    value_coef: float = result(1.0)
    """Weight of the value loss; the critic has weights of its own."""
    gamma: float = result(1.0)
    """Discount."""
    gae_lambda: float = result(0.95)
    """GAE lambda."""
    no_eos_penalty: float = result(1.0)
    """Subtracted from the whitened score of a response that ran out of length."""
    reference: Reference = result(Reference.start)
    """Model the KL penalty is measured against."""
    critic_init: CriticInit = result(CriticInit.helpfulness)
    """Weights the value model starts from."""
    critic_warmup_iterations: int = result(3)
    """First iterations in which only the critic learns."""
    kl_stop: float = result(50.0)
    """Stop when the mean sequence KL to the round's start exceeds this, in nats."""
    heldout_every: int = result(20)
    """Iterations between scores on held-out prompts."""
    heldout_prompts: int = result(64)
    """Held-out prompts scored for early stopping."""
    patience: int = result(3)
    """Held-out scorings without improvement before the run stops; the best policy is kept."""
    eos_alarm: float = result(0.5)
    """Warn when a smaller share of the responses ends by itself."""
    length_alarm: float = result(2.0)
    """Warn when the mean response is this many times as long as in the first iteration."""

    def __post_init__(self) -> None:
        require(
            self.num_minibatches > 0, "ppo.num_minibatches", self.num_minibatches, "give at least 1"
        )
        require(
            self.batch_size % self.num_minibatches == 0,
            "ppo.batch_size",
            self.batch_size,
            f"make it a multiple of ppo.num_minibatches ({self.num_minibatches})",
        )
        require(
            0 <= self.gae_lambda <= 1, "ppo.gae_lambda", self.gae_lambda, "give a value in [0, 1]"
        )
        require(self.kl_coef >= 0, "ppo.kl_coef", self.kl_coef, "give a value of at least 0")


@dataclass
class PromotionRule:
    """When a new version replaces the promoted one; every bound must hold."""

    min_win_rate: float = result(0.5)
    """Lower confidence bound of the win rate under the judge pair must reach this."""
    max_win_rate_gap: float = result(0.15)
    """Allowed excess of the used pair's win rate over the judge pair's, on either axis.

    A gain that only the models see which it was optimised against is over-optimisation.
    """
    max_violation_increase: float = result(0.02)
    """Allowed rise of the judged violation rate on safety prompts."""
    max_over_refusal_increase: float = result(0.05)
    """Allowed rise of the refusal rate on benign look-alike prompts."""
    max_length_ratio: float = result(1.5)
    """Allowed growth of the mean response length."""
    max_kl: float = result(100.0)
    """Allowed mean sequence KL to the promoted version, in nats."""
    min_finished_fraction: float = result(0.5)
    """Share of responses that must end by themselves."""


@dataclass
class Evaluate:
    sampling: Sampling = field(default_factory=Sampling)
    num_prompts: int = result(400)
    """Held-out prompts at most, a third of them benign look-alikes where the sets have them."""
    shard_prompts: int = result(128)
    """Prompts per checkpointed shard."""
    level: float = result(0.95)
    """Confidence level of intervals."""
    bootstrap_draws: int = result(2000)
    """Draws of the clustered bootstrap."""
    unsafe_threshold: float = result(0.5)
    """Safety probability below which a response counts as a violation."""
    rule: PromotionRule = field(default_factory=PromotionRule)


@dataclass
class Collect:
    annotators: Annotators = result(Annotators.people)
    """Simulated annotators rate at once; people get pairs.jsonl and the chain ends."""
    num_pairs: int = result(500)
    """Pairs per round and axis."""
    temperatures: list[float] = result([0.8, 1.2])
    """Temperatures of the two responses; the order in which versions get them is random."""
    max_new_tokens: int = result(64)
    """Longest response in tokens."""
    batch_size: int = result(256)
    """Responses decoded together."""
    shard_prompts: int = result(256)
    """Prompts per checkpointed shard."""

    def __post_init__(self) -> None:
        require(
            len(self.temperatures) == 2,
            "collect.temperatures",
            self.temperatures,
            "give two temperatures, one per response",
        )
