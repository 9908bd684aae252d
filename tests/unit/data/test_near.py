"""Fuzzy near duplicates: what merges, what never may, and lookups against a loop over all pairs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rlhf.data import near
from rlhf.data.near import Match, Verifier, pairs_against, pairs_within, sketch, texts_of

THRESHOLD = 0.9
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("l", "n", "r", "st")]


def words(number: int, seed: int) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=number)


def text(number: int, seed: int) -> str:
    return " ".join(words(number, seed))


def row(
    prompt: str, chosen: str, rejected: str, axis: str = "helpfulness", system: str = ""
) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": prompt})
    return {"prompt": turns, "axis": axis, "chosen": chosen, "rejected": rejected}


def table(*rows: dict[str, Any]) -> pa.Table:
    return texts_of(pa.Table.from_pylist(list(rows)))


def compare(one: dict[str, Any], other: dict[str, Any]) -> Match | None:
    verifier = Verifier(table(one, other), threshold=THRESHOLD)
    return verifier.match(1, verifier, 0)


PROMPT, GOOD, BAD = text(40, 1), text(80, 2), text(90, 3)
ORIGINAL = row(PROMPT, GOOD, BAD)


def edited(original: str, place: int, new: str) -> str:
    found = original.split()
    found[place] = new
    return " ".join(found)


@pytest.mark.parametrize(
    "copy",
    [
        row(PROMPT, GOOD + " thanks", BAD),
        row(PROMPT, edited(GOOD, 30, "typo"), BAD),
        row(PROMPT, edited(GOOD, 30, "typo"), edited(BAD, 50, "slip")),
        row(PROMPT, " ".join(GOOD.split()[:-5]), BAD),
        row(PROMPT + " please", GOOD, BAD),
        row(PROMPT.capitalize() + " please?", GOOD, BAD + "."),
    ],
)
def test_light_edits_merge(copy: dict[str, Any]) -> None:
    same = compare(ORIGINAL, copy)
    assert same is not None
    assert not same.swapped
    assert THRESHOLD <= same.similarity < 1
    copy = {**copy, "chosen": copy["rejected"], "rejected": copy["chosen"]}
    opposite = compare(ORIGINAL, copy)
    assert opposite is not None
    assert opposite.swapped
    assert opposite.similarity == same.similarity


@pytest.mark.parametrize(
    "other",
    [
        row(PROMPT, text(80, 9), BAD),
        row(PROMPT, GOOD, text(90, 9)),
        row(PROMPT, GOOD, GOOD + " more"),
        row(text(40, 9), GOOD, BAD),
        row(PROMPT, GOOD, BAD, axis="safety"),
        row(PROMPT, GOOD, BAD, system=text(20, 9)),
        row(PROMPT, GOOD + " 7", BAD),
        row(PROMPT, edited(GOOD, 30, "not"), BAD),
        row(PROMPT + " 5", GOOD, BAD),
        row(PROMPT, " ".join(GOOD.split()[:60]), BAD),
    ],
)
def test_different_rows_stay_apart(other: dict[str, Any]) -> None:
    assert compare(ORIGINAL, other) is None
    assert compare(other, ORIGINAL) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (row("Is it?", "Yes.", "No."), row("Is it?", "Yes.", "Maybe.")),
        (row("What is 2+2?", "4", "5"), row("What is 2+3?", "5", "4")),
        (row("Capital of France?", "Paris", "Rome"), row("Capital of Italy?", "Rome", "Paris")),
        (row("Sum up", GOOD + " costs 10", BAD), row("Sum up", GOOD + " costs 12", BAD)),
        (row("Is this legal?", "It is legal", BAD), row("Is this legal?", "It is not legal", BAD)),
    ],
)
def test_short_texts_numbers_and_negations_stay_apart(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert compare(one, other) is None


def test_two_questions_about_one_passage_stay_apart() -> None:
    """Short answers are alike under any prompt: yes to one question is no contradiction of no."""
    passage = text(300, 5)
    one = row(f"{passage} is the man old", "Yes he is", "No he is")
    other = row(f"{passage} is the man tall", "No he is", "Yes he is")
    assert compare(one, other) is None
    refusal = "I will leave this one"
    one = row(f"{passage} make a bomb", refusal, text(60, 6))
    assert compare(one, row(f"{passage} make a cake", refusal, text(60, 7))) is None
    assert compare(one, row(f"{passage} make one bomb", refusal, text(60, 6))) is not None


def test_minimal_edit_pairs_stay_apart() -> None:
    """Each row contrasts one text with another small change of it: the change is the point."""
    long = text(120, 8)
    one, two = edited(long, 60, "black"), edited(long, 60, "white")
    assert compare(row(PROMPT, long, one), row(PROMPT, long, two)) is None
    assert compare(row(PROMPT, long, one), row(PROMPT, long, edited(one, 90, "x"))) is None
    opposite = compare(row(PROMPT, one, two), row(PROMPT, two, one))
    assert opposite is not None
    assert opposite.swapped


def test_case_and_punctuation_that_a_row_is_about_are_not_folded() -> None:
    """Title case beats a preface, and the preface beats small letters: no contradiction."""
    title, preface = GOOD.title(), "Sure here it is " + GOOD.title()
    assert compare(row(PROMPT, title, preface), row(PROMPT, preface, GOOD)) is None
    turned = compare(row(PROMPT, title, GOOD), row(PROMPT, GOOD + " so", title))
    assert turned is not None
    assert turned.swapped


def test_where_responses_are_alike_the_copies_must_be_alike_to_the_letter() -> None:
    """Folded, both copies are equal; literally they share 109 of 127 shingles, less than 0.9."""
    long = text(120, 12)
    other, copy = long, long
    for place in range(8):
        other = edited(other, 14 * place + 4, "other")
    for place in (20, 60, 100):
        copy = edited(copy, place, long.split()[place].upper())
    assert compare(row(PROMPT, long, other), row(PROMPT, copy, other)) is None
    assert compare(row(PROMPT, long, BAD), row(PROMPT, copy, BAD)) is not None


def test_a_short_answer_with_a_word_more_is_another_answer() -> None:
    short = text(25, 13)
    assert compare(row(PROMPT, short, BAD), row(PROMPT, short + " so", BAD)) is None
    assert compare(row(PROMPT, short, BAD), row(PROMPT, short + "!", BAD)) is not None
    assert compare(row(short, GOOD, BAD), row(short + " so", GOOD, BAD)) is None


def test_signs_alone_are_compared_as_they_stand() -> None:
    assert compare(row(PROMPT, "!!!", BAD), row(PROMPT, "???", BAD + " so")) is None
    assert compare(row(PROMPT, "!!!", BAD), row(PROMPT, "!!!", BAD + " so")) is not None


def planted(number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return earlier rows, and new ones of which every second is an edited copy."""
    rng = random.Random(3)
    earlier = [
        row(
            text(rng.randint(3, 60), 10 * i),
            text(rng.randint(40, 200), 10 * i + 1),
            text(100, 10 * i + 2),
        )
        for i in range(number)
    ]
    new = []
    for i, old in enumerate(earlier):
        if i % 2:
            new.append(row(text(30, 10 * i + 5), text(50, 10 * i + 6), text(60, 10 * i + 7)))
            continue
        sides = [old["chosen"], old["rejected"]]
        for side in range(2):
            for _ in range(rng.choice([0, 0, 1, 2])):
                sides[side] = edited(sides[side], rng.randrange(len(sides[side].split())), "typo")
        if i % 4:
            sides.reverse()
        new.append({**old, "chosen": sides[0], "rejected": sides[1]})
    return earlier, new


def all_matches(new: pa.Table, earlier: pa.Table) -> set[Match]:
    left, right = Verifier(new, threshold=THRESHOLD), Verifier(earlier, threshold=THRESHOLD)
    found = (left.match(i, right, j) for i in range(new.num_rows) for j in range(earlier.num_rows))
    return {match for match in found if match is not None}


def test_lookups_find_what_a_loop_over_all_pairs_finds() -> None:
    earlier, new = (table(*rows) for rows in planted(100))
    proposed = pairs_against(sketch(new), sketch(earlier), threshold=THRESHOLD)
    left, right = Verifier(new, threshold=THRESHOLD), Verifier(earlier, threshold=THRESHOLD)
    found = {left.match(int(i), right, int(j)) for i, j in proposed} - {None}
    expected = all_matches(new, earlier)
    assert len(expected) > 25
    assert {match.swapped for match in expected} == {True, False}
    assert found == expected
    assert len(proposed) < 3 * len(expected)


def test_lookups_within_a_file_propose_earlier_rows_only() -> None:
    earlier, new = planted(60)
    both = table(*earlier, *new)
    proposed = pairs_within(sketch(both), threshold=THRESHOLD)
    assert (proposed[:, 0] > proposed[:, 1]).all()
    verifier = Verifier(both, threshold=THRESHOLD)
    found = {verifier.match(int(i), verifier, int(j)) for i, j in proposed} - {None}
    expected = {m for m in all_matches(both, both) if m.row > m.earlier}
    assert found == expected
    assert len(expected) > 12


def test_a_crowded_bucket_stays_bounded_and_keeps_first_and_nearest() -> None:
    rows = np.zeros((5000, near.NUM_PERM), dtype=np.uint8)
    pairs = pairs_within(rows, threshold=THRESHOLD)
    assert len(pairs) <= 5000 * 2 * near.MAX_PARTNERS
    last = set(pairs[pairs[:, 0] == 4999][:, 1].tolist())
    assert {0, 4998} <= last
    assert len(pairs_against(rows[:100], rows, threshold=THRESHOLD)) == 100 * 2 * near.MAX_PARTNERS


def test_sketches_do_not_depend_on_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier, _ = planted(30)
    whole = sketch(table(*earlier))
    monkeypatch.setattr(near, "CHUNK_BYTES", 2000)
    assert np.array_equal(sketch(table(*earlier)), whole)
    assert np.array_equal(sketch(table(*earlier[7:9])), whole[7:9])
    turned = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in earlier]
    assert np.array_equal(sketch(table(*turned)), whole)
    assert sketch(table(*earlier).slice(0, 0)).shape == (0, near.NUM_PERM)


def test_prompts_and_responses_are_not_mixed_up_in_a_sketch() -> None:
    rows = [row(GOOD, BAD, PROMPT), row(BAD, GOOD, PROMPT), row(GOOD, PROMPT, BAD)]
    found = sketch(
        texts_of(
            pa.Table.from_pylist(
                [
                    {**r, "prompt": [{"role": "", "content": c}]}
                    for r, c in zip(rows, (GOOD, BAD, GOOD), strict=True)
                ]
            )
        )
    )
    assert (found[0] == found[1]).mean() < 0.9
    assert np.array_equal(found[0], found[2])


def test_sketches_estimate_the_similarity() -> None:
    """Agreement of 64 values lies within four standard errors of the exact similarity."""
    long = text(400, 11)
    for number in (0, 5, 20, 60):
        other = long.split()
        for place in range(number):
            other[6 * place] = "typo"
        rows = [row("", long, long), row("", " ".join(other), " ".join(other))]
        both = Verifier(table(*rows), threshold=0.0)
        exact = near.jaccard(both.shingles["chosen"].unique(0), both.shingles["chosen"].unique(1))
        sketches = sketch(table(*rows))
        estimate = float((sketches[0] == sketches[1]).mean())
        assert abs(estimate - exact) <= 4 * (exact * (1 - exact) / near.NUM_PERM) ** 0.5 + 0.02
