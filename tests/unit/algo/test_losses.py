import math

import pytest
import torch

from rlhf.algo.losses import (
    MARGINS,
    explained_variance,
    margin_for,
    policy_loss,
    ranking_loss,
    safety_auxiliary_loss,
    value_loss,
)
from rlhf.errors import ConfigError, DataError

NAN = float("nan")


def doubles(rows):
    return torch.tensor(rows, dtype=torch.float64)


# Table 27, and no margin at all.
@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("none", [0.0, 0.0, 0.0, 0.0]),
        ("small", [1.0, 2 / 3, 1 / 3, 0.0]),
        ("large", [3.0, 2.0, 1.0, 0.0]),
    ],
)
def test_margin_tables(table, expected):
    strengths = ["significantly_better", "better", "slightly_better", "negligibly_better"]
    assert [margin_for(strength, table) for strength in strengths] == expected
    assert list(MARGINS[table]) == strengths


def test_ungraded_comparisons_and_ties_have_no_margin():
    assert margin_for(None, "large") == 0.0
    assert margin_for("significantly_better", "large", tie=True) == 0.0


def test_unknown_names_are_refused_with_name_and_remedy():
    with pytest.raises(ConfigError, match=r"'huge'.*none, small, large"):
        margin_for("better", "huge")
    with pytest.raises(ConfigError, match="'huge'"):
        margin_for(None, "huge")
    with pytest.raises(DataError, match=r"'much_better'.*slightly_better"):
        margin_for("much_better", "small", tie=True)


def test_margin_tables_cannot_be_changed():
    with pytest.raises(TypeError):
        MARGINS["small"]["better"] = 1.0


def test_ranking_loss_by_hand():
    # Gaps minus margins are 2-3 = -1, 1-2 = -1, .5-1 = -.5, 0-0 = 0 and log(1 + e^-x) is
    # log(1 + e) = 1.313262, 1.313262, log(1 + e^.5) = 0.974077, log 2 = 0.693147; mean 1.073437.
    chosen, rejected = doubles([2.5, 1.0, 0.0, 3.0]), doubles([0.5, 0.0, -0.5, 3.0])
    losses = ranking_loss(chosen, rejected, doubles([3.0, 2.0, 1.0, 0.0]))
    assert losses.shape == (4,)
    assert losses.tolist() == pytest.approx([1.313262, 1.313262, 0.974077, 0.693147], abs=1e-6)
    assert losses.mean().item() == pytest.approx(1.073, abs=5e-4)


@pytest.mark.parametrize(
    ("chosen", "rejected", "margins"),
    [((4, 1), (4, 1), (4,)), ((4,), (4,), (1,)), ((4, 1), (4, 1), (4, 1)), ((4,), (3,), (4,))],
)
def test_ranking_loss_refuses_shapes_that_would_broadcast(chosen, rejected, margins):
    # PITFALLS A1: [4, 1] - [4] is [4, 4]; on the values above its mean is 1.238, not 1.073.
    with pytest.raises(AssertionError, match="1-D and equally long"):
        ranking_loss(torch.zeros(chosen), torch.zeros(rejected), torch.zeros(margins))


def test_ranking_loss_properties():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    zero, one = torch.zeros(50, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    plain = ranking_loss(chosen, rejected, zero)
    slow = [-math.log(1 / (1 + math.exp(-(c - r)))) for c, r in zip(chosen, rejected, strict=True)]
    assert plain.tolist() == pytest.approx(slow, abs=1e-12)
    assert torch.all(ranking_loss(chosen, rejected, one) > plain)
    shifted = ranking_loss(chosen + 5, rejected + 5, one)
    assert torch.allclose(shifted, ranking_loss(chosen, rejected, one), rtol=0, atol=1e-12)
    # A margin of 1 is a gap that is smaller by 1.
    assert torch.allclose(shifted, ranking_loss(chosen - 1, rejected, zero), rtol=0, atol=1e-12)
    swapped = ranking_loss(rejected, chosen, zero)
    # -log sigmoid(-x) = x - log sigmoid(x)
    assert (swapped - plain).tolist() == pytest.approx((chosen - rejected).tolist(), abs=1e-12)


def test_ranking_loss_is_finite_far_out_and_in_half_precision():
    far = ranking_loss(torch.tensor([-500.0, 500.0]), torch.zeros(2), torch.zeros(2))
    assert far.tolist() == [500.0, 0.0]


def test_ranking_loss_subtracts_half_precision_scores_in_float32():
    chosen, rejected = torch.tensor([0.25]).bfloat16(), torch.tensor([128.0]).bfloat16()
    loss = ranking_loss(chosen, rejected, torch.zeros(1).bfloat16())
    assert loss.dtype == torch.float32
    assert loss.tolist() == [127.75]  # bfloat16 rounds the gap to 128


def test_safety_auxiliary_loss_by_hand():
    # Labelled: score ln 3 safe -> -log(3/4) = 0.287682; score ln 3 unsafe -> -log(1/4) = 1.386294;
    # score 0 unsafe -> log 2 = 0.693147. Sum 2.367124 over 3. The last row carries no label.
    scores = doubles([math.log(3), math.log(3), 0.0, 8.0])
    labels, labelled = doubles([1.0, 0.0, 0.0, NAN]), torch.tensor([True, True, True, False])
    scores.requires_grad_()
    total, count = safety_auxiliary_loss(scores, labels, labelled)
    assert total.item() == pytest.approx(2.367124, abs=1e-6)
    assert count.item() == 3
    total.backward()
    # sigmoid(score) - label
    assert scores.grad.tolist() == pytest.approx([-0.25, 0.75, 0.5, 0.0], abs=1e-12)


def test_safety_auxiliary_loss_without_labels_is_zero_of_zero():
    none = torch.tensor([False, False])
    total, count = safety_auxiliary_loss(torch.ones(2), torch.tensor([True, False]), none)
    assert (total.item(), count.item()) == (0.0, 0)


def test_safety_auxiliary_loss_refuses_other_shapes():
    with pytest.raises(AssertionError, match="1-D"):
        safety_auxiliary_loss(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1))


def test_policy_loss_by_hand():
    # ratio, A -> max(-A ratio, -A clip(ratio, .8, 1.2)):
    # 1.5, +1 -> max(-1.5, -1.2) = -1.2 clipped;  1.5, -1 -> max(1.5, 1.2) = 1.5;
    # 0.5, +2 -> max(-1.0, -1.6) = -1.0;          0.5, -2 -> max(1.0, 1.6) = 1.6 clipped;
    # 1.0, +3 -> -3. Sum -2.1; the sixth token is padding. normalizer 4 -> -0.525.
    ratios = doubles([[1.5, 1.5, 0.5], [0.5, 1.0, 1.0]])
    advantages = doubles([[1.0, -1.0, 2.0], [-2.0, 3.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    old = doubles([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    loss, clipfrac_sum, approx_kl_sum = policy_loss(
        old + ratios.log(), old, advantages, mask, clip_range=0.2, normalizer=4.0
    )
    assert loss.item() == pytest.approx(-0.525, abs=1e-12)
    assert clipfrac_sum.item() == 2.0
    # k3: 2 (0.5 - ln 1.5) + 2 (-0.5 - ln 0.5) + 0 = 2 (0.094535) + 2 (0.193147) = 0.575364
    assert approx_kl_sum.item() == pytest.approx(0.575364, abs=1e-6)


def slow_policy_loss(logprobs, old_logprobs, advantages, mask, clip_range, normalizer):
    total = clipped_count = kl = 0.0
    for b in range(len(mask)):
        for t in range(len(mask[b])):
            if mask[b][t]:
                ratio = math.exp(logprobs[b][t] - old_logprobs[b][t])
                bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
                gain = min(ratio * advantages[b][t], bounded * advantages[b][t])
                total -= gain
                clipped_count += gain < ratio * advantages[b][t]
                kl += ratio - 1 - math.log(ratio)
    return total / normalizer, clipped_count, kl


def random_rollout(seed=0, rows=8, columns=6):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, columns, dtype=torch.float64, generator=generator) * 3
    new = old + 0.4 * torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    advantages = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    return new, old, advantages, torch.arange(columns) < lengths


def test_policy_loss_equals_a_slow_second_implementation():
    new, old, advantages, mask = random_rollout()
    fast = policy_loss(new, old, advantages, mask, clip_range=0.2, normalizer=17.0)
    slow = slow_policy_loss(
        new.tolist(), old.tolist(), advantages.tolist(), mask.tolist(), 0.2, 17.0
    )
    assert [x.item() for x in fast] == pytest.approx(slow, abs=1e-12)
    assert fast[1] > 0


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_micro_batches_do_not_change_gradients(micro_batch_size):
    new, old, advantages, mask = random_rollout(1)
    normalizer = mask.sum()

    def grads(size):
        logprobs, values = new.clone().requires_grad_(), old.clone().requires_grad_()
        for rows in torch.arange(len(new)).split(size):
            loss, _, _ = policy_loss(
                logprobs[rows],
                old[rows],
                advantages[rows],
                mask[rows],
                clip_range=0.2,
                normalizer=normalizer,
            )
            loss = loss + value_loss(
                values[rows],
                old[rows],
                advantages[rows],
                mask[rows],
                value_clip_range=0.2,
                normalizer=normalizer,
            )
            loss.backward()
        return torch.stack([logprobs.grad, values.grad])

    assert torch.allclose(grads(micro_batch_size), grads(8), rtol=0, atol=1e-14)


def test_unchanged_policy_has_ratio_one_and_the_plain_policy_gradient():
    _, old, advantages, mask = random_rollout(2)
    logprobs = old.clone().requires_grad_()
    loss, clipfrac_sum, approx_kl_sum = policy_loss(
        logprobs, old, advantages, mask, clip_range=0.2, normalizer=mask.sum()
    )
    loss.backward()
    assert loss.item() == pytest.approx(-advantages[mask].mean().item(), abs=1e-14)
    assert (clipfrac_sum.item(), approx_kl_sum.item()) == (0.0, 0.0)
    expected = torch.where(mask, -advantages / mask.sum(), 0.0)
    assert torch.allclose(logprobs.grad, expected, rtol=0, atol=1e-15)


def test_clipped_tokens_get_no_policy_gradient():
    logprobs = doubles([[math.log(1.5), math.log(1.5)]]).requires_grad_()
    loss, _, _ = policy_loss(
        logprobs,
        torch.zeros(1, 2, dtype=torch.float64),
        doubles([[1.0, -1.0]]),
        torch.ones(1, 2, dtype=torch.bool),
        clip_range=0.2,
        normalizer=1.0,
    )
    loss.backward()
    assert logprobs.grad.tolist() == [[0.0, pytest.approx(1.5)]]


@pytest.mark.parametrize(
    ("value", "target"), [(NAN, 1.0), (math.inf, 1.0), (1e4, 1.0), (-2.0, NAN), (-2.0, math.inf)]
)
def test_padding_reaches_neither_loss_nor_gradient(value, target):
    mask = torch.tensor([[True, False]])
    new, old, targets = doubles([[0.1, value]]), doubles([[0.0, -2.0]]), doubles([[1.0, target]])
    new.requires_grad_()
    loss, clipfrac_sum, approx_kl_sum = policy_loss(
        new, old, targets, mask, clip_range=0.2, normalizer=1.0
    )
    loss = loss + value_loss(new, old, targets, mask, value_clip_range=0.2, normalizer=1.0)
    loss.backward()
    # -e^0.1 + (0.1 - 1)^2 / 2; its derivative is -e^0.1 + 0.1 - 1.
    assert loss.item() == pytest.approx(-math.exp(0.1) + 0.405, abs=1e-12)
    assert new.grad.tolist() == [[pytest.approx(-math.exp(0.1) - 0.9, abs=1e-12), 0.0]]
    assert clipfrac_sum.item() == 0.0
    assert approx_kl_sum.item() == pytest.approx(math.exp(0.1) - 1.1, abs=1e-12)


def test_value_loss_by_hand():
    # v, v_old, R with range 0.2 -> max((v - R)^2, (clip(v) - R)^2) / 2:
    # 1.0, 0.0, 1.0 -> max(0, (0.2 - 1)^2 = 0.64) = 0.64;   0.1, 0.0, 1.0 -> 0.81 both;
    # 1.0, 0.0, -1.0 -> max(4, 1.44) = 4;                   -1.0, 0.0, 0.0 -> max(1, 0.04) = 1.
    # 0.5 * 6.45 / 5 = 0.645; without a clip 0.5 * (0 + 0.81 + 4 + 1) / 5 = 0.581.
    values, old = doubles([[1.0, 0.1], [1.0, -1.0]]), doubles([[0.0, 0.0], [0.0, 0.0]])
    returns, mask = doubles([[1.0, 1.0], [-1.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool)
    loss = value_loss(values, old, returns, mask, value_clip_range=0.2, normalizer=5.0)
    assert loss.item() == pytest.approx(0.645, abs=1e-12)
    plain = value_loss(values, old, returns, mask, value_clip_range=math.inf, normalizer=5.0)
    assert plain.item() == pytest.approx(0.581, abs=1e-12)


def test_value_loss_equals_a_slow_second_implementation():
    values, old, returns, mask = random_rollout(3)
    total = 0.0
    for b in range(8):
        for t in range(6):
            if mask[b, t]:
                v, v_old, target = (x[b, t].item() for x in (values, old, returns))
                clipped = v_old + max(-0.2, min(0.2, v - v_old))
                total += max((v - target) ** 2, (clipped - target) ** 2)
    loss = value_loss(values, old, returns, mask, value_clip_range=0.2, normalizer=9.0)
    assert loss.item() == pytest.approx(0.5 * total / 9.0, abs=1e-12)


def test_explained_variance_by_hand():
    # returns 1, 2, 3: variance 2/3; residuals 0, 0, 1: mean 1/3, variance 2/9; 1 - 1/3 = 2/3.
    mask = torch.tensor([[True, True, True, False]])
    returns = doubles([[1.0, 2.0, 3.0, NAN]])
    values = doubles([[1.0, 2.0, 2.0, 50.0]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(2 / 3, abs=1e-14)
    assert explained_variance(returns + 7.0, returns, mask).item() == 1.0
    assert explained_variance(torch.zeros_like(returns), returns, mask).item() == 0.0
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0, abs=1e-14)
    assert explained_variance(values, torch.ones_like(returns), mask).isnan()
