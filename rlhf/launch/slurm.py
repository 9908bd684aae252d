"""Slurm: one job per node of the plan, `afterok` between them, shards of a sampling as an array.

Every job carries the run and the node in its comment, so that the queue itself says which node has
a job already: a `launch` that was killed half-way, or that runs twice, doubles nothing.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.compose import run_dir
from rlhf.config import Config, StageResources
from rlhf.errors import ConfigError, LauncherError
from rlhf.launch.failures import (
    CANCELLED,
    ERROR,
    NODE_FAILURE,
    OUT_OF_MEMORY,
    PARENT_FAILED,
    PREEMPTED,
    TIME_LIMIT,
)
from rlhf.launch.jobs import ENDED, PENDING, RUNNING, Job, group_name
from rlhf.launch.templates import fill, template
from rlhf.nodes import Node

TEMPLATE = "slurm.sbatch"
JOB_LOGS = "jobs"
"""Folder beside a node's files for what its jobs print."""
FORMAT = "%A|%F|%K|%T|%r|%S|%k"
"""squeue: job id, array job id, array index, state, reason, start, comment, in every version."""

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED")
LIVING = ("RUNNING", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT")
FAILURES = {
    "COMPLETED": "",
    "TIMEOUT": TIME_LIMIT,
    "DEADLINE": TIME_LIMIT,
    "OUT_OF_MEMORY": OUT_OF_MEMORY,
    "NODE_FAIL": NODE_FAILURE,
    "BOOT_FAIL": NODE_FAILURE,
    "PREEMPTED": PREEMPTED,
    "CANCELLED": CANCELLED,
}
"""How Slurm calls the end of a job; what is not listed is an error of ours."""

NEVER = "DependencyNeverSatisfied"
SHARD = "$SLURM_ARRAY_TASK_ID"


class SlurmLauncher:
    """Submits, finds and cancels the jobs of one run."""

    orders_jobs = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._folder = run_dir(config).absolute()
        self.key = hashlib.blake2b(str(self._folder).encode(), digest_size=6).hexdigest()

    def submit(self, nodes: Sequence[Node], after: Sequence[str]) -> dict[str, str]:
        """Submit one node, or several shards as one array; returns the job id per node."""
        for node in nodes:
            (self._folder / node.name / JOB_LOGS).mkdir(parents=True, exist_ok=True)
        answer = self._call("sbatch", "--parsable", script=self.render(nodes, after))
        job = answer.partition(";")[0].strip()
        shards = {node.name: node.options.get("shard") for node in nodes}
        return {name: job if n is None else f"{job}_{n}" for name, n in shards.items()}

    def poll(self) -> dict[str, Job]:
        """Return the newest job of each node that the controller still remembers."""
        rows = self._call(
            "squeue", "--noheader", "--array", "--me", "--states=all", f"--format={FORMAT}"
        )
        found: dict[str, tuple[int, Job]] = {}
        for row in rows.splitlines():
            for number, job in self._parse(row):
                if job.node not in found or number > found[job.node][0]:
                    found[job.node] = number, job
        return {name: job for name, (_, job) in found.items()}

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs; what a running one has saved stays."""
        if jobs:
            self._call("scancel", *sorted({job.id for job in jobs}))

    def render(self, nodes: Sequence[Node], after: Sequence[str]) -> str:
        """Return the job script of a node, or of the shards of a sampling."""
        config, node = self._config, nodes[0]
        shards = [str(node.options["shard"]) for node in nodes if "shard" in node.options]
        options = [*self._identity(node), *self._placement(node.stage), *self._life()]
        if shards:
            options.append(f"--array={','.join(shards)}")
        if after:
            # Waiting for all shards of a sampling is waiting for its array.
            after = list(dict.fromkeys(job.partition("_")[0] for job in after))
            options += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        name = f"{group_name(node)}-{SHARD}" if shards else shlex.quote(node.name)
        runs = shlex.quote(f"paths.runs={Path(config.paths.runs).absolute()}")
        command = f"{shlex.quote(sys.executable)} -m rlhf.cli stage {name} run={config.run} {runs}"
        return fill(
            template(config.launcher.template, TEMPLATE),
            options="\n".join(f"#SBATCH {option}" for option in options),
            setup="\n".join(config.launcher.setup) or "true",
            command=command,
        )

    def _identity(self, node: Node) -> list[str]:
        group = group_name(node)
        is_shard = "shard" in node.options
        log = f"{group}-%a/{JOB_LOGS}/%A_%a.txt" if is_shard else f"{group}/{JOB_LOGS}/%j.txt"
        return [
            f"--job-name={self._config.run}:{group}",
            f"--comment=rlhf:{self.key}:{group}",
            f"--output={self._folder / log}",
            f"--chdir={Path.cwd()}",
        ]

    def _placement(self, stage: str) -> list[str]:
        """Return where a stage's jobs run, and what they get there."""
        slurm, resources = self._config.launcher.slurm, self._config.resources.of(stage)
        cpus = cpus_per_process(resources, self._config) * resources.processes
        wished = {
            "partition": resources.partition or slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": resources.constraint or slurm.constraint,
            "reservation": slurm.reservation,
            "mem": resources.memory,
            "time": resources.time,
            "gres": f"gpu:{resources.gpus * resources.processes}" if resources.gpus else None,
        }
        return [
            f"--nodes={resources.nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={cpus}",
            *(f"--{name}={value}" for name, value in wished.items() if value is not None),
            *slurm.extra,
        ]

    def _life(self) -> list[str]:
        return [
            "--requeue",
            "--open-mode=append",
            f"--signal=B:USR1@{self._config.launcher.grace_seconds}",
        ]

    def _parse(self, row: str) -> list[tuple[int, Job]]:
        """Read one line of squeue: a job, or the shards of an array; none of another run's."""
        number, array, index, state, reason, start, comment = row.split("|", maxsplit=6)
        mark = f"rlhf:{self.key}:"
        if not comment.startswith(mark):
            return []
        group = comment[len(mark) :]
        shards = array_indices(index)
        names = {f"{group}-{n}": f"{array}_{n}" for n in shards} or {group: number}
        return [
            (int(number), _job(node, job, state=state, reason=reason, start=start))
            for node, job in names.items()
        ]

    def _call(self, *command: str, script: str | None = None) -> str:
        return call(command, seconds=self._config.launcher.slurm.call_seconds, script=script)


def _job(node: str, job: str, *, state: str, reason: str, start: str) -> Job:
    if reason == NEVER and state in (*WAITING, "CANCELLED"):
        # Such a job waits for ever or was removed; the next launch replaces it.
        return Job(node, job, ENDED, reason, failure=PARENT_FAILED)
    if state in WAITING:
        return Job(node, job, PENDING, reason, start=start)
    if state in LIVING:
        return Job(node, job, RUNNING, state, start=start)
    return Job(node, job, ENDED, state, failure=FAILURES.get(state, ERROR))


def array_indices(text: str) -> list[int]:
    """Read the indices of an array as squeue writes them, such as 3 or 0-2,7%4; [] for N/A."""
    found: list[int] = []
    for part in text.partition("%")[0].strip("[]").split(","):
        first, dash, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not dash):
            found += range(int(first), int(last if dash else first) + 1)
    return found


def call(command: Sequence[str], *, seconds: float, script: str | None = None) -> str:
    """Ask Slurm; raises LauncherError when it is absent, refuses, or does not answer in time."""
    try:
        done = subprocess.run(
            command, input=script, capture_output=True, text=True, timeout=seconds, check=False
        )
    except FileNotFoundError as error:
        raise LauncherError(
            f"{command[0]} is not installed here: launch from a machine of the cluster, or use "
            "launcher=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LauncherError(
            f"{command[0]} gave no answer in {seconds:g} s: the controller is down or busy; the "
            "same command later goes on, and no job is submitted twice"
        ) from error
    if done.returncode != 0:
        raise LauncherError(
            f"{command[0]} failed: {' '.join(done.stderr.split()) or done.stdout}; correct "
            "launcher.slurm.* or resources.*, then the same command goes on"
        )
    return done.stdout


def cpus_per_process(resources: StageResources, config: Config) -> int:
    """Return the cores of a process: as many as its mathematics uses, if nothing else is said."""
    return resources.cpus if resources.cpus is not None else config.compute.num_threads


def check_template(config: Config) -> None:
    """Refuse a job template that cannot be filled; raises ConfigError."""
    try:
        fill(template(config.launcher.template, TEMPLATE), options="", setup="", command="")
    except OSError as error:
        raise ConfigError(
            f"launcher.template={config.launcher.template} cannot be read ({error.strerror}): "
            f"copy jobs/{TEMPLATE} and edit it"
        ) from error
