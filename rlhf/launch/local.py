"""Node processes on this machine, forked from one server that has imported the stages.

Importing the training libraries costs about ten seconds; the server pays once, and each node is a
fork of it, started in an environment (threads, allocator) fixed before Python starts. The server
ends with the process that started it, and a node with the server, even after kill -9.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rlhf.artifacts import read_json
from rlhf.compose import load_frozen
from rlhf.cost.peak import gpu_names
from rlhf.errors import StageError
from rlhf.launch.ranks import die_with_parent, run_node
from rlhf.plan import Plan
from rlhf.processes import STOP
from rlhf.provenance import git_commit, source_hash, versions

log = logging.getLogger(__name__)

SERVER_LOG = "server.log"
PLAN = "plan.json"
POLL_SECONDS = 0.3
REAP_SECONDS = 0.1


class NodeServer:
    """Starts nodes, each in a process of its own, and says when one has ended.

    The server imports `preload`, then the modules of the stages, before it starts the first node.
    Use it from the main thread: the server ends with the thread that started it.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        stages: Mapping[str, str],
        environment: Mapping[str, str],
        preload: Sequence[str] = (),
    ) -> None:
        self.run_dir = run_dir
        self.stages = dict(stages)
        self.running: set[str] = set()
        self._log = (run_dir / SERVER_LOG).open("wb")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "rlhf.launch.local", str(os.getpid())),
                *(*preload, *stages.values()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def __enter__(self) -> NodeServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def start(self, node: str, *, environment: Mapping[str, str] | None = None) -> None:
        """Start a node; `environment` is set in its process alone, after the imports."""
        assert self._process.stdin is not None
        request = {
            "run_dir": str(self.run_dir),
            "node": node,
            "stages": self.stages,
            "environment": dict(environment or {}),
        }
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        self.running.add(node)

    def stop(self) -> None:
        """Ask every running node to save its state and end; `wait` then tells as they do."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"stop": True}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def wait(self, on_wait: Callable[[], None]) -> tuple[str, int]:
        """Return the next node that ends and its exit code, negative when a signal ended it."""
        assert self._process.stdout is not None
        while not select.select([self._process.stdout], [], [], POLL_SECONDS)[0]:
            on_wait()
        answer = self._process.stdout.readline()
        if not answer:
            raise self._ended()
        ended = json.loads(answer)
        self.running.discard(ended["node"])
        return ended["node"], ended["code"]

    def _ended(self) -> StageError:
        return StageError(
            f"the process that starts nodes ended by itself: see {self.run_dir / SERVER_LOG}, "
            "then run again"
        )


def serve(parent: int, preload: Sequence[str]) -> None:
    """Import the stages, then fork one process per line on standard input; answers as they end."""
    die_with_parent(parent)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for module in preload:
        try:
            importlib.import_module(module)
        except Exception:
            log.exception("cannot import %s; its nodes will say so again", module)
    for look_up_once in (warm_up, versions, source_hash, git_commit):
        look_up_once()
    # Nodes need not look for garbage among the libraries, nor copy those pages by doing so.
    gc.collect()
    gc.freeze()
    children: dict[int, str] = {}
    # Unbuffered, so that no request hides from select in a buffer.
    requests = os.fdopen(0, "rb", buffering=0)
    while True:
        if select.select([requests], [], [], REAP_SECONDS)[0]:
            line = requests.readline()
            if not line:
                return
            request = json.loads(line)
            if "stop" in request:
                for child in children:
                    os.kill(child, signal.SIGUSR1)
            else:
                children[_fork(request)] = request["node"]
        child, status = os.waitpid(-1, os.WNOHANG) if children else (0, 0)
        if child:
            ended = {"node": children.pop(child), "code": os.waitstatus_to_exitcode(status)}
            answers.write(json.dumps(ended) + "\n")


def warm_up() -> None:
    """Do once what the imported libraries do at the beginning of every training."""
    if "transformers" in sys.modules:
        # Hundreds of regular expressions, for the first model that is loaded or saved.
        mapping = importlib.import_module("transformers.conversion_mapping")
        mapping.get_checkpoint_conversion_mapping("llama")
    # It looks for GPUs, which no fork could use then.
    if "accelerate" in sys.modules and not gpu_names():
        importlib.import_module("deepspeed")


def _fork(request: Mapping[str, object]) -> int:
    server = os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _run_child(server, request)
        finally:
            os._exit(code)
    return child


def _run_child(server: int, request: Mapping[str, object]) -> int:
    die_with_parent(server)
    STOP.listen()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    run_dir = Path(str(request["run_dir"]))
    stages, environment = request["stages"], request["environment"]
    assert isinstance(stages, dict)
    assert isinstance(environment, dict)
    os.environ.update(environment)
    config = load_frozen(run_dir)
    plan = Plan.from_json(read_json(run_dir / PLAN))
    code = run_node(config, plan, run_dir, str(request["node"]), stages=stages)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2:])
