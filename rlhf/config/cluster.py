"""Where nodes run: processes and resources per stage, the job launcher, distributed training.

Nothing here changes what a node produces, so every field is an execution field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, auto

from rlhf.config.base import execution, require

MEMORY = re.compile(r"\d+[KMGT]?")
TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


class Strategy(Enum):
    """How the processes of one node share a training: replicas, DeepSpeed ZeRO, or FSDP."""

    ddp = auto()
    zero0 = auto()
    zero1 = auto()
    zero2 = auto()
    zero3 = auto()
    fsdp = auto()

    @property
    def shares(self) -> bool:
        """Tell whether processes need an engine; replicas are whole models that know no other."""
        return self is not Strategy.ddp


class LauncherKind(Enum):
    """Who runs the jobs of `rlhf launch`."""

    local = auto()
    slurm = auto()
    kubernetes = auto()


@dataclass
class Distributed:
    strategy: Strategy = execution(Strategy.ddp)
    """ddp copies the model to every process; zero1-3 and fsdp share its states among them.

    A node with a single process trains plainly, whatever stands here.
    """
    offload_optimizer: bool = execution(False)
    """With zero1-3, keep optimizer states in main memory."""
    timeout_seconds: float = execution(1800.0)
    """A process that waits longer for the others stops and says who is missing and where."""

    def __post_init__(self) -> None:
        zero = (Strategy.zero1, Strategy.zero2, Strategy.zero3)
        require(
            not self.offload_optimizer or self.strategy in zero,
            "distributed.offload_optimizer",
            True,
            "only distributed=zero1, zero2 or zero3 can do it",
        )
        require(
            self.timeout_seconds > 0,
            "distributed.timeout_seconds",
            self.timeout_seconds,
            "give a positive number of seconds",
        )


@dataclass
class StageResources:
    """What one node of a stage gets."""

    nodes: int = execution(1)
    """Machines."""
    processes: int = execution(1)
    """Processes per machine: one per GPU where there are GPUs."""
    cpus: int | None = execution(None)
    """Cores per process; null takes compute.num_threads."""
    gpus: int = execution(0)
    """GPUs per process."""
    memory: str | None = execution(None)
    """Memory per machine, such as 64G; null leaves it to the cluster."""
    time: str | None = execution(None)
    """Time limit as Slurm writes it, such as 4:00:00 or 1-12; null leaves it to the cluster."""
    partition: str | None = execution(None)
    """Slurm partition of this stage; null takes launcher.slurm.partition."""
    constraint: str | None = execution(None)
    """Slurm node features of this stage; null takes launcher.slurm.constraint."""

    @property
    def num_processes(self) -> int:
        """Processes of all machines together."""
        return self.nodes * self.processes

    def check(self, key: str) -> None:
        """Refuse impossible values; `key` is where this stands in the configuration."""
        for name in ("nodes", "processes"):
            require(
                getattr(self, name) >= 1, f"{key}.{name}", getattr(self, name), "give 1 or more"
            )
        require(self.cpus is None or self.cpus >= 1, f"{key}.cpus", self.cpus, "give 1 or more")
        require(self.gpus >= 0, f"{key}.gpus", self.gpus, "give 0 or more")
        for name, pattern, example in (("memory", MEMORY, "64G"), ("time", TIME, "4:00:00")):
            value = getattr(self, name)
            ok = value is None or pattern.fullmatch(value) is not None
            require(ok, f"{key}.{name}", value, f"write it like {example}")


@dataclass
class Resources:
    """Resources per stage."""

    sft: StageResources = field(default_factory=StageResources)
    reward: StageResources = field(default_factory=StageResources)
    sweep: StageResources = field(default_factory=StageResources)
    sample: StageResources = field(default_factory=StageResources)
    rejection: StageResources = field(default_factory=StageResources)
    ppo: StageResources = field(default_factory=StageResources)
    evaluate: StageResources = field(default_factory=StageResources)
    collect: StageResources = field(default_factory=StageResources)

    def of(self, stage: str) -> StageResources:
        """Return what a stage gets; a stage that is not listed gets one process."""
        found: StageResources = getattr(self, stage, None) or StageResources()
        return found

    def __post_init__(self) -> None:
        for stage in self.__dataclass_fields__:
            getattr(self, stage).check(f"resources.{stage}")


@dataclass
class Retries:
    """How often a job is started again by itself, per kind of failure."""

    preempted: int = execution(1000)
    """Another job took the machine; the node goes on from its checkpoint."""
    time_limit: int = execution(1000)
    """The time limit came; the node goes on from its checkpoint."""
    node_failure: int = execution(5)
    """A machine failed."""
    out_of_memory: int = execution(0)
    """The same job would need the same memory."""
    error: int = execution(0)
    """The stage failed: bad input, divergence, or a bug."""


@dataclass
class Slurm:
    partition: str | None = execution(None)
    """Partition of all stages; null takes the cluster's default."""
    account: str | None = execution(None)
    """Account that pays."""
    qos: str | None = execution(None)
    """Quality of service."""
    constraint: str | None = execution(None)
    """Node features."""
    reservation: str | None = execution(None)
    """Reservation."""
    extra: list[str] = execution([])
    """Further sbatch options, one each, such as --exclusive."""
    call_seconds: float = execution(30.0)
    """Longest wait for an answer of the scheduler."""


@dataclass
class Kubernetes:
    namespace: str = execution("default")
    """Namespace of all objects."""
    image: str = execution("rlhf:cpu")
    """Container image with this package."""
    claim: str = execution("rlhf")
    """Persistent volume claim that holds runs and store; every pod mounts it at mount_path."""
    mount_path: str = execution("/data")
    """Where the claim is mounted; paths.runs and paths.store must lie below it."""
    queue: str | None = execution(None)
    """Kueue queue; null does not use Kueue."""
    jobset: bool = execution(False)
    """Render a JobSet instead of an Indexed Job for nodes on several machines."""
    secrets: list[str] = execution([])
    """Secrets whose keys become environment variables, such as a tracking token."""
    gpu_resource: str = execution("nvidia.com/gpu")
    """Resource name of a GPU."""
    tolerations: list[str] = execution([])
    """Taints that pods tolerate, each as KEY or KEY=VALUE."""
    node_selector: list[str] = execution([])
    """Labels a machine must have, each as KEY=VALUE."""


@dataclass
class Launcher:
    kind: LauncherKind = execution(LauncherKind.local)
    """Who runs the jobs; launcher=slurm and launcher=kubernetes choose it."""
    template: str | None = execution(None)
    """Your own job template; null takes the one in jobs/."""
    setup: list[str] = execution([])
    """Shell lines before the command of a job: modules, variables of the site."""
    grace_seconds: int = execution(120)
    """A job is warned this long before a time limit or preemption, and saves its state."""
    follow: bool = execution(False)
    """Stay and launch what becomes possible until everything is done."""
    poll_seconds: float = execution(15.0)
    """Pause between two looks while following."""
    retries: Retries = field(default_factory=Retries)
    slurm: Slurm = field(default_factory=Slurm)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
