"""The held-out rule: one decision per prompt, over all kinds and spellings."""

from __future__ import annotations

import pytest

from rlhf.data.records import Message
from rlhf.data.split import fold_text, is_heldout, is_judge_prompt, prompt_key
from rlhf.errors import DataError


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("  Hello,   World!  ", "hello world"),
        ("It\u2019s \u201cfine\u201d\u2026", "it s fine"),
        ("it's 'fine'", "it s fine"),
        ("2 + 2 = 4", "2 + 2 = 4"),
        ("STRASSE", "strasse"),
        ("stra\u00dfe", "strasse"),
        ("\uff21\uff22", "ab"),
        (" ?! ", "?!"),
    ],
)
def test_folding_by_hand(text: str, folded: str) -> None:
    assert fold_text(text) == folded


def test_signs_that_carry_meaning_are_kept() -> None:
    assert fold_text("3 - 2") != fold_text("3 + 2")
    assert fold_text("a < b") != fold_text("a > b")


def test_only_the_first_user_turn_counts() -> None:
    system: Message = {"role": "system", "content": "Be kind."}
    answer: Message = {"role": "assistant", "content": "Yes."}
    key = prompt_key(user("Is it true?"))
    assert prompt_key([system, *user("is it TRUE")]) == key
    assert prompt_key([*user("Is it true?"), answer, *user("Really?")]) == key
    assert prompt_key([*user("Really?"), answer, *user("Is it true?")]) != key


def test_no_user_turn_is_refused() -> None:
    with pytest.raises(DataError, match="without a user turn"):
        prompt_key([{"role": "assistant", "content": "Hi"}])


def test_shares_are_met_and_nested() -> None:
    prompts = [user(f"question number {i}") for i in range(4000)]
    small = {i for i, p in enumerate(prompts) if is_heldout(p, share=0.1, salt="a")}
    large = {i for i, p in enumerate(prompts) if is_heldout(p, share=0.25, salt="a")}
    assert 330 < len(small) < 470
    assert 890 < len(large) < 1110
    assert small < large


def test_salt_and_judge_split_are_independent() -> None:
    prompts = [user(f"question number {i}") for i in range(4000)]
    a = [is_heldout(p, share=0.5, salt="rlhf") for p in prompts]
    b = [is_heldout(p, share=0.5, salt="other") for p in prompts]
    judge = [is_judge_prompt(p, share=0.5) for p in prompts]
    for other in (b, judge):
        agreement = sum(x == y for x, y in zip(a, other, strict=True)) / len(a)
        assert 0.46 < agreement < 0.54


def test_the_split_never_changes() -> None:
    heldout = [i for i in range(40) if is_heldout(user(f"prompt {i}"), share=0.25, salt="rlhf")]
    assert heldout == [2, 7, 15, 17, 18, 20, 23, 26, 27, 28, 33, 34, 36, 37, 38]
