"""Shingles of whole columns against a plain loop over words, and what counts as a word."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from rlhf.data.shingles import guarded_words, jaccard, shingles


def slow(text: str) -> set[tuple[str, ...]]:
    """Return the shingles of an ASCII text as tuples of words, in plain Python."""
    for sign in ".,;:!?'\"`":
        text = text.replace(sign, " ")
    words = text.lower().split()
    return {tuple(words[i : i + 3]) for i in range(max(len(words) - 2, 1))} if words else set()


def slow_jaccard(left: str, right: str) -> float:
    one, other = slow(left), slow(right)
    return len(one & other) / max(len(one | other), 1)


def random_text(rng: random.Random) -> str:
    words = [
        rng.choice(["a", "b", "Not", "c's", "10", "x+y", "..."]) for _ in range(rng.randint(0, 12))
    ]
    return rng.choice([" ", "  ", "\n"]).join(words)


def test_similarities_equal_those_of_a_loop() -> None:
    rng = random.Random(7)
    texts = [random_text(rng) for _ in range(120)]
    found = shingles(pa.array(texts))
    for i, left in enumerate(texts):
        assert len(found.unique(i)) == len(slow(left)), left
        for j, right in enumerate(texts):
            assert jaccard(found.unique(i), found.unique(j)) == slow_jaccard(left, right)


def test_a_hand_worked_similarity() -> None:
    """abc bcd cde against abc bcd cdf: two of four shingles are shared."""
    found = shingles(pa.array(["A b, c d e", "a b c d f!"]))
    assert jaccard(found.unique(0), found.unique(1)) == 0.5
    assert found.words.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Don\u2019t  stop\u2026", "don't stop"),
        ("\uff21\uff22\uff23 is full width", "abc IS full width"),
        ("a\u00a0b c", "a b c"),
        ("", " \n"),
        ("?!", "..."),
    ],
)
def test_texts_with_the_same_words(left: str, right: str) -> None:
    found = shingles(pa.array([left, right]))
    assert np.array_equal(found.unique(0), found.unique(1))
    assert found.words[0] == found.words[1]


def test_scripts_without_blanks_are_cut_into_characters() -> None:
    found = shingles(
        pa.array(["\u4eca\u5929\u5929\u6c14\u5f88\u597d", "\u0e01\u0e02\u0e03", "abc"])
    )
    assert found.words.tolist() == [6, 3, 1]
    assert np.diff(found.offsets).tolist() == [4, 1, 1]


def test_order_of_words_and_borders_of_texts_count() -> None:
    found = shingles(pa.array(["a b c", "c b a", "a b", "c", "a b c"]))
    sets = [found.unique(i).tolist() for i in range(5)]
    assert sets[0] == sets[4]
    assert len({tuple(s) for s in sets}) == 4


def test_a_slice_of_a_column_is_cut_like_the_whole() -> None:
    whole = pa.array(["zero one two", "three four five", "\u00e9t\u00e9 two three", "six"])
    part = shingles(whole.slice(1, 2))
    every = shingles(whole)
    assert np.array_equal(part.unique(0), every.unique(1))
    assert np.array_equal(part.unique(1), every.unique(2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It costs $5.30, not 6", ["$5", "30", "not", "6"]),
        ("I don't know; nobody cannot", ["t", "nobody", "cannot"]),
        ("Notes about an annotation", []),
        ("", []),
    ],
)
def test_numbers_and_negations(text: str, words: list[str]) -> None:
    assert guarded_words(text) == words
