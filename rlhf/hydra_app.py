"""Hydra's own front end, for the flags it knows: --cfg, --help, --info, --multirun."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from rlhf.compose import choose_base, conf_dir, explain, sweeps, to_config
from rlhf.errors import ConfigError, StageError


def run(
    command: str,
    positionals: Sequence[str],
    extra: Mapping[str, str],
    arguments: Sequence[str],
    handler: Callable[..., int],
) -> int:
    """Let Hydra read the flags; returns the exit code.

    Each job of a sweep runs in a process of its own, under a run name of its own.
    """
    flags = [text for text in arguments if not _is_override(text)]
    overrides = [text for text in arguments if _is_override(text)]
    code = 0

    def task(composed: Any) -> None:
        nonlocal code
        job = HydraConfig.get()
        if job.mode == RunMode.MULTIRUN:
            _run_job(command, positionals, extra, _job_overrides(job, composed, overrides))
        else:
            code = handler(to_config(composed), *positionals, **extra)

    before = sys.argv
    try:
        primary, kept = choose_base(overrides)
        sys.argv = [f"rlhf {command}", *flags, *kept]
        main = hydra.main(
            version_base="1.3", config_path=str(conf_dir().absolute()), config_name=primary
        )
        main(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return code


def _is_override(text: str) -> bool:
    return ("=" in text and not text.startswith("-")) or text.startswith(("+", "~"))


def _job_overrides(job: Any, composed: Any, given: Sequence[str]) -> list[str]:
    """Return one job's overrides; its run is `<run>-<what varies>` unless the sweep varies it."""
    overrides = [str(text) for text in job.overrides.task]
    varied = [key for key in ("run", "recipe") if sweeps(given, key)]
    if "run" in varied or (varied and len(varied) == sum("=" in text for text in given)):
        return overrides
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", job.job.override_dirname).strip("-")
    kept = [text for text in overrides if not text.startswith("run=")]
    return [*kept, f"run={composed.run}-{suffix}"]


def _run_job(
    command: str, positionals: Sequence[str], extra: Mapping[str, str], overrides: Sequence[str]
) -> None:
    given = [f"{key}={value}" for key, value in extra.items() if value]
    arguments = [sys.executable, "-m", "rlhf.cli", command, *positionals, *given, *overrides]
    done = subprocess.run(arguments, check=False)
    if done.returncode == 2:
        raise ConfigError(f"a job of the sweep was refused: {' '.join(overrides)}")
    if done.returncode != 0:
        raise StageError(f"a job of the sweep failed: {' '.join(overrides)}")
