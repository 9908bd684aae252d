"""Run one node in this process: inputs, stage, manifest."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlhf.artifacts import (
    NodeDir,
    digest_json,
    read_json,
    remove_leftovers,
    write_json,
    write_manifest,
    write_text,
)
from rlhf.compose import freeze
from rlhf.config import Config
from rlhf.cost.energy import Meter, device_watts, drop_readings, node_usage
from rlhf.cost.peak import is_gpu
from rlhf.cost.rates import device_name
from rlhf.errors import (
    DISK_FULL,
    STOPPED_EXIT,
    ConfigError,
    LeaseError,
    RlhfError,
    StageError,
    Stopped,
    UserError,
    is_disk_full,
)
from rlhf.fingerprint import (
    differences,
    execution_only,
    fingerprint,
    flat_config,
    read_flat,
    stage_revision,
)
from rlhf.lease import Lease
from rlhf.nodes import Inputs, Node, NodeContext, node_seed
from rlhf.plan import Plan
from rlhf.processes import FOLDER, RANK, join
from rlhf.provenance import environment, origin
from rlhf.resolve import Resolver, inputs_from_json, inputs_to_json, verify
from rlhf.state import (
    CONFIG,
    INPUTS,
    LOG,
    PROGRESS,
    PROVENANCE,
    is_started,
    read_progress,
    what_changed,
)
from rlhf.supply import list_store
from rlhf.tracking import Tracker

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5
HARMLESS = (
    "paths",
    "tracking",
    "checkpoint",
    "ingest",
    "launcher",
    "on_change",
    "run",
    "recipe",
    "cost",
)
"""Groups of execution-only settings that cannot change the last bit of a result."""

SPARE_BYTES = 200 * 2**20
STATE_FACTOR = 3
"""Size of a training state over its weights: fp32 weights and two AdamW moments."""


def process_environment(config: Config) -> dict[str, str]:
    """Return the variables a node's process needs from its very start.

    Thread counts are forced, because they change the last digits; the others yield to the caller's.
    NumPy gets no threads of its own, so that the process that forks nodes has a single one.
    """
    threads = str(config.compute.num_threads)
    forced = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1"}
    wished = {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296"
        ":glibc.malloc.trim_threshold=8589934592",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    return {**forced, **{name: os.environ.get(name, value) for name, value in wished.items()}}


def run_logged(
    config: Config, plan: Plan, run_dir: Path, name: str, *, stages: Mapping[str, str]
) -> int:
    """Run a node, or this process's part of it, with its output in a log file.

    Returns 0, 1 (failed), 2 (bad config or data) or 75 (stopped on request, state saved). The first
    process writes log.txt, the others processes/RANK.log.
    """
    folder = run_dir / name
    rank = os.environ.get(RANK, "0")
    path = folder / LOG if rank == "0" else folder / FOLDER / f"{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(config, plan, run_dir, name, stages=stages)
    except Stopped as error:
        log.warning("%s", error)
        return STOPPED_EXIT
    except RlhfError as error:
        log.error("%s: %s", type(error).__name__, error)
        return 2 if isinstance(error, UserError) else 1
    except Exception as error:
        if is_disk_full(error):
            log.error("%s (%s)", DISK_FULL, error)
        else:
            log.error("node %s failed\n%s", name, traceback.format_exc())
        return 1
    return 0


def work(
    config: Config, plan: Plan, run_dir: Path, name: str, *, stages: Mapping[str, str]
) -> None:
    """Run a node until its manifest is written; a node that is done already is left alone.

    With several processes the first one holds the lease and writes; the others work along.
    """
    node, folder = plan.node(name), run_dir / name
    timeout = config.distributed.timeout_seconds
    processes = join(folder, timeout_seconds=timeout, device=config.compute.device)
    lease = Lease(folder)
    has_gpu = is_gpu(config, node.stage)
    meter = None
    if processes.is_main:
        lease.take()
        remove_leftovers(folder)
    try:
        progress = Progress(folder, lease) if processes.is_main else None
        directory = NodeDir(
            folder, keep=config.checkpoint.keep, on_step=progress, processes=processes
        )
        if processes.broadcast(directory.is_done(), "whether the node is done"):
            log.info("%s is done already", name)
            return
        meter = Meter(folder, has_gpu=has_gpu)
        begun = _begin(config, plan, run_dir, node, stages=stages) if processes.is_main else None
        inputs, provenance = processes.broadcast(begun, "the node's inputs")
        started = time.monotonic() - read_progress(folder)["seconds"]
        context = NodeContext(config, node, inputs, directory, node_seed(config.seed, name))
        with Tracker(config, name, folder) if processes.is_main else nullcontext() as tracker:
            directory.metrics.mirror = tracker.log if tracker else None
            importlib.import_module(stages[node.stage]).run(context)
            # Every process's reading is written before the first one adds them up.
            meter.stop()
            processes.wait("end of the stage")
        if not processes.is_main:
            return
        entries = _manifest_entries(config, node, inputs, provenance)
        entries |= node_usage(folder, config, watts=device_watts(config, has_gpu=has_gpu))
        entries["num_processes"] = processes.size
        entries["wall_seconds"] = round(time.monotonic() - started, 3)
        lease.check()
        write_manifest(folder, entries)
        directory.drop_checkpoints()
        drop_readings(folder)
        log.info("%s is done after %.1f s", name, entries["wall_seconds"])
    except RuntimeError as error:
        if processes.size > 1 and not isinstance(error, RlhfError):
            # A peer that ended or hangs shows as an error of the library that waits for it.
            raise StageError(f"{error}\n{processes.report()}") from error
        raise
    finally:
        if meter is not None:
            meter.stop()
        processes.close()
        if processes.is_main:
            lease.release()


def _begin(
    config: Config, plan: Plan, run_dir: Path, node: Node, *, stages: Mapping[str, str]
) -> tuple[Inputs, dict[str, Any]]:
    """Check that the node can start here, and resolve what it reads."""
    for parent in node.after:
        NodeDir(run_dir / parent).manifest()
    resolver = Resolver(config, plan, run_dir, list_store(config))
    inputs, provenance = _start(config, node, resolver, stages=stages)
    verify(inputs, run_dir)
    _check_disk(config, inputs, run_dir / node.name)
    return inputs, provenance


class Progress:
    """Writes progress.json, at most twice a second; stops a node that lost its lease.

    The first row says where the node goes on, so that nobody takes an earlier start's for its pace.
    """

    def __init__(self, folder: Path, lease: Lease) -> None:
        self.path = folder / PROGRESS
        self.lease = lease
        row = read_progress(folder)
        self.before = float(row["seconds"])
        self.start = time.monotonic()
        self.written = 0.0
        self.first: tuple[int, float] | None = None
        self._write({**row, "eta": None})

    def __call__(self, step: int, total: int) -> None:
        if self.lease.lost:
            raise LeaseError(f"another process took over {self.path.parent}: this one stops")
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
        if step < total and now - self.written < PROGRESS_SECONDS:
            return
        self.written = now
        first_step, first_time = self.first
        pace = (now - first_time) / (step - first_step) if step > first_step else None
        eta = None if pace is None else round(pace * (total - step), 1)
        seconds = self.before + now - self.start
        self._write({"step": step, "total": total, "seconds": seconds, "eta": eta})

    def _write(self, row: Mapping[str, Any]) -> None:
        temporary = self.path.with_name(f".{PROGRESS}.tmp")
        temporary.write_text(json.dumps(row), encoding="utf-8")
        temporary.replace(self.path)


def _start(
    config: Config, node: Node, resolver: Resolver, *, stages: Mapping[str, str]
) -> tuple[Inputs, dict[str, Any]]:
    """Resolve the inputs, or take those of the earlier start; inputs.json is written last."""
    folder = resolver.run_dir / node.name
    if is_started(folder):
        changed = what_changed(config, node, resolver, stages=stages)
        if changed:
            raise ConfigError(
                f"{node.name} has started with other values ({'; '.join(changed)}): "
                "choose run=NEW, or `rlhf run on_change=rerun`"
            )
        return inputs_from_json(read_json(folder / INPUTS)), _resume(config, node, folder)
    inputs = resolver.resolve(node)
    module = stages[node.stage]
    provenance = {
        "fingerprint": fingerprint(config, node, inputs, module=module),
        "revision": stage_revision(module),
        "seed": node_seed(config.seed, node.name),
        "environment": environment(config),
        "origin": origin(),
        "exact": True,
    }
    for leftover in ("checkpoints", "shards", "model"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    write_text(folder / CONFIG, freeze(config))
    write_json(folder / PROVENANCE, provenance)
    write_json(folder / INPUTS, inputs_to_json(inputs))
    return inputs, provenance


def _can_change_bits(key: str, stage: str) -> bool:
    group, _, rest = key.partition(".")
    if group == "resources":
        return rest in (f"{stage}.nodes", f"{stage}.processes")
    return group not in HARMLESS and not key.startswith("model.shape.")


def _resume(config: Config, node: Node, folder: Path) -> dict[str, Any]:
    """Compare this process with the one that started the node; note the end of exactness."""
    provenance: dict[str, Any] = read_json(folder / PROVENANCE)
    changed = differences(provenance["environment"], environment(config))
    old, new = read_flat(folder / CONFIG), flat_config(config)
    changed += [
        text
        for text in differences(execution_only(old), execution_only(new))
        if _can_change_bits(text.partition(":")[0], node.stage)
    ]
    if changed and provenance["exact"]:
        log.warning("resumed under other conditions, so not bit for bit: %s", "; ".join(changed))
        provenance = {**provenance, "exact": False, "changed": changed}
        write_json(folder / PROVENANCE, provenance)
    return provenance


def _manifest_entries(
    config: Config, node: Node, inputs: Inputs, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "node": node.name,
        "stage": node.stage,
        "round": node.round,
        "options": dict(node.options),
        "fingerprint": provenance["fingerprint"],
        "revision": provenance["revision"],
        "config_digest": digest_json(flat_config(config)),
        "inputs": inputs.digests(),
        "seeds": {"run": config.seed, "node": provenance["seed"]},
        **provenance["environment"],
        **origin(),
        "device_name": device_name(config, node.stage),
        "exact": provenance["exact"],
    }


def _check_disk(config: Config, inputs: Inputs, folder: Path) -> None:
    """Stop before a node that would fill the disk: a model and its training states must fit."""
    sizes = [
        sum(path.stat().st_size for path in Path(model.path).rglob("*.safetensors"))
        for model in inputs.models.values()
        if Path(model.path).is_dir()
    ]
    needed = SPARE_BYTES + max(sizes, default=0) * (1 + STATE_FACTOR * (config.checkpoint.keep + 1))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StageError(
            f"{folder} has {free / 2**30:.1f} GiB free and needs {needed / 2**30:.1f} GiB: "
            "free some space, lower checkpoint.keep, or use another paths.runs"
        )
