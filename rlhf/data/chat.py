"""Conversations to token ids, with labels on the assistant's tokens only.

A conversation is rendered by the tokenizer's chat template and cut at the borders of the answers
(the template's `{% generation %}` blocks); each piece is encoded by itself. So an answer has the
same tokens in training, in scoring and after generation, whatever characters it begins with. Text
inside an answer never becomes a special token: only the template ends a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    text, spans = _render(tokenizer, messages, add_generation_prompt=False)
    pieces = _pieces(tokenizer, text, spans)
    answers = [i for i, (is_answer, _) in enumerate(pieces) if is_answer]
    labelled = set(answers[-1:] if last_turn_only else answers)
    input_ids: list[int] = []
    labels: list[int] = []
    for i, (_, ids) in enumerate(pieces):
        input_ids += ids
        labels += ids if i in labelled else [IGNORED] * len(ids)
    return Encoded(input_ids, labels)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Encode a prompt up to the point where the assistant's answer begins."""
    text, spans = _render(tokenizer, prompt, add_generation_prompt=True)
    return [token for _, ids in _pieces(tokenizer, text, spans) for token in ids]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Encode an answer as the policy would have written it, with its EOS."""
    return [*_encode(tokenizer, response, special=False), tokenizer.eos_token_id]


def encode_pair_side(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: str
) -> list[int]:
    """Encode prompt, response and EOS: what a reward model scores, at the last token."""
    return encode_prompt(tokenizer, prompt) + encode_response(tokenizer, response)


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


def _pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> list[tuple[bool, list[int]]]:
    """Cut the text at the spans and encode each piece; True marks an answer."""
    pieces: list[tuple[bool, list[int]]] = []
    position = 0
    for start, end in spans:
        pieces.append((False, _encode(tokenizer, text[position:start], special=True)))
        pieces.append((True, _encode_answer(tokenizer, text[start:end])))
        position = end
    pieces.append((False, _encode(tokenizer, text[position:], special=True)))
    return pieces


def _encode_answer(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    eos = str(tokenizer.eos_token)
    if text.endswith(eos):
        return encode_response(tokenizer, text.removesuffix(eos))
    return _encode(tokenizer, text, special=False)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Encode a piece; `special` tells whether names of special tokens in it mean those tokens."""
    if not text:
        return []
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=not special)
    ids: list[int] = encoded["input_ids"]
    return ids
