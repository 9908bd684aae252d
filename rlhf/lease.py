"""A lease keeps two processes off the same node, and a lock keeps two runners off the same run.

The holder is known by host, process id and process start time, and renews a heartbeat. Others take
over at once when that process has ended, or when the heartbeat stays away where they cannot look.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.artifacts import write_bytes
from rlhf.errors import LeaseError

log = logging.getLogger(__name__)

LEASE = "lease.json"
HEARTBEAT_SECONDS = 10.0
MISSED_SECONDS = 120.0
RUN_LOCK = "run.lock"
LOCK_TRIES, LOCK_PAUSE = 10, 0.1
"""How often, and with which pause in seconds, a lock is tried that somebody only looks at."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease; `space` tells process namespaces and boots of one host apart.

    `job` and `attempt` are those of the scheduler's job, "" and 0 without one.
    """

    host: str
    space: str
    boot: str
    pid: int
    start: int
    token: str
    heartbeat: float
    job: str = ""
    attempt: int = 0


def _read_link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def boot_id() -> str:
    """Return an id that changes with every boot, or "" where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Return a process's start in clock ticks after boot; None when it ended or is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def current_job() -> tuple[str, int]:
    """Return the Slurm job that this process belongs to and its attempt; "" and 0 without one."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def this_process(token: str) -> Holder:
    """Return this process as the holder of something, alive now."""
    job, attempt = current_job()
    return Holder(
        job=job,
        attempt=attempt,
        host=socket.gethostname(),
        space=_read_link("/proc/self/ns/pid"),
        boot=boot_id(),
        pid=os.getpid(),
        start=process_start(os.getpid()) or 0,
        token=token,
        heartbeat=time.time(),
    )


def is_gone(holder: Holder, *, now: float) -> bool:
    """Tell whether a holder's process has ended, or its heartbeat stayed away too long.

    A job has one attempt at a time, so its later attempt knows that the earlier one has ended.
    """
    job, attempt = current_job()
    if job and job == holder.job and attempt > holder.attempt:
        return True
    if holder.host == socket.gethostname() and platform.system() == "Linux":
        if holder.boot != boot_id():
            return True
        if holder.space == _read_link("/proc/self/ns/pid"):
            return process_start(holder.pid) != holder.start
    return now - holder.heartbeat > MISSED_SECONDS


class Lease:
    """The right of this process to write into a node's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEASE
        self.lost = False
        self._token = secrets.token_hex(8)
        self._stop = threading.Event()

    def take(self) -> None:
        """Take the lease, or take it over from a process that ended; raises LeaseError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            holder = self.read()
            if holder is not None and not is_gone(holder, now=time.time()):
                raise LeaseError(
                    f"process {holder.pid} on {holder.host} works on {self.path.parent}: wait "
                    f"for it or stop it; without a sign of life its lease ends after "
                    f"{MISSED_SECONDS:.0f} s"
                )
            self._write()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def read(self) -> Holder | None:
        """Return the present holder; None for no lease or one that cannot be read."""
        try:
            return Holder(**json.loads(self.path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def check(self) -> None:
        """Raise LeaseError unless this process still holds the lease."""
        holder = self.read()
        if holder is None or holder.token != self._token:
            self.lost = True
            raise LeaseError(
                f"another process took over {self.path.parent}: this one stops without writing"
            )

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        with self._locked():
            holder = self.read()
            if holder is not None and holder.token == self._token:
                self.path.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self._renew():
                    return
            except OSError as error:
                # A disk that is full or away for a while must not cost the lease.
                log.warning("%s is not renewed: %s", self.path, error)

    def _renew(self) -> bool:
        """Write a new heartbeat; False where the lease has been given back or taken over."""
        with self._locked():
            holder = self.read()
            if holder is None or holder.token != self._token or self._stop.is_set():
                self.lost = not self._stop.is_set()
                return False
            self._write()
            return True

    def _write(self) -> None:
        holder = this_process(self._token)
        write_bytes(self.path, json.dumps(asdict(holder), indent=2).encode() + b"\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock file, so that of two takeovers only one sees the old lease."""
        with self.path.with_name(f".{LEASE}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other runners off a run while the block runs; raises LeaseError.

    The lock ends with its process.
    """
    with (folder / RUN_LOCK).open("a") as lock:
        for left in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not left:
                    raise LeaseError(
                        f"another process runs {folder}: wait until it has ended, or end it, with "
                        "`rlhf cancel` where `rlhf launch` started it"
                    ) from error
                time.sleep(LOCK_PAUSE)
        yield


def is_run_locked(folder: Path) -> bool:
    """Tell whether a process runs a run's nodes."""
    try:
        with (folder / RUN_LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
