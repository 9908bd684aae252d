"""Token ids and labels of conversations, against the template engine and by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.data.chat import (
    IGNORED,
    encode_conversation,
    encode_conversations,
    encode_pair_side,
    encode_pair_sides,
    encode_prompt,
    encode_prompts,
    encode_response,
    encode_responses,
    ensure_chat,
)
from rlhf.data.records import Message
from rlhf.errors import ConfigError
from rlhf.toy.model import build_tokenizer

CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% endif %}"""
TALK: list[Message] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4.\n\nAnything else?"},
]


def byte_tokenizer(specials: list[str], **tokens: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n\n\n hello there hi hi assistant user system"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def chatml() -> PreTrainedTokenizerFast:
    """Build a tokenizer with SmolLM2's special tokens: BOS opens a turn, pad is EOS."""
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def ready(name: str) -> PreTrainedTokenizerFast:
    tokenizer = {
        "toy": build_tokenizer,
        "chatml": chatml,
        "plain": lambda: byte_tokenizer(["</s>"], eos_token="</s>"),
    }[name]()
    ensure_chat(tokenizer)
    return tokenizer


NAMES = ["toy", "chatml", "plain"]


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_template_engine_with_its_assistant_mask(name: str) -> None:
    tokenizer = ready(name)
    for messages in (TALK, TALK[1:3], TALK[:4]):
        expected = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        encoded = encode_conversation(tokenizer, messages)
        assert encoded.input_ids == expected["input_ids"]
        mask = [int(label != IGNORED) for label in encoded.labels]
        assert mask == expected["assistant_masks"]
        assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_every_answer_with_its_eos_and_nothing_else(name: str) -> None:
    tokenizer = ready(name)
    encoded = encode_conversation(tokenizer, TALK)
    kept = [label for label in encoded.labels if label != IGNORED]
    eos = tokenizer.eos_token
    assert tokenizer.decode(kept) == f"Hi!{eos}It is 4.\n\nAnything else?{eos}"
    assert kept.count(tokenizer.eos_token_id) == 2
    assert encoded.input_ids[-1] == encoded.labels[-1] == tokenizer.eos_token_id
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    assert all(label in (IGNORED, token) for token, label in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_last_turn_only_labels_the_last_answer(name: str) -> None:
    tokenizer = ready(name)
    whole = encode_conversation(tokenizer, TALK)
    last = encode_conversation(tokenizer, TALK, last_turn_only=True)
    assert last.input_ids == whole.input_ids
    kept = [label for label in last.labels if label != IGNORED]
    assert tokenizer.decode(kept) == f"It is 4.\n\nAnything else?{tokenizer.eos_token}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("response", ["It is 4.", "\n\n hi", " hi", "", "hi\n", "\u00e9\u4e16"])
def test_prompt_plus_response_is_the_conversation(name: str, response: str) -> None:
    tokenizer = ready(name)
    prompt = TALK[:4]
    side = encode_pair_side(tokenizer, prompt, response)
    assert side == encode_prompt(tokenizer, prompt) + encode_response(tokenizer, response)
    answer: Message = {"role": "assistant", "content": response}
    assert side == encode_conversation(tokenizer, [*prompt, answer]).input_ids
    assert side[-1] == tokenizer.eos_token_id
    assert side.count(tokenizer.pad_token_id) == 0


@pytest.mark.parametrize("name", NAMES)
def test_prompt_is_what_the_template_engine_gives_a_sampler(name: str) -> None:
    tokenizer = ready(name)
    expected = tokenizer.apply_chat_template(
        TALK[:4], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert encode_prompt(tokenizer, TALK[:4]) == expected["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_text_of_an_answer_never_ends_its_turn(name: str) -> None:
    tokenizer = ready(name)
    text = f"a{tokenizer.eos_token}b{tokenizer.pad_token}"
    ids = encode_response(tokenizer, text)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in ids
    answer: Message = {"role": "assistant", "content": text}
    assert encode_conversation(tokenizer, [TALK[1], answer]).input_ids[-len(ids) :] == ids


def test_chatml_text_and_special_tokens_are_kept() -> None:
    tokenizer = chatml()
    before = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    size = len(tokenizer)
    assert ensure_chat(tokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == before
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id == size == len(tokenizer) - 1
    native = chatml().apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encode_prompt(tokenizer, TALK[:4])) == native


def test_a_second_call_and_a_saved_copy_change_nothing(tmp_path: Any) -> None:
    tokenizer = ready("chatml")
    template, size = tokenizer.chat_template, len(tokenizer)
    assert not ensure_chat(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert not ensure_chat(loaded)
    assert (loaded.chat_template, len(loaded)) == (template, size)
    assert encode_conversation(loaded, TALK) == encode_conversation(tokenizer, TALK)


def test_the_toy_tokenizer_is_left_alone() -> None:
    tokenizer = build_tokenizer()
    template, size = tokenizer.chat_template, len(tokenizer)
    assert not ensure_chat(tokenizer)
    assert (tokenizer.chat_template, len(tokenizer)) == (template, size)


def test_a_padding_token_that_exists_is_used() -> None:
    tokenizer = byte_tokenizer(["</s>", "<pad>"], eos_token="</s>")
    size = len(tokenizer)
    assert not ensure_chat(tokenizer)
    assert (tokenizer.pad_token, len(tokenizer)) == ("<pad>", size)


def test_a_template_that_leaves_eos_unlabelled_is_replaced() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    )
    ensure_chat(tokenizer)
    labels = encode_conversation(tokenizer, TALK[1:3]).labels
    assert labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([x for x in labels if x != IGNORED]) == "Hi!<|im_end|>"


def test_bos_opens_the_text_where_the_tokenizer_does_so() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    ensure_chat(tokenizer)
    ids = encode_prompt(tokenizer, TALK[:2])
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("texts_at_once", [1, 2, 1024])
def test_many_are_encoded_as_one_by_one(
    name: str, texts_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.data.chat.TEXTS_AT_ONCE", texts_at_once)
    tokenizer = ready(name)
    eos = tokenizer.eos_token
    unfinished = [TALK[1], {"role": "assistant", "content": f"4 {eos} 5"}]
    talks = [TALK, TALK[1:3], TALK[:4], unfinished, TALK]
    for last in (False, True):
        assert encode_conversations(tokenizer, talks, last_turn_only=last) == [
            encode_conversation(tokenizer, talk, last_turn_only=last) for talk in talks
        ]
    plain, special = ([{"role": "user", "content": text}] for text in ("say", f"say{eos}"))
    prompts = [TALK[:2], TALK[:4], plain, special, TALK[:2]]
    answers = ["Hi!", "", "the end", f"{eos} is the end", "Hi!"]
    assert encode_prompts(tokenizer, prompts) == [encode_prompt(tokenizer, p) for p in prompts]
    assert encode_responses(tokenizer, answers) == [encode_response(tokenizer, a) for a in answers]
    assert encode_pair_sides(tokenizer, prompts, answers) == [
        encode_pair_side(tokenizer, prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    # The same text is tokens of the template in a prompt, and plain text in an answer.
    counts = [ids.count(tokenizer.eos_token_id) for ids in encode_prompts(tokenizer, prompts)]
    assert counts[3] == counts[2] + 1
    assert encode_responses(tokenizer, answers)[3].count(tokenizer.eos_token_id) == 1


def test_equal_prompts_share_no_list() -> None:
    first, second = encode_prompts(chatml(), [TALK[:2], TALK[:2]])
    assert first == second
    assert first is not second


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ConfigError, match="without an end-of-sequence token"):
        ensure_chat(byte_tokenizer(["x"]))


def test_eos_in_a_prompt_text_is_special_here() -> None:
    """Otherwise the test of answers that spell EOS would pass by accident."""
    assert chatml()("a<|im_end|>")["input_ids"][-1] == chatml().eos_token_id
