"""What a job does when its node has ended: note how, and start again where that can help."""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from rlhf.config import Config
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
from rlhf.processes import STOP
from rlhf.state import log_tail

log = logging.getLogger(__name__)

JOB, ATTEMPT, END_TIME = "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME"
SPARE_SECONDS = 60
"""A warning this long before the announced one still belongs to the time limit."""


def job_id(environment: Mapping[str, str]) -> str | None:
    """Return the Slurm job this process belongs to, if it belongs to one."""
    return environment.get(JOB)


def attempt(environment: Mapping[str, str]) -> int:
    """Return how often this job was started again."""
    return int(environment.get(ATTEMPT, "0"))


def conclude(config: Config, folder: Path, code: int, environment: Mapping[str, str]) -> int:
    """Note how the node of a Slurm job ended, and requeue the job where the policy says so.

    Returns the exit code of the job: 0 once it is requeued, for it has not failed.
    """
    job = job_id(environment)
    if job is None or code == 0:
        return code
    failure = classify(code, log_tail(folder))
    if failure == STOPPED and STOP.signal == signal.SIGUSR1:
        failure = TIME_LIMIT if _is_time_up(config, environment) else PREEMPTED
    before = count_failures(read_exits(folder), job, failure)
    note_exit(folder, new_exit(job, attempt(environment), code, failure))
    if before >= getattr(config.launcher.retries, failure, 0):
        return code
    print(f"{failure}: job {job} goes back to the queue", flush=True)
    return 0 if _requeue(config, job) else code


def _is_time_up(config: Config, environment: Mapping[str, str]) -> bool:
    """Tell whether a warning came because the time limit is near."""
    end = environment.get(END_TIME)
    if end is None:
        # Older versions do not tell the job; without a limit there is nothing to run out of.
        return False
    return int(end) - time.time() <= config.launcher.grace_seconds + SPARE_SECONDS


def _requeue(config: Config, job: str) -> bool:
    command = ["scontrol", "requeue", job]
    seconds = config.launcher.slurm.call_seconds
    try:
        subprocess.run(command, check=True, timeout=seconds, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("job %s cannot be requeued (%s): `rlhf launch` starts it again", job, error)
        return False
    return True
