"""A deliberately damaged batch: every kind of damage has its exact count, and nothing else goes."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import OnBadRow
from rlhf.data import files
from rlhf.data.ingest import MAX_LISTED, ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import Kind
from rlhf.errors import DataError

NUM_GOOD = 4_000
SPLIT = {"heldout_share": 0.1, "heldout_salt": "s"}
MAX_CHARS = 4_000
REFUSED, EXCLUDED = "refused", "excluded"
Row = dict[str, Any]


def good(i: int, **changes: Any) -> Row:
    """Return a sound row; the texts of no two are alike."""
    turns = [{"role": "user", "content": f"What is {i} plus {i * 7}?"}]
    if i % 5 == 0:
        turns += [
            {"role": "assistant", "content": "Caf\u00e9?"},
            {"role": "user", "content": "No."},
        ]
    return {
        "id": f"r{i}",
        "prompt": turns,
        "chosen": f"It is {i * 8}.\n\U0001f600",
        "rejected": f'"Perhaps" {i}',
        "strength": ("significantly_better", "better", None)[i % 3],
        "axis": ("helpfulness", "safety")[i % 2],
        "chosen_safe": None,
        "rejected_safe": None,
        "source": "vendor",
        "meta": {"raters": i % 4},
        **changes,
    }


def without(row: Row, name: str) -> Row:
    return {key: value for key, value in row.items() if key != name}


def turn(role: str, content: Any) -> list[Row]:
    return [{"role": role, "content": content}]


def line(value: Any) -> bytes:
    return json.dumps(value).encode()


# What is done to the row of a new number i, given a sound row that came before; where it must end,
# and the beginning of the reason, or the policy.
KINDS: dict[str, tuple[Callable[[int, Row], Any], str, str]] = {
    "bad JSON": (lambda i, old: b'{"id": nonsense}', REFUSED, "not valid JSON (Expecting value"),
    "cut line": (lambda i, old: line(good(i))[:70], REFUSED, "not valid JSON"),
    "two rows on a line": (
        lambda i, old: line(good(i)) + line(good(i)),
        REFUSED,
        "not valid JSON (Extra data",
    ),
    "raw control character": (
        lambda i, old: line(good(i)).replace(b"What", b"Wh\x02t"),
        REFUSED,
        "not valid JSON (Invalid control character",
    ),
    "no object": (lambda i, old: [good(i)], REFUSED, "a list where a JSON object is needed"),
    "not UTF-8": (
        lambda i, old: line(good(i)).replace(b"What", b"Wh\xe4t"),
        REFUSED,
        "not UTF-8 (invalid continuation byte",
    ),
    "nested too deep": (
        lambda i, old: line(good(i))[:-1] + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        REFUSED,
        "not valid JSON (nested too deeply)",
    ),
    "half surrogate": (
        lambda i, old: good(i, chosen="smile \ud83d"),
        REFUSED,
        "chosen='smile \\ud83d' holds half a character",
    ),
    "text is a number": (lambda i, old: good(i, chosen=5, rejected=6), REFUSED, "chosen=5 is not"),
    "flag is a text": (lambda i, old: good(i, chosen_safe="no"), REFUSED, "chosen_safe='no' is"),
    "source is a number": (lambda i, old: good(i, source=7), REFUSED, "source=7 is not a text"),
    "unknown strength": (lambda i, old: good(i, strength="best"), REFUSED, "strength='best' is no"),
    "unknown axis": (lambda i, old: good(i, axis="honesty"), REFUSED, "axis='honesty' is not one"),
    "missing axis": (lambda i, old: without(good(i), "axis"), REFUSED, "axis is missing"),
    "missing prompt": (lambda i, old: without(good(i), "prompt"), REFUSED, "prompt is missing"),
    "null response": (lambda i, old: good(i, rejected=None), REFUSED, "rejected is missing"),
    "empty prompt": (lambda i, old: good(i, prompt=[]), REFUSED, "prompt=[] is not a list of"),
    "ends in assistant": (
        lambda i, old: good(i, prompt=turn("assistant", "Hi")),
        REFUSED,
        "prompt must end in a user turn",
    ),
    "unknown role": (
        lambda i, old: good(i, prompt=turn("bot", "Hi")),
        REFUSED,
        "prompt[0].role='bot' is not one of",
    ),
    "late system turn": (
        lambda i, old: good(i, prompt=turn("user", "Q") + turn("system", "S") + turn("user", "Q")),
        REFUSED,
        "prompt[1].role='system' may only be the first",
    ),
    "turn without content": (
        lambda i, old: good(i, prompt=turn("user", None)),
        REFUSED,
        "prompt[0].content=None is not a text",
    ),
    "meta is a list": (lambda i, old: good(i, meta=[1]), REFUSED, "meta=[1] is not a JSON object"),
    "meta is broken": (lambda i, old: good(i, meta="{"), REFUSED, "meta='{' is not a JSON object"),
    "tie is a text": (lambda i, old: good(i, meta={"tie": "x"}), REFUSED, "meta.tie='x' is not"),
    "blank id": (lambda i, old: good(i, id=" "), REFUSED, "id='' is empty"),
    "id collision in file": (
        lambda i, old: good(i, id=old["id"]),
        REFUSED,
        "id={old!r} has other content on line",
    ),
    "id collision with earlier": (
        lambda i, old: good(i, id=f"e{i % 50}"),
        REFUSED,
        "id='e{number}' has other content in before",
    ),
    "empty text": (lambda i, old: good(i, chosen=" \n\u2003"), EXCLUDED, "empty_text"),
    "empty turn": (lambda i, old: good(i, prompt=turn("user", "")), EXCLUDED, "empty_text"),
    "over-long": (lambda i, old: good(i, rejected="long " * 900), EXCLUDED, "over_long"),
    "chosen is rejected": (
        lambda i, old: good(i, rejected=f" {good(i)['chosen']}\n"),
        EXCLUDED,
        "identical_responses",
    ),
    "unsafe chosen": (
        lambda i, old: good(i, axis="safety", chosen_safe=False, rejected_safe=True),
        EXCLUDED,
        "unsafe_chosen",
    ),
    "same row again": (lambda i, old: old, EXCLUDED, "duplicate_in_file"),
    "same texts, new id": (lambda i, old: old | {"id": f"r{i}"}, EXCLUDED, "duplicate_in_file"),
    "same texts as earlier": (
        lambda i, old: before(i % 50) | {"id": f"r{i}"},
        EXCLUDED,
        "duplicate_of_earlier",
    ),
    "other case and blanks": (
        lambda i, old: old | {"id": f"r{i}", "chosen": old["chosen"].upper().replace(" ", "  ")},
        EXCLUDED,
        "near_duplicate_in_file",
    ),
    "like an earlier row": (
        lambda i, old: before(i % 50) | {"id": f"r{i}", "rejected": f"perhaps... E{i % 50}"},
        EXCLUDED,
        "near_duplicate_of_earlier",
    ),
    "opposite verdict": (
        lambda i, old: old | {"id": f"r{i}", "chosen": old["rejected"], "rejected": old["chosen"]},
        EXCLUDED,
        "contradicting",
    ),
}


def before(i: int) -> Row:
    """Return a row of the batch that came before."""
    asked = turn("user", f"Earlier question {i}?")
    return good(i, id=f"e{i}", prompt=asked, chosen=f"So {i}", rejected=f"Perhaps E{i}")


def damaged() -> tuple[list[bytes], dict[int, tuple[str, str, str]]]:
    """Return lines, and of each damaged one by number: kind, fate and reason.

    Kind number k is there 3 + k % 5 times, in random places of the file's second half.
    """
    rng = random.Random(0)
    first = [good(i) for i in range(NUM_GOOD // 2)]
    second: list[tuple[str, Any, Row]] = [("", good(i), {}) for i in range(NUM_GOOD // 2, NUM_GOOD)]
    number = NUM_GOOD
    originals = iter(rng.sample(first, len(first)))
    for k, (name, (make, _, _)) in enumerate(KINDS.items()):
        for _ in range(3 + k % 5):
            number += 1
            old = next(originals)
            second.insert(rng.randrange(len(second)), (name, (make, number, old), old))
    lines = [line(row) for row in first]
    expected = {}
    for name, made, old in second:
        value = made
        if name:
            make, number, old = made
            value = make(number, old)
            _, fate, reason = KINDS[name]
            reason = reason.replace("{old!r}", repr(old["id"])).replace(
                "{number}", str(number % 50)
            )
            expected[len(lines) + 1] = (name, fate, reason)
        lines.append(value if isinstance(value, bytes) else line(value))
    lines.append(line(good(number + 1))[:-20])
    expected[len(lines)] = ("cut last line", REFUSED, "not valid JSON")
    return lines, expected


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "store", "weekly")
    path = tmp_path / "before.jsonl"
    path.write_bytes(b"\n".join(line(before(i)) for i in range(50)))
    ingest_file(path, found, kind=None, **SPLIT)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("block_bytes", [files.BLOCK_BYTES, 40_000])
def test_every_damage_is_counted_and_nothing_else(
    tmp_path: Path, store: Store, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    lines, expected = damaged()
    assert len(KINDS) + 1 >= 12
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"\n".join(lines))
    options = {"on_bad_row": OnBadRow.quarantine, "max_chars": MAX_CHARS, **SPLIT}
    report = ingest_file(path, store, kind=Kind.batch, **options)  # type: ignore[arg-type]
    folder = store.folder / "batches" / "damaged"
    refused = {row["line"]: row for row in map(json.loads, (folder / "refused.jsonl").open())}
    excluded = {row["line"]: row for row in map(json.loads, (folder / "excluded.jsonl").open())}

    wanted = Counter(name for name, _, _ in expected.values())
    found = Counter(
        name
        for number, (name, fate, reason) in expected.items()
        if (fate == REFUSED and refused.get(number, {"reason": ""})["reason"].startswith(reason))
        or (fate == EXCLUDED and excluded.get(number, {"policy": ""})["policy"] == reason)
    )
    assert found == wanted
    assert wanted == {name: 3 + k % 5 for k, name in enumerate(KINDS)} | {"cut last line": 1}
    assert refused.keys() | excluded.keys() == expected.keys()
    assert not refused.keys() & excluded.keys()

    policies = Counter(reason for _, fate, reason in expected.values() if fate == EXCLUDED)
    for policy in policies:
        assert report.counts[policy] == policies[policy]
    assert report.counts["refused"] == len(refused)
    assert report.counts["excluded"] == len(excluded) == policies.total()
    assert report.counts["read"] == len(lines)
    assert report.counts["accepted"] == NUM_GOOD
    assert [row.id for row in store.comparisons(Kind.batch, "damaged")] == [
        f"r{i}" for i in range(NUM_GOOD)
    ]


def test_the_damaged_batch_is_refused_as_a_whole_by_default(tmp_path: Path, store: Store) -> None:
    lines, expected = damaged()
    path = tmp_path / "damaged.jsonl.gz"
    path.write_bytes(gzip.compress(b"\r\n".join(lines)))
    names = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(DataError) as caught:
        ingest_file(path, store, kind=Kind.batch, max_chars=MAX_CHARS, **SPLIT)  # type: ignore[arg-type]
    listed = str(caught.value).splitlines()
    refused = [number for number, (_, fate, _) in expected.items() if fate == REFUSED]
    assert listed[0].startswith(f"{path}: {len(refused)} of {len(lines)} rows are bad, so nothing")
    assert [text.split(":")[0] for text in listed[1:-1]] == [
        f"  line {number}" for number in refused[:MAX_LISTED]
    ]
    assert listed[-1] == f"  and {len(refused) - MAX_LISTED} more"
    assert sorted(str(p) for p in tmp_path.rglob("*")) == names
    assert store.ids(Kind.batch) == ["before"]
