"""The processes of one node: who am I, wait for the others, agree with them, stop on request.

A node of one process needs none of this and imports no torch. With several, every wait has a name;
each process keeps a small file that says where it stands, so that a hang can be put down to the
process that is missing and to the place where the others wait for it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.errors import StageError

FOLDER = "processes"
BEAT_SECONDS = 1.0
RANK, SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
"""Environment variables that torch.distributed, accelerate and DeepSpeed read too."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a signal has asked this process to save its state and end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first signal that asked."""

    @property
    def made(self) -> bool:
        """Tell whether the request has come."""
        return self.signal is not None

    def note(self, number: int) -> None:
        """Remember a signal."""
        self.signal = self.signal or number

    def listen(self) -> None:
        """Note SIGTERM and SIGUSR1 from now on, instead of ending by them."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def pause(self) -> None:
        """Ignore the signals: what replaces this process by exec would be ended by them."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.note(number)


STOP = StopRequest()
"""The request to this process; signals have one receiver per process, and so has this."""


class Processes:
    """This process among those of its node; `Processes()` is a node of one process."""

    def __init__(self, *, rank: int = 0, size: int = 1, folder: Path | None = None) -> None:
        self.rank, self.size = rank, size
        self._folder = folder
        self._place = "start"
        self._since = time.time()
        self._end = threading.Event()
        if folder is not None and size > 1:
            folder.mkdir(parents=True, exist_ok=True)
            threading.Thread(target=self._beat, name="place", daemon=True).start()

    @property
    def is_main(self) -> bool:
        """Tell whether this process writes the node's files."""
        return self.rank == 0

    def share(self, items: list[Any]) -> list[Any]:
        """Return this process's part of a list: every size-th item from its rank on."""
        return items[self.rank :: self.size]

    def wait(self, what: str) -> None:
        """Wait until every process has come here; StageError when one stays away."""
        if self.size > 1:
            with self.at(what):
                _distributed().barrier()

    def any(self, *flags: bool, what: str) -> list[bool]:
        """Tell for each flag whether it is set in any process; the same answer everywhere."""
        if self.size == 1:
            return list(flags)
        import torch

        with self.at(what):
            votes = torch.tensor([float(flag) for flag in flags])
            _distributed().all_reduce(votes, op=_distributed().ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def broadcast(self, value: Any, what: str) -> Any:
        """Return the first process's value everywhere."""
        if self.size == 1:
            return value
        box = [value]
        with self.at(what):
            _distributed().broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any, what: str) -> list[Any]:
        """Return the values of all processes, by rank, everywhere."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.at(what):
            _distributed().all_gather_object(found, value)
        return found

    def sum(self, values: list[float], what: str) -> list[float]:
        """Return the sums over all processes, in float64."""
        if self.size == 1:
            return values
        import torch

        with self.at(what):
            total = torch.tensor(values, dtype=torch.float64)
            _distributed().all_reduce(total)
        return [float(value) for value in total.tolist()]

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """Name the place where this process waits for the others.

        Raises StageError with the place of every process when the others do not come.
        """
        before = self._place, self._since
        self._place, self._since = what, time.time()
        try:
            yield
        except RuntimeError as error:
            raise StageError(f"at `{what}`: {error}\n{self.report()}") from error
        self._place, self._since = before[0], time.time()

    def passed(self, what: str) -> None:
        """Note the step that this process has reached."""
        self._place, self._since = what, time.time()

    def report(self) -> str:
        """Say where each process stands, the one that is behind first."""
        now = time.time()
        rows = sorted((row["since"], row) for row in self._places())
        lines = [
            f"rank {row['rank']} ({row['host']}, process {row['pid']}): at `{row['place']}` for "
            f"{now - row['since']:.0f} s, last sign of life {max(now - row['beat'], 0.0):.0f} s ago"
            for _, row in rows
        ]
        missing = sorted({*range(self.size)} - {row["rank"] for _, row in rows})
        lines += [f"rank {rank}: never started" for rank in missing]
        return "\n".join(lines)

    def close(self) -> None:
        """Stop writing this process's place."""
        self._end.set()

    def _places(self) -> list[dict[str, Any]]:
        if self._folder is None:
            return []
        self._write()
        found = []
        for path in sorted(self._folder.glob("*.json")):
            with suppress(FileNotFoundError, ValueError):
                found.append(json.loads(path.read_bytes()))
        return found

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        assert self._folder is not None
        row = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": self._place,
            "since": self._since,
            "beat": time.time(),
        }
        temporary = self._folder / f".{self.rank}.{threading.get_ident()}.tmp"
        # A full disk must not end the thread that tells where this process stands.
        with suppress(OSError):
            temporary.write_text(json.dumps(row), encoding="utf-8")
            temporary.replace(self._folder / f"{self.rank}.json")


def world_size() -> int:
    """Return how many processes work on this node, from the environment."""
    return int(os.environ.get(SIZE, "1"))


def join(folder: Path, *, timeout_seconds: float, device: str) -> Processes:
    """Meet the other processes that the environment names; alone where it names none.

    `folder` is the node's. Control messages always travel over gloo; gradients over NCCL on GPUs.
    """
    size = world_size()
    if size == 1:
        return Processes()
    import torch

    is_gpu = device != "cpu" and torch.cuda.is_available()
    if is_gpu:
        torch.cuda.set_device(int(os.environ[LOCAL_RANK]))
    else:
        # Without it accelerate runs N unconnected trainings on a machine without GPUs.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    processes = Processes(rank=int(os.environ[RANK]), size=size, folder=folder / FOLDER)
    from datetime import timedelta

    with processes.at("meeting of all processes"):
        _distributed().init_process_group(
            "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
        )
    return processes


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed
