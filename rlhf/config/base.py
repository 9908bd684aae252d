"""Building blocks of the configuration: field declarations, choices and the shared groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum, auto
from typing import Any

from rlhf.errors import ConfigError


def result(default: Any) -> Any:
    """Declare a field that can change a node's output."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"effect": "result"})
    return field(default=default, metadata={"effect": "result"})


def execution(default: Any) -> Any:
    """Declare a field that only changes where, when or how fast a node runs."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"effect": "execution"})
    return field(default=default, metadata={"effect": "execution"})


def require(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value} cannot work: {remedy}")


def leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted key, effect, value) of every leaf of a group or of its class.

    The effect is "" where a field declares none; a test demands that there is no such field.
    """
    for item in fields(group):
        value = getattr(group, item.name, None)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item.metadata.get("effect", ""), value


class Precision(Enum):
    """Number format of weights in the forward pass."""

    fp32 = auto()
    bf16 = auto()


class Margin(Enum):
    """Margin table of the ranking loss (paper Table 27)."""

    none = auto()
    small = auto()
    large = auto()


class RoundStage(Enum):
    """How a round improves the policy."""

    rejection = auto()
    ppo = auto()
    rejection_ppo = auto()


class RejectionInit(Enum):
    """Weights that fine-tuning on the winners starts from."""

    promoted = auto()
    sft = auto()
    base = auto()


class Reference(Enum):
    """Frozen model of the KL penalty: the round's starting policy or v0."""

    start = auto()
    sft = auto()


class CriticInit(Enum):
    """Weights the value model starts from."""

    helpfulness = auto()
    safety = auto()
    policy = auto()


class KlEstimator(Enum):
    """Schulman's per-token estimators."""

    k1 = auto()
    k2 = auto()
    k3 = auto()


class JudgeData(Enum):
    """What the judge pair learns from: a reserved share of open comparisons or of batches."""

    open = auto()
    batches = auto()


class Annotators(Enum):
    """Who rates collected pairs."""

    people = auto()
    simulated = auto()


class OnChange(Enum):
    """What to do when the configuration changed under a finished node."""

    refuse = auto()
    rerun = auto()


class OnBadRow(Enum):
    """What ingest does with a file that has bad rows."""

    refuse = auto()
    quarantine = auto()


class Contradictions(Enum):
    """What ingest does with a comparison whose verdict an earlier one contradicts.

    lower accepts it as negligibly_better, the strength with the smallest margin.
    """

    drop = auto()
    keep = auto()
    lower = auto()


class NearDuplicates(Enum):
    """What ingest does with a row that repeats an earlier one almost literally."""

    drop = auto()
    keep = auto()


class Engine(Enum):
    """What samples responses: transformers, own decoding, vLLM beside the node, or a server."""

    hf = auto()
    fused = auto()
    vllm = auto()
    vllm_server = auto()


class TrackingMode(Enum):
    """Where metrics go besides metrics.jsonl."""

    none = auto()
    offline = auto()
    online = auto()


@dataclass
class Paths:
    runs: str = execution("runs")
    """Folder that holds one folder per run."""
    store: str = execution("store")
    """Folder of ingested data."""


@dataclass
class Optimizer:
    lr: float = result(2.0e-5)
    """Peak learning rate; 2e-5 for supervised fine-tuning [paper]."""
    beta1: float = result(0.9)
    """AdamW beta1 [paper]."""
    beta2: float = result(0.95)
    """AdamW beta2 [paper]."""
    eps: float = result(1.0e-5)
    """AdamW epsilon [paper]."""
    weight_decay: float = result(0.1)
    """Decoupled weight decay [paper]."""
    max_grad_norm: float = result(1.0)
    """Gradient clipping by global norm [paper]."""
    warmup_fraction: float = result(0.03)
    """Share of all steps with rising learning rate; 3 % for reward models [paper]."""
    warmup_steps_min: int = result(5)
    """Lower bound of warm-up steps; 5 for reward models [paper]."""
    lr_floor: float = result(0.1)
    """Final learning rate over peak; 10 % for reward models [paper]; 1 keeps it constant."""

    def check(self, key: str) -> None:
        """Refuse impossible values; `key` is where this optimizer stands in the configuration."""
        require(self.lr > 0, f"{key}.lr", self.lr, "give a positive learning rate")
        for name, value in (
            ("lr_floor", self.lr_floor),
            ("warmup_fraction", self.warmup_fraction),
            ("beta1", self.beta1),
            ("beta2", self.beta2),
        ):
            require(0 <= value <= 1, f"{key}.{name}", value, "give a value between 0 and 1")


@dataclass
class Lora:
    enabled: bool = result(False)
    """Train low-rank adapters instead of all weights; PPO then keeps its five roles on one base."""
    rank: int = result(16)
    """Adapter rank."""
    alpha: float = result(32.0)
    """Adapter scale numerator."""
    target_modules: str = result("all-linear")
    """Layers that get an adapter, as peft names them."""


@dataclass
class Shape:
    """Shape of the base model, a Llama; estimates read it where model.path is not there yet."""

    hidden_size: int | None = execution(None)
    """Width of the hidden states; null says that the shape is not known."""
    intermediate_size: int | None = execution(None)
    """Width of the feed-forward layers."""
    num_layers: int | None = execution(None)
    """Layers."""
    num_heads: int | None = execution(None)
    """Attention heads."""
    num_kv_heads: int | None = execution(None)
    """Heads of keys and values."""
    vocab_size: int | None = execution(None)
    """Words of the vocabulary."""
    tied: bool = execution(False)
    """Input embedding and output head are one table."""

    def __post_init__(self) -> None:
        names = ("intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size")
        for name in names:
            is_given = getattr(self, name) is not None
            require(
                is_given == (self.hidden_size is not None),
                f"model.shape.{name}",
                getattr(self, name),
                "give all sizes of model.shape, or none",
            )


@dataclass
class Model:
    path: str = result("toy")
    """Hugging Face folder of the base model, or `toy` for the built-in random tiny Llama."""
    precision: Precision = result(Precision.fp32)
    """fp32, or bf16 autocast over fp32 master weights."""
    max_length: int = result(256)
    """Longest prompt + response in tokens; longer rows are counted and left out, never cut."""
    attention: str = execution("sdpa")
    """Attention implementation of transformers."""
    gradient_checkpointing: bool = execution(False)
    """Recompute activations in the backward pass to save memory."""
    lora: Lora = field(default_factory=Lora)
    shape: Shape = field(default_factory=Shape)


@dataclass
class Data:
    stream: str = result("weekly")
    """Stream of the store this run reads."""
    heldout_share: float = result(0.1)
    """Share of prompts, over all kinds of data, that is never trained on; fixed at ingest."""
    heldout_salt: str = result("rlhf")
    """Salt of the held-out hash."""
    is_safety_default: bool = result(False)
    """is_safety of prompts whose set does not tag them."""

    def __post_init__(self) -> None:
        require(
            0 < self.heldout_share < 1,
            "data.heldout_share",
            self.heldout_share,
            "give a share in (0, 1)",
        )


@dataclass
class Toy:
    enabled: bool = result(False)
    """Fill the run's stream with the built-in toy world before planning."""
    sft_rows: int = result(3000)
    """Demonstrations, with deliberate mistakes."""
    prompts_per_kind: int = result(600)
    """Prompts of each kind: ordinary, adversarial, benign look-alikes."""
    open_rows: int = result(2000)
    """Ungraded open comparisons over both axes."""
    length_bias: float = result(0.0)
    """Planted flaw of the simulated annotators: they like length (a negative control)."""
    shuffle_labels: bool = result(False)
    """Simulated annotators flip a coin (a negative control)."""
