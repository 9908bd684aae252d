from __future__ import annotations

import subprocess
import sys

import torch

from rlhf.toy.model import build_model, build_tokenizer
from rlhf.toy.words import AMOUNTS, FOODS, PLANTS, SUBJECTS


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for word in (*SUBJECTS, *FOODS, *PLANTS, *AMOUNTS):
        assert len(tokenizer.encode(f" {word}")) == 1, word
        assert len(tokenizer.encode(word)) == 1, word


def test_any_text_survives_encoding() -> None:
    tokenizer = build_tokenizer()
    text = "Zürich, 12:30! <b>na\u00efve</b>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pad_is_not_eos_and_an_answer_ends_in_eos() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes ."}]
    found = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    labelled = [
        token
        for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True)
        if mask
    ]
    assert labelled[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(labelled[:-1]) == "yes ."


def test_a_model_follows_its_seed() -> None:
    one, same, other = (build_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_world_needs_no_torch() -> None:
    code = "import sys, rlhf.toy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
