"""What `rlhf launch`, `rlhf status` and `rlhf cancel` do with a run's jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from rlhf.artifacts import NodeDir, write_json
from rlhf.config import Config, LauncherKind
from rlhf.errors import ConfigError, LauncherError, StageError
from rlhf.launch.failures import is_submitted_again, read_exits, why
from rlhf.launch.jobs import Job, Launcher, next_submissions
from rlhf.lease import is_run_locked, process_start
from rlhf.nodes import Node

BACKGROUND = "background.json"
BACKGROUND_LOG = "background.txt"
END_SECONDS = 10.0
"""Longest wait for a process that follows jobs, which ends at once."""


def open_launcher(config: Config) -> Launcher:
    """Return the scheduler that the configuration names; raises ConfigError for `local`."""
    if config.launcher.kind is LauncherKind.slurm:
        from rlhf.launch.slurm import SlurmLauncher, check_template

        check_template(config)
        return SlurmLauncher(config)
    if config.launcher.kind is LauncherKind.kubernetes:
        from rlhf.launch.kubernetes import KubernetesLauncher

        return KubernetesLauncher(config)
    raise ConfigError(
        f"launcher={config.launcher.kind.name} has no jobs of its own: choose launcher=slurm or "
        "launcher=kubernetes"
    )


def show_jobs(config: Config, nodes: Sequence[Node], folder: Path, console: Console) -> None:
    """Print the job scripts that `launch` would submit; unknown job ids show as <NODE>."""
    launcher = open_launcher(config)
    done = {node.name for node in nodes if NodeDir(folder / node.name).is_done()}
    for item in next_submissions(nodes, done=done, alive=set(), held=set(), orders_jobs=True):
        text = launcher.render(item.nodes, [f"<{name}>" for name in item.after])
        console.print(text, markup=False, highlight=False)


def launch_jobs(config: Config, nodes: Sequence[Node], folder: Path, console: Console) -> None:
    """Submit what is missing; with launcher.follow stay until everything is done.

    Raises StageError when a node failed while following.
    """
    from rlhf.launch.reconciler import Reconciler

    reconciler = Reconciler(config, nodes, folder, open_launcher(config))
    if config.launcher.follow:
        reconciler.follow(console)
        if reconciler.held:
            raise StageError(reconciler.failures())
        return
    alive, submitted = reconciler.once()
    for name, job in alive.items():
        console.print(f"{name}: job {job.id} is {job.state} already", highlight=False)
    for name, number in submitted.items():
        console.print(f"{name}: job {number} submitted", highlight=False)
    if not alive and not submitted:
        console.print(f"nothing to launch: all {len(nodes)} nodes are done")
    else:
        console.print(f"follow them with `rlhf status run={config.run}`", highlight=False)


def launch_here(config: Config, folder: Path, console: Console) -> None:
    """Start `rlhf run` in the background of this machine, unless the run is run already."""
    if background_process(folder) is None and is_run_locked(folder):
        console.print(f"another process runs {config.run} already", highlight=False)
        return
    _start_background(config, folder, console, "run", does="runs")


def follow_here(config: Config, folder: Path, console: Console) -> None:
    """Follow the jobs from the background of this machine, unless somebody does already."""
    _start_background(config, folder, console, "launch", "launcher.follow=true", does="follows")


def _start_background(
    config: Config, folder: Path, console: Console, command: str, *settings: str, does: str
) -> None:
    from rlhf.launch.reconciler import launch_lock

    arguments = [command, f"run={config.run}", f"paths.runs={config.paths.runs}", *settings]
    log = folder / BACKGROUND_LOG
    with launch_lock(folder):
        pid = background_process(folder)
        if pid is not None:
            console.print(f"process {pid} {does} {config.run} already", highlight=False)
            return
        with log.open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "rlhf.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        write_json(folder / BACKGROUND, {"pid": child.pid, "start": process_start(child.pid)})
    console.print(f"process {child.pid} {does} {config.run}; its output: {log}", highlight=False)


def background_process(folder: Path) -> int | None:
    """Return the process that `launch` started on this machine, while it lives."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        row = json.loads((folder / BACKGROUND).read_bytes())
        start = process_start(row["pid"])
        if start is not None and start == row["start"]:
            return int(row["pid"])
    return None


def cancel_jobs(config: Config, folder: Path, console: Console, *, node: str) -> None:
    """End the run's jobs, or one node's; what they saved stays.

    Raises ConfigError for a node without a job.
    """
    if config.launcher.kind is LauncherKind.local:
        if node:
            raise ConfigError(
                f"node={node} has no job of its own with launcher=local, where one process runs "
                "all nodes: leave node out to end that one"
            )
        pid = _end_background(folder)
        if pid is None:
            console.print(f"no process started by `rlhf launch` runs {config.run}")
            return
        console.print(f"process {pid} saves its state and stops", highlight=False)
        return
    launcher = open_launcher(config)
    if not node:
        _end_follower(folder, console)
    alive = [job for job in launcher.poll().values() if job.is_alive]
    if node:
        alive = [job for job in alive if job.node == node]
        if not alive:
            raise ConfigError(f"node={node} has no job that waits or runs: see `rlhf status`")
    launcher.cancel(alive)
    names = ", ".join(f"{job.node} (job {job.id})" for job in alive) or "nothing: no job is alive"
    console.print(f"cancelled {names}", highlight=False)


def _end_background(folder: Path) -> int | None:
    """Ask the process in the background to end; returns it, None where there is none."""
    pid = background_process(folder)
    if pid is None:
        return None
    # It may end by itself in between.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    return pid


def _end_follower(folder: Path, console: Console) -> None:
    """End the process that follows the jobs, so that it submits none while they are cancelled."""
    pid = _end_background(folder)
    if pid is None:
        return
    end = time.monotonic() + END_SECONDS
    while background_process(folder) is not None and time.monotonic() < end:
        time.sleep(0.1)
    console.print(f"process {pid} follows them no longer", highlight=False)


def known_jobs(config: Config, console: Console) -> dict[str, Job]:
    """Return the run's jobs by node; none, with a word of why, when the scheduler is silent."""
    if config.launcher.kind is LauncherKind.local:
        return {}
    try:
        return open_launcher(config).poll()
    except LauncherError as error:
        console.print(f"[yellow]jobs unknown: {error}[/yellow]")
        return {}


def describe_job(job: Job | None) -> str:
    """Return a job as a table cell: id, state and the scheduler's reason."""
    if job is None:
        return ""
    word = job.reason if job.reason not in ("", "None", "RUNNING", "COMPLETED") else ""
    start = f"starts {job.start}" if job.state == "pending" and job.start not in ("", "N/A") else ""
    extra = ", ".join(text for text in (word, start) if text)
    return f"{job.id} {job.state}{f' ({extra})' if extra else ''}"


def failure_of(folder: Path, job: Job | None) -> str:
    """Return why a node that is not done and has no living job ended last, "" if it never did.

    Without a job, as where no scheduler was asked, an end before the newest submission is over.
    """
    exits = read_exits(folder)
    if job is None:
        return exits[-1].failure if exits and not is_submitted_again(folder) else ""
    own = exits[-1].failure if exits and exits[-1].job == job.id else ""
    return why(own, job.failure)
