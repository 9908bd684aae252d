"""Why a node's job ended without a result, and what to do about it.

A job notes each end in exits.jsonl in the node's folder. What it cannot note, because it was killed
with its machine, the scheduler says.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.artifacts import read_jsonl
from rlhf.errors import STOPPED_EXIT

EXITS = "exits.jsonl"
SUBMITTED = ".submitted"
"""File in a node's folder whose time is that of its newest job."""

PREEMPTED, TIME_LIMIT, NODE_FAILURE = "preempted", "time_limit", "node_failure"
OUT_OF_MEMORY, ERROR = "out_of_memory", "error"
BAD_INPUT, CANCELLED, PARENT_FAILED, STOPPED = "bad_input", "cancelled", "parent_failed", "stopped"
KILLED = "killed"

REMEDIES: Mapping[str, str] = {
    PREEMPTED: "another job took the machine; it goes on from its checkpoint when it is back",
    TIME_LIMIT: "it goes on from its checkpoint; a longer resources.STAGE.time means fewer stops",
    NODE_FAILURE: "the machine failed; `rlhf launch` starts it again from its checkpoint",
    OUT_OF_MEMORY: "it was killed, most likely for want of memory: lower STAGE.micro_batch_size, "
    "set model.gradient_checkpointing=true or distributed=zero3, or raise resources.STAGE.memory; "
    "then `rlhf launch` again",
    ERROR: "mend the cause that the log's last lines name, then `rlhf launch` again",
    BAD_INPUT: "correct the setting or the data that the log names, then `rlhf launch` again",
    CANCELLED: "`rlhf launch` starts it again from its checkpoint",
    PARENT_FAILED: "a node before it failed: mend that one, then `rlhf launch` again",
    STOPPED: "`rlhf launch` goes on from its checkpoint",
    KILLED: "it ended without a word: its process was killed, often for want of memory, or its "
    "machine stopped; `rlhf launch` goes on from its checkpoint, and if it ends so again, lower "
    "STAGE.micro_batch_size",
}
"""What to do, per kind of failure; STAGE stands for the node's stage."""

MEMORY_WORDS = ("CUDA out of memory", "OutOfMemoryError", "MemoryError", "oom-kill", "oom_kill")


@dataclass(frozen=True, slots=True)
class Exit:
    """One end of a job: which attempt, how it ended, and when (Unix seconds)."""

    job: str
    attempt: int
    code: int
    failure: str
    time: float


def remedy(failure: str, stage: str) -> str:
    """Return what to do about a failure of a stage's node."""
    return REMEDIES[failure].replace("STAGE", stage)


def classify(code: int, log_lines: list[str]) -> str:
    """Return the kind of failure behind a node's exit code; "" for success.

    A negative code is a signal's number. SIGKILL without a word is what a machine without memory
    sends.
    """
    if code == 0:
        return ""
    if code == STOPPED_EXIT:
        return STOPPED
    if any(word in line for line in log_lines for word in MEMORY_WORDS):
        return OUT_OF_MEMORY
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return OUT_OF_MEMORY
    return BAD_INPUT if code == 2 else ERROR


def why(own: str, scheduler: str) -> str:
    """Return why a job ended, from its own word and its scheduler's ("" where one is silent).

    The job knows best, but for who stopped it.
    """
    if own and not (own == STOPPED and scheduler):
        return own
    return scheduler


def note_exit(folder: Path, entry: Exit) -> None:
    """Append an end to the node's exits.jsonl."""
    with (folder / EXITS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(entry)) + "\n")


def read_exits(folder: Path) -> list[Exit]:
    """Return the ends of a node's jobs, oldest first."""
    return [Exit(**row) for row in read_jsonl(folder / EXITS)]


def note_submission(folder: Path) -> None:
    """Note that a node has a new job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUBMITTED).touch()


def is_submitted_again(folder: Path) -> bool:
    """Tell whether a node has got a new job since one of its jobs noted an end."""
    try:
        submitted = (folder / SUBMITTED).stat().st_mtime
    except FileNotFoundError:
        return False
    exits = read_exits(folder)
    return not exits or exits[-1].time < submitted


def count_failures(exits: list[Exit], job: str, failure: str) -> int:
    """Return how often a job has ended with a failure."""
    return sum(entry.job == job and entry.failure == failure for entry in exits)


def new_exit(job: str, attempt: int, code: int, failure: str) -> Exit:
    """Return an end that happens now."""
    return Exit(job, attempt, code, failure, time.time())
