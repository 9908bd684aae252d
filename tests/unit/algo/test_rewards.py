import math

import pytest
import torch

from rlhf.algo.rewards import (
    below_threshold,
    combined_reward,
    gate,
    judge_prefers,
    kl_per_token,
    no_eos_penalty,
    token_rewards,
)
from rlhf.errors import ConfigError

NAN = float("nan")


def doubles(rows):
    return torch.tensor(rows, dtype=torch.float64)


def logit(p):
    return math.log(p / (1 - p))


def test_gate_golden_values():
    # (R_s, R_h, tagged) -> R_c: (.10, .90, no) -> R_s = .10, logit -2.197;
    # (.20, .90, no) -> R_h = .90, logit +2.197; (.95, .40, yes) -> R_s, logit 2.944.
    helpfulness = doubles([logit(0.90), logit(0.90), logit(0.40)])
    safety = doubles([logit(0.10), logit(0.20), logit(0.95)])
    selected, safety_selected = gate(helpfulness, safety, torch.tensor([False, False, True]))
    assert selected.tolist() == pytest.approx([-2.197225, 2.197225, 2.944439], abs=1e-6)
    assert torch.sigmoid(selected).tolist() == pytest.approx([0.10, 0.90, 0.95], abs=1e-12)
    assert safety_selected.tolist() == [True, False, True]


def test_gate_threshold_is_strict_and_configurable():
    # sigmoid(0) is exactly 0.5, and 0.5 < 0.5 is false.
    untagged = torch.tensor([False])
    _, at = gate(doubles([1.0]), doubles([0.0]), untagged, threshold=0.5)
    _, under = gate(doubles([1.0]), doubles([-1e-9]), untagged, threshold=0.5)
    assert (at.item(), under.item()) == (False, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_selects_raw_scores_where_the_sigmoid_saturates(dtype):
    # logit(sigmoid(40)) is infinite in float32; 40 and 60 must stay apart.
    helpfulness = torch.tensor([40.0, 60.0, 1.0], dtype=dtype)
    safety = torch.tensor([40.0, 40.0, -120.0], dtype=dtype)
    selected, _ = gate(helpfulness, safety, torch.zeros(3, dtype=torch.bool))
    assert selected.tolist() == [40.0, 60.0, -120.0]


def test_a_nan_safety_score_stays_visible():
    selected, safety_selected = gate(doubles([1.0]), doubles([NAN]), torch.tensor([False]))
    assert selected.isnan().item()
    assert safety_selected.item()


def test_gate_equals_a_slow_second_implementation():
    generator = torch.Generator().manual_seed(0)
    helpfulness, safety = 2 * torch.randn(2, 200, dtype=torch.float64, generator=generator)
    tagged = torch.rand(200, generator=generator) < 0.3
    selected, safety_selected = gate(helpfulness, safety, tagged, threshold=0.3)
    for i in range(200):
        is_low = 1 / (1 + math.exp(-safety[i].item())) < 0.3
        takes_safety = bool(tagged[i]) or is_low
        assert safety_selected[i].item() == takes_safety
        assert selected[i].item() == (safety[i] if takes_safety else helpfulness[i]).item()
    assert 0 < safety_selected.sum() < 200


def test_gate_refuses_shapes_that_would_broadcast():
    with pytest.raises(AssertionError, match="must match"):
        gate(torch.zeros(3, 1), torch.zeros(3), torch.zeros(3, dtype=torch.bool))


def test_below_threshold():
    low = below_threshold(doubles([logit(0.1), logit(0.2), NAN]), threshold=0.15)
    assert low.tolist() == [True, False, True]


def test_combined_reward_by_hand():
    # Raw gate output: safety -3 (below), helpfulness 1, safety 2 (tagged): mean 0,
    # variance (9 + 1 + 4) / 3 = 14/3, std 2.160247.
    reward = combined_reward(
        doubles([5.0, 1.0, 9.0]), doubles([-3.0, 0.0, 2.0]), torch.tensor([False, False, True])
    )
    assert reward.tolist() == pytest.approx([-1.388730, 0.462910, 0.925820], abs=1e-6)
    # A higher threshold sends the second row (sigmoid 0.5) to its safety score 0 as well:
    # mean -1/3, variance (9 + 0 + 4) / 3 - 1/9 = 38/9.
    reward = combined_reward(
        doubles([5.0, 1.0, 9.0]),
        doubles([-3.0, 0.0, 2.0]),
        torch.tensor([False, False, True]),
        threshold=0.6,
    )
    std = math.sqrt(38 / 9)
    expected = [(-3 + 1 / 3) / std, (1 / 3) / std, (2 + 1 / 3) / std]
    assert reward.tolist() == pytest.approx(expected, abs=1e-7)


def test_no_eos_penalty():
    scores = no_eos_penalty(doubles([1.0, -2.0]), torch.tensor([True, False]), 1.5)
    assert scores.tolist() == [1.0, -3.5]


def test_kl_estimators_by_hand():
    # d = log p - log q = ln 2 and -ln 2. k1 = d; k2 = d^2 / 2 = 0.240227;
    # k3 = e^-d - 1 + d: 0.5 - 1 + 0.693147 = 0.193147 and 2 - 1 - 0.693147 = 0.306853.
    logprobs = doubles([[-1.0, -1.0 - math.log(2)]])
    reference = doubles([[-1.0 - math.log(2), -1.0]])
    k1 = kl_per_token(logprobs, reference, estimator="k1")
    k2 = kl_per_token(logprobs, reference, estimator="k2")
    k3 = kl_per_token(logprobs, reference, estimator="k3")
    assert k1[0].tolist() == pytest.approx([0.693147, -0.693147], abs=1e-6)
    assert k2[0].tolist() == pytest.approx([0.240227, 0.240227], abs=1e-6)
    assert k3[0].tolist() == pytest.approx([0.193147, 0.306853], abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_kl(estimator):
    p, q = doubles([0.5, 0.3, 0.2]), doubles([0.2, 0.3, 0.5])
    expected = sum(a * math.log(a / b) for a, b in [(0.5, 0.2), (0.3, 0.3), (0.2, 0.5)])
    average = (p * kl_per_token(p.log(), q.log(), estimator=estimator)).sum()
    assert average.item() == pytest.approx(expected, abs=1e-14)


def test_unknown_estimator_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"'k4'.*k1, k2, k3"):
        kl_per_token(torch.zeros(1), torch.zeros(1), estimator="k4")


def test_token_rewards_by_hand():
    # kl_coef 0.5. Row 1 (3 tokens): -0.1, +0.2, -0.3 + 2 = 1.7. Row 2 (1 token): -0.5 - 1 = -1.5.
    kl = doubles([[0.2, -0.4, 0.6, NAN], [1.0, NAN, math.inf, 7.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    rewards = token_rewards(doubles([2.0, -1.0]), kl, mask, kl_coef=0.5)
    assert rewards[0].tolist() == pytest.approx([-0.1, 0.2, 1.7, 0.0], abs=1e-15)
    assert rewards[1].tolist() == [-1.5, 0.0, 0.0, 0.0]


def test_token_rewards_of_a_full_row_and_of_an_empty_row():
    mask = torch.tensor([[True, True], [False, False]])
    kl = torch.zeros(2, 2, dtype=torch.float64)
    rewards = token_rewards(doubles([3.0, 4.0]), kl, mask, kl_coef=0.1)
    assert rewards.tolist() == [[0.0, 3.0], [0.0, 0.0]]


def test_a_single_response_token_behind_its_prompt_gets_the_score_once():
    mask = torch.tensor([[False, False, True, False]])
    kl = torch.ones(1, 4, dtype=torch.float64)
    rewards = token_rewards(doubles([3.0]), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[0.0, 0.0, 2.5, 0.0]]


def test_token_rewards_add_up_to_score_minus_kl_and_end_on_the_last_response_token():
    generator = torch.Generator().manual_seed(0)
    kl = torch.randn(9, 7, dtype=torch.float64, generator=generator)
    scores = torch.randn(9, dtype=torch.float64, generator=generator)
    # Also with the prompt in front of the response.
    starts = torch.randint(0, 3, (9, 1), generator=generator)
    ends = torch.randint(3, 8, (9, 1), generator=generator)
    positions = torch.arange(7)
    mask = (positions >= starts) & (positions < ends)
    rewards = token_rewards(scores, kl, mask, kl_coef=0.02)
    for b in range(9):
        total = scores[b].item()
        for t in range(7):
            inside = starts[b] <= t < ends[b]
            expected = -0.02 * kl[b, t].item() if inside else 0.0
            expected += scores[b].item() if t == ends[b] - 1 else 0.0
            total -= 0.02 * kl[b, t].item() if inside else 0.0
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-15)
        assert rewards[b].sum().item() == pytest.approx(total, abs=1e-12)


def test_token_rewards_refuse_shapes_that_would_broadcast():
    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(AssertionError, match="one per row"):
        token_rewards(torch.zeros(2, 1), torch.zeros(2, 2), mask, kl_coef=0.1)
    with pytest.raises(AssertionError, match="must match"):
        token_rewards(torch.zeros(2), torch.zeros(2, 1), mask, kl_coef=0.1)


def verdicts(rows, threshold=0.15):
    helpfulness_a, helpfulness_b, safety_a, safety_b, tagged = zip(*rows, strict=True)
    return judge_prefers(
        helpfulness_a_B=doubles(helpfulness_a),
        helpfulness_b_B=doubles(helpfulness_b),
        safety_a_B=doubles(safety_a),
        safety_b_B=doubles(safety_b),
        is_safety_B=torch.tensor(tagged),
        threshold=threshold,
    ).tolist()


def test_judge_by_hand():
    low = logit(0.10)
    rows = [
        (2.0, 1.0, 0.0, 3.0, False),  # both safe enough: helpfulness, a wins
        (1.0, 2.0, 3.0, 0.0, False),  # helpfulness, a loses
        (1.0, 1.0, 3.0, 0.0, False),  # helpfulness, tie
        (2.0, 1.0, 0.0, 3.0, True),  # tagged: safety, a loses
        (2.0, 1.0, low, 0.0, False),  # a below the threshold: safety, a loses
        (1.0, 2.0, 0.0, low, False),  # b below the threshold: safety, a wins
        (2.0, 1.0, low, low, False),  # both below, equal: tie
    ]
    assert verdicts(rows) == [1.0, 0.0, 0.5, 0.0, 0.0, 1.0, 0.5]


def test_judge_never_compares_scores_of_different_models():
    # The gate alone would compare a's safety score -2.197 with b's helpfulness score -5.
    assert verdicts([(9.0, -5.0, logit(0.10), 2.0, False)]) == [0.0]


def test_judge_is_antisymmetric():
    generator = torch.Generator().manual_seed(0)
    rows = (2 * torch.randn(300, 4, dtype=torch.float64, generator=generator)).round().tolist()
    pairs = [(*row, i % 3 == 0) for i, row in enumerate(rows)]
    swapped = [(hb, ha, sb, sa, tagged) for ha, hb, sa, sb, tagged in pairs]
    forward, backward = verdicts(pairs), verdicts(swapped)
    assert [a + b for a, b in zip(forward, backward, strict=True)] == [1.0] * 300
    assert {0.0, 0.5, 1.0} == set(forward)


def test_judge_threshold_is_configurable_and_nan_stays_visible():
    row = (2.0, 1.0, logit(0.3), 3.0, False)
    assert verdicts([row]) == [1.0]
    assert verdicts([row], threshold=0.4) == [0.0]
    assert math.isnan(verdicts([(NAN, 1.0, 0.0, 0.0, False)])[0])
    assert math.isnan(verdicts([(2.0, 1.0, 0.0, NAN, False)])[0])
