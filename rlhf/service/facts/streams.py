"""Streams of the store and their batches: what came, what became of it, who used it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.ingest import NAME
from rlhf.data.ledger import FOLDERS, Store
from rlhf.data.records import Kind
from rlhf.data.tombstones import FOLDER as TOMBSTONES
from rlhf.errors import ArtifactError
from rlhf.service.facts import checks
from rlhf.service.facts.checks import Manifests
from rlhf.service.facts.files import finite, not_found, rows, steadily
from rlhf.service.facts.runs import Run, open_runs
from rlhf.service.state import State
from rlhf.supply import reads_store

MAX_ROWS = 100
"""Refused and excluded rows that a batch's report holds; the store's files hold them all."""


@dataclass(frozen=True, slots=True)
class StreamRow:
    """A stream: sets per kind, accepted comparisons, the newest batch, and the runs that read it.

    `heldout_share` was fixed by the first file.
    """

    name: str
    sets: dict[str, int]
    rows: int
    newest: str
    ingested: str
    heldout_share: float
    withdrawals: int
    runs: list[str]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch or set of a stream, in the order they came.

    `verdict` and `headline` are the drift against all earlier batches, "" for anything but an
    original batch; `supersedes` is what a correction corrects; `used_by` maps a run to its rounds.
    """

    id: str
    kind: str
    rows: int
    digest: str
    ingested: str
    counts: dict[str, int]
    verdict: str
    headline: str
    supersedes: str
    used_by: dict[str, list[int]]


def list_streams(state: State, *, runs: Sequence[Run] | None = None) -> list[StreamRow]:
    """Return the streams by name; `runs` are the open runs, where the caller has them."""
    known = open_runs(state) if runs is None else runs
    return [_stream(state, name, known) for name in _names(state)]


def open_stream(state: State, name: str) -> Store:
    """Return a stream; a Problem (404) naming the streams there are."""
    known = _names(state)
    if name not in known:
        raise not_found("stream", name, known)
    return Store(state.store, name)


def list_batches(
    state: State,
    stream: str,
    *,
    runs: Sequence[Run] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> list[BatchRow]:
    """Return the batches and sets of a stream, or a part of the list, oldest first.

    `runs` are the open runs, where the caller has them.
    """
    store = open_stream(state, stream)
    readers = [
        run
        for run in (open_runs(state) if runs is None else runs)
        if reads_store(run.config, store)
    ]
    entries = {kind: _entries(store, kind) for kind in FOLDERS}
    found = [
        (manifest["sequence"], kind, id, manifest)
        for kind, manifests in entries.items()
        for id, manifest in manifests.items()
    ]
    found.sort(key=lambda item: item[0])
    originals = _originals(entries[Kind.batch])
    return [
        _batch(store, kind, id, manifest, originals, readers)
        for _, kind, id, manifest in found[start:stop]
    ]


def batch_report(state: State, stream: str, id: str, *, kind: str | None = None) -> dict[str, Any]:
    """Return everything about a batch or set: the manifest, drift, quality, rows left out.

    `kind` is needed only where sets of two kinds have the same name. `drift` and `quality` are None
    for anything but an original batch. A Problem (404) names the batches and sets there are.
    """
    store = open_stream(state, stream)
    entries = {k: _entries(store, k) for k in FOLDERS if kind in (None, k.name)}
    which = next((k for k, found in entries.items() if id in found), None)
    if which is None:
        known = [name for found in entries.values() for name in found]
        raise not_found(f"batch or set of stream {stream}:", id, known)
    manifest, folder = entries[which][id], store.path(which, id)
    originals = _originals(entries.get(Kind.batch, {}))
    is_original = which is Kind.batch and id in originals
    readers = [run for run in open_runs(state) if reads_store(run.config, store)]
    return {
        "manifest": finite({name: value for name, value in manifest.items() if name != "files"}),
        "drift": checks.drift(store, originals, id)["report"] if is_original else None,
        "quality": checks.quality(state, store, originals, id) if is_original else None,
        "refused": _first(folder / "refused.jsonl"),
        "excluded": _first(folder / "excluded.jsonl"),
        "used_by": _used_by(id, readers) if is_original else {},
    }


def _originals(batches: Manifests) -> Manifests:
    """Return the batches that correct no other: those that rounds are made of."""
    return {id: found for id, found in batches.items() if "supersedes" not in found}


def _entries(store: Store, kind: Kind) -> dict[str, dict[str, Any]]:
    return steadily(lambda: store.entries(kind))


def _names(state: State) -> list[str]:
    try:
        folders = sorted(path for path in state.store.iterdir() if NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []
    return [path.name for path in folders if (path / "stream.json").is_file()]


def _stream(state: State, name: str, runs: Sequence[Run]) -> StreamRow:
    store = Store(state.store, name)
    entries = {kind: _entries(store, kind) for kind in FOLDERS}
    batches = entries[Kind.batch]
    newest = next(reversed(batches), "")
    split = store.split()
    if split is None:
        raise ArtifactError(f"stream {name} went away while it was read: look again")
    return StreamRow(
        name=name,
        sets={kind.name: len(found) for kind, found in entries.items()},
        rows=sum(manifest["rows"] for manifest in batches.values()),
        newest=newest,
        ingested=batches[newest]["ingested"] if newest else "",
        heldout_share=split["heldout_share"],
        withdrawals=sum(1 for _ in (store.folder / TOMBSTONES).glob("[0-9]*.json")),
        runs=[run.name for run in runs if reads_store(run.config, store)],
    )


def _batch(
    store: Store,
    kind: Kind,
    id: str,
    manifest: Mapping[str, Any],
    originals: Manifests,
    runs: list[Run],
) -> BatchRow:
    is_original = kind is Kind.batch and id in originals
    drift = checks.drift(store, originals, id) if is_original else None
    return BatchRow(
        id=id,
        kind=kind.name,
        rows=manifest["rows"],
        digest=manifest["digest"],
        ingested=manifest["ingested"],
        counts=manifest["counts"],
        verdict=drift["report"]["verdict"] if drift else "",
        headline=drift["headline"] if drift else "",
        supersedes=manifest.get("supersedes", ""),
        used_by=_used_by(id, runs) if is_original else {},
    )


def _used_by(id: str, runs: list[Run]) -> dict[str, list[int]]:
    """Return run to rounds of which a batch is new; every later round learns from it, too."""
    found = {
        run.name: [item.round for item in run.plan.rounds if id in item.batches] for run in runs
    }
    return {name: rounds for name, rounds in found.items() if rounds}


def _first(path: Path) -> list[dict[str, Any]]:
    return [row for row, _ in zip(rows(path), range(MAX_ROWS), strict=False)]
