"""A second implementation of ingest: one row after another, everything in dictionaries.

Written before the columnar one and kept as what it must agree with: the plainest form.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.files import RowError, quote, read_objects
from rlhf.data.keys import Keys, Record, keys_of
from rlhf.data.parse import Defaults, parse_row, unknown_fields
from rlhf.data.records import Comparison, Conversation, Kind
from rlhf.data.sift import COMPARISON_ONLY, POLICIES
from rlhf.data.split import key_is_heldout
from rlhf.data.tabulate import refused_row


@dataclass(frozen=True)
class Seen:
    batch: str
    id: str
    swapped: bool


@dataclass
class SlowHistory:
    exact: dict[str, Seen] = field(default_factory=dict)
    near: dict[str, Seen] = field(default_factory=dict)
    contents: dict[str, tuple[str, str]] = field(default_factory=dict)
    prompts: set[str] = field(default_factory=set)

    def add(self, batch: str, rows: Iterable[tuple[Record, Keys]]) -> None:
        for record, keys in rows:
            seen = Seen(batch, record.id, keys.swapped)
            self.exact.setdefault(keys.exact, seen)
            self.near.setdefault(keys.near, seen)
            self.contents[record.id] = (batch, keys.content)
            self.prompts.add(keys.prompt)


@dataclass
class Slow:
    """What became of a file, as the store would hold it."""

    accepted: list[tuple[Record, Keys]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)
    extra_fields: Counter[str] = field(default_factory=Counter)
    num_read: int = 0

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for record, keys in self.accepted:
            digest.update(f"{keys.content} {record.source}\n".encode())
        return digest.hexdigest()

    def counts(self, kind: Kind) -> dict[str, int]:
        comparisons = kind in (Kind.batch, Kind.open)
        records = [record for record, _ in self.accepted]
        policies = Counter(row["policy"] for row in self.excluded)
        counts = {
            "read": self.num_read,
            "accepted": len(records),
            "refused": len(self.refused),
            "excluded": len(self.excluded),
        }
        counts |= {
            name: policies[name] for name in POLICIES if comparisons or name not in COMPARISON_ONLY
        }
        counts["heldout"] = sum(record.heldout for record in records)
        rated = [record for record in records if isinstance(record, Comparison)]
        if comparisons:
            counts["repeat_prompt"] = sum(record.repeat_prompt for record in rated)
            counts["ties"] = sum(record.tie for record in rated)
            counts["ungraded"] = sum(record.strength is None for record in rated)
        return counts

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of rows.parquet."""
        found = []
        for record, keys in self.accepted:
            row = record.to_json()
            row.pop("batch_id", None)
            row["meta"] = json.dumps(row["meta"])
            found.append({**row, **{f"key_{name}": getattr(keys, name) for name in Keys.__slots__}})
        return found


def slow_ingest(
    path: Path,
    kind: Kind,
    history: SlowHistory,
    *,
    id: str,
    axis: str | None = None,
    share: float,
    salt: str,
    max_chars: int,
) -> Slow:
    defaults = Defaults(source=id, axis=axis, is_safety=False)
    parsed: list[tuple[int, Record]] = []
    slow = Slow()
    for line, row in read_objects(path):
        slow.num_read += 1
        if isinstance(row, RowError):
            slow.refused.append(refused_row(line, row.reason, row.value))
            continue
        try:
            parsed.append((line, parse_row(kind, row, line=line, defaults=defaults)))
        except RowError as error:
            slow.refused.append(refused_row(line, error.reason, error.value))
        slow.extra_fields.update(unknown_fields(kind, row))
    sift(slow, parsed, id, history, share=share, salt=salt, max_chars=max_chars)
    slow.refused.sort(key=lambda row: row["line"])
    return slow


def sift(
    slow: Slow,
    rows: Sequence[tuple[int, Record]],
    batch: str,
    history: SlowHistory,
    *,
    share: float,
    salt: str,
    max_chars: int,
) -> None:
    lines: dict[str, tuple[int, str]] = {}
    exact: dict[str, Seen] = {}
    near: dict[str, Seen] = {}
    for line, record in rows:
        keys = keys_of(record)
        collision = id_collision(record, keys, lines, history)
        if collision is not None:
            slow.refused.append(refused_row(line, collision, record.id))
            continue
        lines.setdefault(record.id, (line, keys.content))
        found = row_policy(record, max_chars) or repetition(keys, exact, near, history)
        if found is not None:
            policy, reason = found
            slow.excluded.append(
                {"line": line, "id": record.id, "policy": policy, "reason": reason}
            )
            continue
        seen = Seen(batch, record.id, keys.swapped)
        exact[keys.exact] = seen
        near[keys.near] = seen
        record.heldout = key_is_heldout(keys.prompt, share=share, salt=salt)
        if isinstance(record, Comparison):
            record.repeat_prompt = keys.prompt in history.prompts
        slow.accepted.append((record, keys))


def id_collision(
    record: Record, keys: Keys, lines: dict[str, tuple[int, str]], history: SlowHistory
) -> str | None:
    line, content = lines.get(record.id, (0, keys.content))
    if content != keys.content:
        return f"id={quote(record.id)} has other content on line {line}"
    batch, content = history.contents.get(record.id, ("", keys.content))
    if content != keys.content:
        return f"id={quote(record.id)} has other content in {batch}"
    return None


def row_policy(record: Record, max_chars: int) -> tuple[str, str] | None:
    messages = record.messages if isinstance(record, Conversation) else record.prompt
    texts = {f"turn {i + 1}": message["content"] for i, message in enumerate(messages)}
    num_chars = sum(map(len, texts.values()))
    if isinstance(record, Comparison):
        num_chars += max(len(record.chosen), len(record.rejected))
        texts |= {"chosen": record.chosen, "rejected": record.rejected}
    empty = [name for name, text in texts.items() if not text.strip()]
    if empty:
        return "empty_text", f"{', '.join(empty)} has no text"
    if num_chars > max_chars:
        return "over_long", f"{num_chars} characters, more than max_chars={max_chars}"
    if not isinstance(record, Comparison):
        return None
    if record.chosen.strip() == record.rejected.strip():
        return "identical_responses", "chosen equals rejected"
    if record.axis == "safety" and record.chosen_safe is False and record.rejected_safe is True:
        return "unsafe_chosen", "chosen is unsafe and rejected is safe"
    return None


def repetition(
    keys: Keys, exact: dict[str, Seen], near: dict[str, Seen], history: SlowHistory
) -> tuple[str, str] | None:
    for name, found, earlier in (
        ("duplicate", exact.get(keys.exact), history.exact.get(keys.exact)),
        ("near_duplicate", near.get(keys.near), history.near.get(keys.near)),
    ):
        seen = found or earlier
        if seen is None:
            continue
        if seen.swapped != keys.swapped:
            return "contradicting", f"contradicts {seen.id} of {seen.batch}"
        where = "in_file" if found is not None else "of_earlier"
        return f"{name}_{where}", f"repeats {seen.id} of {seen.batch}"
    return None
