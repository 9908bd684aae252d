"""Decoding with a Llama-family model's weights alone: fused matrices, no padding, shared prompts.

The same function as the model's own forward pass, written for sampling: a prompt is read once for
all its samples, and the weights of norms and the scale of queries are multiplied into the matrices
beforehand. Shapes: n prompts, P longest prompt, b rows (samples still being written), D width of a
head, H query heads in Hkv groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rlhf.inference.generation import Decoding, HfGenerator, Weights
from rlhf.inference.llama_cache import open_cache

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Architectures that are this computation, as long as no layer looks at a window only."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations that do not depend on the length of the text."""
ROWS_HINT = 64
"""Rows of a typical product, which the layout of packed matrices depends on."""


def why_not(config: Any) -> str:
    """Say why a model cannot be decoded here; "" if it can."""
    if config.model_type not in MODEL_TYPES:
        return f"model_type {config.model_type} is none of {', '.join(MODEL_TYPES)}"
    if config.hidden_act != "silu":
        return f"hidden_act {config.hidden_act} is not silu"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        return "its attention looks at a window only"
    rope = config.rope_parameters["rope_type"]
    return "" if rope in ROPE_TYPES else f"rope_type {rope} is none of {', '.join(ROPE_TYPES)}"


class _Linear:
    """A matrix in the layout that products with few rows want; a layer's output is `x @ W.T`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._weight = weight.to(dtype).contiguous()
        self._bias = None if bias is None else bias.to(dtype)
        # oneDNN's own layout: up to four times as fast for few rows, where a plain product spends
        # its time on rearranging the matrix.
        self._is_packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if self._is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, ROWS_HINT)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        if self._is_packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
            return product
        return F.linear(x, self._weight, self._bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Linear
    out: _Linear
    gate_up: _Linear
    down: _Linear


class LlamaWeights:
    """A model's weights as decoding wants them: queries, keys and values in one matrix, and so on.

    A copy: changes of the model are seen by a new object only. Matrices take `dtype`; the residual
    stream stays fp32, as under autocast.
    """

    def __init__(self, config: Any, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
        self._weights, self.dtype = weights, dtype
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.eps = config.rms_norm_eps
        self.embedding = weights["model.embed_tokens.weight"].detach()
        self.device = self.embedding.device
        self.layers = [
            self._layer(f"model.layers.{number}.") for number in range(config.num_hidden_layers)
        ]
        tied = "lm_head.weight" not in weights
        head = self.embedding if tied else weights["lm_head.weight"].detach()
        bias = weights.get("lm_head.bias")
        norm = weights["model.norm.weight"].detach().float()
        self.head = _Linear(
            head.float() * norm, None if bias is None else bias.detach(), dtype=dtype
        )
        self._rotary = LlamaRotaryEmbedding(config=config).to(self.device)
        del self._weights

    def rotations(self, num_positions: int) -> Tensor:
        """Return the turn of every position as complex numbers, [positions, D / 2]."""
        positions = torch.arange(num_positions, device=self.device).unsqueeze(0)
        cos, sin = self._rotary(torch.empty(0, device=self.device), positions)
        half = self.head_size // 2
        return torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())

    def _layer(self, prefix: str) -> _Layer:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        norms = {
            name: self._weights[f"{prefix}{name}_layernorm.weight"].detach().float()
            for name in ("input", "post_attention")
        }
        gates = [self._matrix(f"{mlp}{name}_proj") for name in ("gate", "up")]
        return _Layer(
            qkv=self._linear(self._qkv(attention), norm=norms["input"]),
            out=self._linear([self._matrix(f"{attention}o_proj")]),
            gate_up=self._linear(gates, norm=norms["post_attention"]),
            down=self._linear([self._matrix(f"{mlp}down_proj")]),
        )

    def _qkv(self, attention: str) -> list[tuple[Tensor, Tensor | None]]:
        """Return the three projections; queries are scaled, and turning pairs are neighbours.

        The model turns dimension i with i + D / 2. As queries and keys change places alike, their
        products stay what they are.
        """

        def paired(rows: Tensor | None, scale: float) -> Tensor | None:
            if rows is None:
                return None
            halves = (rows * scale).unflatten(0, (-1, 2, self.head_size // 2))
            return halves.transpose(1, 2).flatten(0, 2)

        projections = []
        for name, scale in (("q", self.head_size**-0.5), ("k", 1.0)):
            weight, bias = self._matrix(f"{attention}{name}_proj")
            turned = paired(weight, scale)
            assert turned is not None
            projections.append((turned, paired(bias, scale)))
        return [*projections, self._matrix(f"{attention}v_proj")]

    def _matrix(self, name: str) -> tuple[Tensor, Tensor | None]:
        bias = self._weights.get(f"{name}.bias")
        weight = self._weights[f"{name}.weight"].detach().float()
        return weight, None if bias is None else bias.detach().float()

    def _linear(
        self, matrices: Sequence[tuple[Tensor, Tensor | None]], *, norm: Tensor | None = None
    ) -> _Linear:
        """Put matrices on top of each other, behind a norm with these weights."""
        weight = torch.cat([weight for weight, _ in matrices])
        biases = [bias for _, bias in matrices if bias is not None]
        return _Linear(
            weight if norm is None else weight * norm,
            torch.cat(biases) if len(biases) == len(matrices) else None,
            dtype=self.dtype,
        )


class LlamaGenerator(HfGenerator):
    """Decodes as `HfGenerator` does, on a copy of the weights; draws the same random numbers."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int,
        weights: Weights,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length)
        self._dtype = dtype
        self._weights = LlamaWeights(model.config, weights(), dtype=dtype)

    def update_weights(self, model: Any, weights: Weights) -> None:
        """Copy the weights anew."""
        self._weights = LlamaWeights(model.config, weights(), dtype=self._dtype)

    def _read(self, prompt_ids: list[list[int]], repeats: int, num_tokens: int) -> Decoding:
        return LlamaDecoding(self._weights, prompt_ids, repeats=repeats, num_tokens=num_tokens)


class LlamaDecoding:
    """The state between two tokens: what was read and written so far, and the next logits [b, V].

    Rows are the prompts, each `repeats` times; `num_tokens` bounds the responses.
    """

    def __init__(
        self,
        weights: LlamaWeights,
        prompt_ids: Sequence[Sequence[int]],
        *,
        repeats: int,
        num_tokens: int,
    ) -> None:
        self._w = weights
        self.device = weights.device
        lengths = [len(ids) for ids in prompt_ids]
        self._rotations = weights.rotations(max(lengths) + num_tokens)
        self._position_b = torch.tensor(lengths, device=self.device).repeat_interleave(repeats)
        self._cache = open_cache(
            lengths, repeats=repeats, num_tokens=num_tokens, device=self.device
        )
        self.logits = self._read(prompt_ids).repeat_interleave(repeats, 0)

    def select(self, kept: Tensor) -> None:
        """Go on with some rows only."""
        self._position_b = self._position_b[kept]
        self._cache.select(kept)

    def advance(self, tokens_b: Tensor) -> None:
        """Write one token per row and compute the next logits."""
        weights = self._w
        x_bh = weights.embedding[tokens_b].float()
        turns_bd = self._rotations[self._position_b].unsqueeze(1)
        for number, layer in enumerate(weights.layers):
            q, k, v = self._project(layer, x_bh, turns_bd)
            x_bh = self._finish(layer, x_bh, self._cache.attend(number, q, k, v))
        self._cache.advance()
        self._position_b = self._position_b + 1
        self.logits = self._head(x_bh)

    def _read(self, prompt_ids: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, one behind the other; returns the logits behind each, [n, V].

        Attention alone sees them padded on the right, where a causal mask hides the padding.
        """
        weights, lengths = self._w, [len(ids) for ids in prompt_ids]
        flat = torch.tensor([token for ids in prompt_ids for token in ids], device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        shape = (len(lengths), max(lengths))
        starts = torch.arange(len(lengths), device=self.device) * max(lengths)
        lengths_n = torch.tensor(lengths, device=self.device)
        places = starts.repeat_interleave(lengths_n) + positions
        x = weights.embedding[flat].float()
        turns = self._rotations[positions].unsqueeze(1)
        for layer in weights.layers:
            q, k, v = (_padded(part, places, shape) for part in self._project(layer, x, turns))
            self._cache.read(k, v)
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=1.0, enable_gqa=q.shape[1] != k.shape[1]
            )
            x = self._finish(layer, x, mixed.transpose(1, 2).flatten(2).flatten(0, 1)[places])
        return self._head(x[lengths_n.cumsum(0) - 1])

    def _project(self, layer: _Layer, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return turned queries [rows, H, D], turned keys and plain values [rows, Hkv, D]."""
        weights = self._w
        heads, groups = weights.num_heads, weights.num_groups
        projected = layer.qkv(self._normed(x))
        qkv = projected.view(len(x), heads + 2 * groups, weights.head_size)
        turning, values = qkv.split((heads + groups, groups), dim=1)
        # A view of `turning` where that is fp32 already: turned in place.
        wide = turning.float()
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turns)
        q, k = wide.to(values.dtype).split((heads, groups), dim=1)
        return q, k, values

    def _finish(self, layer: _Layer, x: Tensor, mixed: Tensor) -> Tensor:
        """Add attention and feed-forward layer to the residual stream, in place."""
        x += layer.out(mixed)
        gate, up = layer.gate_up(self._normed(x)).chunk(2, -1)
        x += layer.down(F.silu(gate, inplace=True) * up)
        return x

    def _head(self, x: Tensor) -> Tensor:
        return self._w.head(self._normed(x)).float()

    def _normed(self, x: Tensor) -> Tensor:
        """Divide by the root mean square; the norm's weights are in the matrix behind it."""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return x * squares.div_(x.shape[-1]).add_(self._w.eps).rsqrt_()


def _padded(rows: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return [tokens, heads, D] as [n, heads, P, D], zeros behind each prompt."""
    padded = rows.new_zeros(shape[0] * shape[1], *rows.shape[1:])
    padded[places] = rows
    return padded.view(*shape, *rows.shape[1:]).transpose(1, 2)
