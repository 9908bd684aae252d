"""The root of the configuration: every group, and the rules that span groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from rlhf.config.base import (
    Annotators,
    Data,
    Model,
    OnBadRow,
    OnChange,
    Paths,
    RoundStage,
    Toy,
    TrackingMode,
    execution,
    leaves,
    require,
    result,
)
from rlhf.config.cluster import Distributed, Launcher, Resources
from rlhf.config.stages import Collect, Evaluate, Gate, Judge, Ppo, Rejection, Reward, Sft

AT_LEAST_ONE = (
    "batch_size",
    "micro_batch_size",
    "epochs",
    "iterations",
    "num_samples",
    "num_prompts",
    "num_pairs",
    "num_ppo_epochs",
    "num_threads",
    "parallel_nodes",
    "shard_prompts",
    "max_rows",
    "max_comparisons",
    "max_heldout",
    "max_length",
    "max_new_tokens",
    "heldout_every",
    "rank",
    "bootstrap_draws",
)
"""Settings, by name in any group, that count something there must be at least one of."""


@dataclass
class Rounds:
    limit: int | None = result(None)
    """Rounds at most; null runs as many as there are batches."""
    batches_per_round: int = result(1)
    """Weekly batches that make one round."""
    schedule: list[RoundStage] = result([RoundStage.rejection, RoundStage.ppo])
    """How each round improves the policy, cycled over the rounds."""
    sampling_jobs: int = result(1)
    """Nodes that sample for one rejection node; more than one run as an array job on Slurm."""

    def __post_init__(self) -> None:
        require(bool(self.schedule), "rounds.schedule", self.schedule, "name at least one stage")
        require(
            self.batches_per_round > 0,
            "rounds.batches_per_round",
            self.batches_per_round,
            "give at least 1",
        )
        require(
            self.sampling_jobs > 0, "rounds.sampling_jobs", self.sampling_jobs, "give at least 1"
        )


@dataclass
class Compute:
    num_threads: int = execution(2)
    """Threads of CPU mathematics; fixed here because thread counts change the last float digits."""
    parallel_nodes: int = execution(1)
    """Independent nodes that run at the same time on this machine."""
    device: str = execution("auto")
    """cpu, cuda, or auto for the best that is there."""


@dataclass
class Checkpoint:
    every_seconds: float = execution(60.0)
    """Longest time between checkpoints."""
    every_steps: int | None = execution(None)
    """Also checkpoint after this many steps."""
    keep: int = execution(2)
    """Newest checkpoints kept while a node runs."""

    def __post_init__(self) -> None:
        require(self.keep > 0, "checkpoint.keep", self.keep, "keep at least 1")


@dataclass
class Tracking:
    mode: TrackingMode = execution(TrackingMode.offline)
    """Weights & Biases offline, online or not at all."""
    project: str = execution("rlhf")
    """Project name there."""


@dataclass
class Ingest:
    """Settings of `rlhf ingest`; runs do not read them."""

    kind: str | None = execution(None)
    """batch, open, sft or prompts; null infers it from the fields, but never infers open."""
    id: str | None = execution(None)
    """Name of the batch or set; null takes the file's stem."""
    stream: str = execution("weekly")
    """Stream of the store that receives the rows."""
    on_bad_row: OnBadRow = execution(OnBadRow.refuse)
    """Refuse the whole file, or set bad rows aside and go on."""
    axis: str | None = execution(None)
    """Axis of rows that do not name one."""
    max_chars: int = execution(40000)
    """Longer rows are refused as over-long, never cut."""


@dataclass
class Config:
    """One run: a model lineage over rounds of preference batches."""

    recipe: str = execution(MISSING)
    """Name of the recipe file this run started from."""
    run: str = execution("${recipe}")
    """Name of the run and of its folder."""
    seed: int = result(0)
    """Root of every random stream."""
    on_change: OnChange = execution(OnChange.refuse)
    """When a finished node's configuration changed: refuse, or run it again."""
    paths: Paths = field(default_factory=Paths)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    toy: Toy = field(default_factory=Toy)
    sft: Sft = field(default_factory=Sft)
    reward: Reward = field(default_factory=Reward)
    judge: Judge = field(default_factory=Judge)
    gate: Gate = field(default_factory=Gate)
    rejection: Rejection = field(default_factory=Rejection)
    ppo: Ppo = field(default_factory=Ppo)
    evaluate: Evaluate = field(default_factory=Evaluate)
    collect: Collect = field(default_factory=Collect)
    rounds: Rounds = field(default_factory=Rounds)
    compute: Compute = field(default_factory=Compute)
    distributed: Distributed = field(default_factory=Distributed)
    resources: Resources = field(default_factory=Resources)
    launcher: Launcher = field(default_factory=Launcher)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    ingest: Ingest = field(default_factory=Ingest)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_annotators()
        for key, sampling in (
            ("rejection", self.rejection.sampling),
            ("ppo", self.ppo.sampling),
            ("evaluate", self.evaluate.sampling),
        ):
            sampling.check(f"{key}.sampling")
            require(
                sampling.max_new_tokens < self.model.max_length,
                f"{key}.sampling.max_new_tokens",
                sampling.max_new_tokens,
                f"leave room for the prompt in model.max_length ({self.model.max_length})",
            )
        if self.toy.enabled and self.model.path == "toy":
            require(
                not self.sft.skip,
                "sft.skip",
                True,
                "the toy model is random and must be trained first",
            )

    def _check_numbers(self) -> None:
        for key, optimizer in (
            ("sft", self.sft.optimizer),
            ("reward", self.reward.optimizer),
            ("rejection", self.rejection.optimizer),
            ("ppo", self.ppo.optimizer),
        ):
            optimizer.check(f"{key}.optimizer")
        for key, _, value in leaves(self):
            name = key.rpartition(".")[2]
            if isinstance(value, int) and name in AT_LEAST_ONE:
                require(value >= 1, key, value, "give at least 1")
            if isinstance(value, int | float) and name.endswith("_share"):
                require(0 <= value <= 1, key, value, "give a share between 0 and 1")

    def _check_annotators(self) -> None:
        simulated = self.collect.annotators is Annotators.simulated
        require(
            self.toy.enabled or not simulated,
            "collect.annotators",
            "simulated",
            "only the toy world has them; set toy.enabled=true or collect.annotators=people",
        )
        require(
            not simulated or self.rounds.limit is not None,
            "rounds.limit",
            "null",
            "simulated annotators never run out of batches; give a number of rounds",
        )
        require(
            not simulated or self.rounds.batches_per_round == 1,
            "rounds.batches_per_round",
            self.rounds.batches_per_round,
            "simulated annotators rate one batch a round; leave it at 1",
        )
