"""The columnar ingest gives what the row-wise second implementation gives, on files of every sort.

Row for row, key for key, count for count, message for message, and the manifest's digest.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from slow_ingest import SlowHistory, slow_ingest

from rlhf.config import OnBadRow
from rlhf.data import files, raw, repeats
from rlhf.data.accept import Rules, staged_block
from rlhf.data.columns import fold_texts, hex_texts, json_texts, key_columns
from rlhf.data.files import Lines
from rlhf.data.ingest import ingest_file
from rlhf.data.keys import keys_of
from rlhf.data.ledger import Store
from rlhf.data.parse import Defaults, parse_row
from rlhf.data.records import Kind
from rlhf.data.split import FOLDED, fold_text
from rlhf.data.tabulate import tabulate

PIECES = (
    "word",
    "Word",
    " ",
    "  ",
    "\n",
    "\t",
    "\x0b",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2003",
    "\u2028",
    "\u3000",
    ".",
    "...",
    "\u2026",
    "\u2019",
    "\u201cx\u201d",
    '"',
    "\\",
    "\\n",
    "/",
    "\x00",
    "\x01",
    "\x7f",
    "\b\f\r",
    "caf\u00e9",
    "cafe\u0301",
    "\u00a8",
    "\u0308",
    "STRASSE",
    "stra\u00dfe",
    "\u0130",
    "\ufb01",
    "\uff21\uff22",
    "\u00bd",
    "\U0001f600",
    "\u4f60\u597d",
    "+",
    "<b>",
    '"meta": {"tie": true}',
    '"meta"',
    "true",
    "\u1680",
    "\ufeff",
)
"""Parts of texts in which case, blanks, escapes and Unicode forms differ."""


def text(rng: random.Random, most: int = 6) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(0, most)))


def messages(rng: random.Random, last: str) -> list[dict[str, str]]:
    found = [{"role": "system", "content": text(rng)}] if rng.random() < 0.2 else []
    for _ in range(rng.randint(0, 2)):
        found += [{"role": role, "content": text(rng)} for role in ("user", "assistant")]
    found.append({"role": "user", "content": f"ask {rng.randint(0, 30)} {text(rng, 2)}"})
    return [*found, {"role": "assistant", "content": text(rng)}] if last == "assistant" else found


def meta(rng: random.Random) -> Any:
    return rng.choice(
        [
            {},
            None,
            {"tie": rng.choice([True, False, None, "no", 1])},
            {"b": 1, "a": [1.0, 1e400, 10**30, {"c": None}], "text": text(rng)},
            '{"score": 1.50}',
            "{",
            [],
            0,
            {"meta": {"meta": 1}},
            {"half": "\ud83d", "x": float("nan")},
        ]
    )


def comparison(rng: random.Random, i: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": f"r{i}",
        "prompt": messages(rng, "user"),
        "chosen": f"{rng.randint(0, 3)}{text(rng)}",
        "rejected": f"{rng.randint(4, 6)}{text(rng)}",
        "strength": rng.choice(["better", "slightly_better", None]),
        "axis": rng.choice(["helpfulness", "safety"]),
        "chosen_safe": rng.choice([True, False, None]),
        "rejected_safe": rng.choice([True, False, None]),
        "source": rng.choice(["vendor", "", None, "v\u00e9"]),
    }
    if rng.random() < 0.7:
        row["meta"] = meta(rng)
    if rng.random() < 0.2:
        row |= {"tie": rng.choice([True, False, None]), "annotator": text(rng)}
    return row


CHANGES: tuple[Callable[[random.Random, dict[str, Any]], Any], ...] = (
    lambda r, row: row | {"strength": "much_better"},
    lambda r, row: row | {"strength": ["better"]},
    lambda r, row: row | {"axis": r.choice(["honesty", None, 3])},
    lambda r, row: row | {"prompt": r.choice([None, [], "plain", [None], [{"role": "user"}], 5])},
    lambda r, row: row | {"prompt": [{"role": "bot", "content": "x"}]},
    lambda r, row: row | {"prompt": [{"role": "user", "content": None}]},
    lambda r, row: row | {"prompt": [*row["prompt"], {"role": "system", "content": "x"}]},
    lambda r, row: row | {"prompt": [*row["prompt"], {"role": "assistant", "content": "x"}]},
    lambda r, row: row | {"prompt": [{**row["prompt"][-1], "name": r.choice([None, "x"])}]},
    lambda r, row: row | {"chosen": r.choice([None, 5, "", " \u2003", row["rejected"] + " "])},
    lambda r, row: row | {"chosen": [{"role": "assistant", "content": "Hi"}]},
    lambda r, row: row | {"chosen": "long " * 100},
    lambda r, row: row | {"chosen": "half \ud83d"},
    lambda r, row: row | {"chosen_safe": r.choice(["true", 0, True])},
    lambda r, row: row | {"id": r.choice([None, 7, r.randint(0, 9), 1.5, "", " ", True, 10**25])},
    lambda r, row: row | {"id": f"r{r.randint(0, 40)}"},
    lambda r, row: row | {"chosen": row["rejected"], "rejected": row["chosen"]},
    lambda r, row: row | {"chosen": row["chosen"].upper() + ".", "id": "n" + row["id"]},
    lambda r, row: row | {"source": r.choice([7, None, "other"])},
    lambda r, row: row | {"score": r.choice([None, 1, 2.5, "x", [1]]), "unk\u00f6wn": None},
    lambda r, row: row | {"heldout": True, "batch_id": r.choice([None, "x", 4])},
    lambda r, row: row | {"completion": "x", "messages": 3},
    lambda r, row: {
        "chosen": "\n\nHuman: Q\n\nAssistant: A",
        "rejected": "\n\nHuman: Q\n\nAssistant: B",
    },
    lambda r, row: {k: v for k, v in row.items() if k != r.choice(list(row))},
    lambda r, row: {},
    lambda r, row: [row],
)

BROKEN: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    lambda r, line: line[: r.randint(0, len(line))],
    lambda r, line: line + line,
    lambda r, line: line[:-1] + b',"id":"twice"}',
    lambda r, line: line[:-1] + b',"meta":{"tie":true}}',
    lambda r, line: line[:-1] + b',"m\\u0065ta":{"e":1}}',
    lambda r, line: line[:-1] + b',"sc\\u006fre":null}',
    lambda r, line: line.replace(b"{", b"{ \t", 1) + b" \r",
    lambda r, line: b"  " + line,
    lambda r, line: line.replace(b'"id"', b'"id"\xff', 1),
    lambda r, line: line.replace(b"ask", b"ask\x01", 1),
    lambda r, line: line.replace(b"ask", b"ask\\x", 1),
    lambda r, line: line.replace(b"ask", b"\\ud83d\\ude00", 1),
    lambda r, line: line.replace(b"ask", b"\\ude00", 1),
    lambda r, line: line.replace(b"ask", b"\xed\xa0\x80", 1),
    lambda r, line: line[:-1] + b',"deep":' + b"[" * 3000 + b"]" * 3000 + b"}",
    lambda r, line: line[:-1] + b',"meta":' + b"[" * 3000 + b"}",
    lambda r, line: line[:-1] + b',"x":Inf}',
    lambda r, line: line[:-1] + b',"x":NaN}',
    lambda r, line: line[:-1] + b',"meta":{"a":1},{"b":2}}',
    lambda r, line: line[:-1] + b',"meta" : {"a":[1}',
    lambda r, line: line + b"\n2]}}",
    lambda r, line: line[:-1] + b',"meta":{"a":1},"tie":false}',
    lambda r, line: r.choice(
        [b"", b" ", b"\x0b", b"\r", b"null", b"7", b"[]", b"}{", b"\xef\xbb\xbf{}"]
    ),
)


def rows_of(rng: random.Random, number: int, *, first: int, mild: bool) -> list[Any]:
    rows: list[Any] = []
    for i in range(first, first + number):
        row: Any = comparison(rng, i)
        if rows and rng.random() < 0.15 and isinstance(rows[-1], dict):
            row = rows[rng.randrange(len(rows))]
        if rng.random() < (0.1 if mild else 0.4) and isinstance(row, dict) and "prompt" in row:
            try:
                row = rng.choice(CHANGES)(rng, row)
            except (TypeError, KeyError, AttributeError):
                row = comparison(rng, i)
        rows.append(row)
    return rows


def lines_of(rng: random.Random, rows: list[Any], *, mild: bool) -> bytes:
    lines = []
    for row in rows:
        separators = rng.choice([(",", ":"), (", ", ": ")])
        try:
            ascii_only = rng.random() < 0.5
            line = json.dumps(row, ensure_ascii=ascii_only, separators=separators).encode()
        except UnicodeEncodeError:
            line = json.dumps(row).encode()
        if rng.random() < (0.02 if mild else 0.2) and line[-1:] == b"}":
            line = rng.choice(BROKEN)(rng, line)
        lines.append(line)
    end = rng.choice([b"\n", b"\r\n"])
    start = rng.choice([b"", b"\xef\xbb\xbf"])
    return start + end.join(lines) + rng.choice([b"", end])


def check(path: Path, store: Store, history: SlowHistory, *, id: str, axis: str | None) -> None:
    report = ingest_file(
        path,
        store,
        kind=Kind.batch,
        id=id,
        on_bad_row=OnBadRow.quarantine,
        axis=axis,
        heldout_share=0.25,
        heldout_salt="s",
        max_chars=300,
    )
    slow = slow_ingest(
        path, Kind.batch, history, id=id, axis=axis, share=0.25, salt="s", max_chars=300
    )
    folder = store.folder / "batches" / id
    assert report.added
    assert [json.loads(line) for line in (folder / "refused.jsonl").open()] == slow.refused
    assert [json.loads(line) for line in (folder / "excluded.jsonl").open()] == slow.excluded
    assert report.counts == slow.counts(Kind.batch)
    assert report.digest == slow.digest
    stored = pq.read_table(folder / "rows.parquet").to_pylist()
    wanted = slow.rows()
    assert [dict(sorted(row.items())) for row in stored] == [
        dict(sorted(row.items())) for row in wanted
    ]
    manifest = store.manifest(Kind.batch, id)
    assert manifest["extra_fields"] == dict(sorted(slow.extra_fields.items()))
    history.add(id, slow.accepted)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every file one of many blocks and parts."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 6_000)
    monkeypatch.setattr(files, "BLOCK_ROWS", 13)
    monkeypatch.setattr(repeats, "PART_ROWS", 40)


@pytest.mark.parametrize("seed", range(12))
def test_json_lines(tmp_path: Path, seed: int, small_blocks: None) -> None:
    rng = random.Random(seed)
    store, history = Store(tmp_path / "store", "weekly"), SlowHistory()
    mild = seed % 2 == 0
    before: list[Any] = []
    for number, id in enumerate(("w1", "w2")):
        rows = rows_of(rng, 150, first=100 * number, mild=mild)
        rows += [row for row in before if rng.random() < 0.2]
        rng.shuffle(rows)
        before = rows
        data = lines_of(rng, rows, mild=mild)
        path = tmp_path / f"{id}.jsonl"
        path.write_bytes(data if seed % 3 else gzip.compress(data))
        check(path, store, history, id=id, axis=rng.choice([None, "safety"]))


@pytest.mark.parametrize("seed", range(4))
def test_one_block(tmp_path: Path, seed: int) -> None:
    rng = random.Random(100 + seed)
    store, history = Store(tmp_path / "store", "weekly"), SlowHistory()
    for id in ("w1", "w2"):
        path = tmp_path / f"{id}.jsonl"
        path.write_bytes(lines_of(rng, rows_of(rng, 300, first=0, mild=True), mild=True))
        check(path, store, history, id=id, axis=None)


@pytest.mark.parametrize("seed", range(6))
def test_parquet(tmp_path: Path, seed: int, small_blocks: None) -> None:
    rng = random.Random(seed)
    store, history = Store(tmp_path / "store", "weekly"), SlowHistory()
    for id in ("w1", "w2"):
        rows = [comparison(rng, i) for i in range(80)]
        for row in rows:
            row["meta"] = rng.choice([None, '{"a": 1.50}', "{", '{"tie": true}', ""])
            row["strength"] = rng.choice(["better", "odd", None])
            row["prompt"] = rng.choice([row["prompt"], row["prompt"], [], None])
            row["extra"] = rng.choice([None, 1.5])
        if seed % 3 == 1:
            rows = [row | {"meta": {"tie": rng.choice([None, True]), "n": 1}} for row in rows]
        if seed % 3 == 2:
            rows = [row | {"id": i + 1000, "prompt": f"ask {i}"} for i, row in enumerate(rows)]
        table = pa.Table.from_pylist(rows)
        if seed % 2:
            types = {"chosen": pa.large_string(), "source": pa.dictionary(pa.int8(), pa.string())}
            for name, kind in types.items():
                at = table.schema.get_field_index(name)
                table = table.set_column(at, name, table[name].cast(kind))
        path = tmp_path / f"{id}.parquet"
        pq.write_table(table, path)
        check(path, store, history, id=id, axis=None)


@pytest.mark.parametrize("kind", [Kind.sft, Kind.prompts])
@pytest.mark.parametrize("seed", range(3))
def test_other_kinds(tmp_path: Path, kind: Kind, seed: int, small_blocks: None) -> None:
    rng = random.Random(seed)
    rows: list[Any] = []
    for i in range(120):
        row: dict[str, Any] = {"id": f"r{i}", "meta": meta(rng)}
        if kind is Kind.sft:
            row["messages"] = messages(rng, rng.choice(["user", "assistant", "assistant"]))
            row |= rng.choice([{}, {}, {"messages": None, "prompt": "Q", "completion": "A"}])
        else:
            row["prompt"] = rng.choice([messages(rng, "user"), "text", text(rng)])
            row["is_safety"] = rng.choice([True, False, None, None, "x"])
        rows.append(rng.choice(rows) if rows and rng.random() < 0.2 else row)
    path = tmp_path / "s.jsonl"
    path.write_bytes(lines_of(rng, rows, mild=True))
    store = Store(tmp_path / "store", "weekly")
    split = {"heldout_share": 0.25, "heldout_salt": "s"}
    options = {"on_bad_row": OnBadRow.quarantine, "max_chars": 300}
    report = ingest_file(path, store, kind=kind, **split, **options)  # type: ignore[arg-type]
    slow = slow_ingest(path, kind, SlowHistory(), id="s", share=0.25, salt="s", max_chars=300)
    assert report.counts == slow.counts(kind)
    assert (report.refused, report.excluded) == (slow.refused, slow.excluded)
    assert report.digest == slow.digest
    (stored,) = store.folder.glob("*/s/rows.parquet")
    assert pq.read_table(stored).to_pylist() == [
        {name: row[name] for name in pq.read_schema(stored).names} for row in slow.rows()
    ]


@pytest.mark.parametrize("seed", range(3))
def test_both_ways_stage_the_same(seed: int) -> None:
    rng = random.Random(seed)
    block = Lines(1, lines_of(rng, rows_of(rng, 200, first=0, mild=True), mild=True), 0)
    defaults = Defaults(source="w", axis=None, is_safety=False)
    fast, slow = (
        staged_block(block, Kind.batch, defaults, Rules(0.25, "s", 300), by_row=by_row)
        for by_row in (False, True)
    )
    assert fast[0].equals(slow[0])
    assert fast[1:] == slow[1:]


PLAIN = b'{"prompt":"Q","chosen":"A","rejected":"B","axis":"safety","id":"x"'
TRICKS: dict[str, list[bytes]] = {
    "meta is true by itself": [PLAIN + b',"meta":true,"source":"meta"}'],
    "escaped meta is true": [PLAIN + b',"m\\u0065ta":true}'],
    "escaped meta beside meta": [PLAIN + b',"m\\u0065ta":true,"meta":{"a":1}}'],
    "meta twice": [PLAIN + b',"meta":{"a":1},"meta":{"b":2}}'],
    "meta inside a turn": [PLAIN + b',"annotator":null,"z":{"meta":{"a":1}}}'],
    "meta in the middle": [PLAIN + b',"meta":{"tie":true},"source":"s"}'],
    "meta over two lines": [PLAIN + b',"meta":{"a":[1}', PLAIN + b',"meta":2]}}'],
    "two values as meta": [PLAIN + b',"meta":{"a":1},{"b":2}}', PLAIN + b',"meta":}'],
    "meta in a text": [PLAIN + b',"source":"x\\"meta\\":{}"}', PLAIN + b',"x\\"meta":{"a":1}}'],
    "more in a turn": [
        PLAIN[:-7].replace(b'"Q"', b'[{"role":"user","content":"Q","e":[1]}]') + b"}"
    ],
    "other fields of two types": [PLAIN + b',"z":1}', PLAIN + b',"z":"1"}', PLAIN + b',"z":null}'],
    "escaped other field": [PLAIN + b',"\\u007a":null}', PLAIN + b',"z":1}'],
    "two rows on a line, one on two": [PLAIN + b"}" + PLAIN + b"}", PLAIN, b'"source":"s"}'],
    "id of every type": [
        PLAIN[:-1].replace(b'"id":"x', b'"id":' + i) + b"}" for i in (b"1", b"1.0")
    ],
    "all ids are large": [PLAIN.replace(b'"id":"x"', b'"id":' + b"9" * 25) + b"}"],
}


@pytest.mark.parametrize("name", TRICKS)
@pytest.mark.parametrize("around", [b"", b',"meta":{"n":1}'])
def test_rows_that_try_to_pass_for_others(name: str, around: bytes) -> None:
    lines = [PLAIN[:-2] + b'%d"' % i + around + b"}" for i in range(4)]
    lines[2:2] = TRICKS[name]
    block = Lines(1, b"\n".join(lines), 0)
    defaults = Defaults(source="w", axis=None, is_safety=False)
    fast, slow = (tabulate(block, Kind.batch, defaults, by_row=by_row) for by_row in (False, True))
    assert fast.table.equals(slow.table)
    assert (fast.refused, fast.extra_fields) == (slow.refused, slow.extra_fields)


def test_sound_rows_take_the_columnar_way() -> None:
    """The bound on time: rows in our own fields are never parsed one by one."""
    rng = random.Random(0)
    sound = [comparison(rng, i) | {"meta": {"n": i, "topic": text(rng)}} for i in range(100)]
    for row in sound[:50]:
        del row["meta"]
    odd = [row | {"strength": "odd"} for row in sound[:3]]
    texts = [json.dumps(row).encode() for row in [*sound, {"chosen": 5}, *odd]]
    texts.insert(20, texts[20] + b" x}")
    texts.insert(40, texts[0][:-1] + b',"other":1}')
    found = raw.from_lines(texts, b"\n".join(texts), Kind.batch)
    assert found is not None
    assert len(found.rows) >= 100


def test_every_character_folds_as_one_by_one() -> None:
    chars = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    texts = [f"a{''.join(chars[i : i + 64])}B" for i in range(0, len(chars), 64)]
    spaced = [f"a{char}b" for char in chars if FOLDED.fullmatch(char) or char.isspace()]
    rng = random.Random(0)
    mixed = [text(rng) for _ in range(3000)]
    for values in (texts, spaced, mixed, [""], []):
        column = pa.array(values, pa.string())
        assert fold_texts(column).to_pylist() == [fold_text(value) for value in values]
        assert json_texts(column).to_pylist() == [json.dumps(value) for value in values]
        part = column.slice(len(values) // 3, len(values) // 2)
        assert fold_texts(part).to_pylist() == [fold_text(value) for value in part.to_pylist()]


def test_keys_of_a_slice() -> None:
    rng = random.Random(0)
    rows = [comparison(rng, i) | {"meta": {"i": i}} for i in range(40)]
    defaults = Defaults(source="w", axis=None, is_safety=False)
    data = "\n".join(map(json.dumps, rows)).encode()
    table = tabulate(Lines(1, data, 0), Kind.batch, defaults).table.slice(7, 20)
    keys = key_columns(table, Kind.batch)
    lines = table["line"].to_pylist()
    wanted = [
        keys_of(parse_row(Kind.batch, rows[line - 1], line=line, defaults=defaults))
        for line in lines
    ]
    for name in ("content", "exact", "near", "prompt"):
        assert hex_texts(getattr(keys, name)).to_pylist() == [getattr(k, name) for k in wanted]
    assert keys.swapped.to_pylist() == [k.swapped for k in wanted]
