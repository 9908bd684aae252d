"""Corrections and withdrawals: which rows count as of when, and what can never happen twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf.artifacts import read_json, sha256_file, write_json
from rlhf.config import OnBadRow
from rlhf.data.corrections import list_tombstones, withdraw
from rlhf.data.ingest import IngestReport, ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import Kind
from rlhf.data.tombstones import digest_as_of, newest
from rlhf.errors import ArtifactError, DataError


def comparison(id: str, number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": id,
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "chosen": f"good {number}",
        "rejected": f"bad {number}",
        "strength": "better",
        "axis": "helpfulness",
        **more,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def add(path: Path, store: Store, **more: Any) -> IngestReport:
    how = {"kind": None, "heldout_share": 0.25, "heldout_salt": "s", **more}
    return ingest_file(path, store, **how)


def ids_file(tmp_path: Path, *ids: str) -> Path:
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(ids) + "\n", encoding="utf-8")
    return path


def rows_of(store: Store, key: str = "w1") -> dict[str, str]:
    return {row.id: row.chosen for row in store.comparisons(Kind.batch, key)}


def tree(folder: Path) -> dict[str, str]:
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): sha256_file(p) for p in paths}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two batches of three comparisons and a set of two prompts: numbers 1 to 3 of the stream."""
    store = Store(tmp_path / "store", "weekly")
    add(write(tmp_path / "w1.jsonl", [comparison(f"a{i}", i) for i in range(3)]), store)
    add(write(tmp_path / "w2.jsonl", [comparison(f"b{i}", 10 + i) for i in range(3)]), store)
    prompts = [{"id": f"p{i}", "prompt": f"ask {i}"} for i in range(2)]
    add(write(tmp_path / "p.jsonl", prompts), store)
    return store


def correct(tmp_path: Path, store: Store, *rows: dict[str, Any], **more: Any) -> IngestReport:
    path = write(tmp_path / more.pop("name", "fix.jsonl"), list(rows))
    return add(path, store, **{"supersedes": "w1", "reason": "typo", **more})


def test_a_correction_replaces_rows_of_the_same_id_and_nothing_else(
    tmp_path: Path, store: Store
) -> None:
    before = tree(store.folder)
    same, changed = comparison("a0", 0), comparison("a1", 1, chosen="better 1")
    report = correct(tmp_path, store, same, changed, comparison("new", 50))
    assert rows_of(store) == {"a0": "good 0", "a2": "good 2", "a1": "better 1", "new": "good 50"}
    assert rows_of(store, "w2") == {"b0": "good 10", "b1": "good 11", "b2": "good 12"}
    assert {row.batch_id for row in store.comparisons(Kind.batch, "w1")} == {"w1"}
    assert store.ids(Kind.batch) == ["w1", "w2"]
    assert report.counts["superseded"] == 1
    assert report.counts["duplicate_of_earlier"] == 1
    assert "fix, which replaces 1 rows of batch w1" in report.message
    after = tree(store.folder)
    assert {name: after[name] for name in before} == before
    stone = read_json(store.path(Kind.batch, "fix") / "tombstone.json")
    assert stone["rows"] == {"batch": {"w1": ["a1"]}}
    assert (stone["sequence"], stone["of"], stone["by"], stone["reason"]) == (
        4,
        "w1",
        "fix",
        "typo",
    )
    assert stone["file"]["sha256"] == sha256_file(tmp_path / "fix.jsonl")


def test_a_store_reads_as_of_a_number(tmp_path: Path, store: Store) -> None:
    correct(tmp_path, store, comparison("a1", 1, chosen="better 1"))
    withdraw(store, ids_file(tmp_path, "a2", "p0", "b0"), reason="asked to")
    correct(tmp_path, store, comparison("a1", 1, chosen="best 1"), name="again.jsonl")
    states = {
        3: {"a0": "good 0", "a1": "good 1", "a2": "good 2"},
        4: {"a0": "good 0", "a1": "better 1", "a2": "good 2"},
        5: {"a0": "good 0", "a1": "better 1"},
        6: {"a0": "good 0", "a1": "best 1"},
    }
    for number, rows in states.items():
        assert rows_of(Store(store.root, "weekly", as_of=number)) == rows
    assert rows_of(Store(store.root, "weekly", as_of=0)) == states[3]
    assert rows_of(store) == states[6]
    assert [row.id for row in store.prompts("p")] == ["p1"]
    assert [row.id for row in Store(store.root, "weekly", as_of=4).prompts("p")] == ["p0", "p1"]
    assert set(rows_of(store, "w2")) == {"b1", "b2"}
    assert store.position() == 6


def test_digests_change_only_where_rows_do(tmp_path: Path, store: Store) -> None:
    def listing() -> dict[str, dict[str, str]]:
        found = {k.name: {key: store.digest(k, key) for key in store.ids(k)} for k in Kind}
        return {**found, "tombstones": list_tombstones(store)}

    assert newest(listing()) == 0
    correct(tmp_path, store, comparison("a1", 1, chosen="better 1"))
    withdraw(store, ids_file(tmp_path, "a1", "p0"), reason="")
    found = listing()
    assert newest(found) == 5
    digests = [digest_as_of(found, "batch", "w1", number) for number in range(6)]
    assert digests[:4] == [store.digest(Kind.batch, "w1")] * 4
    assert len(set(digests[3:])) == 3
    assert digest_as_of(found, "batch", "w2", 5) == store.digest(Kind.batch, "w2")
    assert digest_as_of(found, "prompts", "p", 4) == store.digest(Kind.prompts, "p")
    assert digest_as_of(found, "prompts", "p", 5) != store.digest(Kind.prompts, "p")


def test_a_reversed_verdict_is_a_correction_and_no_contradiction(
    tmp_path: Path, store: Store
) -> None:
    turned = comparison("a1", 1, chosen="bad 1", rejected="good 1")
    report = correct(tmp_path, store, turned)
    assert report.counts["contradicting"] == report.counts["refused"] == 0
    assert rows_of(store)["a1"] == "bad 1"
    late = write(tmp_path / "w3.jsonl", [comparison("c1", 1), comparison("c2", 30)])
    assert add(late, store).counts["contradicting"] == 1


def test_swapped_ids_are_corrected_together(tmp_path: Path, store: Store) -> None:
    report = correct(tmp_path, store, comparison("a0", 1), comparison("a1", 0))
    assert report.counts["superseded"] == report.counts["accepted"] == 2
    assert rows_of(store) == {"a2": "good 2", "a0": "good 1", "a1": "good 0"}


def test_a_corrected_row_that_a_rule_excludes_still_replaces_the_old_one(
    tmp_path: Path, store: Store
) -> None:
    same = comparison("a0", 0, chosen="same", rejected="same")
    correct(tmp_path, store, same, comparison("a1", 1, strength="slightly_better"))
    assert set(rows_of(store)) == {"a1", "a2"}


def test_a_row_of_another_batch_is_not_corrected(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path / "fix.jsonl", [comparison("b1", 1, chosen="x"), comparison("n", 70)])
    with pytest.raises(DataError, match="id='b1' has other content in w2"):
        add(path, store, supersedes="w1")
    add(path, store, supersedes="w1", on_bad_row=OnBadRow.quarantine)
    assert rows_of(store, "w2")["b1"] == "good 11"


def test_a_row_without_an_id_cannot_correct(tmp_path: Path, store: Store) -> None:
    row = comparison("", 1, chosen="better")
    del row["id"]
    with pytest.raises(DataError, match="line 1: id is missing, by which a correction finds"):
        correct(tmp_path, store, row)


def test_what_is_not_there_cannot_be_corrected(tmp_path: Path, store: Store) -> None:
    with pytest.raises(DataError, match=r"batch 'w9' is not in stream .*there: w1, w2"):
        correct(tmp_path, store, comparison("a1", 1, chosen="x"), supersedes="w9")


def test_the_same_correction_again_is_a_no_op_under_any_name(tmp_path: Path, store: Store) -> None:
    rows = [comparison("a0", 0), comparison("a1", 1, chosen="better 1")]
    assert correct(tmp_path, store, *rows, name="w1.jsonl").id == "w1-correction-1"
    before = tree(store.folder)
    for name in ("w1.jsonl", "copy.jsonl"):
        assert not correct(tmp_path, store, *rows, name=name).added
    assert tree(store.folder) == before
    other = comparison("a1", 1, chosen="best 1")
    report = correct(tmp_path, store, other, name="w1.jsonl", supersedes="w1-correction-1")
    assert report.id == "w1-correction-2"
    assert store.manifest(Kind.batch, "w1-correction-2")["supersedes"] == "w1"
    assert rows_of(store)["a1"] == "best 1"


def test_the_original_file_again_stays_a_no_op(tmp_path: Path, store: Store) -> None:
    correct(tmp_path, store, comparison("a1", 1, chosen="better 1"))
    withdraw(store, ids_file(tmp_path, "a2"), reason="")
    assert not add(tmp_path / "w1.jsonl", store).added


def test_withdrawn_rows_are_gone_and_no_original(tmp_path: Path, store: Store) -> None:
    stone = withdraw(store, ids_file(tmp_path, "a1", " p0 ", "", "a1"), reason="consent")
    assert stone.num_rows == 2
    assert stone.rows == {"batch": {"w1": ("a1",)}, "prompts": {"p": ("p0",)}}
    written = read_json(store.folder / "tombstones" / "000000004.json")
    assert (written["what"], written["reason"], written["num_rows"]) == ("withdrawal", "consent", 2)
    fresh = [comparison("c1", 1), comparison("c2", 2)]
    report = add(write(tmp_path / "w3.jsonl", fresh), store)
    assert set(rows_of(store, "w3")) == {"c1"}
    assert report.counts["duplicate_of_earlier"] == 1


def test_a_withdrawn_row_does_not_come_back_as_it_was(tmp_path: Path, store: Store) -> None:
    withdraw(store, ids_file(tmp_path, "a1", "a2"), reason="")
    rows = [comparison("a1", 1), comparison("a2", 2, chosen="rewritten"), comparison("z", 90)]
    report = add(write(tmp_path / "w3.jsonl", rows), store)
    assert report.counts["withdrawn"] == 1
    assert [row["reason"] for row in report.excluded] == ["a1 was withdrawn"]
    assert set(rows_of(store, "w3")) == {"a2", "z"}
    copy = write(tmp_path / "copy.jsonl", [comparison(f"a{i}", i) for i in range(2)])
    assert not add(copy, store).added


def test_unknown_ids_are_refused_with_count_and_list(tmp_path: Path, store: Store) -> None:
    before = tree(store.folder)
    wanted = ["a1", *(f"x{i}" for i in range(25))]
    with pytest.raises(DataError) as error:
        withdraw(store, ids_file(tmp_path, *wanted), reason="")
    text = str(error.value)
    assert "25 of 26 ids are no rows of stream 'weekly', so nothing was withdrawn" in text
    assert "  x0\n" in text
    assert "x20" not in text
    assert "and 5 more" in text
    with pytest.raises(DataError, match=r"1 of 1 ids are no rows .*\(ingest\.kind=prompts\)"):
        withdraw(store, ids_file(tmp_path, "a1"), reason="", kind=Kind.prompts)
    assert tree(store.folder) == before


def test_the_same_withdrawal_again_writes_nothing(tmp_path: Path, store: Store) -> None:
    path = ids_file(tmp_path, "a1")
    withdraw(store, path, reason="")
    before = tree(store.folder)
    assert withdraw(store, path, reason="").num_rows == 0
    assert tree(store.folder) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\n \n", "names no row"), (b"\xff\xfe\x00", "is not UTF-8")],
)
def test_an_unusable_list_is_refused(
    tmp_path: Path, store: Store, content: bytes | None, message: str
) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        withdraw(store, path, reason="")


def test_a_changed_tombstone_is_noticed(tmp_path: Path, store: Store) -> None:
    withdraw(store, ids_file(tmp_path, "a1"), reason="")
    path = store.folder / "tombstones" / "000000004.json"
    write_json(path, {**read_json(path), "rows": {"batch": {"w1": ["a0"]}}})
    with pytest.raises(ArtifactError, match="changed after it was written"):
        rows_of(store)


def test_the_split_does_not_move(tmp_path: Path, store: Store) -> None:
    before = {row.id: row.heldout for row in store.comparisons(Kind.batch, "w1")}
    correct(tmp_path, store, *(comparison(f"a{i}", i, chosen=f"new {i}") for i in range(3)))
    assert {row.id: row.heldout for row in store.comparisons(Kind.batch, "w1")} == before


CORRECTING = """
import sys
from pathlib import Path
from rlhf.data.corrections import withdraw
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
store = Store(Path(sys.argv[2]), "weekly")
if sys.argv[1].endswith(".txt"):
    withdraw(store, Path(sys.argv[1]), reason="")
else:
    how = {"kind": None, "heldout_share": 0.25, "heldout_salt": "s", "supersedes": "w1"}
    ingest_file(Path(sys.argv[1]), store, **how)
"""


@pytest.mark.parametrize(
    ("boundary", "survives"),
    [
        ("after-rename:tombstone.json", False),
        ("before-rename:batches/fix", False),
        ("after-rename:batches/fix", True),
        ("before-rename:000000004.json", False),
        ("after-rename:000000004.json", True),
    ],
)
def test_a_kill_leaves_all_of_it_or_nothing(
    tmp_path: Path, store: Store, boundary: str, survives: bool
) -> None:
    path = write(tmp_path / "fix.jsonl", [comparison("a1", 1, chosen="better 1")])
    if boundary.endswith("4.json"):
        path = ids_file(tmp_path, "a1")
    done = subprocess.run(
        [sys.executable, "-c", CORRECTING, str(path), str(store.root)],
        env={**os.environ, "RLHF_KILL_AT": boundary, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert (rows_of(store).get("a1") != "good 1") is survives
    assert store.position() == 3 + survives


def test_writers_at_the_same_time_get_numbers_of_their_own(tmp_path: Path, store: Store) -> None:
    lists = []
    for number in range(3):
        lists.append(tmp_path / f"ids-{number}.txt")
        lists[-1].write_text(f"a{number}\n", encoding="utf-8")
    more = [write(tmp_path / f"v{i}.jsonl", [comparison(f"v{i}", 100 + i)]) for i in range(3)]
    calls = [lambda p=p: withdraw(store, p, reason="") for p in lists]
    calls += [lambda p=p: add(p, store) for p in more]
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [stone.sequence for stone in store.tombstones()]
    numbers += [m["sequence"] for kind in Kind for m in store.entries(kind).values()]
    assert sorted(numbers) == list(range(1, 10))
    assert rows_of(store) == {}
