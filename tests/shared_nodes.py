"""A stage for tests that trains or scores with micro models in as many processes as its node has.

The node's options say what to train; FAULT=KIND:RANK:STEP plants a fault in one process.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import deepspeed  # noqa: F401  (slow to import: the server that forks nodes does it once)
import micro_models as micro
import micro_ppo
import torch
from safetensors.torch import save_file

from rlhf.artifacts import NodeDir
from rlhf.config import Optimizer
from rlhf.data.records import Comparison
from rlhf.inference.comparisons import Sides, score_sides
from rlhf.inference.scoring import HfScorer
from rlhf.nodes import NodeContext
from rlhf.processes import BEAT_SECONDS

REVISION = 1
FAULT = "SHARED_FAULT"
WEIGHTS = "weights.safetensors"


def run(context: NodeContext) -> None:
    """Train what the options ask for; writes the weights and every process's digest of them."""
    options, directory = context.node.options, context.directory
    _plant_fault(directory)
    dtype = torch.float64 if options.get("float64", False) else torch.float32
    work = {"sft": _sft, "reward": _reward, "ppo": _ppo, "evaluate": _score}[context.node.stage]
    weights = work(context, dtype)
    digests = directory.processes.gather(_digest(weights), "digests of the weights")
    directory.write_json("digests.json", digests)
    if directory.processes.is_main:
        save_file(weights, directory.path / WEIGHTS)


def _sft(context: NodeContext, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = micro.policy(0, dtype)
    rows = micro.conversations(context.node.options.get("rows", 21))
    micro.train_sft(model, rows, context.directory.path, **_settings(context))
    return _weights(model)


def _reward(context: NodeContext, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = micro.scorer(0, dtype)
    rows = micro.pairs(context.node.options.get("rows", 21))
    micro.train_reward(model, rows, context.directory.path, **_settings(context))
    return _weights(model)


def _ppo(context: NodeContext, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    roles = micro_ppo.roles(context.config, dtype=dtype, finishes=True)
    micro_ppo.loop(
        context.config, context.directory.path, given=roles, node=context.directory, heldout=3
    ).run()
    critic = {f"critic.{name}": value for name, value in roles.critic_parameters().items()}
    both = {**roles.policy_parameters(), **critic}
    return {name: value.detach().clone() for name, value in both.items()}


def _score(context: NodeContext, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    directory, lists = context.directory, micro.token_lists(1200)
    comparison = Comparison(
        id="x",
        axis="safety",
        prompt=[{"role": "user", "content": "a fish"}],
        chosen="a",
        rejected="b",
        strength=None,
        source="x",
    )
    sides = [Sides(comparison, lists[2 * i], lists[2 * i + 1]) for i in range(600)]
    scorer = HfScorer(micro.scorer(0, dtype), micro.tokenizer(), max_length=256)
    pairs = score_sides(scorer, sides, on_chunk=directory.step, processes=directory.processes)
    scores = [score for pair in pairs for score in (pair.chosen_score, pair.rejected_score)]
    return {"scores": torch.tensor(scores)}


def _settings(context: NodeContext) -> dict[str, Any]:
    return {
        "directory": context.directory,
        "config": context.config,
        "optimizer": Optimizer(lr=float(context.node.options.get("lr", 1e-3))),
        "epochs": 2,
        "batch_size": 8,
        "micro_batch_size": 2,
    }


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _digest(weights: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def _die() -> None:
    time.sleep(2 * BEAT_SECONDS)  # So that this process's place is on disk.
    os.kill(os.getpid(), signal.SIGKILL)


def _plant_fault(directory: NodeDir) -> None:
    if FAULT not in os.environ:
        return
    kind, rank, at = os.environ[FAULT].split(":")
    faults: dict[str, Callable[[], None]] = {
        "kill": _die,
        "hang": lambda: time.sleep(600),
        "stop": lambda: os.kill(os.getppid(), signal.SIGUSR1),
    }
    finish = directory.step

    def step(number: int, total: int) -> None:
        finish(number, total)
        if number == int(at) and directory.processes.rank == int(rank):
            faults[kind]()

    directory.step = step  # type: ignore[method-assign]
