"""A file to an immutable batch or set of the store, or one message that says why not.

A file goes through in blocks, in bounded memory: parsed and hashed (tabulate, columns), staged on
disk (staging), compared with itself and with what came before (repeats), and written (ledger).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.artifacts import sha256_file
from rlhf.config import Ingest, OnBadRow
from rlhf.data.accept import Judged, Rules, staged_block
from rlhf.data.columns import is_comparison
from rlhf.data.corrections import (
    Correction,
    check_ids,
    correction_stone,
    open_correction,
    replaced_rows,
)
from rlhf.data.files import Block, RowError, file_format, read_blocks, read_objects, storable
from rlhf.data.ledger import Entry, Progress, Store, silent
from rlhf.data.parse import Defaults, infer_kind
from rlhf.data.records import AXES, Kind
from rlhf.data.repeats import add_similar, find_verdicts
from rlhf.data.sift import POLICIES
from rlhf.data.similar import RepeatRules, with_sketches
from rlhf.data.staging import Staging
from rlhf.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SUFFIXES = re.compile(r"(\.jsonl|\.json|\.parquet)?(\.gz)?$")
"""What a file's name loses to become the name of a batch or set."""

MAX_LISTED = 20
"""Bad rows that a message lists; refused.jsonl holds them all."""
MAX_REPORTED = 1_000
"""Refused and excluded rows that a report holds; the store's files hold them all."""
MAX_THREADS = 4
"""Blocks that are worked on at once: hashing holds Python's lock, more would only take memory."""
QUARANTINE = "ingest.on_bad_row=quarantine"

Check = Callable[[], None]
"""Called when a file has been read and nothing is added yet; what it raises ends the ingest."""

In = TypeVar("In")
Out = TypeVar("Out")


def unchecked() -> None:
    """Add what was read."""


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What became of a file: `added` is False when its rows were in the stream already.

    `counts` has read = accepted + refused + excluded; `refused` has line, reason and value,
    `excluded` line, id, policy and reason, of the first MAX_REPORTED rows.
    """

    added: bool
    kind: Kind
    id: str
    stream: str
    digest: str
    counts: dict[str, int]
    refused: list[dict[str, Any]]
    excluded: list[dict[str, Any]]
    message: str


class BadRows(DataError):
    """A file that is refused because of its rows; the first MAX_REPORTED are in `rows`.

    `rows` has line, reason and value of each; `counts` is as in an IngestReport.
    """

    def __init__(self, message: str, *, counts: dict[str, int], rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.counts = counts
        self.rows = rows


@dataclass(slots=True)
class _Parsed:
    file: dict[str, str]
    extra_fields: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where the rows go: the name of the batch or set, and what it corrects, if anything."""

    store: Store
    kind: Kind
    id: str
    correction: Correction | None
    check: Check


def ingest_file(
    path: Path,
    store: Store,
    *,
    kind: Kind | None,
    id: str | None = None,
    on_bad_row: OnBadRow = OnBadRow.refuse,
    axis: str | None = None,
    heldout_share: float,
    heldout_salt: str,
    max_chars: int = 40_000,
    is_safety_default: bool = False,
    repeats: RepeatRules | None = None,
    supersedes: str | None = None,
    reason: str = "",
    check: Check = unchecked,
    progress: Progress = silent,
) -> IngestReport:
    """Validate a file and add it to the store as one immutable batch or set.

    `kind` None infers it from the fields (never `open`); `id` None takes the file's name. Adding
    the same rows again changes nothing and says so. With `supersedes` the file corrects a batch or
    set: its rows replace those with their ids, and no round is made of it. Raises DataError, with
    nothing written, for a damaged file, for bad rows under `refuse`, for other rows under an old
    id, and for a split that differs from the stream's.
    """
    given, id = id, SUFFIXES.sub("", path.name) if id is None else id
    _check_names(path, id=id, stream=store.stream, axis=axis)
    store.check_split(share=heldout_share, salt=heldout_salt)
    kind = kind or _kind_of(path)
    correction: Correction | None = None
    if supersedes is not None:
        correction = open_correction(
            store, kind, of=supersedes, reason=reason, path=path, id=given, default=id
        )
    target = _Target(store, kind, correction.id if correction else id, correction, check)
    source = correction.of if correction else id
    defaults = Defaults(source, axis, is_safety_default, name=target.id)
    rules = Rules(heldout_share, heldout_salt, max_chars)
    repeats = RepeatRules.of(Ingest()) if repeats is None else repeats
    settings = {
        "on_bad_row": on_bad_row.name,
        "axis": axis,
        "max_chars": max_chars,
        "is_safety_default": is_safety_default,
        **repeats.to_json(),
    }
    split = {"share": heldout_share, "salt": heldout_salt}
    with Staging(store.folder) as staging:
        is_sketched = is_comparison(kind) and repeats.threshold is not None
        parsed = _parse(path, staging, kind, defaults, rules, is_sketched, progress)
        if correction is not None:
            check_ids(path, staging, defaults)
        while True:
            report = _add(path, target, staging, parsed, settings, repeats, split, progress)
            if report is not None:
                log.info("%s", report.message)
                return report


def _add(
    path: Path,
    target: _Target,
    staging: Staging,
    parsed: _Parsed,
    settings: dict[str, Any],
    repeats: RepeatRules,
    split: dict[str, Any],
    progress: Progress,
) -> IngestReport | None:
    """Judge the rows against the stream as it is, and add; None when it moved on meanwhile."""
    store, kind, id, correction = target.store, target.kind, target.id, target.correction
    history = store.history(kind, before=id, progress=progress)
    replaced: dict[str, set[str]] = {}
    if correction is not None:
        replaced = replaced_rows(store, kind, correction, staging, history)
        history = history.without(replaced)
    verdicts = find_verdicts(staging, history, batch=id, rules=repeats)
    if is_comparison(kind):
        verdicts = add_similar(verdicts, staging, history, batch=id, rules=repeats)
    judged = Judged(staging, kind, verdicts)
    if judged.num_refused and settings["on_bad_row"] == OnBadRow.refuse.name:
        rows = list(islice(judged.refused(), MAX_REPORTED))
        raise BadRows(_refusal(path, judged), counts=judged.counts, rows=rows)
    manifest = _manifest(target, parsed, judged, settings)
    stone = None
    if correction is not None:
        brought = manifest["digest"]
        stone = correction_stone(kind, correction, replaced, path=path, brought=brought)
        manifest["supersedes"] = correction.of
        manifest["counts"]["superseded"] = stone.num_rows
    if _is_known(path, id, store, kind, judged, manifest):
        return _report(store, kind, id, manifest, judged, added=False)
    entry = Entry(
        kind=kind,
        id=id,
        rows=judged.accepted(progress),
        refused=judged.refused(),
        excluded=judged.excluded(),
        manifest=manifest,
        beside=(judged.write_notes, judged.write_sketches),
        tombstone=stone,
    )
    target.check()
    if store.add(entry, **split, position=history.position):
        return _report(store, kind, id, manifest, judged, added=True)
    return None


def _check_names(path: Path, *, id: str, stream: str, axis: str | None) -> None:
    rule = "use up to 100 letters, digits, dots, dashes and underscores"
    if not NAME.fullmatch(id):
        raise DataError(f"ingest.id={id!r} (for {path}) is no name for a batch or set; {rule}")
    if not NAME.fullmatch(stream):
        raise DataError(f"ingest.stream={stream!r} is no name for a stream; {rule}")
    if axis is not None and axis not in AXES:
        raise DataError(f"ingest.axis={axis} is not one of {', '.join(AXES)}; give one of them")


def _kind_of(path: Path) -> Kind:
    """Infer the kind from the first object of the file."""
    for line, row in read_objects(path):
        if not isinstance(row, RowError):
            return infer_kind(row, f"{path} line {line}")
    return Kind.batch


def _parse(
    path: Path,
    staging: Staging,
    kind: Kind,
    defaults: Defaults,
    rules: Rules,
    is_sketched: bool,
    progress: Progress,
) -> _Parsed:
    """Read the file into the staging, several blocks at a time."""
    found = file_format(path)
    size = path.stat().st_size

    def work(block: Block) -> tuple[pa.Table, list[dict[str, Any]], Counter[str]]:
        table, refused, extra_fields = staged_block(block, kind, defaults, rules)
        return with_sketches(table) if is_sketched else table, refused, extra_fields

    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads + 1) as pool:
        sha256 = pool.submit(sha256_file, path)
        parsed = _Parsed({"name": path.name, "format": found})
        blocks = in_order(
            pool,
            lambda block: (block.done, work(block)),
            read_blocks(path),
            ahead=num_threads,
        )
        for done, (table, refused, extra_fields) in blocks:
            staging.add(table, refused)
            for name, number in extra_fields.items():
                parsed.extra_fields[storable(name)] += number
            progress(f"read {path.name}", done, size)
        parsed.file["sha256"] = sha256.result()
    staging.finish()
    if staging.num_rows + staging.num_refused == 0:
        raise DataError(f"{path} has no rows; give a file with at least one")
    return parsed


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[In], Out], items: Iterable[In], *, ahead: int
) -> Iterator[Out]:
    """Yield the results of work in the order of the items, with up to `ahead` items under way."""
    waiting: deque[Future[Out]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _refusal(path: Path, judged: Judged) -> str:
    """Return the message that lists the bad rows."""
    refused = list(islice(judged.refused(), MAX_LISTED))
    if judged.num_refused == 1:
        row = refused[0]
        return f"{path} line {row['line']}: {row['reason']}; fix it or use {QUARANTINE}"
    lines = [f"  line {row['line']}: {row['reason']}" for row in refused]
    if judged.num_refused > MAX_LISTED:
        lines.append(f"  and {judged.num_refused - MAX_LISTED} more")
    bad = f"{judged.num_refused} of {judged.counts['read']} rows are bad"
    head = f"{path}: {bad}, so nothing was added; fix them or use {QUARANTINE}"
    return "\n".join([head, *lines])


def _manifest(
    target: _Target, parsed: _Parsed, judged: Judged, settings: dict[str, Any]
) -> dict[str, Any]:
    counts = judged.counts
    return {
        "kind": target.kind.name,
        "id": target.id,
        "stream": target.store.stream,
        "rows": counts["accepted"],
        "digest": judged.digest,
        "counts": counts,
        "accepted_by": judged.accepted_by,
        "extra_fields": dict(sorted(parsed.extra_fields.items())),
        "policy": {name: POLICIES[name] for name in POLICIES if name in counts},
        "settings": settings,
        "file": parsed.file,
        "ingested": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _is_known(
    path: Path, id: str, store: Store, kind: Kind, judged: Judged, manifest: dict[str, Any]
) -> bool:
    """Tell whether the stream holds these rows; DataError for other rows, or none, under the id."""
    if id in store.entries(kind):
        if store.digest(kind, id) == manifest["digest"]:
            return True
        raise DataError(
            f"{path} differs from {kind.name} {id!r}, which is in stream {store.stream!r} and "
            "never changes; give the new rows new ids and a new name (ingest.id=...)"
        )
    counts = judged.counts
    if counts["accepted"]:
        return False
    if counts["duplicate_of_earlier"] + counts["withdrawn"] == counts["read"]:
        return True
    fates = Counter(row["policy"] for row in judged.excluded())
    fates["refused"] = counts["refused"]
    listed = ", ".join(f"{name} {number}" for name, number in fates.most_common() if number)
    raise DataError(f"{path} has no usable row ({listed}); nothing was added, check the file")


def _report(
    store: Store, kind: Kind, id: str, manifest: dict[str, Any], judged: Judged, *, added: bool
) -> IngestReport:
    counts = judged.counts
    if added:
        fates = [f"{name} {counts[name]}" for name in (*POLICIES, "refused") if counts.get(name)]
        left_out = f" (left out: {', '.join(fates)})" if fates else ""
        what = f"{kind.name} {id}"
        if "supersedes" in manifest:
            what = f"{id}, which replaces {counts['superseded']} rows of {kind.name} "
            what += f"{manifest['supersedes']},"
        message = (
            f"added {what} to stream {store.stream}: {counts['accepted']} of "
            f"{counts['read']} rows{left_out}, {counts['heldout']} held out"
        )
    else:
        message = f"{kind.name} {id}: all rows are in stream {store.stream} already; nothing added"
    if manifest["extra_fields"]:
        names = ", ".join(f"{name} ({n})" for name, n in manifest["extra_fields"].items())
        message += f"; fields kept in meta: {names}"
    return IngestReport(
        added=added,
        kind=kind,
        id=id,
        stream=store.stream,
        digest=manifest["digest"],
        counts=counts,
        refused=list(islice(judged.refused(), MAX_REPORTED)),
        excluded=list(islice(judged.excluded(), MAX_REPORTED)),
        message=message,
    )
