"""The `rlhf` commands that the service calls: their arguments, and what they answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rlhf.compose import FLOATS, LITERALS, PLAIN, load_frozen
from rlhf.config import Config
from rlhf.errors import ConfigError, LauncherError
from rlhf.fingerprint import flat_config
from rlhf.service.database.connect import PASSWORD, PASSWORD_FILE
from rlhf.service.state import State

LAUNCH_SECONDS = 300.0
"""Longest wait for `rlhf launch` and `rlhf cancel`, which ask a scheduler."""


def launch_arguments(state: State, run: str, recipe: str | None) -> list[str]:
    """Return the launch of a run: its name, the service's folders, for a new run its launcher.

    What has to be followed is followed by a process in the background.

    Raises ConfigError for a run that reads another store: it would read this one from now on.
    """
    folders = [_override("paths.runs", state.runs), _override("paths.store", state.store)]
    fixed = [_override("run", run), *folders, "detach=true"]
    if recipe is None:
        store = Path(load_frozen(state.runs / run).paths.store)
        if store.resolve() != state.store.resolve():
            raise ConfigError(
                f"run {run} reads paths.store={store} and this service has "
                f"paths.store={state.store}: serve its store, or launch it on the command line, "
                "once, with the store that it is to read from now on"
            )
        return ["launch", *fixed]
    usual = flat_config(Config(recipe="none"))
    chosen = [
        _override(key, value)
        for key, value in flat_config(state.config).items()
        if key.startswith("launcher.") and value != usual[key]
    ]
    return ["launch", f"recipe={recipe}", *fixed, *chosen]


def cancel_arguments(state: State, run: str, node: str) -> list[str]:
    """Return the end of a run, or of one of its nodes."""
    runs = _override("paths.runs", state.runs)
    return ["cancel", _override("run", run), runs, f"node={node}"]


def _override(key: str, value: object) -> str:
    text = "null" if value is None else str(value)
    is_word = isinstance(value, str) and text.lower() in (*LITERALS, *FLOATS)
    if PLAIN.fullmatch(f"{key}={text}") and not is_word:
        return f"{key}={text}"
    if isinstance(value, bool | int | float | list):
        return f"{key}={text}"
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{quoted}"'


def run_command(arguments: list[str]) -> str:
    """Run an `rlhf` command and return what it said; its refusals become the errors they were."""
    # A run has no business with the service's database.
    hidden = (PASSWORD, PASSWORD_FILE)
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rlhf.cli", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LAUNCH_SECONDS,
            env=environment,
            start_new_session=True,
            check=False,
        )
    except OSError as error:
        raise LauncherError(f"rlhf {arguments[0]} cannot be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise LauncherError(
            f"rlhf {arguments[0]} did not answer within {LAUNCH_SECONDS:.0f} s: see whether the "
            "scheduler does, then try again"
        ) from error
    if done.returncode == 0:
        return done.stdout.strip()
    # Warnings come before; the message may have several lines.
    said = f"\n{done.stderr}".rpartition("\nrlhf: ")[2].strip()
    if done.returncode == 2:
        raise ConfigError(said)
    raise LauncherError(said or f"rlhf {arguments[0]} ended with exit code {done.returncode}")
