"""Who used rows that are corrected or withdrawn: nodes and versions of the runs beside the store.

Which rows a node could use follows from its inputs, the split and its stage. Where a node lists the
rows that it used, the list counts. Mixtures do not list theirs: a training row that its cap or
share left out is still reported as trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf.artifacts import NodeDir, read_json, read_jsonl
from rlhf.compose import known_runs, load_frozen
from rlhf.config import Config, JudgeData
from rlhf.data.corrections import row_facts
from rlhf.data.ledger import Store
from rlhf.data.records import Kind
from rlhf.data.split import JUDGE_SALT, key_is_heldout
from rlhf.data.tombstones import Tombstone
from rlhf.nodes import Inputs, Node
from rlhf.plan import Plan
from rlhf.resolve import inputs_from_json
from rlhf.runner import read_plan
from rlhf.state import INPUTS, is_started
from rlhf.supply import reads_store

TRAINED, SAMPLED, SCORED, HELD_OUT = "trained on", "sampled for", "scored", "held out"

Facts = Mapping[tuple[str, str], list[dict[str, Any]]]
"""Kind and batch or set to the facts of its rows: id, heldout, key_prompt, axis."""


@dataclass(frozen=True, slots=True)
class NodeUsage:
    """How often a node used the rows, by use, and whether it is done."""

    node: str
    done: bool
    uses: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RunUsage:
    """What a run did with the rows: its nodes, and the versions that training on them led to."""

    run: str
    nodes: tuple[NodeUsage, ...]
    versions: tuple[str, ...]


def find_usage(runs: Path, store: Store, stone: Tombstone) -> list[RunUsage]:
    """Return the runs in a folder that read the store's stream and used rows of a tombstone."""
    facts = _facts(store, stone)
    found = []
    for name in known_runs(runs):
        config = load_frozen(runs / name)
        plan = read_plan(runs / name)
        if plan is None or not reads_store(config, store):
            continue
        nodes = []
        for node in (node for node in plan.nodes if is_started(runs / name / node.name)):
            folder = runs / name / node.name
            uses = _uses(config, node, folder, facts, before=stone.sequence)
            if uses:
                nodes.append(NodeUsage(node.name, NodeDir(folder).is_done(), uses))
        if nodes:
            found.append(RunUsage(name, tuple(nodes), _versions(plan, runs / name, nodes)))
    return found


def show_withdrawal(config: Config, store: Store, stone: Tombstone, console: Console) -> None:
    """Say what was withdrawn, from where, and who used it."""
    if not stone.num_rows:
        console.print(f"all of these rows were withdrawn from stream {store.stream} before")
        return
    sets = [
        f"{kind} {key} {len(ids)}"
        for kind, found in stone.rows.items()
        for key, ids in found.items()
    ]
    console.print(
        f"withdrew {stone.num_rows} rows from stream {store.stream} ({', '.join(sets)})",
        markup=False,
    )
    show_usage(config, store, stone, console)


def show_usage(config: Config, store: Store, stone: Tombstone, console: Console) -> None:
    """Say which nodes and versions used the rows; what is finished stays."""
    if not stone.num_rows:
        return
    usage = find_usage(Path(config.paths.runs), store, stone)
    for run in usage:
        console.print(f"run {run.run}:", markup=False)
        for node in run.nodes:
            uses = ", ".join(f"{use} {number}" for use, number in node.uses.items())
            state = "" if node.done else " (not done; it goes on with them)"
            console.print(f"  {node.node}: {uses}{state}", markup=False, highlight=False)
        made = ", ".join(run.versions) or "none"
        console.print(f"  versions that training on them led to: {made}", markup=False)
    if not usage:
        console.print(f"no run in {config.paths.runs} used these rows", markup=False)
    else:
        console.print("finished nodes stay; rounds that have not started leave these rows out")


def _facts(store: Store, stone: Tombstone) -> Facts:
    facts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kind, sets in stone.rows.items():
        for key, ids in sets.items():
            root = store.root_of(Kind[kind], key)
            facts.setdefault((kind, root), []).extend(row_facts(store, Kind[kind], key, ids))
    return facts


def _uses(config: Config, node: Node, folder: Path, facts: Facts, *, before: int) -> dict[str, int]:
    """Count the uses that a started node made of the rows."""
    inputs = inputs_from_json(read_json(folder / INPUTS))
    if inputs.as_of >= before:
        return {}
    uses: Counter[str] = Counter()
    for item in inputs.data:
        rows = facts.get((item.kind, item.id), [])
        if node.stage == "reward":
            is_newest = item.kind == "batch" and item.round == node.round
            uses.update(_reward_uses(config, node, folder, item.kind, rows, is_newest=is_newest))
        elif item.kind == "prompts":
            uses.update(_prompt_uses(node, folder, inputs, rows))
        else:
            uses.update(HELD_OUT if row["heldout"] else TRAINED for row in rows)
    return dict(uses)


def _reward_uses(
    config: Config,
    node: Node,
    folder: Path,
    kind: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    is_newest: bool,
) -> list[str]:
    """Tell what a reward model or judge did with comparisons (see rlhf/stages/reward.py)."""
    is_judge = node.options["role"] == "judge"
    judged = "open" if config.judge.data is JudgeData.open else "batch"
    scores = folder / "scores.jsonl"
    scored = {row["id"] for row in read_jsonl(scores)} if scores.exists() else None
    uses = []
    for row in rows:
        is_own = row["axis"] == node.options["axis"]
        share = config.judge.share
        is_reserved = key_is_heldout(row["key_prompt"], share=share, salt=JUDGE_SALT)
        if row["heldout"]:
            is_measured = kind == "batch" and (is_own or not is_judge)
            if is_measured and (scored is None or row["id"] in scored):
                uses.append(SCORED)
            uses.append(HELD_OUT)
        elif is_judge:
            uses += [TRAINED] if is_reserved and is_own and kind == judged else []
        elif not is_reserved or (kind == "batch" and judged == "open"):
            uses.append(TRAINED)
        if is_newest and is_own and node.round > 1 and not is_judge and not row["heldout"]:
            uses.append(SCORED)
    return uses


def _prompt_uses(
    node: Node, folder: Path, inputs: Inputs, rows: Iterable[Mapping[str, Any]]
) -> list[str]:
    """Tell what a node did with prompts."""
    heldout = [row for row in rows if row["heldout"]]
    training = {row["id"] for row in rows if not row["heldout"]}
    if node.stage == "evaluate":
        path = folder / "responses.jsonl"
        listed = {row["prompt_id"] for row in read_jsonl(path)} if path.exists() else None
        return [SCORED for row in heldout if listed is None or row["id"] in listed]
    if node.stage == "ppo":
        return [TRAINED] * len(training) + [SCORED] * len(heldout)
    if node.stage == "rejection":
        pools = [Path(m.path) for role, m in inputs.models.items() if role.startswith("pool_")]
        winners = [row for path in (folder, *pools) for row in read_jsonl(path / "winners.jsonl")]
        won = training & {row["prompt_id"] for row in winners}
        return [TRAINED] * len(won) + [SAMPLED] * len(training - won)
    return [SAMPLED] * (len(training) + (len(heldout) if node.stage == "collect" else 0))


def _versions(plan: Plan, run_dir: Path, nodes: Iterable[NodeUsage]) -> tuple[str, ...]:
    """Return the versions there are that come, by any way, from a node that trained on rows."""
    trained = {node.node for node in nodes if TRAINED in node.uses}
    found = []
    for k in range(len(plan.rounds) + 1):
        made_by = plan.improves(k)
        if made_by and NodeDir(run_dir / made_by).is_done():
            origins = {node.name for node in plan.upstream(made_by)}
            found += [f"v{k}"] if trained & origins else []
    return tuple(found)
