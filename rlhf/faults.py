"""Fault injection: what the tests of kills and stops put into a node's environment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

KILL_VARIABLE = "RLHF_KILL_AT"
"""Fault injection for tests: `<boundary>:<text in the path>`, as in `before-rename:manifest`."""


STOP_VARIABLE = "RLHF_STOP_AT"
"""The same for a request to stop, as a scheduler sends it."""
FAULTS = {KILL_VARIABLE: signal.SIGKILL, STOP_VARIABLE: signal.SIGUSR1}


def boundary(name: str, where: Path | str) -> None:
    """Die here, or be asked to stop, when the fault tests want it."""
    for variable, number in FAULTS.items():
        kind, _, text = os.environ.get(variable, "").partition(":")
        if kind == name and text in str(where):
            os.kill(os.getpid(), number)
