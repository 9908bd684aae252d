"""A watcher in a process of its own, to be killed: `watch_process.py SETTINGS FILES`.

It looks until so many files have been taken in by anybody, or until it is killed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf.config import Config, Paths, Service
from rlhf.service.inbox import ACCEPTED, REFUSED, REPORT
from rlhf.service.state import State, open_state
from rlhf.service.watch import Watcher


def settings_of(state: State) -> str:
    """Return what `open_here` needs of a state."""
    config = state.config
    service = {
        name: getattr(config.service, name)
        for name in ("folder", "database", "inbox", "settle_seconds", "autolaunch")
    }
    paths = {"runs": config.paths.runs, "store": config.paths.store}
    return json.dumps({"paths": paths, "service": service})


def open_here(text: str) -> State:
    tree = json.loads(text)
    return open_state(
        Config(recipe="none", paths=Paths(**tree["paths"]), service=Service(**tree["service"]))
    )


def taken(inbox: Path) -> list[Path]:
    """Return the reports of the files that were taken in."""
    return [path for name in (ACCEPTED, REFUSED) for path in (inbox / name).rglob(f"*{REPORT}")]


if __name__ == "__main__":
    state = open_here(Path(sys.argv[1]).read_text())
    watcher = Watcher(state)
    inbox = watcher.inbox.local
    assert inbox is not None
    while len(taken(inbox)) < int(sys.argv[2]) or watcher.inbox.waiting():
        watcher.look_once()
