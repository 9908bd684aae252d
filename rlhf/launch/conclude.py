"""What a job does when its node has ended: note how, and start again where that can help."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

from rlhf.config import Config
from rlhf.errors import LauncherError
from rlhf.launch.failures import (
    PREEMPTED,
    STOPPED,
    TIME_LIMIT,
    classify,
    count_failures,
    new_exit,
    note_exit,
    read_exits,
)
from rlhf.launch.slurm import call
from rlhf.lease import current_job
from rlhf.processes import STOP
from rlhf.state import log_tail

log = logging.getLogger(__name__)

SPARE_SECONDS = 60
"""A warning this long before the announced one still belongs to the time limit."""


def conclude(config: Config, folder: Path, code: int) -> int:
    """Note how the node of a Slurm job ended, and requeue the job where the policy says so.

    Returns the exit code of the job: 0 once it is requeued, for it has not failed.
    """
    job, attempt = current_job()
    if not job or code == 0:
        return code
    failure = classify(code, log_tail(folder))
    if failure == STOPPED and STOP.signal == signal.SIGUSR1:
        failure = TIME_LIMIT if _is_time_up(config, job) else PREEMPTED
    before = count_failures(read_exits(folder), job, failure)
    note_exit(folder, new_exit(job, attempt, code, failure))
    if before >= getattr(config.launcher.retries, failure, 0):
        return code
    print(f"{failure}: job {job} goes back to the queue", flush=True)
    return 0 if _requeue(config, job) else code


def _is_time_up(config: Config, job: str) -> bool:
    """Tell whether a warning came because the time limit is near."""
    try:
        left = call(
            ["squeue", "--noheader", "--jobs", job, "--format=%L"], seconds=_patience(config)
        )
    except LauncherError as error:
        log.warning("cannot ask for the time that is left: %s", error)
        return False
    # Slurm warns up to a minute early; without a limit there is nothing to run out of.
    seconds = clock_seconds(left.strip())
    return seconds is not None and seconds <= config.launcher.grace_seconds + SPARE_SECONDS


def clock_seconds(text: str) -> int | None:
    """Read a time as Slurm writes it, such as 1-02:03:04 or 4:30; None for a word."""
    days, dash, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        total = int(days) if dash else 0
    except ValueError:
        return None
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return ((total * 24 + hours) * 60 + minutes) * 60 + seconds


def _requeue(config: Config, job: str) -> bool:
    try:
        call(["scontrol", "requeue", job], seconds=_patience(config))
    except LauncherError as error:
        log.warning("job %s cannot be requeued (%s): `rlhf launch` starts it again", job, error)
        return False
    return True


def _patience(config: Config) -> float:
    return config.launcher.slurm.call_seconds
