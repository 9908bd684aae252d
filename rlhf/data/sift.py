"""Which parsed rows are accepted, which policy excludes the others, and which ids collide.

Every row ends in exactly one of three places, and each is counted: accepted, refused (a fault of
the file) or excluded (a rule of ours, which is never an error).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.files import quote
from rlhf.data.keys import Keys, Record, keys_of
from rlhf.data.ledger import History, Seen
from rlhf.data.records import Comparison, Conversation
from rlhf.data.split import key_is_heldout

MAX_REFUSED_VALUE = 500
"""Characters of a refused value that refused.jsonl keeps."""

POLICIES = {
    "empty_text": "a response or a turn without text",
    "over_long": "longer than max_chars characters, prompt and longer response together; never cut",
    "identical_responses": "chosen equals rejected",
    "unsafe_chosen": "on the safety axis, an unsafe chosen beside a safe rejected response "
    "(paper section 3.2.2)",
    "duplicate_in_file": "equal texts earlier in this file",
    "duplicate_of_earlier": "equal texts in an earlier batch or set of this kind",
    "near_duplicate_in_file": "earlier in this file but for case, blanks and punctuation",
    "near_duplicate_of_earlier": "in an earlier batch or set but for case, blanks and punctuation",
    "contradicting": "the same pair was met before with the opposite verdict, which stays",
}
"""Why rows are excluded, in the order in which the rules are tried."""

COMPARISON_ONLY = ("identical_responses", "unsafe_chosen", "contradicting")


@dataclass(slots=True)
class Sifted:
    """Accepted rows in file order, and what became of the others."""

    accepted: list[tuple[Record, Keys]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)


def refused_row(line: int, reason: str, value: object) -> dict[str, Any]:
    """Return an entry of refused.jsonl; long values are shortened."""
    text = value if isinstance(value, str) else quote(value)
    return {"line": line, "reason": reason, "value": text[:MAX_REFUSED_VALUE]}


def sift(
    rows: Iterable[tuple[int, Record]],
    *,
    batch: str,
    history: History,
    share: float,
    salt: str,
    max_chars: int,
) -> Sifted:
    """Sort rows by policy, and fill in `heldout` and `repeat_prompt` of those that are accepted."""
    sifted = Sifted()
    lines: dict[str, tuple[int, str]] = {}
    exact: dict[str, Seen] = {}
    near: dict[str, Seen] = {}
    for line, record in rows:
        keys = keys_of(record)
        collision = _id_collision(record, keys, lines, history)
        if collision is not None:
            sifted.refused.append(refused_row(line, collision, record.id))
            continue
        lines.setdefault(record.id, (line, keys.content))
        found = _row_policy(record, max_chars) or _repetition(keys, exact, near, history)
        if found is not None:
            policy, reason = found
            sifted.excluded.append(
                {"line": line, "id": record.id, "policy": policy, "reason": reason}
            )
            continue
        seen = Seen(batch, record.id, keys.swapped)
        exact[keys.exact] = seen
        near[keys.near] = seen
        record.heldout = key_is_heldout(keys.prompt, share=share, salt=salt)
        if isinstance(record, Comparison):
            record.repeat_prompt = keys.prompt in history.prompts
        sifted.accepted.append((record, keys))
    return sifted


def count_rows(sifted: Sifted, *, num_read: int, comparisons: bool) -> dict[str, int]:
    """Count every fate: read = accepted + refused + excluded, and excluded by policy."""
    records = [record for record, _ in sifted.accepted]
    policies = Counter(row["policy"] for row in sifted.excluded)
    counts = {
        "read": num_read,
        "accepted": len(records),
        "refused": len(sifted.refused),
        "excluded": len(sifted.excluded),
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


def count_values(sifted: Sifted) -> dict[str, dict[str, int]]:
    """Count the accepted rows by source and, for comparisons, by axis and strength."""
    records = [record for record, _ in sifted.accepted]
    rated = [record for record in records if isinstance(record, Comparison)]
    counts = {"source": Counter(record.source for record in records)}
    if rated:
        counts["axis"] = Counter(record.axis for record in rated)
        counts["strength"] = Counter(record.strength or "ungraded" for record in rated)
    return {name: dict(sorted(counter.items())) for name, counter in counts.items()}


def _id_collision(
    record: Record, keys: Keys, lines: dict[str, tuple[int, str]], history: History
) -> str | None:
    """Tell when an id stands for two different rows; the pool and the intervals go by ids."""
    line, content = lines.get(record.id, (0, keys.content))
    if content != keys.content:
        return f"id={quote(record.id)} has other content on line {line}"
    batch, content = history.contents.get(record.id, ("", keys.content))
    if content != keys.content:
        return f"id={quote(record.id)} has other content in {batch}"
    return None


def _row_policy(record: Record, max_chars: int) -> tuple[str, str] | None:
    """Apply the rules that need nothing but the row."""
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


def _repetition(
    keys: Keys, exact: dict[str, Seen], near: dict[str, Seen], history: History
) -> tuple[str, str] | None:
    """Find the same row in this file or before it, literally or folded, or its contradiction."""
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
