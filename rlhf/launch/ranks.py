"""Start the processes of one node on this machine, watch them, pass signals on.

A node with one process is that process. With several, this one becomes their supervisor: it forks
one child per process, tells each who it is, and ends the rest when one of them fails. On several
machines there is one supervisor per machine; Slurm or Kubernetes says which one this is.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rlhf.config import Config, StageResources
from rlhf.errors import STOPPED_EXIT, ConfigError
from rlhf.plan import Plan
from rlhf.processes import LOCAL_RANK, RANK, SIZE, STOP, STOP_SIGNALS
from rlhf.worker import run_logged

MACHINE = "RLHF_MACHINE"
"""Number of this machine among those of the node, from 0."""

LAST_WORDS_SECONDS = 15.0
"""How long the other processes may live after one has failed."""
POLL_SECONDS = 0.05
FIRST_PORT, NUM_PORTS = 20000, 20000
CALL_SECONDS = 30.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where this machine stands in a node: its number, and where the first process listens."""

    machine: int
    address: str
    port: int


def is_rank(environment: Mapping[str, str]) -> bool:
    """Tell whether this process has been told who it is among the processes of a node."""
    return RANK in environment and SIZE in environment


def needs_srun(resources: StageResources, environment: Mapping[str, str]) -> bool:
    """Tell whether this is the batch script of a Slurm job that has to start other machines."""
    return (
        resources.nodes > 1 and "SLURM_JOB_NODELIST" in environment and MACHINE not in environment
    )


def find_place(resources: StageResources, environment: Mapping[str, str]) -> Place:
    """Say where this machine stands; raises ConfigError on several machines without a scheduler."""
    if resources.nodes == 1:
        return Place(0, "127.0.0.1", free_port())
    try:
        machine = int(environment[MACHINE])
        return Place(machine, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    except KeyError as error:
        raise ConfigError(
            f"resources.*.nodes={resources.nodes} needs {error.args[0]}, which the scheduler's job "
            "sets: use launcher=slurm or launcher=kubernetes, or nodes=1"
        ) from error


def free_port() -> int:
    """Return a port on this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_node(
    config: Config,
    plan: Plan,
    run_dir: Path,
    name: str,
    *,
    stages: Mapping[str, str],
    supervise: bool = False,
) -> int:
    """Run a node on this machine with the processes it is to have; returns the exit code.

    With `supervise` a single process gets a supervisor too, who lives to tell how it ended.
    """
    resources = config.resources.of(plan.node(name).stage)

    def run() -> int:
        return run_logged(config, plan, run_dir, name, stages=stages)

    if is_rank(os.environ) or (resources.num_processes == 1 and not supervise):
        return run()
    return run_ranks(run, resources, find_place(resources, os.environ))


def run_ranks(run: Callable[[], int], resources: StageResources, place: Place) -> int:
    """Fork this machine's processes, each calling `run`; returns the first failure's exit code.

    A negative code is a signal's number. 75 if a process stopped on request and none failed.
    """
    children: set[int] = set()
    with _forwarding(children):
        for local_rank in range(resources.processes):
            children.add(_fork_rank(run, resources, place, local_rank))
        return _watch(children)


def run_machines(arguments: list[str], resources: StageResources) -> int:
    """Inside a Slurm job, start one supervisor per machine with srun; returns its exit code."""
    job = int(os.environ["SLURM_JOB_ID"])
    environment = {
        **os.environ,
        "MASTER_ADDR": first_address(os.environ["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + job % NUM_PORTS),
    }
    # SLURM_NODEID is known in the task only, hence the shell; it must outlive the signal.
    command = [
        shutil.which("srun") or "srun",
        f"--nodes={resources.nodes}",
        f"--ntasks={resources.nodes}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--unbuffered",
        "bash",
        "-c",
        f'export {MACHINE}=$SLURM_NODEID; exec "$@"',
        "machine",
        *arguments,
    ]
    child = subprocess.Popen(command, env=environment)
    with _forwarding({child.pid}):
        return child.wait()


def first_address(nodelist: str) -> str:
    """Return the address of a Slurm job's first machine, which its name may not resolve to."""
    names = _ask("scontrol", "show", "hostnames", nodelist).split()
    for field in _ask("scontrol", "show", "node", names[0], "-o").split():
        key, _, value = field.partition("=")
        if key == "NodeAddr":
            return value
    return names[0]


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS, check=True)
    return done.stdout


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, however it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _fork_rank(
    run: Callable[[], int], resources: StageResources, place: Place, local_rank: int
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        die_with_parent(parent)
        STOP.listen()
        if resources.num_processes > 1:
            os.environ |= _identity(resources, place, local_rank)
        code = run()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # An ordinary exit would wait for gloo's threads, which sometimes abort the interpreter.
        os._exit(code)


def _identity(resources: StageResources, place: Place, local_rank: int) -> dict[str, str]:
    """Return the variables that tell a process who it is among those of its node."""
    found = {
        RANK: str(place.machine * resources.processes + local_rank),
        LOCAL_RANK: str(local_rank),
        SIZE: str(resources.num_processes),
        "LOCAL_WORLD_SIZE": str(resources.processes),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }
    if place.address.startswith("127."):
        # Gloo otherwise looks for an interface by the host's name, which may not resolve.
        found["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return found


def _watch(children: set[int]) -> int:
    """Wait for all children; after the first failure the others get a short while to end."""
    codes: list[int] = []
    deadline: float | None = None
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            children.remove(child)
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1] != 0 and deadline is None:
                deadline = time.monotonic() + LAST_WORDS_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(POLL_SECONDS)
    failures = [code for code in codes if code not in (0, STOPPED_EXIT)]
    if STOPPED_EXIT in codes and all(code == -signal.SIGKILL for code in failures):
        return STOPPED_EXIT
    return failures[0] if failures else 0


class _forwarding:
    """Pass SIGTERM and SIGUSR1 on to the children while they live."""

    def __init__(self, children: set[int]) -> None:
        self.children = children

    def __enter__(self) -> None:
        def forward(number: int, frame: FrameType | None) -> None:
            STOP.note(number)
            for pid in list(self.children):
                os.kill(pid, number)

        self.before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
