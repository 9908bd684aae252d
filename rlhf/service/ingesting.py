"""Uploads and files of the inbox into the store, by the rules of `rlhf ingest`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config import Config, OnBadRow
from rlhf.data.ingest import NAME, BadRows, Check, IngestReport, unchecked
from rlhf.data.ledger import Progress, silent
from rlhf.data.records import Kind
from rlhf.errors import ConfigError, RlhfError
from rlhf.intake import add_file, drift_line, for_one_file, target_store
from rlhf.service.state import State


def ingest_into(
    state: State,
    path: Path,
    *,
    kind: Kind | str | None,
    stream: str,
    id: str | None = None,
    on_bad_row: OnBadRow | str | None = None,
    axis: str | None = None,
    check: Check = unchecked,
    progress: Progress = silent,
) -> IngestReport:
    """Add a file to a stream; what is None is as the configuration's `ingest` has it.

    `check` is called before anything is added. A stream that has rows keeps its own held-out
    split: one service has streams of several.

    Raises DataError or ConfigError with the messages of `rlhf ingest`, and then nothing is written.
    """
    given: dict[str, Any] = {"stream": stream, "id": id}
    if kind is not None:
        given["kind"] = kind.name if isinstance(kind, Kind) else kind
    if on_bad_row is not None:
        given["on_bad_row"] = _on_bad_row(on_bad_row)
    if axis is not None:
        given["axis"] = axis
    config = _with_split(for_one_file(state.config, **given))
    return add_file(config, path, check=check, progress=progress)


def drift_headline(state: State, report: IngestReport) -> str:
    """Return the verdict on a batch that was added, in one line; "" for anything else."""
    return drift_line(for_one_file(state.config, stream=report.stream), report)


def report_json(report: IngestReport, drift: str) -> dict[str, Any]:
    """Return what a file's report says of rows that were taken in."""
    return {
        "outcome": "accepted",
        "message": report.message,
        "drift": drift,
        "added": report.added,
        "stream": report.stream,
        "kind": report.kind.name,
        "id": report.id,
        "digest": report.digest,
        "counts": report.counts,
        "refused": report.refused,
        "excluded": report.excluded,
    }


def refusal_json(error: RlhfError, stream: str) -> dict[str, Any]:
    """Return what a file's report says of a file that was refused."""
    rows: list[Mapping[str, Any]] = []
    counts: Mapping[str, int] = {}
    if isinstance(error, BadRows):
        rows, counts = list(error.rows), error.counts
    return {
        "outcome": "refused",
        "message": str(error),
        "stream": stream,
        "counts": counts,
        "refused": rows,
    }


def _with_split(config: Config) -> Config:
    """Return a configuration with the split of its stream, where the stream has one."""
    # What is no name is refused later, and is no part of a path until then.
    is_name = NAME.fullmatch(config.ingest.stream)
    recorded = target_store(config).split() if is_name else None
    if recorded is None:
        return config
    return replace(config, data=replace(config.data, **recorded))


def _on_bad_row(choice: OnBadRow | str) -> OnBadRow:
    if isinstance(choice, OnBadRow):
        return choice
    if choice not in OnBadRow.__members__:
        known = ", ".join(OnBadRow.__members__)
        raise ConfigError(f"ingest.on_bad_row={choice} is unknown: choose one of {known}")
    return OnBadRow[choice]
