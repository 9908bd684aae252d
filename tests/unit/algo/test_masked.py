import math

import pytest
import torch

from rlhf.algo.masked import (
    logprobs_and_entropies,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_var,
    mean_and_std,
    token_logprobs,
    whiten,
    whiten_with,
)

NAN = float("nan")


def doubles(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_masked_reductions_by_hand_with_garbage_outside_the_mask():
    values = doubles([[1.0, 3.0, NAN], [8.0, float("inf"), 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_sum(values, mask).item() == 12.0  # 1 + 3 + 8
    assert masked_mean(values, mask).item() == 4.0  # 12 / 3
    # (9 + 1 + 16) / 3
    assert masked_var(values, mask).item() == pytest.approx(26 / 3, rel=1e-14)


def test_masked_sum_sends_no_gradient_outside_the_mask():
    values = doubles([2.0, NAN]).requires_grad_()
    masked_sum(values, torch.tensor([True, False])).backward()
    assert values.grad.tolist() == [1.0, 0.0]


def test_masked_mean_of_nothing_is_nan_not_zero():
    nothing = torch.tensor([False, False])
    assert masked_mean(doubles([1.0, 2.0]), nothing).isnan()
    assert masked_sum(doubles([1.0, 2.0]), nothing).item() == 0.0


def test_masked_sum_refuses_broadcasting():
    with pytest.raises(AssertionError, match="must match"):
        masked_sum(torch.ones(3, 1), torch.ones(3, dtype=torch.bool))


def test_half_precision_is_summed_in_float32():
    values = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    values[0] = 2.0
    total = masked_sum(values, torch.ones(4096, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total.item() == 4097.0  # bfloat16 rounds it to 4096


def test_whiten_by_hand():
    # mean 3, variance (4 + 0 + 4) / 3 = 8/3, std 1.63299: (1-3)/1.63299 = -1.22474
    x = doubles([1.0, 3.0, 5.0])
    expected = 2.0 / math.sqrt(8 / 3)
    whitened = whiten(x, eps=0.0).tolist()
    assert whitened == pytest.approx([-expected, 0.0, expected], abs=1e-14)
    scaled = whiten(x, center=False, eps=0.0).tolist()
    unit = 1.0 / math.sqrt(8 / 3)
    assert scaled == pytest.approx([unit, 3 * unit, 5 * unit], abs=1e-14)


@pytest.mark.parametrize("center", [True, False])
def test_whiten_properties_over_the_mask(center):
    generator = torch.Generator().manual_seed(0)
    x = 7.0 + 3.0 * torch.randn(6, 9, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    x[~mask] = NAN
    whitened = whiten(x, mask, center=center)
    assert masked_var(whitened, mask).item() == pytest.approx(1.0, abs=1e-8)
    kept = (masked_mean(x, mask) / masked_var(x, mask).sqrt()).item()
    assert masked_mean(whitened, mask).item() == pytest.approx(0.0 if center else kept, abs=1e-7)
    assert torch.all(whitened[~mask] == 0.0)


@pytest.mark.parametrize("constant", [0.1, -3.7, 1e4])
def test_whitening_equal_scores_gives_zero_and_no_amplified_rounding(constant):
    assert whiten(torch.full((7,), constant)).abs().max().item() == 0.0


def test_whitening_divides_by_the_root_of_variance_plus_eps():
    # sqrt(0 + 1e-8) = 1e-4: rounding noise of 1e-6 becomes 0.01, not 100.
    assert whiten_with(doubles([1e-6]), 0.0, 0.0).tolist() == pytest.approx([0.01], abs=1e-12)
    assert whiten_with(doubles([10.0]), 0.0, 3.0, eps=16.0).tolist() == [2.0]


def test_whitening_parts_with_global_moments_equals_whitening_the_whole():
    # PITFALLS A8: whitening each part on its own gives -1, 1, -1, 1 instead.
    whole = doubles([0.0, 2.0, 10.0, 12.0])
    mean, std = mean_and_std(masked_moments(whole[:2]) + masked_moments(whole[2:]))
    parts = torch.cat([whiten_with(part, mean, std) for part in whole.split(2)])
    # mean 6, variance (36 + 16 + 16 + 36) / 4 = 26
    expected = [-6 / math.sqrt(26), -4 / math.sqrt(26), 4 / math.sqrt(26), 6 / math.sqrt(26)]
    assert parts.tolist() == pytest.approx(expected, abs=1e-8)
    assert torch.equal(parts, whiten(whole))
    assert whiten_with(whole, 6.0, 2.0, center=False, eps=0.0).tolist() == [0.0, 1.0, 5.0, 6.0]


def test_moments_count_only_the_mask():
    moments = masked_moments(doubles([1.0, 2.0, NAN]), torch.tensor([True, True, False]))
    assert moments.tolist() == [2.0, 3.0, 5.0]
    mean, std = mean_and_std(moments)
    assert (mean.item(), std.item()) == (1.5, 0.5)


def test_token_logprobs_by_hand():
    # softmax of (ln 1, ln 3) is (1/4, 3/4); at temperature 1/2 the odds are squared: (1/10, 9/10)
    logits = doubles([[[0.0, math.log(3.0)], [0.0, math.log(3.0)]]])
    tokens = torch.tensor([[0, 1]])
    plain = token_logprobs(logits, tokens)
    assert plain.tolist() == [pytest.approx([math.log(0.25), math.log(0.75)], abs=1e-15)]
    sharp = token_logprobs(logits, tokens, temperature=0.5)
    assert sharp.tolist() == [pytest.approx([math.log(0.1), math.log(0.9)], abs=1e-15)]


def slow_distribution(logits, temperature):
    weights = [math.exp(x / temperature) for x in logits]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_logprobs_and_entropy_equal_a_slow_second_implementation(temperature):
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    tokens = torch.randint(5, (2, 3), generator=generator)
    logprobs = token_logprobs(logits, tokens, temperature=temperature)
    measured, entropies = logprobs_and_entropies(logits, tokens, temperature=temperature)
    assert measured.equal(logprobs)
    for b in range(2):
        for t in range(3):
            p = slow_distribution(logits[b, t].tolist(), temperature)
            expected = math.log(p[tokens[b, t]])
            assert logprobs[b, t].item() == pytest.approx(expected, abs=1e-12)
            entropy = -sum(q * math.log(q) for q in p)
            assert entropies[b, t].item() == pytest.approx(entropy, abs=1e-12)


def test_entropy_ignores_excluded_tokens():
    logits = doubles([[[0.0, 0.0, -math.inf]]])
    logprob, entropy = logprobs_and_entropies(logits, torch.zeros(1, 1, dtype=torch.long))
    assert logprob.item() == entropy.neg().item() == pytest.approx(math.log(0.5), abs=1e-15)


def test_measured_logprobs_are_the_bits_of_those_with_gradient():
    generator = torch.Generator().manual_seed(2)
    logits = 9 * torch.randn(50, 301, generator=generator)
    tokens = torch.randint(301, (50,), generator=generator)
    logprobs, entropies = logprobs_and_entropies(logits, tokens, temperature=0.7)
    assert logprobs.equal(token_logprobs(logits, tokens, temperature=0.7))
    exact = logprobs_and_entropies(logits.double(), tokens, temperature=0.7)[1]
    assert entropies.double().allclose(exact, atol=1e-5, rtol=0)


def test_half_precision_logits_give_float32_logprobs():
    logits = torch.zeros(1, 1, 1000, dtype=torch.bfloat16)
    logprob = token_logprobs(logits, torch.zeros(1, 1, dtype=torch.long))
    assert logprob.dtype == torch.float32
    # bfloat16 rounds log 1000 = 6.9078 to 6.90625
    assert logprob.item() == pytest.approx(-math.log(1000.0), abs=1e-5)


def test_token_logprobs_refuses_unshifted_shapes_and_bad_temperature():
    logits = torch.zeros(2, 4, 3)
    with pytest.raises(AssertionError, match="vocabulary"):
        token_logprobs(logits, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(AssertionError, match="temperature"):
        token_logprobs(logits, torch.zeros(2, 4, dtype=torch.long), temperature=0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_of_logprobs_in_float64(temperature: float) -> None:
    """With a token that is excluded from sampling, whose gradient is 0."""
    logits_BTV = torch.randn(
        2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    tokens_BT = torch.tensor([[0, 1, 2], [3, 3, 0]])

    def logprobs(free_BTv: torch.Tensor) -> torch.Tensor:
        excluded = torch.full((2, 3, 1), -torch.inf, dtype=torch.float64)
        whole_BTV = torch.cat((free_BTv, excluded), -1)
        return token_logprobs(whole_BTV, tokens_BT, temperature=temperature)

    assert torch.autograd.gradcheck(logprobs, (logits_BTV[..., :4].clone().requires_grad_(),))
    logits_BTV[..., 4] = -torch.inf
    whole = logits_BTV.requires_grad_()
    token_logprobs(whole, tokens_BT, temperature=temperature).sum().backward()
    assert whole.grad is not None
    assert (whole.grad[..., 4] == 0.0).all()
