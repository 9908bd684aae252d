"""`rlhf serve` in a process of its own, on a port of its own, to be asked and killed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rlhf.config import Config
from rlhf.service.database.models import ROLES
from rlhf.service.state import State

FIRST_LINE = re.compile(r"rlhf serves (http://\S+): ")


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        """The port that it listens on."""
        found = urlsplit(self.url).port
        assert found is not None
        return found

    def kill(self) -> None:
        """End it as a power failure would."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """Ask it to end; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate()
        return self.process.returncode


def arguments(config: Config, *more: str) -> list[str]:
    """Return the command that serves with a configuration's folders and database."""
    database = f'"{config.service.database}"' if config.service.database else "null"
    settings = {
        "paths.runs": config.paths.runs,
        "paths.store": config.paths.store,
        "service.folder": config.service.folder,
        "service.database": database,
        "service.port": 0,
        "service.poll_seconds": config.service.poll_seconds,
        "service.settle_seconds": config.service.settle_seconds,
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "rlhf.cli", "serve", *given, *more]


def start(config: Config, *more: str) -> Served:
    """Start a server and wait until it listens."""
    log = Path(config.service.folder) / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as errors:
        process = subprocess.Popen(
            arguments(config, *more), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    match = FIRST_LINE.match(line)
    if match is None:
        process.kill()
        process.communicate()
        raise AssertionError(f"{line}{log.read_text()}")
    return Served(process, match[1])


@contextmanager
def serving(config: Config, *more: str) -> Iterator[Served]:
    """Serve while the block runs."""
    served = start(config, *more)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.kill()


def make_token(state: State, name: str, role: str) -> str:
    """Return a token for somebody new."""
    from rlhf.service.access import new_token

    assert role in ROLES
    with state.transaction() as session:
        return new_token(session, name=name, role=role, days=None)
