"""Drawing tokens from logits, with random numbers that depend on a sample's key alone.

A token is the inverse of its distribution's CDF at one number in [0, 1), so the same key and the
same logits give the same token in any batch. Shapes: B rows, T tokens, V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlhf.config import Sampling

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Step of the SplitMix64 sequence."""
BLOCK = 256
"""Tokens of the vocabulary whose probability is summed up together when one is drawn."""
NUCLEUS_CANDIDATES = 1024
"""Likeliest tokens that are looked at first for a nucleus; seldom it takes more."""


def row_keys(keys: Sequence[str], num_samples: int) -> NDArray[np.uint64]:
    """Return a 64-bit key per prompt and sample, shape [prompts, num_samples]."""
    digests = [
        hashlib.blake2b(f"{key}/{sample}".encode(), digest_size=8).digest()
        for key in keys
        for sample in range(num_samples)
    ]
    flat = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    return flat.reshape(len(keys), num_samples)


def uniforms(row_keys_B: NDArray[np.uint64], num_tokens: int) -> NDArray[np.float64]:
    """Return the number in [0, 1) of each row and token position, shape [B, T].

    Position t is output t of SplitMix64 (Steele et al. 2014) started at the row's key.
    """
    steps_T = np.arange(1, num_tokens + 1, dtype=np.uint64) * GOLDEN
    z_BT = row_keys_B[:, None] + steps_T[None, :]
    z_BT = (z_BT ^ (z_BT >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_BT = (z_BT ^ (z_BT >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z_BT = z_BT ^ (z_BT >> np.uint64(31))
    return (z_BT >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor, *, sampling: Sampling) -> Tensor:
    """Draw one token a row from softmax(logits / temperature), cut to top-k, then top-p; [B].

    A token of probability 0 is never drawn. Of equal logits at the edge of a cut, any may be kept.
    """
    temperature = sampling.temperature
    scaled_BV = logits_BV.float() if temperature == 1.0 else logits_BV.float() / temperature
    if sampling.top_k == 1:
        return scaled_BV.argmax(-1)
    if sampling.top_k is None and sampling.top_p == 1.0:
        return _from_all(scaled_BV.softmax(-1), uniforms_B)
    return _from_likeliest(scaled_BV, uniforms_B, top_k=sampling.top_k, top_p=sampling.top_p)


def _from_all(probabilities_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Draw from the whole vocabulary, [B].

    The inverse is looked up twice, among blocks of the vocabulary and inside one, so that only one
    block is summed up token by token. The CDF is off by the rounding of a block's fp32 sum, 1e-7 of
    it.
    """
    missing = -probabilities_BV.shape[1] % BLOCK
    padded_BV = F.pad(probabilities_BV, (0, missing)) if missing else probabilities_BV
    blocks_BNW = padded_BV.unflatten(1, (-1, BLOCK))
    cdf_BN = blocks_BNW.sum(-1).double().cumsum(-1)
    target_B1 = (uniforms_B * cdf_BN[:, -1]).unsqueeze(1)
    block_B1 = _first_above(cdf_BN, target_B1)
    before_B1 = F.pad(cdf_BN, (1, 0)).gather(1, block_B1)
    rows_B = torch.arange(len(target_B1), device=target_B1.device)
    cdf_BW = blocks_BNW[rows_B, block_B1[:, 0]].double().cumsum(-1)
    return (block_B1 * BLOCK + _first_above(cdf_BW, target_B1 - before_B1)).squeeze(1)


def _from_likeliest(
    scaled_BV: Tensor, uniforms_B: Tensor, *, top_k: int | None, top_p: float
) -> Tensor:
    """Draw from the `top_k` likeliest tokens and of these from the nucleus of `top_p`, [B].

    The nucleus is the smallest set of likeliest tokens whose share reaches `top_p` (Holtzman et al.
    2020); a share is taken of what top-k has left.
    """
    vocabulary = scaled_BV.shape[1]
    num_candidates = min(top_k or NUCLEUS_CANDIDATES, vocabulary)
    found_BK, tokens_BK = scaled_BV.topk(num_candidates, dim=-1)
    all_B1 = (scaled_BV if top_k is None else found_BK).double().logsumexp(-1, keepdim=True)
    cdf_BK = (found_BK.double() - all_B1).exp().cumsum(-1)
    if top_k is None and num_candidates < vocabulary and bool((cdf_BK[:, -1] < top_p).any()):
        return _from_likeliest(scaled_BV, uniforms_B, top_k=vocabulary, top_p=top_p)
    before_BK = F.pad(cdf_BK[:, :-1], (1, 0))
    # The likeliest token has nothing before it, so it stays whatever top_p is.
    share_B = cdf_BK.where(before_BK < top_p, 0.0).amax(-1)
    last_B1 = (before_BK < top_p).sum(-1, keepdim=True) - 1
    chosen_B1 = _first_above(cdf_BK, (uniforms_B * share_B).unsqueeze(1)).minimum(last_B1)
    return tokens_BK.gather(1, chosen_B1).squeeze(1)


def _first_above(cdf_BX: Tensor, target_B1: Tensor) -> Tensor:
    """Return the first position whose sum exceeds the target, [B, 1].

    Rounding may put a target at the end of the sum; then it is the last position that adds to it.
    """
    found_B1 = torch.searchsorted(cdf_BX, target_B1, right=True)
    last_B1 = torch.searchsorted(cdf_BX, cdf_BX[:, -1:].contiguous())
    return torch.minimum(found_B1, last_B1)
