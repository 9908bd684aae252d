"""Model sizes without loading weights: the toy model, a model folder, or the configured shape."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.algo.flops import ModelSize, llama_size
from rlhf.artifacts import read_json
from rlhf.config import Model, Shape

TOY = "toy"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""How the names of the two vocabulary tables end, in every model family that we train."""


def model_size(model: Model) -> ModelSize | None:
    """Return the size of the base model, or None where nothing tells it.

    A model folder is read if it is there (config.json and the headers of its safetensors files),
    else model.shape counts.
    """
    if model.path == TOY:
        return toy_size()
    return folder_size(Path(model.path)) or shape_size(model.shape)


def toy_size() -> ModelSize:
    """Return the size of the toy world's Llama."""
    from rlhf.toy import model as toy

    return llama_size(
        hidden_size=toy.HIDDEN_SIZE,
        intermediate_size=toy.INTERMEDIATE_SIZE,
        num_layers=toy.NUM_LAYERS,
        num_heads=toy.NUM_HEADS,
        num_kv_heads=toy.NUM_HEADS,
        head_size=toy.HIDDEN_SIZE // toy.NUM_HEADS,
        vocab_size=toy.VOCAB_SIZE,
        is_tied=True,
    )


def shape_size(shape: Shape) -> ModelSize | None:
    """Return the size of a configured Llama shape, or None where the shape is not given."""
    if shape.hidden_size is None:
        return None
    assert shape.num_heads is not None
    assert shape.num_kv_heads is not None
    assert shape.intermediate_size is not None
    assert shape.num_layers is not None
    assert shape.vocab_size is not None
    return llama_size(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.hidden_size // shape.num_heads,
        vocab_size=shape.vocab_size,
        is_tied=shape.tied,
    )


def folder_size(folder: Path) -> ModelSize | None:
    """Return the size of a Hugging Face model folder, or None where it cannot be told.

    Weights are counted in the files; without safetensors files config.json must be a Llama's.
    """
    if not (folder / "config.json").is_file():
        return None
    config: dict[str, Any] = read_json(folder / "config.json")
    try:
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            return _from_config(config, head_size)
    except KeyError:
        return None
    tables = {EMBEDDING: 0, HEAD: 0, "": 0}
    for name, count in (item for path in files for item in tensor_sizes(path)):
        tables[next(end for end in tables if name.endswith(end))] += count
    is_tied = tables[HEAD] == 0
    return ModelSize(
        trunk=tables[""],
        head=tables[EMBEDDING] if is_tied else tables[HEAD],
        embedding=0 if is_tied else tables[EMBEDDING],
        num_layers=layers,
        attention_width=heads * head_size,
    )


def _from_config(config: Mapping[str, Any], head_size: int) -> ModelSize:
    return llama_size(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_size=head_size,
        vocab_size=config["vocab_size"],
        is_tied=bool(config["tie_word_embeddings"]),
    )


def tensor_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and number of elements of every tensor in a safetensors file's header.

    The file begins with the header's length as a little-endian 64-bit number, then its JSON.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            yield name, math.prod(tensor["shape"])
