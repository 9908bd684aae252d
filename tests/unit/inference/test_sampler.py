"""Draws against exact distributions, and the cuts of top-k and top-p against a slow definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf.config import Sampling
from rlhf.inference import sampler
from rlhf.inference.sampler import row_keys, sample_tokens, uniforms


def slow_distribution(logits: list[float], sampling: Sampling) -> list[float]:
    """Return the exact shares by sorting in plain Python."""
    weights = [np.exp(value / sampling.temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])
    order = order[: sampling.top_k or len(order)]
    total = sum(weights[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        if kept and reached >= sampling.top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


def draws(logits: torch.Tensor, sampling: Sampling, n: int) -> torch.Tensor:
    keys = row_keys([f"draw {i}" for i in range(n)], 1).reshape(-1)
    numbers = torch.from_numpy(uniforms(keys, 3)[:, 2])
    return sample_tokens(logits.expand(n, -1), numbers, sampling=sampling)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.3},
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_k": 12, "top_p": 0.8, "temperature": 1.3},
        {"top_k": 40, "top_p": 0.999},
    ],
)
@pytest.mark.parametrize("candidates", [1024, 4])
def test_draws_follow_the_exact_distribution(
    settings: dict[str, float], candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pearson's chi-square over 50,000 draws from one row; 5.6 standard errors is the bound.

    Also where the nucleus is larger than the candidates that are looked at first.
    """
    monkeypatch.setattr(sampler, "NUCLEUS_CANDIDATES", candidates)
    torch.manual_seed(0)
    logits, n = torch.randn(40) * 2, 50_000
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    expected = torch.tensor(slow_distribution(logits.tolist(), sampling)) * n
    observed = torch.bincount(draws(logits, sampling, n), minlength=40).double()
    possible = expected > 0
    assert observed[~possible].sum() == 0
    freedom = int(possible.sum()) - 1
    chi_square = float(((observed - expected).square() / expected)[possible].sum())
    assert chi_square < freedom + 5.6 * (2 * freedom) ** 0.5


def test_a_large_vocabulary_takes_many_blocks() -> None:
    """49,152 words as SmolLM2 has: sums of 192 blocks, compared bin by bin of 512 words."""
    torch.manual_seed(1)
    logits, n = torch.randn(49_152), 10_000
    expected = logits.double().softmax(-1).view(96, 512).sum(1) * n
    numbers = torch.rand(n, dtype=torch.float64)
    # 1,000 rows of logits at a time: 200 MB.
    parts = [
        sample_tokens(logits.expand(len(part), -1), part, sampling=Sampling())
        for part in numbers.split(1_000)
    ]
    drawn = torch.cat(parts) // 512
    observed = torch.bincount(drawn, minlength=96).double()
    chi_square = float(((observed - expected).square() / expected).sum())
    assert chi_square < 95 + 5.6 * (2 * 95) ** 0.5


def test_top_k_of_one_is_the_argmax_whatever_the_number() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 300)
    drawn = sample_tokens(logits, torch.rand(5).double(), sampling=Sampling(top_k=1))
    assert drawn.tolist() == logits.argmax(-1).tolist()


def test_top_p_keeps_the_token_that_reaches_the_share() -> None:
    # Shares 1/2, 1/4, 1/8, 1/8. Up to a half one token is enough; from there on it takes two.
    logits = torch.tensor([4.0, 2.0, 1.0, 1.0]).log()
    for top_p, allowed in ((0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.9, 4)):
        drawn = draws(logits, Sampling(top_p=top_p), 300)
        assert set(drawn.tolist()) == set(range(allowed)), top_p


def test_inverse_of_the_cdf_by_hand() -> None:
    # Shares 1/8, 0, 1/2, 3/8: the CDF is .125, .125, .625, 1.
    logits = torch.tensor([1.0, 0.0, 4.0, 3.0]).log()
    numbers = torch.tensor([0.0, 0.12, 0.13, 0.6249, 0.626, 1 - 2**-53], dtype=torch.float64)
    drawn = sample_tokens(logits.expand(6, -1), numbers, sampling=Sampling())
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]


def test_last_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for number in (0.0, 1 - 2**-53):
        drawn = sample_tokens(logits, torch.tensor([number]).double(), sampling=Sampling())
        assert drawn.item() in (1, 2)


def test_uniforms_are_splitmix64() -> None:
    """The first outputs of the published generator for seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = uniforms(np.array([1234567], dtype=np.uint64), 3)
    assert found.tolist()[0] == [(value >> 11) * 2.0**-53 for value in published]
