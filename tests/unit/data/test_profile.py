"""Profiles: counts against a loop over rows, merging, order, and what the store keeps."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drift_world import Recipe, draw, for_vendor, profile_of

from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
from rlhf.data.profile import (
    FILE,
    MAX_NAMED,
    OTHERS,
    hash_numbers,
    length_bins,
    merged_measure,
    merged_words,
    num_distinct_prompts,
    profile_rows,
    read_profile,
)
from rlhf.data.records import Kind
from rlhf.data.vocabulary import changed_words


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return draw(Recipe(), 400, seed=3)


def counts(profile: dict[str, Any], measure: str) -> dict[Any, int]:
    found = profile["measures"][measure]
    return dict(zip(found["names"], found["counts"], strict=True))


def label(safe: bool | None) -> str:
    return {True: "safe", False: "unsafe", None: "unknown"}[safe]


def longer(row: dict[str, Any]) -> str:
    chosen, rejected = len(row["chosen"]), len(row["rejected"])
    return "chosen" if chosen > rejected else "rejected" if chosen < rejected else "equal"


def prompt_chars(row: dict[str, Any]) -> int:
    return sum(len(turn["content"]) for turn in row["prompt"])


def bin_of(chars: int) -> int:
    return math.floor(4 * math.log2(chars))


def test_counts_equal_a_loop_over_the_rows(rows: list[dict[str, Any]]) -> None:
    profile = profile_of(rows)
    assert profile["rows"] == 400
    assert profile["prompts"]["distinct"] == len({row["cluster"] for row in rows})
    new = {row["cluster"] for row in rows if not row["repeat_prompt"]}
    assert profile["prompts"]["new"] == len(new)
    for name in ("strength", "axis", "source"):
        assert counts(profile, name) == Counter(row[name] for row in rows)
    assert profile["annotators"] == Counter(row["annotator"] for row in rows)
    labels = [
        f"{label(r['chosen_safe'])}/{label(r['rejected_safe'])}"
        for r in rows
        if r["axis"] == "safety"
    ]
    assert counts(profile, "safety_bins") == Counter(labels)
    assert counts(profile, "ties")["tie"] == sum(row["tie"] for row in rows)
    assert counts(profile, "longer") == Counter(longer(r) for r in rows if not r["tie"])
    turns = Counter(sum(turn["role"] == "user" for turn in row["prompt"]) for row in rows)
    assert counts(profile, "turns") == turns
    assert counts(profile, "prompt_length") == Counter(bin_of(prompt_chars(row)) for row in rows)
    lengths = Counter(bin_of(len(row[side])) for row in rows for side in ("chosen", "rejected"))
    assert counts(profile, "response_length") == lengths
    repeated = sum(row["repeat_prompt"] for row in rows)
    assert counts(profile, "new_prompts") == {"new": 400 - repeated, "repeated": repeated}
    assert profile["vocabulary"]["words"]["the"] == sum(
        "the" in f"{r['prompt'][0]['content']} {r['chosen']} {r['rejected']}".split() for r in rows
    )


def test_products_know_which_rows_share_a_prompt(rows: list[dict[str, Any]]) -> None:
    found = profile_of(rows)["measures"]["axis"]
    sizes = {axis: Counter() for axis in found["names"]}
    for row in rows:
        sizes[row["axis"]][row["cluster"]] += 1
    squares = [sum(n * n for n in sizes[axis].values()) for axis in found["names"]]
    # Axes are the prompts' own here, so that no prompt has rows on both.
    assert found["products"] == [[squares[0], 0], [squares[1]]]
    assert found["clusters"] == len({row["cluster"] for row in rows})


def test_order_ids_and_chunks_change_nothing(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert profile_of(shuffled) == profile_of(rows)
    monkeypatch.setattr("rlhf.data.vocabulary.MAX_ROWS", 100)
    monkeypatch.setattr("rlhf.data.profile.MAX_ROWS", 100)
    some, again = profile_of(rows), profile_of(shuffled)
    assert some == again
    assert 70 < some["vocabulary"]["rows"] < 130


def test_merging_equals_one_profile_of_all(rows: list[dict[str, Any]]) -> None:
    more = draw(Recipe(safety=0.9, length=60), 300, seed=4)
    parts, both = [profile_of(rows), profile_of(more)], profile_of(rows + more)
    for name in both["measures"]:
        merged = merged_measure([part["measures"][name] for part in parts])
        whole = merged_measure([both["measures"][name]])
        assert merged.names == whole.names
        assert (merged.sums.rows, merged.sums.clusters) == (whole.sums.rows, whole.sums.clusters)
        np.testing.assert_array_equal(merged.sums.sums, whole.sums.sums)
        np.testing.assert_array_equal(merged.sums.products, whole.sums.products)
    merged_vocabulary = merged_words([part["vocabulary"] for part in parts])
    whole_vocabulary = merged_words([both["vocabulary"]])
    for field in ("sums", "cross", "products"):
        np.testing.assert_allclose(
            getattr(merged_vocabulary.sums, field),
            getattr(whole_vocabulary.sums, field),
            rtol=1e-5,
            atol=1e-4,
        )
    assert merged_vocabulary.counts["the"] == whole_vocabulary.counts["the"]


def test_rare_sources_are_counted_together() -> None:
    rows = draw(Recipe(), 200, seed=5)
    for i, row in enumerate(rows):
        row["source"] = "big" if i < 100 else f"s{i:03}"
    found = counts(profile_of(rows), "source")
    assert len(found) == MAX_NAMED + 1
    assert found["big"] == 100
    assert found[OTHERS] == 100 - (MAX_NAMED - 1)


def test_distinct_prompts_of_several_batches() -> None:
    def of(distinct: int, new: int) -> dict[str, Any]:
        return {"prompts": {"distinct": distinct, "new": new}}

    assert num_distinct_prompts([of(10, 10), of(8, 3), of(5, 0)]) == 13
    # Nothing new since the stream's first batch, which is not among these.
    assert num_distinct_prompts([of(4, 0), of(9, 0)]) == 9


def test_hashes_become_numbers() -> None:
    texts = ["00ff" * 8, "123456789abcdef0" * 2, "f" * 32]
    found = hash_numbers(pa.array(["a" * 32, *texts]).slice(1))
    assert found.tolist() == [int(text[:16], 16) for text in texts]


def test_length_bins_begin_at_quarters_of_octaves() -> None:
    assert length_bins(np.array([0, 1, 2, 4, 8, 9, 10, 1 << 30])).tolist() == [
        *(0, 0, 4, 8, 12, 12, 13),
        79,
    ]


def test_words_are_ranked_by_what_changed_beyond_their_use() -> None:
    now, before = {"bomb": 30, "the": 100, "bread": 1}, {"the": 98, "bread": 40, "and": 50}
    more, less = changed_words(now, 100, before, 100)
    assert more == ["bomb", "the"]
    assert less == ["and", "bread"]
    assert changed_words(now, 100, now, 100) == ([], [])


def test_the_store_keeps_a_profile_and_old_batches_get_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", "weekly")
    path = tmp_path / "w1.jsonl"
    rows = for_vendor(draw(Recipe(), 60, seed=6))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ingest_file(path, store, kind=None, heldout_share=0.2, heldout_salt="s")
    folder = store.folder / "batches" / "w1"
    kept = json.loads((folder / FILE).read_text())
    assert kept == profile_rows(folder / "rows.parquet", batch="w1", is_first=True)
    assert kept["rows"] == 60
    assert "new_prompts" not in kept["measures"]
    assert store.manifest(Kind.batch, "w1")["files"][FILE]["size"] == (folder / FILE).stat().st_size
    (folder / FILE).write_text('{"format": 0}')
    assert read_profile(folder, batch="w1", is_first=True) == kept
    (folder / FILE).unlink()
    assert read_profile(folder, batch="w1", is_first=True) == kept
    assert "new_prompts" in read_profile(folder, batch="w1", is_first=False)["measures"]
