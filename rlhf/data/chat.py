"""Conversations to token ids, with labels on the assistant's tokens only.

A conversation is rendered by the tokenizer's chat template and cut at the borders of the answers
(the template's `{% generation %}` blocks); each piece is encoded by itself. So an answer has the
same tokens in training, in scoring and after generation, whatever characters it begins with. Text
inside an answer never becomes a special token: only the template ends a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rlhf.data.records import Message
from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that carries no loss."""

PAD = "<|pad|>"
RESERVED_PADS = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|fim_pad|>")
"""Tokens that serve as padding when a tokenizer has them already; else PAD is added."""

CHAT_TEMPLATE = r"""
{%- for message in messages -%}
{%- if not loop.first -%}{{- '\n' -}}{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""ChatML with the end-of-sequence token as end of turn; it lies inside the generation block."""

BOS_PREFIX = "{{- bos_token -}}"
"""Put before the template for tokenizers that start every text with BOS."""

TEXTS_AT_ONCE = 1024
"""Texts per call of a tokenizer, which takes a hundred bytes a token until it returns."""

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE: list[Message] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation and their labels, of equal length; -100 carries no loss."""

    input_ids: list[int]
    labels: list[int]


def ensure_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a template that marks answers and a padding token that is not EOS.

    A template that marks answers and their EOS is kept, any other is replaced by CHAT_TEMPLATE.
    BOS, EOS and UNK stay as they are. Returns True when the vocabulary grew, so that the model's
    embeddings must grow too. Raises ConfigError for a tokenizer without EOS.
    """
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"model.path={tokenizer.name_or_path} has a tokenizer without an end-of-sequence "
            "token; set eos_token in its tokenizer_config.json"
        )
    if not _marks_answers(tokenizer):
        starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = (BOS_PREFIX if starts_with_bos else "") + CHAT_TEMPLATE
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return False
    size = len(tokenizer)
    vocabulary = tokenizer.get_vocab()
    free = [
        token for token in RESERVED_PADS if token in vocabulary and token != tokenizer.eos_token
    ]
    tokenizer.add_special_tokens({"pad_token": free[0] if free else PAD})
    return len(tokenizer) > size


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    last_turn_only: bool = False,
) -> Encoded:
    """Encode a conversation; labels are the ids of assistant tokens including EOS, else -100.

    With `last_turn_only` earlier assistant turns are context like the user's.
    """
    return encode_conversations(tokenizer, [messages], last_turn_only=last_turn_only)[0]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Sequence[Message]],
    *,
    last_turn_only: bool = False,
) -> list[Encoded]:
    """Encode conversations as `encode_conversation` each, with few calls of the tokenizer."""
    cut = [
        _cut(tokenizer, *_render(tokenizer, messages, add_generation_prompt=False))
        for messages in conversations
    ]
    ids_of = _encode(tokenizer, (piece for pieces in cut for piece in pieces))
    return [_label(pieces, ids_of, last_turn_only=last_turn_only) for pieces in cut]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Encode a prompt up to the point where the assistant's answer begins."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Sequence[Message]]
) -> list[list[int]]:
    """Encode prompts as `encode_prompt` each, equal ones once, with few calls of the tokenizer."""
    keys = [tuple((turn["role"], turn["content"]) for turn in prompt) for prompt in prompts]
    cut = {key: _cut_prompt(tokenizer, key) for key in dict.fromkeys(keys)}
    ids_of = _encode(tokenizer, (piece for pieces in cut.values() for piece in pieces))
    joined = {key: [i for piece in pieces for i in ids_of[piece]] for key, pieces in cut.items()}
    return [list(joined[key]) for key in keys]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Encode an answer as the policy would have written it, with its EOS."""
    return encode_responses(tokenizer, [response])[0]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]
) -> list[list[int]]:
    """Encode answers as `encode_response` each, equal ones once, with few calls."""
    ids_of = _encode(tokenizer, (_Piece(response) for response in responses))
    return [[*ids_of[_Piece(response)], tokenizer.eos_token_id] for response in responses]


def encode_pair_side(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: str
) -> list[int]:
    """Encode prompt, response and EOS: what a reward model scores, at the last token."""
    return encode_pair_sides(tokenizer, [prompt], [response])[0]


def encode_pair_sides(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    responses: Sequence[str],
) -> list[list[int]]:
    """Encode pair sides as `encode_pair_side` each, with few calls of the tokenizer."""
    return [
        prompt + response
        for prompt, response in zip(
            encode_prompts(tokenizer, prompts), encode_responses(tokenizer, responses), strict=True
        )
    ]


def _marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the template marks an answer together with its EOS, and nothing else."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not MARKER.search(template):
        return False
    text, spans = _render(tokenizer, PROBE, add_generation_prompt=False)
    marked = [text[start:end] for start, end in spans]
    return marked == [PROBE[1]["content"] + str(tokenizer.eos_token)]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered text and the character spans of the answers in it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [list(messages)],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [(start, end) for start, end in spans[0]]


class _Piece(NamedTuple):
    """A text that is encoded by itself."""

    text: str
    is_answer: bool = True
    """In an answer the names of special tokens are plain text."""
    is_finished: bool = False
    """Whether an EOS follows."""


def _cut(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> list[_Piece]:
    """Cut a rendered text at the spans of its answers."""
    eos = str(tokenizer.eos_token)
    pieces: list[_Piece] = []
    position = 0
    for start, end in spans:
        answer = text[start:end]
        pieces.append(_Piece(text[position:start], is_answer=False))
        pieces.append(_Piece(answer.removesuffix(eos), is_finished=answer.endswith(eos)))
        position = end
    pieces.append(_Piece(text[position:], is_answer=False))
    return pieces


def _cut_prompt(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]
) -> list[_Piece]:
    prompt: list[Message] = [{"role": role, "content": content} for role, content in turns]
    return _cut(tokenizer, *_render(tokenizer, prompt, add_generation_prompt=True))


def _label(
    pieces: Sequence[_Piece], ids_of: Mapping[_Piece, list[int]], *, last_turn_only: bool
) -> Encoded:
    answers = [i for i, piece in enumerate(pieces) if piece.is_answer]
    labelled = set(answers[-1:] if last_turn_only else answers)
    input_ids: list[int] = []
    labels: list[int] = []
    for i, piece in enumerate(pieces):
        ids = ids_of[piece]
        input_ids += ids
        labels += ids if i in labelled else [IGNORED] * len(ids)
    return Encoded(input_ids, labels)


def _encode(
    tokenizer: PreTrainedTokenizerBase, pieces: Iterable[_Piece]
) -> dict[_Piece, list[int]]:
    """Encode each distinct piece once."""
    found: dict[_Piece, list[int]] = {}
    distinct = list(dict.fromkeys(pieces))
    for is_answer in (False, True):
        chosen = [piece for piece in distinct if piece.is_answer is is_answer]
        for start in range(0, len(chosen), TEXTS_AT_ONCE):
            block = chosen[start : start + TEXTS_AT_ONCE]
            encoded = tokenizer(
                [piece.text for piece in block],
                add_special_tokens=False,
                split_special_tokens=is_answer,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            for piece, ids in zip(block, encoded["input_ids"], strict=True):
                found[piece] = [*ids, tokenizer.eos_token_id] if piece.is_finished else ids
    return found
