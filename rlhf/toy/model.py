"""The toy world's tokenizer and its tiny Llama, both built from nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.toy.words import AMOUNTS, FOODS, PLANTS, SUBJECTS, every_phrase

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
ROLES = ("system", "user", "assistant")
VOCAB_SIZE = 506
MAX_LENGTH = 256
HIDDEN_SIZE = 96
NUM_LAYERS = 4
NUM_HEADS = 4
INTERMEDIATE_SIZE = 192
INIT_STD = 0.08
"""At this width the usual 0.02 needs three times as many steps to learn to copy subjects."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<|assistant|>{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else -%}
{{ '<|' + message['role'] + '|>' + message['content'] }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{%- endif -%}
"""
"""EOS lies inside the generation block: it is part of the answer and is trained."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on the world's words; the same on every call.

    Any text can be encoded and decodes to itself; each word of the world is one token, both at the
    start of a text and after a blank.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[PAD, EOS, *(f"<|{role}|>" for role in ROLES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer=trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(
    seed: int,
    *,
    hidden_size: int = HIDDEN_SIZE,
    num_layers: int = NUM_LAYERS,
    num_heads: int = NUM_HEADS,
    intermediate_size: int = INTERMEDIATE_SIZE,
) -> LlamaForCausalLM:
    """Build the tiny Llama in fp32 with weights from the seed; leaves the global RNG untouched."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        attention_dropout=0.0,
        initializer_range=INIT_STD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _corpus() -> list[str]:
    """Return every word in both positions, often enough that each becomes one token."""
    subject_text = [f"{s} {s} the {s} eats" for s in SUBJECTS]
    food_text = [f"{f} {f} is {f}" for f in (*FOODS, *PLANTS)]
    blanks = dict.fromkeys(("subject", "subjects", "food", "plant"), "")
    phrases = [phrase.format(**blanks) for phrase in every_phrase()]
    words = sorted({word for phrase in phrases for word in phrase.split()} | set(AMOUNTS))
    return [*subject_text, *food_text, *phrases, *(f"{w} {w} a {w}" for w in words)] * 3
