"""A vendor's file from end to end: every kind of damage with its exact counts and message."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.config import OnBadRow
from rlhf.data.ingest import IngestReport, ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import Kind, Message
from rlhf.data.split import is_heldout
from rlhf.errors import DataError

DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
SPLIT = {"heldout_share": 0.25, "heldout_salt": "s"}


def row(i: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"r{i}",
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "chosen": f"good answer {i}",
        "rejected": f"bad answer {i}",
        "strength": "better",
        "axis": "helpfulness",
        "chosen_safe": None,
        "rejected_safe": None,
        "source": "vendor",
        **changes,
    }


def lines(rows: list[Any]) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(lines(rows), encoding="utf-8")
    return path


def add(path: Path, store: Store, kind: Kind | None = None, **more: Any) -> IngestReport:
    return ingest_file(path, store, kind=kind, **{**SPLIT, **more})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", "weekly")


def nonzero(report: IngestReport) -> dict[str, int]:
    return {n: v for n, v in report.counts.items() if v and n not in ("heldout", "repeat_prompt")}


FAULTS: list[tuple[str, Any, str]] = [
    ("json", '{"id": "r1", "prompt": [', "not valid JSON (Expecting value at column"),
    ("cut line", lines([row(1)])[:60], "not valid JSON (Unterminated string"),
    ("no object", '"text"', "a str where a JSON object is needed"),
    ("strength", row(1, strength="much_better"), "strength='much_better' is not one of signifi"),
    ("axis", row(1, axis="honesty"), "axis='honesty' is not one of helpfulness, safety"),
    ("type", row(1, chosen=5, rejected=6), "chosen=5 is not a list of messages"),
    ("missing", {k: v for k, v in row(1).items() if k != "rejected"}, "rejected is missing"),
    ("no prompt", {k: v for k, v in row(1).items() if k != "prompt"}, "prompt is missing"),
    ("last turn", row(1, prompt=[{"role": "assistant", "content": "x"}]), "must end in a user"),
    ("role", row(1, prompt=[{"role": "bot", "content": "x"}]), "prompt[0].role='bot' is not one"),
    ("flag", row(1, chosen_safe="true"), "chosen_safe='true' is not true, false or null"),
    ("tie", row(1, meta={"tie": "yes"}), "meta.tie='yes' is not true, false or null"),
    ("surrogate", row(1, chosen="\ud83d"), "holds half a character"),
    ("half value", row(1, strength="a\ud83d"), "strength='a\\ud83d' is not one of"),
    ("half role", row(1, prompt=[{"role": "\ud83d", "content": "x"}]), "role='\\ud83d' is not"),
    ("same id", row(0, chosen="another answer"), "id='r0' has other content on line 1"),
]


@pytest.mark.parametrize(("bad", "reason"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_bad_row_refuses_the_file_or_is_set_aside(
    tmp_path: Path, store: Store, bad: Any, reason: str
) -> None:
    path = write(tmp_path / "w.jsonl", [row(0), bad, row(2)])
    with pytest.raises(DataError) as caught:
        add(path, store, kind=Kind.batch)
    message = str(caught.value)
    assert message.startswith(f"{path} line 2: ")
    assert reason in message
    assert message.endswith("; fix it or use ingest.on_bad_row=quarantine")
    assert "\n" not in message
    assert not store.root.exists()

    report = add(path, store, kind=Kind.batch, on_bad_row=OnBadRow.quarantine)
    assert nonzero(report) == {"read": 3, "accepted": 2, "refused": 1}
    assert [r.id for r in store.comparisons(Kind.batch, "w")] == ["r0", "r2"]
    stored = (store.folder / "batches" / "w" / "refused.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in stored] == report.refused
    assert [r["line"] for r in report.refused] == [2]
    assert reason in report.refused[0]["reason"]


def test_all_bad_rows_are_listed_up_to_twenty(tmp_path: Path, store: Store) -> None:
    rows = [row(i, strength="x" if i % 2 else "better") for i in range(60)]
    path = write(tmp_path / "w.jsonl", rows)
    with pytest.raises(DataError) as caught:
        add(path, store)
    listed = str(caught.value).splitlines()
    assert listed[0] == (
        f"{path}: 30 of 60 rows are bad, so nothing was added; "
        "fix them or use ingest.on_bad_row=quarantine"
    )
    assert [line.split(":")[0] for line in listed[1:-1]] == [f"  line {n}" for n in range(2, 41, 2)]
    assert listed[-1] == "  and 10 more"
    assert not store.root.exists()


def test_half_a_character_in_the_name_of_a_field_is_spelled_out(
    tmp_path: Path, store: Store
) -> None:
    path = write(tmp_path / "w.jsonl", [row(0, **{"a\ud83d": 1}), row(1)])
    report = add(path, store)
    assert report.message.endswith("; fields kept in meta: a\\ud83d (1)")
    assert store.manifest(Kind.batch, "w")["extra_fields"] == {"a\\ud83d": 1}
    assert store.comparisons(Kind.batch, "w")[0].meta == {"a\ud83d": 1}


def test_unknown_strength_in_row_17(tmp_path: Path, store: Store) -> None:
    rows = [row(i) for i in range(20)]
    rows[16]["strength"] = "hugely_better"
    path = write(tmp_path / "w.jsonl", rows)
    with pytest.raises(DataError) as caught:
        add(path, store)
    assert str(caught.value) == (
        f"{path} line 17: strength='hugely_better' is not one of significantly_better, better, "
        "slightly_better, negligibly_better; fix it or use ingest.on_bad_row=quarantine"
    )


def test_a_file_with_every_kind_of_damage_is_counted_exactly(tmp_path: Path, store: Store) -> None:
    add(write(tmp_path / "old.jsonl", [row(100), row(101)]), store)
    unsafe = {"axis": "safety", "chosen_safe": False, "rejected_safe": True}
    rows = [
        *(row(i) for i in range(5)),
        *(bad for _, bad, _ in FAULTS),
        row(0),
        row(20, prompt=row(1)["prompt"], chosen="good answer 1", rejected="bad answer 1"),
        row(21, prompt=row(1)["prompt"], chosen="Good answer 1!", rejected="bad answer 1"),
        row(22, prompt=row(1)["prompt"], chosen="bad answer 1", rejected="good answer 1"),
        row(100),
        row(23, prompt=row(101)["prompt"], chosen="good  answer 101", rejected="Bad answer 101"),
        row(24, chosen="same", rejected="same"),
        row(25, **unsafe),
        row(26, **unsafe),
        row(27, rejected=" \n"),
        row(28, chosen="long " * 100),
        row(29, tie=True),
        row(30, strength=None),
        row(31, prompt=row(100)["prompt"]),
    ]
    path = write(tmp_path / "new.jsonl", rows)
    options = {"on_bad_row": OnBadRow.quarantine, "max_chars": 400}
    report = add(path, store, kind=Kind.batch, **options)
    counts = dict(report.counts)
    assert counts.pop("heldout") == sum(r.heldout for r in store.comparisons(Kind.batch, "new"))
    assert counts == {
        "read": len(rows),
        "accepted": 8,
        "refused": len(FAULTS),
        "excluded": 11,
        "empty_text": 1,
        "over_long": 1,
        "identical_responses": 1,
        "unsafe_chosen": 2,
        "withdrawn": 0,
        "duplicate_in_file": 2,
        "duplicate_of_earlier": 1,
        "near_duplicate_in_file": 1,
        "near_duplicate_of_earlier": 1,
        "similar_in_file": 0,
        "similar_to_earlier": 0,
        "contradicting": 1,
        "repeat_prompt": 1,
        "ties": 1,
        "ungraded": 1,
    }
    accepted = [r.id for r in store.comparisons(Kind.batch, "new")]
    assert accepted == ["r0", "r1", "r2", "r3", "r4", "r29", "r30", "r31"]
    assert [r["line"] for r in report.refused] == list(range(6, 6 + len(FAULTS)))
    excluded = (store.folder / "batches" / "new" / "excluded.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in excluded] == report.excluded
    fates = {r["line"] for r in report.refused} | {r["line"] for r in report.excluded}
    assert len(fates) + len(accepted) == len(rows)
    assert add(path, store, kind=Kind.batch, **options).added is False


def test_the_same_rows_again_change_nothing(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path / "w.jsonl", [row(i) for i in range(4)])
    first = add(path, store)
    later = write(tmp_path / "v.jsonl", [row(i) for i in range(10, 14)])
    add(later, store)
    before = {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()}
    again = add(path, store)
    assert first.added
    assert not again.added
    assert again.message == "batch w: all rows are in stream weekly already; nothing added"
    assert again.digest == first.digest

    rows = [json.loads(line) for line in path.open()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "w.parquet")
    assert not add(tmp_path / "w.parquet", store).added
    reordered = [dict(reversed(r.items())) for r in rows]
    assert not add(write(tmp_path / "w.jsonl", reordered), store).added
    del rows[0]["source"]
    assert not add(write(tmp_path / "renamed.jsonl", rows), store).added
    assert {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "change", [{"strength": "slightly_better"}, {"chosen": "x"}, {"source": "y"}]
)
def test_other_rows_under_an_old_id_are_refused(
    tmp_path: Path, store: Store, change: dict[str, Any]
) -> None:
    add(write(tmp_path / "w.jsonl", [row(0), row(1)]), store)
    path = write(tmp_path / "w.jsonl", [row(0), row(1, **change)])
    with pytest.raises(
        DataError, match=r"differs from batch 'w'.*never changes; give .*ingest\.id"
    ):
        add(path, store)
    with pytest.raises(DataError, match="differs from batch 'w'"):
        add(write(tmp_path / "w.jsonl", [row(0)]), store)
    assert [r.id for r in store.comparisons(Kind.batch, "w")] == ["r0", "r1"]


def test_a_corrected_row_under_its_old_id_in_a_new_batch_is_refused(
    tmp_path: Path, store: Store
) -> None:
    add(write(tmp_path / "w1.jsonl", [row(0), row(1)]), store)
    path = write(tmp_path / "w2.jsonl", [row(1, strength="slightly_better"), row(2)])
    with pytest.raises(DataError, match=r"line 1: id='r1' has other content in w1"):
        add(path, store)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "has no rows"),
        (b"PAR1 and no end", "not a complete Parquet file"),
        (b"\x1f\x8b\x08 cut", "is damaged"),
        (b'{"text": "x"}\n', "cannot tell what it holds from the fields text"),
    ],
)
def test_files_that_hold_nothing(
    tmp_path: Path, store: Store, content: bytes, message: str
) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        add(path, store, on_bad_row=OnBadRow.quarantine)
    assert "\n" not in str(caught.value)
    assert not store.root.exists()


def test_a_truncated_parquet_file_leaves_nothing_behind(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "w.parquet"
    pq.write_table(pa.Table.from_pylist([row(i) for i in range(100)]), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"w\.parquet is not a complete Parquet file"):
        add(path, store)
    assert not store.root.exists()


def test_a_file_without_a_usable_row_is_refused(tmp_path: Path, store: Store) -> None:
    rows = [row(0, chosen="x", rejected="x"), row(1, chosen=""), "{", "["]
    with pytest.raises(DataError) as caught:
        add(write(tmp_path / "w.jsonl", rows), store, Kind.batch, on_bad_row=OnBadRow.quarantine)
    assert "has no usable row (refused 2, identical_responses 1, empty_text 1)" in str(caught.value)
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a b", "x" * 101])
def test_names_stay_inside_the_store(tmp_path: Path, store: Store, name: str) -> None:
    path = write(tmp_path / "w.jsonl", [row(0)])
    with pytest.raises(DataError, match="is no name for a batch or set"):
        add(path, store, id=name)
    with pytest.raises(DataError, match="is no name for a stream"):
        add(path, Store(tmp_path / "store", name))


@pytest.mark.parametrize(
    ("name", "id"),
    [("2026-W38.jsonl", "2026-W38"), ("v1.2.parquet", "v1.2"), ("t.jsonl.gz", "t"), ("x", "x")],
)
def test_the_id_comes_from_the_file_name(tmp_path: Path, store: Store, name: str, id: str) -> None:
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([row(0)]), tmp_path / name)
    else:
        write(tmp_path / name, [row(0)])
    assert add(tmp_path / name, store).id == id


def test_kinds_and_their_rows(tmp_path: Path, store: Store) -> None:
    user = {"role": "user", "content": "Hi"}
    hello = {"role": "assistant", "content": "Hello"}
    assert add(write(tmp_path / "b.jsonl", [row(0)]), store).kind is Kind.batch
    ungraded = write(tmp_path / "o.jsonl", [row(1, strength=None)])
    assert add(ungraded, store, Kind.open).kind is Kind.open
    assert add(write(tmp_path / "s.jsonl", [{"messages": [user, hello]}]), store).kind is Kind.sft
    tagged = write(tmp_path / "p.jsonl", [{"prompt": "a", "is_safety": True}, {"prompt": "b"}])
    assert add(tagged, store, is_safety_default=True).kind is Kind.prompts
    assert [r.is_safety for r in store.prompts("p")] == [True, True]
    assert store.comparisons(Kind.open, "o")[0].strength is None
    assert [r.id for r in store.prompts("p")] == ["p/1", "p/2"]


def test_foreign_files_end_to_end(tmp_path: Path, store: Store) -> None:
    ask = "\n\nHuman: What do owls eat?\n\nAssistant: Mice.\n\nHuman: All of them?\n\nAssistant: "
    transcripts = [{"chosen": ask + "Most do.", "rejected": ask + "Cake."}]
    path = write(tmp_path / "hh.jsonl", transcripts)
    with pytest.raises(DataError, match=r"line 1: axis is missing; add it or give ingest\.axis"):
        add(path, store, Kind.open)
    add(path, store, Kind.open, axis="safety")
    (read,) = store.comparisons(Kind.open, "hh")
    assert [m["content"] for m in read.prompt] == ["What do owls eat?", "Mice.", "All of them?"]
    assert (read.chosen, read.rejected, read.axis) == ("Most do.", "Cake.", "safety")
    trl = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "score_chosen": 8.5}
    report = add(write(tmp_path / "trl.jsonl", [trl]), store, axis="helpfulness")
    assert report.message.endswith("; fields kept in meta: score_chosen (1)")
    assert store.comparisons(Kind.batch, "trl")[0].meta == {"score_chosen": 8.5}
    assert store.manifest(Kind.batch, "trl")["extra_fields"] == {"score_chosen": 1}


def test_one_missing_line_shifts_no_pair(tmp_path: Path, store: Store) -> None:
    rows = [row(i) for i in range(6)]
    del rows[2]
    add(write(tmp_path / "w.jsonl", rows), store)
    for record in store.comparisons(Kind.batch, "w"):
        number = record.id.removeprefix("r")
        assert record.chosen == f"good answer {number}"
        assert record.rejected == f"bad answer {number}"


def test_a_heldout_prompt_is_held_out_in_every_kind(tmp_path: Path, store: Store) -> None:
    texts = [f"question {i}" for i in range(80)]
    talk: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    answer = {"role": "assistant", "content": "Yes."}
    system = {"role": "system", "content": "Be kind."}
    batch = [row(i, prompt=talk[i]) for i in range(80)]
    ungraded = [row(i, prompt=[system, *talk[i]], chosen="other") for i in range(80)]
    sft = [{"messages": [*talk[i], answer, *talk[0], answer]} for i in range(80)]
    prompts = [{"prompt": texts[i].upper() + "?"} for i in range(80)]
    for name, rows, kind in (
        ("b", batch, Kind.batch),
        ("o", ungraded, Kind.open),
        ("s", sft, Kind.sft),
        ("p", prompts, Kind.prompts),
    ):
        add(write(tmp_path / f"{name}.jsonl", rows), store, kind)
    expected = [is_heldout(messages, share=0.25, salt="s") for messages in talk]
    assert 10 < sum(expected) < 32
    assert [r.heldout for r in store.comparisons(Kind.batch, "b")] == expected
    assert [r.heldout for r in store.comparisons(Kind.open, "o")] == expected
    assert [r.heldout for r in store.conversations("s")] == expected
    assert [r.heldout for r in store.prompts("p")] == expected


def test_repeat_prompt_looks_at_earlier_batches_only(tmp_path: Path, store: Store) -> None:
    add(write(tmp_path / "o.jsonl", [row(9, strength=None)]), store, Kind.open)
    add(write(tmp_path / "w1.jsonl", [row(0), row(1), row(9)]), store)
    again = [row(10, prompt=row(0)["prompt"]), row(11), row(12, prompt=row(11)["prompt"])]
    add(write(tmp_path / "w2.jsonl", again), store)
    assert [r.repeat_prompt for r in store.comparisons(Kind.batch, "w1")] == [False] * 3
    assert [r.repeat_prompt for r in store.comparisons(Kind.batch, "w2")] == [True, False, False]


def test_rows_of_a_bad_week_leave_the_last_good_week_alone(tmp_path: Path, store: Store) -> None:
    add(write(tmp_path / "w1.jsonl", [row(0)]), store)
    with pytest.raises(DataError):
        add(write(tmp_path / "w2.jsonl", ["{", "["]), store, Kind.batch)
    assert store.ids(Kind.batch) == ["w1"]
    assert store.position() == 1


def test_reading_does_not_depend_on_the_order_of_fields(tmp_path: Path) -> None:
    rows = [row(i) for i in range(3)]
    shuffled = [dict(reversed(copy.deepcopy(r).items())) for r in rows]
    digests = {
        add(write(tmp_path / "w.jsonl", r), Store(tmp_path / name, "weekly")).digest
        for name, r in (("a", rows), ("b", shuffled))
    }
    assert len(digests) == 1


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")
def test_real_files(store: Store) -> None:
    read = 0
    for folder, kind in (("weekly", None), ("open", Kind.open), ("sft", None), ("prompts", None)):
        for path in sorted((DATA / folder).glob("*.jsonl")):
            report = add(path, store, kind)
            assert report.added
            assert report.counts["refused"] == 0
            assert report.counts["accepted"] >= 0.98 * report.counts["read"]
            read += report.counts["read"]
    assert read == 3777 + 2358 + 3589 + 3908
    weekly = [c for id in store.ids(Kind.batch) for c in store.comparisons(Kind.batch, id)]
    heldout = {c.prompt[0]["content"] for c in weekly if c.heldout}
    assert heldout
    xstest = [p for p in store.prompts("xstest") if p.prompt[0]["content"] in heldout]
    assert xstest
    assert all(p.heldout for p in xstest)
    assert sum(c.tie for c in weekly) == 376
    assert not add(DATA / "weekly" / "2026-W38.jsonl", store).added
