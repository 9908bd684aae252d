"""A file to an immutable batch or set of the store, or one message that says why not."""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.artifacts import sha256_file
from rlhf.config import OnBadRow
from rlhf.data.files import RowError, file_format, read_objects
from rlhf.data.keys import Record
from rlhf.data.ledger import Entry, Store, rows_digest
from rlhf.data.parse import Defaults, infer_kind, parse_row, unknown_fields
from rlhf.data.records import AXES, Kind
from rlhf.data.sift import POLICIES, Sifted, count_rows, count_values, refused_row, sift
from rlhf.errors import DataError

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SUFFIXES = re.compile(r"(\.jsonl|\.json|\.parquet)?(\.gz)?$")
"""What a file's name loses to become the name of a batch or set."""

MAX_LISTED = 20
"""Bad rows that a message lists; refused.jsonl holds them all."""
QUARANTINE = "ingest.on_bad_row=quarantine"
COMPARISONS = (Kind.batch, Kind.open)


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What became of a file: `added` is False when its rows were in the stream already.

    `counts` has read = accepted + refused + excluded; `refused` has line, reason and value,
    `excluded` line, id, policy and reason.
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


@dataclass(slots=True)
class _Parsed:
    kind: Kind
    rows: list[tuple[int, Record]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    extra_fields: Counter[str] = field(default_factory=Counter)

    @property
    def num_read(self) -> int:
        return len(self.rows) + len(self.refused)


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
) -> IngestReport:
    """Validate a file and add it to the store as one immutable batch or set.

    `kind` None infers it from the fields (never `open`); `id` None takes the file's name. Adding
    the same rows again changes nothing and says so. Raises DataError, with nothing written, for a
    damaged file, for bad rows under `refuse`, for other rows under an old id, and for a split that
    differs from the stream's.
    """
    id = SUFFIXES.sub("", path.name) if id is None else id
    _check_names(path, id=id, stream=store.stream, axis=axis)
    store.check_split(share=heldout_share, salt=heldout_salt)
    parsed = _parse(path, kind, Defaults(source=id, axis=axis, is_safety=is_safety_default))
    settings = {
        "on_bad_row": on_bad_row.name,
        "axis": axis,
        "max_chars": max_chars,
        "is_safety_default": is_safety_default,
    }
    while True:
        history = store.history(parsed.kind, before=id)
        sifted = sift(
            parsed.rows,
            batch=id,
            history=history,
            share=heldout_share,
            salt=heldout_salt,
            max_chars=max_chars,
        )
        sifted.refused = sorted(parsed.refused + sifted.refused, key=lambda row: row["line"])
        if sifted.refused and on_bad_row is OnBadRow.refuse:
            raise DataError(_refusal(path, sifted.refused, num_read=parsed.num_read))
        manifest = _manifest(path, id, store, parsed, sifted, settings)
        if _is_known(path, id, store, parsed.kind, sifted, manifest):
            return _report(store, parsed.kind, id, manifest, sifted, added=False)
        entry = Entry(parsed.kind, id, sifted.accepted, sifted.refused, sifted.excluded, manifest)
        position = history.position
        if store.add(entry, share=heldout_share, salt=heldout_salt, position=position):
            report = _report(store, parsed.kind, id, manifest, sifted, added=True)
            log.info("%s", report.message)
            return report


def _check_names(path: Path, *, id: str, stream: str, axis: str | None) -> None:
    rule = "use up to 100 letters, digits, dots, dashes and underscores"
    if not NAME.fullmatch(id):
        raise DataError(f"ingest.id={id!r} (for {path}) is no name for a batch or set; {rule}")
    if not NAME.fullmatch(stream):
        raise DataError(f"ingest.stream={stream!r} is no name for a stream; {rule}")
    if axis is not None and axis not in AXES:
        raise DataError(f"ingest.axis={axis} is not one of {', '.join(AXES)}; give one of them")


def _parse(path: Path, kind: Kind | None, defaults: Defaults) -> _Parsed:
    """Read every row of the file; the first object decides the kind when it is not given."""
    parsed = _Parsed(kind or Kind.batch)
    for line, row in read_objects(path):
        if isinstance(row, RowError):
            parsed.refused.append(refused_row(line, row.reason, row.value))
            continue
        if kind is None:
            kind = parsed.kind = infer_kind(row, f"{path} line {line}")
        try:
            parsed.rows.append((line, parse_row(kind, row, line=line, defaults=defaults)))
        except RowError as error:
            parsed.refused.append(refused_row(line, error.reason, error.value))
        parsed.extra_fields.update(unknown_fields(kind, row))
    if parsed.num_read == 0:
        raise DataError(f"{path} has no rows; give a file with at least one")
    return parsed


def _refusal(path: Path, refused: list[dict[str, Any]], *, num_read: int) -> str:
    """Return the message that lists the bad rows."""
    if len(refused) == 1:
        row = refused[0]
        return f"{path} line {row['line']}: {row['reason']}; fix it or use {QUARANTINE}"
    lines = [f"  line {row['line']}: {row['reason']}" for row in refused[:MAX_LISTED]]
    if len(refused) > MAX_LISTED:
        lines.append(f"  and {len(refused) - MAX_LISTED} more")
    head = f"{path}: {len(refused)} of {num_read} rows are bad, so nothing was added; "
    return "\n".join([f"{head}fix them or use {QUARANTINE}", *lines])


def _manifest(
    path: Path, id: str, store: Store, parsed: _Parsed, sifted: Sifted, settings: dict[str, Any]
) -> dict[str, Any]:
    comparisons = parsed.kind in COMPARISONS
    counts = count_rows(sifted, num_read=parsed.num_read, comparisons=comparisons)
    return {
        "kind": parsed.kind.name,
        "id": id,
        "stream": store.stream,
        "rows": counts["accepted"],
        "digest": rows_digest(sifted.accepted),
        "counts": counts,
        "accepted_by": count_values(sifted),
        "extra_fields": dict(sorted(parsed.extra_fields.items())),
        "policy": {name: POLICIES[name] for name in POLICIES if name in counts},
        "settings": settings,
        "file": {
            "name": path.name,
            "format": file_format(path),
            "sha256": sha256_file(path),
        },
        "ingested": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _is_known(
    path: Path, id: str, store: Store, kind: Kind, sifted: Sifted, manifest: dict[str, Any]
) -> bool:
    """Tell whether the stream holds these rows; DataError for other rows, or none, under the id."""
    if id in store.ids(kind):
        if store.digest(kind, id) == manifest["digest"]:
            return True
        raise DataError(
            f"{path} differs from {kind.name} {id!r}, which is in stream {store.stream!r} and "
            "never changes; give the new rows new ids and a new name (ingest.id=...)"
        )
    if sifted.accepted:
        return False
    fates = Counter(row["policy"] for row in sifted.excluded)
    if fates["duplicate_of_earlier"] == manifest["counts"]["read"]:
        return True
    fates.update({"refused": len(sifted.refused)})
    listed = ", ".join(f"{name} {number}" for name, number in fates.most_common() if number)
    raise DataError(f"{path} has no usable row ({listed}); nothing was added, check the file")


def _report(
    store: Store, kind: Kind, id: str, manifest: dict[str, Any], sifted: Sifted, *, added: bool
) -> IngestReport:
    counts: dict[str, int] = manifest["counts"]
    if added:
        fates = [f"{name} {counts[name]}" for name in (*POLICIES, "refused") if counts.get(name)]
        left_out = f" (left out: {', '.join(fates)})" if fates else ""
        message = (
            f"added {kind.name} {id} to stream {store.stream}: {counts['accepted']} of "
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
        refused=sifted.refused,
        excluded=sifted.excluded,
        message=message,
    )
