"""Weights & Biases beside metrics.jsonl: offline by default, one group per run, one id per node.

metrics.jsonl is the record; this is a copy of it. Whatever goes wrong here is said once and never
stops a stage.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.config import Config, TrackingMode
from rlhf.errors import STOPPED_EXIT, Stopped

log = logging.getLogger(__name__)

STEP = "step"

LATE_IMPORT = "wandb.sdk.launch"
"""What wandb imports when a run opens. Its classes are searched for in all modules that there are:
after the training libraries that takes five times as long as before them."""


def tracking_id(run: str, node: str) -> str:
    """Return the id of a node's tracked run: stable, so that a resumed node continues it."""
    return hashlib.blake2b(f"{run}/{node}".encode(), digest_size=8).hexdigest()


def preload(config: Config) -> list[str]:
    """Return the modules to import before the training libraries, where nodes are tracked."""
    return [] if config.tracking.mode is TrackingMode.none else [LATE_IMPORT]


class Tracker:
    """One node's tracked run, opened with its first row; after the first failure it does nothing.

    Opening late keeps nodes without metrics free of charge. No configuration is sent: metrics.jsonl
    and config.yaml lie beside it, and paths may be private.
    """

    def __init__(self, config: Config, node: str, folder: Path) -> None:
        self._config = config
        self._node = node
        self._folder = folder
        self._active = config.tracking.mode is not TrackingMode.none
        self._run: Any = None

    def __enter__(self) -> Tracker:
        """Track what happens inside the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the tracked run, as failed when the block ends by an error."""
        stopped = isinstance(error, Stopped)
        self.finish(exit_code=0 if error is None else STOPPED_EXIT if stopped else 1)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row of metrics; its `step` is the axis of all charts."""
        if not self._active:
            return
        # Anything may be wrong outside our hands: no module, its service process gone, a full disk,
        # no network. A copy of the metrics is never worth a stage, so every exception counts.
        try:
            if self._run is None:
                self._run = self._open()
            self._run.log(dict(row))
        except Exception as error:
            self._give_up(error)

    def finish(self, *, exit_code: int = 0) -> None:
        """Close the tracked run; any exit code but 0 marks it as failed."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _open(self) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        config = self._config
        self._folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=config.tracking.project,
            group=config.run,
            name=self._node,
            id=tracking_id(config.run, self._node),
            resume="allow",
            mode="online" if config.tracking.mode is TrackingMode.online else "offline",
            dir=str(self._folder),  # It makes a folder `wandb` there.
            reinit="create_new",
            # Nothing about the machine, its files or its environment is recorded; it also starts
            # faster without.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        # A resumed node repeats the steps after its checkpoint, which wandb's own counter refuses.
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        return run

    def _give_up(self, error: Exception) -> None:
        self._active = False
        log.warning(
            "tracking stopped for %s (%s: %s); the stage goes on and metrics.jsonl is complete; "
            "tracking.mode=none silences this",
            self._node,
            type(error).__name__,
            error,
        )
