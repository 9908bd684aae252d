"""A store, a node and its context, small enough to run a whole stage in a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import micro_models as micro

from rlhf.artifacts import NodeDir
from rlhf.config import Config, Evaluate, Optimizer, Paths, Reward, Sft
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import Kind
from rlhf.models.loading import save_model
from rlhf.nodes import DataInput, Inputs, ModelInput, Node, NodeContext

KINDS = {"batch": Kind.batch, "open": Kind.open, "sft": Kind.sft, "prompts": Kind.prompts}


def config(folder: Path, **checkpoint: Any) -> Config:
    """Return small stages over a store in `folder`; one held-out prompt in four."""
    made = micro.config(**checkpoint)
    made.paths = Paths(runs=str(folder / "runs"), store=str(folder / "store"))
    made.data.heldout_share = 0.25
    made.sft = Sft(optimizer=Optimizer(lr=1e-3), epochs=1, batch_size=8, micro_batch_size=4)
    made.reward = Reward(optimizer=Optimizer(lr=1e-3), batch_size=8, micro_batch_size=4)
    made.evaluate = Evaluate(bootstrap_draws=50)
    return made


def add(made: Config, kind: str, id: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Ingest rows into the configuration's store."""
    file = Path(made.paths.store).parent / f"{id}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store(Path(made.paths.store), made.data.stream)
    ingest_file(
        file,
        store,
        kind=KINDS[kind],
        id=id,
        heldout_share=made.data.heldout_share,
        heldout_salt=made.data.heldout_salt,
    )


def save_policy(folder: Path, seed: int = 0) -> str:
    save_model(micro.policy(seed), micro.tokenizer(), folder)
    return str(folder)


def save_scorer(folder: Path, seed: int = 0) -> str:
    save_model(micro.scorer(seed), micro.tokenizer(), folder)
    return str(folder)


def context(
    made: Config,
    *,
    name: str,
    stage: str,
    models: Mapping[str, str],
    data: Sequence[tuple[str, str, int]],
    round: int = 0,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> NodeContext:
    """Return a node's context; `data` lists (kind, id, round)."""
    inputs = Inputs(
        models={role: ModelInput(path, role, "") for role, path in models.items()},
        data=tuple(DataInput(kind, id, "", number) for kind, id, number in data),
    )
    return NodeContext(
        config=made,
        node=Node(name, stage, round, (), {}, dict(options or {})),
        inputs=inputs,
        directory=NodeDir(Path(made.paths.runs) / name, on_step=on_step),
        seed=seed,
    )
