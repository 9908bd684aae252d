"""Self-BLEU by hand, and against sacrebleu."""

from __future__ import annotations

import math
import random

import pytest
import sacrebleu

from rlhf.algo.diversity import mean_self_bleu, self_bleu, words

HOW = {"level": 0.95, "num_draws": 500, "seed": 0}


def reference(texts: list[str]) -> float:
    """Return the mean of sacrebleu's sentence BLEU of each text against the others."""
    split = [" ".join(words(text)) for text in texts]
    scores = [
        sacrebleu.sentence_bleu(
            text,
            split[:index] + split[index + 1 :],
            smooth_method="floor",
            smooth_value=0.1,
            tokenize="none",
            use_effective_order=True,
        ).score
        for index, text in enumerate(split)
    ]
    return sum(scores) / len(scores) / 100


def test_two_texts_by_hand() -> None:
    """`a b c d e` against `a b c d f`, both ways the same.

    4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours; equal lengths.
    """
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(expected, abs=1e-12)


def test_matches_are_clipped_by_the_best_single_reference() -> None:
    """`a a a a` against `a a` and `a b`: no reference has more than 2 a, so 2 of 4 words match.

    1 of 3 pairs; of 2 triples and 1 four none, which count as 0.1. The closest length is 2:
    brevity 1. `a a` against the others: all of 2 words, 1 of 1 pair, closest length 2. `a b`: a of
    2 words, no pair of 1.
    """
    long = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    short = 1.0
    other = math.sqrt(1 / 2 * 0.1)
    assert self_bleu(["a a a a", "a a", "a b"]) == pytest.approx((long + short + other) / 3)


def test_a_short_text_pays_for_its_brevity() -> None:
    """`a b` within `a b c d`: perfect matches, 2 words against 4: exp(1 - 4 / 2).

    `a b c d` against `a b`: 2/4, 1/3, and 0.1 of 2 triples and of 1 four; it is the longer one.
    """
    expected = (math.exp(-1) + (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** 0.25) / 2
    assert self_bleu(["a b", "a b c d"]) == pytest.approx(expected)


def test_two_references_that_are_equally_close_count_as_the_shorter_one() -> None:
    """`a b x` lies between 2 and 4 words: no brevity penalty, instead of exp(1 - 4 / 3).

    `a b` matches fully; its closest reference has 3 words: exp(1 - 3 / 2). `a b c d` is longer.
    """
    middle = (2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 3)
    short = math.exp(-1 / 2)
    long = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** 0.25
    assert self_bleu(["a b x", "a b", "a b c d"]) == pytest.approx((middle + short + long) / 3)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["yes .", "yes ."], 1.0),
        (["yes", "yes", "yes"], 1.0),
        (["", ""], 1.0),
        (["", "yes"], 0.0),
        (["one two three four five", "six seven eight nine ten"], 0.0),
        (["Yes, it does.", "yes , it does ."], 1.0),
        (["only one"], None),
        ([], None),
    ],
)
def test_stated_rules(texts: list[str], expected: float | None) -> None:
    assert self_bleu(texts) == expected


def test_words_are_runs_signs_and_single_characters_of_scripts_without_blanks() -> None:
    assert words("It's 3.5, OK!") == ["it", "'", "s", "3", ".", "5", ",", "ok", "!"]
    assert words("\u4f60\u597d a") == ["\u4f60", "\u597d", "a"]


@pytest.mark.parametrize("seed", range(25))
def test_it_is_what_sacrebleu_says(seed: int) -> None:
    """Random texts over few words, so that all orders match now and then; no text is empty."""
    draw = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(draw.choice((2, 5, 30)))]
    texts = [
        " ".join(draw.choice(vocabulary) for _ in range(draw.randint(1, 14)))
        for _ in range(draw.randint(2, 7))
    ]
    assert self_bleu(texts) == pytest.approx(reference(texts), abs=1e-9)


def test_order_does_not_matter_and_more_variety_lowers_it() -> None:
    draw = random.Random(1)
    narrow = [" ".join(draw.choice("ab") for _ in range(8)) for _ in range(6)]
    wide = [" ".join(draw.choice("abcdefghijklmnop") for _ in range(8)) for _ in range(6)]
    low, high = self_bleu(wide), self_bleu(narrow)
    assert low is not None
    assert high is not None
    assert low < high
    assert self_bleu(wide[::-1]) == pytest.approx(low, abs=1e-12)


def test_mean_is_over_prompts_with_two_responses_and_clustered() -> None:
    same, different = ["a b", "a b"], ["a b", "c d"]
    found = mean_self_bleu([same, different, ["alone"]], ["x", "y", "z"], **HOW)
    assert (found["mean"], found["n"]) == (0.5, 2)
    assert (found["low"], found["high"]) == (0.0, 1.0)
    # Forty prompts that are twenty twice over are no more than twenty.
    texts = [same if i % 3 else different for i in range(20)]
    once = mean_self_bleu(texts, range(20), **HOW)
    twice = mean_self_bleu(texts * 2, [*range(20)] * 2, **HOW)
    assert (twice["low"], twice["high"]) == (once["low"], once["high"])
    assert mean_self_bleu([], [], **HOW) == {"mean": None, "low": None, "high": None, "n": 0}
