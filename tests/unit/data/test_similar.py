"""Near duplicates and contradictions through ingest: every policy, in a file and over batches."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.artifacts import read_jsonl
from rlhf.config import Contradictions, NearDuplicates
from rlhf.data import near, similar
from rlhf.data.corrections import withdraw
from rlhf.data.ingest import IngestReport, ingest_file
from rlhf.data.ledger import Store
from rlhf.data.records import Comparison, Kind
from rlhf.data.similar import RepeatRules
from rlhf.data.split import fold_text

Row = dict[str, Any]
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("l", "n", "r", "st")]


def text(number: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=number))


def pair(id: str, number: int, **more: Any) -> Row:
    """Return a comparison of its own, long enough to have near duplicates."""
    return {
        "id": id,
        "prompt": [{"role": "user", "content": text(20, 10 * number)}],
        "chosen": text(80, 10 * number + 1),
        "rejected": text(90, 10 * number + 2),
        "strength": "better",
        "axis": "helpfulness",
        **more,
    }


def edited(row: Row, id: str, **more: Any) -> Row:
    return {**row, "id": id, "chosen": row["chosen"] + " thanks", **more}


def turned(row: Row, id: str, **more: Any) -> Row:
    return {**row, "id": id, "chosen": row["rejected"], "rejected": row["chosen"], **more}


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rules(
    contradictions: str = "drop", near_duplicates: str = "drop", threshold: float | None = 0.9
) -> RepeatRules:
    return RepeatRules(Contradictions[contradictions], NearDuplicates[near_duplicates], threshold)


def add(store: Store, path: Path, how: RepeatRules | None = None, **more: Any) -> IngestReport:
    split = {"heldout_share": 0.25, "heldout_salt": "s"}
    return ingest_file(path, store, kind=more.pop("kind", None), repeats=how, **split, **more)


def rows_of(store: Store, id: str) -> dict[str, Comparison]:
    return {row.id: row for row in store.comparisons(Kind.batch, id)}


def listed(store: Store, id: str, name: str) -> list[tuple[Any, ...]]:
    rows = read_jsonl(store.path(Kind.batch, id) / name)
    names = ("line", "id", "earlier_batch", "earlier_id", "match", "fate")
    return [tuple(row[name] for name in names) for row in rows]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store", "weekly")
    add(store, write(tmp_path / "old.jsonl", [pair(f"o{i}", i) for i in range(5)]))
    return store


def week(tmp_path: Path) -> Path:
    """Every relation once: to the earlier batch, and to a row of the same file."""
    rows = [
        pair("fresh", 50),
        edited(pair("", 0), "similar-old"),
        edited(pair("", 50), "similar-new"),
        turned(edited(pair("", 1), ""), "against-old"),
        turned({**pair("", 50), "chosen": pair("", 50)["chosen"] + " so"}, "against-new"),
        turned(pair("", 2), "against-exact"),
        {**pair("folded", 3), "chosen": pair("", 3)["chosen"].upper() + "!"},
        {**pair("exact", 4)},
        pair("other", 60, prompt=pair("", 0)["prompt"]),
    ]
    return write(tmp_path / "new.jsonl", rows)


def test_by_default_near_duplicates_and_contradictions_are_dropped(
    tmp_path: Path, store: Store
) -> None:
    report = add(store, week(tmp_path))
    assert set(rows_of(store, "new")) == {"fresh", "other"}
    met = {row["id"]: (row["policy"], row["reason"]) for row in report.excluded}
    assert met["exact"] == ("duplicate_of_earlier", "repeats o4 of old")
    assert met["folded"] == ("near_duplicate_of_earlier", "repeats o3 of old")
    assert met["against-exact"] == ("contradicting", "contradicts o2 of old")
    assert met["similar-old"] == ("similar_to_earlier", "repeats o0 of old (similarity 0.987)")
    assert met["similar-new"] == ("similar_in_file", "repeats fresh of new (similarity 0.987)")
    assert met["against-old"][0] == met["against-new"][0] == "contradicting"
    assert met["against-old"][1].startswith("contradicts o1 of old (similarity 0.98")
    named = {name: n for name, n in report.counts.items() if n}
    assert named["contradicting"] == 3
    assert named["similar_in_file"] == named["similar_to_earlier"] == 1
    assert named["read"] == named["accepted"] + named["excluded"] == 9
    assert listed(store, "new", "contradictions.jsonl") == [
        (4, "against-old", "old", "o1", "similar", "drop"),
        (5, "against-new", "new", "fresh", "similar", "drop"),
        (6, "against-exact", "old", "o2", "folded", "drop"),
    ]
    assert listed(store, "new", "near_duplicates.jsonl") == [
        (2, "similar-old", "old", "o0", "similar", "drop"),
        (3, "similar-new", "new", "fresh", "similar", "drop"),
        (7, "folded", "old", "o3", "folded", "drop"),
    ]
    settings = store.manifest(Kind.batch, "new")["settings"]
    assert settings["contradictions"] == settings["near_duplicates"] == "drop"
    assert settings["near_threshold"] == 0.9


def test_contradictions_may_be_kept(tmp_path: Path, store: Store) -> None:
    report = add(store, week(tmp_path), rules(contradictions="keep"))
    kept = {"against-old", "against-new", "against-exact"}
    assert set(rows_of(store, "new")) == {"fresh", "other"} | kept
    assert {row.strength for row in rows_of(store, "new").values()} == {"better"}
    assert report.counts["contradictions_kept"] == 3
    assert report.counts["contradicting"] == 0
    assert {
        row[1]: row[5] for row in listed(store, "new", "contradictions.jsonl")
    } == dict.fromkeys(kept, "keep")


def test_contradictions_may_be_lowered_and_say_what_they_were(tmp_path: Path, store: Store) -> None:
    rows = [
        pair("fresh", 50),
        turned(pair("", 1), "a", strength="significantly_better", meta={"k": 1}),
        turned(edited(pair("", 2), ""), "b", strength="slightly_better"),
        turned(pair("", 3), "c", strength=None),
    ]
    report = add(store, write(tmp_path / "new.jsonl", rows), rules(contradictions="lower"))
    found = rows_of(store, "new")
    assert {id: (row.strength, row.meta) for id, row in found.items()} == {
        "fresh": ("better", {}),
        "a": ("negligibly_better", {"k": 1, "strength_before": "significantly_better"}),
        "b": ("negligibly_better", {"strength_before": "slightly_better"}),
        "c": (None, {}),
    }
    assert report.counts["contradictions_lowered"] == 3
    manifest = store.manifest(Kind.batch, "new")
    assert manifest["accepted_by"]["strength"] == {
        "better": 1,
        "negligibly_better": 2,
        "ungraded": 1,
    }
    assert not add(store, tmp_path / "new.jsonl", rules(contradictions="lower")).added
    other = Store(store.root, "other")
    add(other, tmp_path / "old.jsonl")
    add(other, tmp_path / "new.jsonl", rules(contradictions="keep"))
    assert other.digest(Kind.batch, "new") != manifest["digest"]


def test_a_contradiction_that_was_kept_has_copies_of_its_own(tmp_path: Path, store: Store) -> None:
    first = [turned(pair("", 1), "kept"), pair("fresh", 50)]
    add(store, write(tmp_path / "new.jsonl", first), rules(contradictions="keep"))
    shouted = turned(pair("", 1), "shouted")
    shouted["chosen"] = shouted["chosen"].upper()
    report = add(store, write(tmp_path / "late.jsonl", [shouted, pair("later", 70)]))
    assert [(row["policy"], row["reason"]) for row in report.excluded] == [
        ("near_duplicate_of_earlier", "repeats kept of new")
    ]


def test_near_duplicates_may_be_kept_and_exact_ones_still_go(tmp_path: Path, store: Store) -> None:
    path = week(tmp_path)
    again = {**pair("", 3), "id": "folded-again", "chosen": pair("", 3)["chosen"].upper() + "!"}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(again) + "\n")
    report = add(store, path, rules(near_duplicates="keep"))
    assert set(rows_of(store, "new")) == {"fresh", "other", "similar-old", "similar-new", "folded"}
    assert report.counts["near_duplicates_kept"] == 3
    met = {row["id"]: row["reason"] for row in report.excluded if "duplicate" in row["policy"]}
    assert met == {"exact": "repeats o4 of old", "folded-again": "repeats folded of new"}


def test_without_a_threshold_only_folded_texts_are_compared(tmp_path: Path, store: Store) -> None:
    add(store, week(tmp_path), rules(threshold=None))
    kept = {"fresh", "other", "similar-old", "similar-new", "against-old", "against-new"}
    assert set(rows_of(store, "new")) == kept
    assert not (store.path(Kind.batch, "new") / "sketches.parquet").exists()
    again = {**pair("late", 50), "rejected": pair("", 50)["rejected"] + " really"}
    late = write(tmp_path / "late.jsonl", [again, pair("later", 70)])
    assert add(store, late).counts["similar_to_earlier"] == 1


def test_a_dropped_row_is_nobodys_original(tmp_path: Path, store: Store) -> None:
    """b repeats a, and c repeats b but not a: c stays."""
    a = pair("a", 80)
    words = a["chosen"].split()
    b = {**a, "id": "b", "chosen": " ".join([*words, "x", "y", "z", "u", "v"])}
    c = {**a, "id": "c", "chosen": " ".join([*words, "x", "y", "z", "u", "v", *"qrswp"])}
    report = add(store, write(tmp_path / "new.jsonl", [a, b, c]))
    assert set(rows_of(store, "new")) == {"a", "c"}
    assert report.excluded[0]["reason"].startswith("repeats a of new")


def test_sketches_are_read_back_and_made_anew_when_made_otherwise(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.path(Kind.batch, "old") / "sketches.parquet"
    table = pq.read_table(path)
    assert table.num_rows == 5
    rows = pq.read_table(store.path(Kind.batch, "old") / "rows.parquet")
    expected = near.sketch(near.texts_of(rows))
    assert [bytes(row) for row in expected] == table.column("sketch").to_pylist()

    late = [edited(pair("", 0), "late"), pair("later", 70)]
    calls = []
    made = near.sketch
    monkeypatch.setattr(near, "sketch", lambda texts: calls.append(texts.num_rows) or made(texts))
    add(store, write(tmp_path / "late.jsonl", late))
    assert calls == [2]

    zeros = pa.array([bytes(64)] * 5, pa.binary(64))
    other = pa.table({"sketch": zeros}).replace_schema_metadata({similar.SCHEME: b'{"seed": 1}'})
    pq.write_table(other, path)
    more = write(tmp_path / "more.jsonl", [edited(pair("", 1), "more"), pair("most", 71)])
    assert add(store, more).counts["similar_to_earlier"] == 1


def test_withdrawn_and_corrected_rows_are_compared_with_no_longer(
    tmp_path: Path, store: Store
) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("o0\n", encoding="utf-8")
    withdraw(store, ids, reason="")
    fix = write(tmp_path / "fix.jsonl", [edited(pair("", 1), "o1")])
    assert add(store, fix, supersedes="old").counts["accepted"] == 1
    rows = [edited(pair("", 0), "n0"), turned(pair("", 1), "n1"), edited(pair("", 2), "n2")]
    report = add(store, write(tmp_path / "new.jsonl", rows))
    assert set(rows_of(store, "new")) == {"n0"}
    assert [row["reason"].partition(" (")[0] for row in report.excluded] == [
        "contradicts o1 of fix",
        "repeats o2 of old",
    ]


def test_streams_and_kinds_are_compared_by_themselves(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path / "new.jsonl", [edited(pair("", 0), "n")])
    assert add(store, path, kind=Kind.open).counts["accepted"] == 1
    assert add(Store(store.root, "other"), path).counts["accepted"] == 1


def test_tasks_about_case_and_punctuation_are_compared_as_they_stand(
    tmp_path: Path, store: Store
) -> None:
    words = "Kosovo Pristina Kuwait Kuwait City Laos Vientiane Latvia Riga"
    forms = [f'["{words}"]', f'"{words}",', f'"{words.upper()}"', f"{words}."]
    ask = {"prompt": [{"role": "user", "content": "Quote it."}]}
    rows = [
        pair(f"f{i}{j}", 0, **ask, chosen=forms[i], rejected=forms[j])
        for i, j in ((0, 1), (0, 2), (1, 3), (2, 3))
    ]
    rows.append(turned(rows[0], "against"))
    rows.append({**rows[1], "id": "again"})
    report = add(store, write(tmp_path / "new.jsonl", rows))
    assert set(rows_of(store, "new")) == {"f01", "f02", "f13", "f23"}
    assert {row["id"]: row["policy"] for row in report.excluded} == {
        "against": "contradicting",
        "again": "duplicate_in_file",
    }


def slow(rows: list[Row], how: RepeatRules) -> dict[str, tuple[str, str]]:
    """Judge the rows of one file one after another; id to fate and the row it was compared with."""
    accepted: list[Row] = []
    fates: dict[str, tuple[str, str]] = {}
    for row in rows:
        same = [fold_text(row["chosen"]), fold_text(row["rejected"])]
        texts = [row["chosen"], row["rejected"]]
        alike = [old for old in accepted if old["prompt"] == row["prompt"]]
        exact = [old for old in alike if [old["chosen"], old["rejected"]] == texts]
        folds = [[fold_text(old["chosen"]), fold_text(old["rejected"])] for old in alike]
        folded = [old for old, pair in zip(alike, folds, strict=True) if pair == same]
        opposite = [old for old, pair in zip(alike, folds, strict=True) if pair == same[::-1]]
        if exact:
            fates[row["id"]] = ("duplicate", exact[0]["id"])
            continue
        if folded:
            fates[row["id"]] = (how.near_duplicates.name, folded[0]["id"])
        elif opposite:
            fates[row["id"]] = (how.contradictions.name, opposite[0]["id"])
        if fates.get(row["id"], ("keep",))[0] != "drop":
            accepted.append(row)
    return fates


@pytest.mark.parametrize(
    ("contradictions", "near_duplicates"),
    list(itertools.product(["drop", "keep", "lower"], ["drop", "keep"])),
)
@pytest.mark.parametrize("seed", range(4))
def test_folded_rows_are_judged_as_one_after_another(
    tmp_path: Path, contradictions: str, near_duplicates: str, seed: int
) -> None:
    rng = random.Random(seed)
    rows: list[Row] = []
    for number in range(60):
        sides = ["yes", "no"] if rng.random() < 0.5 else ["no", "yes"]
        sides = [side if rng.random() < 0.6 else side.upper() + "." for side in sides]
        prompt = [{"role": "user", "content": f"question {rng.randrange(6)}"}]
        rows.append(
            {"id": f"r{number}", "prompt": prompt, "axis": "safety", "strength": "better"}
            | {"chosen": sides[0], "rejected": sides[1]}
        )
    rows.append({**rows[0], "id": "last", "chosen": "something else"})
    how = rules(contradictions, near_duplicates)
    store = Store(tmp_path / "store", "weekly")
    half = 0 if seed % 2 else 25
    if half:
        add(store, write(tmp_path / "one.jsonl", rows[:half]), how)
    report = add(store, write(tmp_path / "two.jsonl", rows[half:]), how)
    expected = slow(rows, how)
    gone = {id for id, (fate, _) in expected.items() if fate in ("drop", "duplicate")}
    ids = [row["id"] for row in rows[half:]]
    assert list(rows_of(store, "two")) == [id for id in ids if id not in gone]
    reasons = {row["id"]: row["reason"].split()[1] for row in report.excluded}
    notes = [*read_jsonl(store.path(Kind.batch, "two") / "contradictions.jsonl")]
    notes += read_jsonl(store.path(Kind.batch, "two") / "near_duplicates.jsonl")
    assert {id: other for id, (fate, other) in expected.items() if id in reasons} == reasons
    assert {row["id"]: (row["fate"], row["earlier_id"]) for row in notes} == {
        id: found for id, found in expected.items() if found[0] != "duplicate" and id in ids
    }
