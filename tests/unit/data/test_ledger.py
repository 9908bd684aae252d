"""The store: order, immutability, exact rows back, and what concurrent writers may do."""

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

from rlhf.data.ingest import IngestReport, ingest_file
from rlhf.data.ledger import Entry, Store
from rlhf.data.records import Comparison, Conversation, Kind, Prompt
from rlhf.errors import ArtifactError, DataError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def batch(tmp_path: Path, id: str, *, first: int = 0, number: int = 3) -> Path:
    rows = [
        {
            "id": f"r{i}",
            "prompt": user(f"question {i}"),
            "chosen": f"good {i}",
            "rejected": f"bad {i}",
            "strength": "better",
            "axis": "helpfulness",
        }
        for i in range(first, first + number)
    ]
    return write(tmp_path / f"{id}.jsonl", rows)


def add(path: Path, store: Store, kind: Kind | None = None, **more: Any) -> IngestReport:
    return ingest_file(
        path, store, kind=kind, **{"heldout_share": 0.25, "heldout_salt": "s", **more}
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", "weekly")


def test_order_of_ingest_not_of_names(tmp_path: Path, store: Store) -> None:
    for number, id in enumerate(["zeta", "alpha", "mid"]):
        add(batch(tmp_path, id, first=10 * number), store)
    add(write(tmp_path / "p.jsonl", [{"prompt": "hello"}]), store)
    assert store.ids(Kind.batch) == ["zeta", "alpha", "mid"]
    assert store.ids(Kind.prompts) == ["p"]
    assert store.ids(Kind.open) == store.ids(Kind.sft) == []
    assert [store.manifest(Kind.batch, id)["sequence"] for id in store.ids(Kind.batch)] == [1, 2, 3]
    assert store.position() == 4


def test_records_come_back_exactly(tmp_path: Path, store: Store) -> None:
    odd = '\u00e9 \U0001f600 \u2028 \x00 "quoted" \\n \n'
    comparison = Comparison(
        id="a",
        prompt=[{"role": "system", "content": odd}, {"role": "user", "content": "q"}],
        chosen=odd,
        rejected="no",
        strength=None,
        axis="safety",
        source="toy",
        chosen_safe=True,
        rejected_safe=False,
        annotator="x",
        model_chosen="v1",
        model_rejected=None,
        tie=True,
        meta={"deep": [1, 2.5, None, {"a": odd}], "empty": {}},
    )
    prompt = Prompt(id="p", prompt=[{"role": "user", "content": odd}], is_safety=True, source="t")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": odd}]
    talk = Conversation(id="c", messages=messages, source="t", meta={"a": 1})  # type: ignore[arg-type]
    for name, row in (("b", comparison), ("p", prompt), ("s", talk)):
        add(write(tmp_path / f"{name}.jsonl", [row.to_json()]), store)
    (read,) = store.comparisons(Kind.batch, "b")
    assert read.batch_id == "b"
    comparison.batch_id, comparison.heldout = "b", read.heldout
    assert read == comparison
    assert [(r.id, r.prompt, r.is_safety, r.meta) for r in store.prompts("p")] == [
        ("p", prompt.prompt, True, {})
    ]
    assert [(r.id, r.messages, r.meta) for r in store.conversations("s")] == [
        ("c", messages, {"a": 1})
    ]
    assert list(read.prompt[0]) == ["role", "content"]


def test_files_of_a_batch_and_its_manifest(tmp_path: Path, store: Store) -> None:
    report = add(batch(tmp_path, "w1"), store)
    folder = store.folder / "batches" / "w1"
    names = ["contradictions.jsonl", "excluded.jsonl", "manifest.json", "near_duplicates.jsonl"]
    names += ["profile.json", "refused.jsonl", "rows.parquet", "sketches.parquet"]
    assert sorted(p.name for p in folder.iterdir()) == names
    manifest = store.manifest(Kind.batch, "w1")
    assert store.digest(Kind.batch, "w1") == manifest["digest"] == report.digest
    assert manifest["rows"] == 3
    assert manifest["counts"] == report.counts
    assert manifest["accepted_by"]["strength"] == {"better": 3}
    assert manifest["settings"]["max_chars"] == 40_000
    assert set(manifest["policy"]) <= set(manifest["counts"])
    assert json.loads((store.folder / "stream.json").read_text()) == {
        "heldout_share": 0.25,
        "heldout_salt": "s",
    }


def test_a_changed_row_file_is_noticed(tmp_path: Path, store: Store) -> None:
    add(batch(tmp_path, "w1"), store)
    path = store.folder / "batches" / "w1" / "rows.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"rows\.parquet changed after ingest"):
        store.comparisons(Kind.batch, "w1")


def test_what_is_not_there_is_named(tmp_path: Path, store: Store) -> None:
    add(batch(tmp_path, "w1"), store)
    with pytest.raises(DataError, match=r"batch 'w2' is not in stream 'weekly' .*\(there: w1\)"):
        store.manifest(Kind.batch, "w2")
    assert Store(tmp_path / "nowhere", "weekly").ids(Kind.batch) == []


KILLED = """
import sys
from pathlib import Path
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
store = Store(Path(sys.argv[2]), "weekly")
ingest_file(Path(sys.argv[1]), store, kind=None, heldout_share=0.25, heldout_salt="s")
"""


@pytest.mark.parametrize(
    ("boundary", "survives"),
    [
        ("before-temp:stream.json", False),
        ("after-rename:stream.json", False),
        ("before-temp:batches/w1", False),
        ("before-rename:manifest.json", False),
        ("after-rename:manifest.json", False),
        ("after-rename:batches/w1", True),
    ],
)
def test_a_kill_at_any_write_leaves_all_of_a_batch_or_nothing(
    tmp_path: Path, store: Store, boundary: str, survives: bool
) -> None:
    path = batch(tmp_path, "w1")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(store.root)],
        env={**os.environ, "RLHF_KILL_AT": boundary, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert store.ids(Kind.batch) == (["w1"] if survives else [])
    assert add(path, store).added is not survives
    assert len(store.comparisons(Kind.batch, "w1")) == 3
    assert [p.name for p in (store.folder / "batches").iterdir()] == ["w1"]


def test_a_half_written_batch_is_not_there(tmp_path: Path, store: Store) -> None:
    add(batch(tmp_path, "w1"), store)
    folder = store.folder / "batches"
    (folder / "w1").rename(folder / ".w1.tmp")
    assert store.ids(Kind.batch) == []
    assert add(batch(tmp_path, "w1"), store).added
    assert store.ids(Kind.batch) == ["w1"]


def test_another_share_or_salt_is_refused(tmp_path: Path, store: Store) -> None:
    add(batch(tmp_path, "w1"), store)
    path = batch(tmp_path, "w2", first=10)
    with pytest.raises(DataError, match=r"data\.heldout_share=0\.1 differs from 0\.25"):
        add(path, store, heldout_share=0.1)
    with pytest.raises(DataError, match=r"data\.heldout_salt=t differs from s"):
        add(path, store, heldout_salt="t")
    assert store.ids(Kind.batch) == ["w1"]
    assert add(path, Store(store.root, "other"), heldout_share=0.1).added


def test_streams_do_not_see_each_other(tmp_path: Path, store: Store) -> None:
    path = batch(tmp_path, "w1")
    other = Store(store.root, "sim-demo")
    assert add(path, store).added
    assert add(path, other).added
    assert other.digest(Kind.batch, "w1") == store.digest(Kind.batch, "w1")


def test_a_stream_that_moved_on_is_not_written_to(tmp_path: Path, store: Store) -> None:
    add(batch(tmp_path, "w1"), store)
    entry = Entry(Kind.batch, "late", [], [], [], {})
    assert not store.add(entry, share=0.25, salt="s", position=0)
    assert store.ids(Kind.batch) == ["w1"]


def test_concurrent_ingests_all_arrive_in_some_order(tmp_path: Path, store: Store) -> None:
    paths = [batch(tmp_path, f"w{i}", first=100 * i, number=20) for i in range(4)]
    paths.append(write(tmp_path / "copy.jsonl", [json.loads(s) for s in paths[0].open()]))
    reports: list[IngestReport] = []
    threads = [threading.Thread(target=lambda p=p: reports.append(add(p, store))) for p in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 5
    assert sum(report.added for report in reports) == 4  # the copy or its original, not both
    assert len(store.ids(Kind.batch)) == 4
    sequences = [store.manifest(Kind.batch, id)["sequence"] for id in store.ids(Kind.batch)]
    assert sequences == [1, 2, 3, 4]
