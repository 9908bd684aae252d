"""The root of the configuration: every group, and the rules that span groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from omegaconf import MISSING

from rlhf.config.base import (
    Annotators,
    Contradictions,
    Data,
    Engine,
    Model,
    NearDuplicates,
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
from rlhf.config.cost import Cost
from rlhf.config.service import Service
from rlhf.config.stages import Collect, Evaluate, Gate, Judge, Ppo, Rejection, Reward, Sft

AT_LEAST_ONE = (
    "batch_size",
    "micro_batch_size",
    "epochs",
    "iterations",
    "num_samples",
    "num_prompts",
    "num_pairs",
    "sweep_prompts",
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
class GeneratorSettings:
    """What samples responses in rejection sampling, PPO, evaluate and collect."""

    engine: Engine = result(Engine.fused)
    """fused, hf, vllm (a process of the node's own) or vllm_server; their samples differ."""
    url: str = execution("http://127.0.0.1:8000")
    """Address of the server; beyond this machine it needs the token in RLHF_GENERATOR_TOKEN."""
    timeout_seconds: float = execution(600.0)
    """Longest wait for one answer of the server: a batch of responses, or a change of weights."""
    gpu_memory_utilization: float = execution(0.4)
    """Share of the GPU's memory that vLLM takes for weights and cache, beside the trainer."""
    cpu_kv_cache_gib: float = execution(1.0)
    """Memory of vLLM's cache on a machine without GPU."""

    def __post_init__(self) -> None:
        require(
            _is_address(self.url),
            "generator.url",
            self.url,
            "give scheme, host and port, such as http://127.0.0.1:8000",
        )
        require(
            0 < self.gpu_memory_utilization <= 1,
            "generator.gpu_memory_utilization",
            self.gpu_memory_utilization,
            "give a share in (0, 1]",
        )
        for name, value in (
            ("timeout_seconds", self.timeout_seconds),
            ("cpu_kv_cache_gib", self.cpu_kv_cache_gib),
        ):
            require(value > 0, f"generator.{name}", value, "give a value above 0")


def _is_address(url: str) -> bool:
    """Tell whether a URL is scheme, host and perhaps a port, and nothing else."""
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    rest = parts.username or parts.path.strip("/") or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and not rest


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
    """Longer rows are excluded and counted as over_long, never cut: prompt and longer response."""
    contradictions: Contradictions = execution(Contradictions.drop)
    """What becomes of a comparison that an earlier one contradicts: drop, keep, or lower to
    negligibly_better."""
    near_duplicates: NearDuplicates = execution(NearDuplicates.drop)
    """What becomes of a row that repeats an earlier one almost literally: drop or keep."""
    near_threshold: float | None = execution(0.9)
    """Jaccard similarity of prompt and both responses from which on comparisons are near
    duplicates; null compares only texts without case, blanks and punctuation."""
    supersedes: str | None = execution(None)
    """Batch or set that the file corrects: its rows replace those with their ids."""
    retract: str | None = execution(None)
    """File of row ids, one a line, that are withdrawn from the stream."""
    reason: str = execution("")
    """Why rows are corrected or withdrawn; it is recorded."""

    def __post_init__(self) -> None:
        if self.near_threshold is not None:
            require(
                0.5 <= self.near_threshold <= 1,
                "ingest.near_threshold",
                self.near_threshold,
                "give a similarity from 0.5 to 1, or null for none",
            )


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
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    rounds: Rounds = field(default_factory=Rounds)
    compute: Compute = field(default_factory=Compute)
    distributed: Distributed = field(default_factory=Distributed)
    resources: Resources = field(default_factory=Resources)
    launcher: Launcher = field(default_factory=Launcher)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    cost: Cost = field(default_factory=Cost)
    ingest: Ingest = field(default_factory=Ingest)
    service: Service = field(default_factory=Service)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_annotators()
        self._check_processes()
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
        for name, neutral in (("top_k", None), ("top_p", 1.0)):
            require(
                getattr(self.ppo.sampling, name) == neutral,
                f"ppo.sampling.{name}",
                getattr(self.ppo.sampling, name),
                "PPO's ratio and KL are those of the whole softmax: take the setting away",
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

    def _check_processes(self) -> None:
        for stage in ("sft", "reward", "rejection", "ppo"):
            is_shared = self.resources.of(stage).num_processes > 1
            require(
                not (is_shared and self.model.lora.enabled and self.distributed.strategy.shares),
                "distributed.strategy",
                self.distributed.strategy.name,
                f"an adapter's states are small: with model.lora.enabled=true and several "
                f"processes for resources.{stage}, use distributed=ddp",
            )
        minibatch = self.ppo.batch_size // self.ppo.num_minibatches
        processes = self.resources.ppo.num_processes
        require(
            minibatch % processes == 0,
            "ppo.batch_size / ppo.num_minibatches",
            minibatch,
            f"make it a multiple of the {processes} processes of resources.ppo, which share it",
        )

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
