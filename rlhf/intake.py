"""A file into the store under the configuration's settings, as `rlhf ingest` and the service do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config import Config
from rlhf.data.ingest import NAME, Check, IngestReport, ingest_file, unchecked
from rlhf.data.ledger import Progress, Store, silent
from rlhf.data.records import AXES, Kind
from rlhf.data.similar import RepeatRules
from rlhf.datacheck import batch_headline
from rlhf.errors import ConfigError


def chosen_kind(config: Config) -> Kind | None:
    """Return what `ingest.kind` names, None where the fields decide; raises ConfigError."""
    name = config.ingest.kind
    if name is None:
        return None
    if name not in Kind.__members__:
        known = ", ".join(Kind.__members__)
        raise ConfigError(f"ingest.kind={name} is unknown: choose one of {known}")
    return Kind[name]


def check_settings(config: Config) -> None:
    """Refuse settings with which every file would be refused; raises ConfigError."""
    chosen_kind(config)
    settings = config.ingest
    if settings.axis is not None and settings.axis not in AXES:
        known = ", ".join(AXES)
        raise ConfigError(f"ingest.axis={settings.axis} is unknown: choose one of {known}")
    if not NAME.fullmatch(settings.stream):
        raise ConfigError(
            f"ingest.stream={settings.stream} cannot name a stream: use up to 100 letters, digits, "
            "dots, dashes and underscores"
        )


def target_store(config: Config) -> Store:
    """Return the stream that `ingest.stream` names."""
    return Store(Path(config.paths.store), config.ingest.stream)


def add_file(
    config: Config, path: Path, *, check: Check = unchecked, progress: Progress = silent
) -> IngestReport:
    """Validate a file and add it to the store; errors are those of `ingest_file`."""
    settings = config.ingest
    return ingest_file(
        path,
        target_store(config),
        kind=chosen_kind(config),
        id=settings.id,
        on_bad_row=settings.on_bad_row,
        axis=settings.axis,
        heldout_share=config.data.heldout_share,
        heldout_salt=config.data.heldout_salt,
        max_chars=settings.max_chars,
        is_safety_default=config.data.is_safety_default,
        repeats=RepeatRules.of(settings),
        supersedes=settings.supersedes,
        reason=settings.reason,
        check=check,
        progress=progress,
    )


def drift_line(config: Config, report: IngestReport) -> str:
    """Return the verdict on a batch that was added, in one line; "" for other sets and batches."""
    is_new = report.added and report.kind is Kind.batch and config.ingest.supersedes is None
    return batch_headline(config, target_store(config), report.id) if is_new else ""


def for_one_file(config: Config, **settings: Any) -> Config:
    """Return a configuration with other ingest settings, which corrects and withdraws nothing."""
    plain: dict[str, Any] = {"id": None, "supersedes": None, "retract": None, "reason": ""}
    return replace(config, ingest=replace(config.ingest, **{**plain, **settings}))
