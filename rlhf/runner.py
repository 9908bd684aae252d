"""Run what is left of a run: fill, plan, check, then every node whose parents are done.

Everything is idempotent. A node that is done stays done while its fingerprint does; a node that was
killed goes on from its last checkpoint; a new batch or a higher `rounds.limit` adds only new nodes.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from rlhf import tracking
from rlhf.artifacts import NodeDir, read_json, write_json, write_text
from rlhf.compose import RUN_FILE, freeze, run_dir
from rlhf.config import Annotators, Config, OnChange
from rlhf.cost.energy import drop_readings
from rlhf.cost.estimate import freeze_estimate
from rlhf.errors import (
    DISK_FULL,
    STOPPED_EXIT,
    ArtifactError,
    ConfigError,
    StageError,
    Stopped,
)
from rlhf.fingerprint import STAGES, differences, flat_config, read_flat
from rlhf.launch.local import PLAN, NodeServer
from rlhf.lease import run_lock
from rlhf.nodes import Node
from rlhf.plan import Listing, Plan, Round, build_plan, check_sets, waiting_batches
from rlhf.progress import duration, follow
from rlhf.resolve import Resolver, check_external_models
from rlhf.state import is_started, log_tail, what_changed
from rlhf.supply import check_split, fill_from_toy_world, forget_batch, list_store
from rlhf.versions import forget_overrules, write_versions
from rlhf.worker import process_environment

log = logging.getLogger(__name__)

FULL_BYTES = 2**20
"""With less free space a log may have lost its end, so the disk itself is asked."""

TOY_WORLD_KEYS = (
    "seed",
    "toy.sft_rows",
    "toy.prompts_per_kind",
    "toy.open_rows",
    "data.stream",
    "data.heldout_share",
    "data.heldout_salt",
)
"""Settings that are fixed once a toy world has been written into a run's stream."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is ready: planned, checked and frozen."""

    config: Config
    plan: Plan
    listing: Listing
    folder: Path
    todo: tuple[Node, ...]


def read_plan(folder: Path) -> Plan | None:
    """Return a run's plan, or None before its first start; ArtifactError for a damaged one."""
    path = folder / PLAN
    if not path.exists():
        return None
    tree = read_json(path)
    try:
        return Plan.from_json(tree)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no plan ({type(error).__name__}: {error}); restore it from a backup"
        ) from error


@contextmanager
def plan_lock(folder: Path) -> Iterator[None]:
    """Let one at a time change the plan of a run; a new run has no plan that others know."""
    if not folder.is_dir():
        yield
        return
    with folder.with_name(f".{folder.name}.{PLAN}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def draft(config: Config) -> tuple[Plan, Listing]:
    """Plan a run as `rlhf run` would, without writing anything."""
    listing, folder = list_store(config), run_dir(config)
    previous = read_plan(folder)
    nodes = previous.nodes if previous is not None else ()
    started = max((n.round for n in nodes if is_started(folder / n.name)), default=-1)
    return build_plan(config, listing, previous, started=started), listing


def extend(config: Config) -> tuple[Round, ...]:
    """Append the rounds that new batches allow to the plan of a run; returns them.

    Earlier rounds stay as they are, also while the run works on them; a run that has not started
    stays without a plan.
    """
    folder = run_dir(config)
    with plan_lock(folder):
        previous = read_plan(folder)
        if previous is None:
            return ()
        drafted, _ = draft(config)
        added = drafted.rounds[len(previous.rounds) :]
        if added:
            # Which corrections an earlier round takes in is decided when the run goes on.
            rounds = (*previous.rounds, *added)
            plan = replace(drafted, rounds=rounds, as_of=previous.as_of)
            write_json(folder / PLAN, plan.to_json())
        return added


def prepare(config: Config, console: Console, *, stages: Mapping[str, str] = STAGES) -> Prepared:
    """Fill, plan, check and freeze a run; nothing is written when the configuration is refused."""
    folder = run_dir(config)
    check_external_models(config)
    check_split(config)
    if config.toy.enabled:
        _check_toy_world(config, folder)
    else:
        check_sets(config, list_store(config))
    if config.toy.enabled:
        for name in fill_from_toy_world(config):
            console.print(f"[dim]ingested {name} into stream {config.data.stream}[/dim]")
    with plan_lock(folder):
        plan, listing = draft(config)
        if _check_started(config, plan, listing, folder, console, stages=stages):
            plan, listing = draft(config)
        _freeze(config, plan, folder)
    freeze_estimate(config, plan, folder)
    todo = tuple(node for node in within_limit(config, plan) if not _is_done(folder, node))
    for node in within_limit(config, plan):
        if node not in todo:
            NodeDir(folder / node.name).drop_checkpoints()
            drop_readings(folder / node.name)
    return Prepared(config, plan, listing, folder, todo)


def run(config: Config, console: Console, *, stages: Mapping[str, str] = STAGES) -> Prepared:
    """Run every node that is not done; raises StageError when one fails.

    A failure stops what depends on it and nothing else. Raises LeaseError while another process
    runs the same run.
    """
    _refuse_machines(config)
    folder = run_dir(config)
    with ExitStack() as held:
        # A new run gets its folder, and with it the lock, only when its configuration is accepted.
        is_new = not folder.is_dir()
        if not is_new:
            held.enter_context(run_lock(folder))
        prepared = prepare(config, console, stages=stages)
        if is_new:
            held.enter_context(run_lock(folder))
        return _run_prepared(prepared, console, stages=stages)


def _run_prepared(prepared: Prepared, console: Console, *, stages: Mapping[str, str]) -> Prepared:
    config, plan, folder, todo = prepared.config, prepared.plan, prepared.folder, prepared.todo
    write_versions(config, plan, folder)
    if not todo:
        total = len(within_limit(config, plan))
        console.print(f"nothing to do: all {total} nodes of run {config.run} are done")
        return prepared
    left = waiting_batches(plan, prepared.listing)
    if left and config.collect.annotators is Annotators.people:
        console.print(f"[dim]batches waiting for a later round: {', '.join(left)}[/dim]")
    used = {node.stage: stages[node.stage] for node in todo}
    environment = process_environment(config)
    preload = tracking.preload(config)
    with NodeServer(folder, stages=used, environment=environment, preload=preload) as server:
        try:
            failed = _run_nodes(server, prepared, console)
        except KeyboardInterrupt:
            _stop_nodes(server, config, console)
            raise
    stopped = [node.name for node, code in failed if code == STOPPED_EXIT]
    if stopped:
        raise Stopped(f"{', '.join(stopped)} saved and stopped; the same command goes on there")
    if failed:
        raise StageError("\n".join(failure(config, node, folder, code) for node, code in failed))
    return prepared


def _refuse_machines(config: Config) -> None:
    """Refuse a node that is to run on several machines: here is one."""
    plan, _ = draft(config)
    left = [node for node in within_limit(config, plan) if not _is_done(run_dir(config), node)]
    for node in left:
        number = config.resources.of(node.stage).nodes
        if number > 1:
            raise ConfigError(
                f"resources.{node.stage}.nodes={number} cannot work with rlhf run, which has this "
                f"machine only: use rlhf launch launcher=slurm, or resources.{node.stage}.nodes=1"
            )


def within_limit(config: Config, plan: Plan) -> list[Node]:
    """Return the nodes of the rounds that `rounds.limit` allows."""
    limit = config.rounds.limit
    return [node for node in plan.nodes if limit is None or node.round <= limit]


def _is_done(folder: Path, node: Node) -> bool:
    return NodeDir(folder / node.name).is_done()


def _run_nodes(server: NodeServer, prepared: Prepared, console: Console) -> list[tuple[Node, int]]:
    """Run nodes as their parents end, `compute.parallel_nodes` at a time; returns the failed."""
    waiting = {node.name: node for node in prepared.todo}
    running: dict[str, float] = {}
    failed: list[tuple[Node, int]] = []
    num_ended = 0
    with follow(console, prepared.folder) as update:
        while True:
            blocked = {*waiting, *running, *(node.name for node, _ in failed)}
            for node in [n for n in waiting.values() if not blocked & set(n.after)]:
                if len(running) < prepared.config.compute.parallel_nodes:
                    server.start(waiting.pop(node.name).name)
                    running[node.name] = time.monotonic()
            if not running:
                return failed
            name, code = server.wait(lambda: update(tuple(running)))
            seconds, num_ended = duration(time.monotonic() - running.pop(name)), num_ended + 1
            title = f"[{num_ended}/{len(prepared.todo)}] {name}"
            if code == 0:
                console.print(f"{title} done in {seconds}", highlight=False)
                write_versions(prepared.config, prepared.plan, prepared.folder)
            else:
                console.print(f"[red]{title} failed after {seconds}[/red]", highlight=False)
                failed.append((prepared.plan.node(name), code))


def _stop_nodes(server: NodeServer, config: Config, console: Console) -> None:
    """Let the running nodes save their state; a second interruption ends them at once."""
    if not server.running:
        return
    names, grace = ", ".join(sorted(server.running)), config.launcher.grace_seconds
    console.print(f"stopping: {names} may save for {grace} s; interrupt again to end at once")
    deadline = time.monotonic() + grace

    def check() -> None:
        if time.monotonic() > deadline:
            raise StageError(f"{names} did not stop within launcher.grace_seconds={grace}")

    server.stop()
    while server.running:
        name, code = server.wait(check)
        how = "saved and stopped" if code == STOPPED_EXIT else f"ended with exit code {code}"
        console.print(f"{name} {how}", highlight=False)


def failure(config: Config, node: Node, run_folder: Path, code: int) -> str:
    """Say which node failed and how, with the end of its log, and what to do next."""
    folder = run_folder / node.name
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    hint = " (9 is also what a machine without memory sends)" if code == -9 else ""
    if shutil.disk_usage(run_folder).free < FULL_BYTES:
        hint += f"; {DISK_FULL}"
    tail = "\n".join(f"  {line}" for line in log_tail(folder))
    return (
        f"node {node.name} {how}{hint}; the end of {folder / 'log.txt'}:\n{tail}\n"
        f"Mend the cause and run `rlhf run run={config.run} paths.runs={config.paths.runs}` again: "
        "finished nodes stay, this one goes on from its last checkpoint."
    )


def _check_toy_world(config: Config, folder: Path) -> None:
    """Refuse to change a toy world that has been written already."""
    if not (folder / RUN_FILE).exists():
        return
    old, new = read_flat(folder / RUN_FILE), flat_config(config)
    changed = differences(
        {key: old[key] for key in TOY_WORLD_KEYS if key in old},
        {key: new[key] for key in TOY_WORLD_KEYS},
    )
    if changed:
        raise ConfigError(
            f"the toy world of run={config.run} is fixed ({'; '.join(changed)}): choose run=NEW"
        )


def _check_started(
    config: Config,
    plan: Plan,
    listing: Listing,
    folder: Path,
    console: Console,
    *,
    stages: Mapping[str, str],
) -> bool:
    """Refuse a configuration that differs from the one of a started node, or drop those nodes.

    Tells whether nodes were dropped.
    """
    dropped = False
    resolver = Resolver(config, plan, folder, listing)
    for node in plan.nodes:
        if not is_started(folder / node.name):
            continue
        changed = what_changed(config, node, resolver, stages=stages)
        if not changed:
            continue
        affected = [node, *plan.downstream(node.name)]
        if config.on_change is OnChange.refuse:
            state = "is done" if _is_done(folder, node) else "has started"
            raise ConfigError(
                f"node {node.name} {state} with other values: {'; '.join(changed)}. Choose run=NEW "
                f"for a new lineage, or on_change=rerun to delete {len(affected)} nodes from it on"
            )
        dropped = True
        for old in reversed(affected):
            _drop(config, old, folder, console)
        undone = [old.round for old in affected if old.stage == "evaluate"]
        forget_overrules(folder, from_round=min(undone, default=len(plan.rounds) + 1))
    return dropped


def _drop(config: Config, node: Node, folder: Path, console: Console) -> None:
    if not (folder / node.name).exists():
        return
    if "batch" in node.options:
        forget_batch(config, str(node.options["batch"]))
    shutil.rmtree(folder / node.name)
    console.print(f"[yellow]on_change=rerun: dropped {node.name}[/yellow]")


def _freeze(config: Config, plan: Plan, folder: Path) -> None:
    """Write run.yaml and plan.json where they changed: what jobs and later calls start from."""
    frozen = replace(config, on_change=OnChange.refuse)
    path = folder / RUN_FILE
    if not path.exists() or read_flat(path) != flat_config(frozen):
        write_text(path, freeze(frozen))
    previous = read_plan(folder)
    if previous != plan:
        write_json(folder / PLAN, plan.to_json())
