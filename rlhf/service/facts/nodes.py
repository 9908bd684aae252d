"""Where each node of a run stands, how it ended, and what to do about it."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.artifacts import MANIFEST, read_json
from rlhf.config import LauncherKind
from rlhf.errors import RlhfError
from rlhf.launch.failures import (
    CANCELLED,
    ERROR,
    KILLED,
    PREEMPTED,
    STOPPED,
    TIME_LIMIT,
    classify,
    is_submitted_again,
    remedy,
)
from rlhf.launch.jobs import Job
from rlhf.launch.operator import failure_of, open_launcher
from rlhf.nodes import Node
from rlhf.service.facts.cache import Cache
from rlhf.service.facts.files import UNREADABLE, Stamp, not_found, stamp, steadily, tail
from rlhf.service.facts.runs import Run
from rlhf.state import LOG, NodeState, node_state

log = logging.getLogger(__name__)

JOBS_SECONDS = 5.0
"""The scheduler is asked about a run at most this often, however many look at its page."""
SILENT_SECONDS = 60.0
"""Time until a scheduler is asked again that gave no answer."""
LOG_LINES = 5000
"""Lines of a log in which a node's last word is looked for; a traceback may have hundreds."""
RECORD = re.compile(r"[\d-]{10} [\d:]{8},\d{3} (?P<level>[A-Z]+) \S+: (?P<text>.*)")
"""A line of a node's log that the logging module wrote."""
MAX_FINISHED = 50_000
"""Finished nodes that are remembered."""
BAD_INPUT_ERRORS = ("ConfigError", "DataError", "UserError")
NO_FAILURES = ("", STOPPED, CANCELLED, PREEMPTED, TIME_LIMIT)
"""Ends after which a node goes on where it was."""
_WORDS = Cache(1000)


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node of the plan and where it stands.

    `state` is done, running, stopped or waiting; `seconds`, `eta` and `silent` are in seconds;
    `failure` is a kind of launch/failures.py, "" without one, and `remedy` what to do about it.
    """

    name: str
    stage: str
    round: int
    after: tuple[str, ...]
    state: str
    step: int
    total: int
    seconds: float
    eta: float | None
    silent: float | None
    peak_memory_mb: float | None
    job: dict[str, str] | None
    failure: str
    remedy: str

    @property
    def has_failed(self) -> bool:
        """Tell whether the node ended in a way that somebody has to look at."""
        return self.failure not in NO_FAILURES


def find_node(run: Run, name: str) -> Node:
    """Return a node of the plan; a Problem (404) naming the nodes there are."""
    for node in run.plan.nodes:
        if node.name == name:
            return node
    raise not_found(f"node of run {run.name}:", name, (node.name for node in run.plan.nodes))


def node_rows(run: Run, *, ask_scheduler: bool = True) -> list[NodeRow]:
    """Return every node of the plan, in its order.

    Without `ask_scheduler` only files are read, so that nothing is known about waiting jobs.
    """
    jobs, trouble = _JOBS.of(run) if ask_scheduler else ({}, "")
    return [_row(run, node, jobs.get(node.name), trouble) for node in run.plan.nodes]


def node_row(run: Run, node: Node) -> NodeRow:
    """Return one node of the plan."""
    jobs, trouble = _JOBS.of(run)
    return _row(run, node, jobs.get(node.name), trouble)


def _row(run: Run, node: Node, job: Job | None, trouble: str) -> NodeRow:
    folder = run.folder / node.name
    try:
        state = _FINISHED.state_of(run, node)
        failure = steadily(lambda: _failure(run, folder, state, job))
        advice = remedy(failure, node.stage) if failure else ""
    except UNREADABLE as error:
        # One damaged node is no reason to hide the others.
        state = NodeState(node.name, "stopped", 0, 0, 0.0, None)
        failure, advice = ERROR, f"{folder} cannot be read: {error}"
    return NodeRow(
        name=node.name,
        stage=node.stage,
        round=node.round,
        after=node.after,
        state=state.state,
        step=state.step,
        total=state.total,
        seconds=state.seconds,
        eta=state.eta,
        silent=state.silent,
        peak_memory_mb=state.peak_memory_mb,
        job=_shown_job(job, trouble if state.state != "done" else ""),
        failure=failure,
        remedy=advice,
    )


def _shown_job(job: Job | None, trouble: str) -> dict[str, str] | None:
    """Return what is shown of a job; of a scheduler that is silent, why nothing is known."""
    if job is not None:
        return {"id": job.id, "state": job.state, "reason": job.reason}
    return {"id": "", "state": "unknown", "reason": trouble} if trouble else None


def _failure(run: Run, folder: Path, state: NodeState, job: Job | None) -> str:
    """Return how a node ended that is over and not done, "" for any other."""
    if state.state not in ("stopped", "waiting") or (job is not None and job.is_alive):
        return ""
    if job is None and is_submitted_again(folder):
        return ""
    noted = failure_of(folder, job)
    if noted or state.state == "waiting":
        return noted
    # A scheduler knows itself what it killed. With a manifest the node had ended well: its files
    # were changed afterwards.
    is_told = run.config.launcher.kind is not LauncherKind.local or (folder / MANIFEST).exists()
    return last_word(folder) or ("" if is_told else KILLED)


def last_word(folder: Path) -> str:
    """Return how a node ended according to its log, which is all that `rlhf run` leaves.

    "" where the log ends without a word: the process was killed, or its machine stopped.
    """
    word: str = _WORDS.get(folder, stamp(folder / LOG), lambda: _read_last_word(folder))
    return word


def _read_last_word(folder: Path) -> str:
    lines = tail(folder / LOG, lines=LOG_LINES)
    for i in range(len(lines) - 1, -1, -1):
        record = RECORD.match(lines[i])
        if record is not None:
            # The lines before it are of earlier attempts, too.
            return _word(record["level"], record["text"], lines[i:])
    return ""


def _word(level: str, text: str, lines: list[str]) -> str:
    if level == "ERROR":
        return classify(2 if text.partition(":")[0] in BAD_INPUT_ERRORS else 1, lines)
    return STOPPED if level == "WARNING" and "stopped on request" in text else ""


@dataclass(frozen=True, slots=True)
class _Finished:
    """A finished node: its manifest's stamp, its state, and the sizes of its files."""

    manifest: Stamp
    state: NodeState
    sizes: tuple[tuple[str, int], ...]

    @property
    def is_whole(self) -> bool:
        """Tell whether every file is still there in its size, as `NodeDir.is_done` wants it."""
        stamps = ((stamp(path), size) for path, size in self.sizes)
        return all(found is not None and found[1] == size for found, size in stamps)


class _Nodes:
    """States of nodes; of a finished one only its files' sizes are looked at again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Path, _Finished] = {}

    def state_of(self, run: Run, node: Node) -> NodeState:
        """Return where a node stands now."""
        folder = run.folder / node.name
        manifest = stamp(folder / MANIFEST)
        known = self._found.get(folder)
        if known is not None and known.manifest == manifest and known.is_whole:
            return known.state
        state = steadily(lambda: node_state(run.folder, node))
        if manifest is not None and state.state == "done":
            files = read_json(folder / MANIFEST)["files"]
            sizes = tuple((str(folder / name), entry["size"]) for name, entry in files.items())
            with self._lock:
                if len(self._found) >= MAX_FINISHED:
                    del self._found[next(iter(self._found))]
                self._found[folder] = _Finished(manifest, state, sizes)
        return state


@dataclass(slots=True)
class _Answer:
    """What a scheduler said last of a run's jobs, or why nothing; asked again from `due` on."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    due: float = 0.0
    jobs: Mapping[str, Job] = field(default_factory=dict)
    trouble: str = ""


class _Jobs:
    """What the schedulers said last; one question at a time for a run, and not too many."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[Path, _Answer] = {}

    def of(self, run: Run) -> tuple[Mapping[str, Job], str]:
        """Return the run's jobs by node, and why they are unknown where they are.

        There are none without a scheduler. While another thread asks, the last answer counts.
        """
        if run.config.launcher.kind is LauncherKind.local:
            return {}, ""
        with self._lock:
            answer = self._answers.setdefault(run.folder, _Answer())
        if answer.lock.acquire(blocking=False):
            try:
                if time.monotonic() >= answer.due:
                    _ask(run, answer)
            finally:
                answer.lock.release()
        return answer.jobs, answer.trouble


def _ask(run: Run, answer: _Answer) -> None:
    try:
        answer.jobs, answer.trouble = open_launcher(run.config).poll(), ""
        answer.due = time.monotonic() + JOBS_SECONDS
    except (RlhfError, OSError) as error:
        if str(error) != answer.trouble:
            log.warning("the jobs of run %s are unknown: %s", run.name, error)
        answer.jobs, answer.trouble = {}, str(error)
        answer.due = time.monotonic() + SILENT_SECONDS


_FINISHED = _Nodes()
_JOBS = _Jobs()
