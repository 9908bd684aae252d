"""A real Slurm on this machine: munge, a controller and several virtual nodes, on loopback only.

The packages come from Debian (installed when they are missing, which needs root); everything else
lies in one folder. No systemd, no cgroups, no accounting database.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CPUS = 4
"""Cores of a virtual node; more than the machine has, because jobs of the tests mostly wait."""

PATIENCE = 6.0
"""Seconds before, and between, requests to let a job start."""

CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/run/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state/controller
SlurmdSpoolDir={folder}/state/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
ReturnToService=2
KillWait=10
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4096"
)


class SlurmLab:
    """Starts in `with`, ends what it started, and knows how to hurt it."""

    def __init__(self, folder: Path, *, nodes: int = 2) -> None:
        self.folder, self.nodes = folder, nodes
        self.config = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}
        self.environment["PATH"] += ":/usr/sbin:/sbin"

    def __enter__(self) -> SlurmLab:
        self._configure()
        self._munge()
        try:
            self.start_controller()
            for i in range(1, self.nodes + 1):
                self.start_node(i)
            self.wait(lambda: self.idle() == self.nodes, "the virtual nodes to become idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.call("scancel", "--me", check=False)
        for path in [*self.folder.glob("run/node*.pid"), *self.folder.glob("run/*.pid")]:
            self._end(path)

    def call(self, *command: str, check: bool = True, seconds: float = 30) -> str:
        """Run a Slurm command; returns what it printed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=seconds
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def idle(self) -> int:
        """Return how many virtual nodes are idle."""
        command = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")
        return len(self.call(*command, check=False).split())

    def state(self, job: str) -> str:
        """Return a job's state, such as RUNNING."""
        return self.call("squeue", "-h", "--states=all", "-j", job, "-o", "%T").strip()

    def run_again(self, job: str) -> None:
        """Let a requeued job start now; Slurm alone would hold it back for two minutes.

        Not at once: the end of its first attempt would be taken for that of the second. And not
        often: the start moves on with every request.
        """
        asked = time.monotonic()

        def is_running() -> bool:
            nonlocal asked
            if time.monotonic() - asked > PATIENCE:
                self.call("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
                asked = time.monotonic()
            return self.state(job) in ("RUNNING", "COMPLETED")

        self.wait(is_running, f"job {job} to run again")

    def start_controller(self) -> None:
        """Start slurmctld, which puts itself into the background."""
        self.call("slurmctld")
        self.wait(lambda: "UP" in self.call("scontrol", "ping", check=False), "the controller")

    def kill_controller(self) -> None:
        """End slurmctld without warning."""
        pid = int((self.folder / "run" / "slurmctld.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        self.wait(lambda: not _is_alive(pid), "the end of the controller")

    def start_node(self, i: int) -> None:
        """Start the slurmd of a virtual node, which puts itself into the background."""
        (self.folder / "state" / f"node{i}").mkdir(parents=True, exist_ok=True)
        self.call("slurmd", "-N", f"node{i}")

    def crash_node(self, name: str, process: int) -> None:
        """End a virtual node's slurmd and everything above a process of its job, without warning.

        The controller notices after SlurmdTimeout.
        """
        slurmd = int((self.folder / "run" / f"{name}.pid").read_text())
        os.kill(slurmd, signal.SIGKILL)
        while process not in (0, 1, slurmd):
            parent = _parent(process)
            os.kill(process, signal.SIGKILL)
            process = parent

    def wait(self, condition: Callable[[], object], what: str, *, seconds: float = 60) -> None:
        """Wait until a condition holds; raises TimeoutError naming it."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}")
            time.sleep(0.2)

    def _configure(self) -> None:
        for name in ("run", "log", "state/controller"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        host, ports = socket.gethostname().partition(".")[0], _free_ports(self.nodes + 1)
        rows = [
            NODE.format(i=i, host=host, port=ports[i], cpus=CPUS) for i in range(1, self.nodes + 1)
        ]
        text = CONFIG.format(
            host=host, port=ports[0], folder=self.folder, nodes="\n".join(rows)
        ).lstrip()
        self.config.write_text(text, encoding="utf-8")

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        run, log = self.folder / "run", self.folder / "log"
        self.call(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log",
            f"--seed-file={self.folder}/munge.seed",
        )

    def _end(self, path: Path) -> None:
        try:
            pid = int(path.read_text())
            os.kill(pid, signal.SIGTERM)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return
        self.wait(lambda: not _is_alive(pid), f"the end of process {pid}")


def install() -> str:
    """Install Slurm where it is missing; returns why that is impossible, "" when it is there."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if all(shutil.which(name, path=path) for name in PROGRAMS):
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "Slurm is not installed, and this is not root on a Debian machine"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            return f"Debian's packages cannot be installed: {done.stderr.strip()[-200:]}"
    return ""


def _free_ports(number: int) -> list[int]:
    """Return ports nobody listens on; all are held open until the last one is found."""
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _parent(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _is_alive(pid: int) -> bool:
    """Tell whether a process lives; one that nobody has reaped does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")
