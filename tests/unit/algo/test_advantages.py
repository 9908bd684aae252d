import pytest
import torch

from rlhf.algo.advantages import gae

NAN = float("nan")


def doubles(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_rollout(seed=0, rows=6, columns=8):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    values = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    return rewards, values, torch.arange(columns) < lengths


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5, so gamma lambda = 0.25.
    # Row 1 (3 tokens), r = 1, 0, 2, V = 1, 2, 4, then 0:
    #   delta_3 = 2 + 0 - 4 = -2            A_3 = -2
    #   delta_2 = 0 + 0.5 * 4 - 2 = 0       A_2 = 0 + 0.25 * -2 = -0.5
    #   delta_1 = 1 + 0.5 * 2 - 1 = 1       A_1 = 1 + 0.25 * -0.5 = 0.875
    #   returns = A + V = 1.875, 1.5, 2
    # Row 2 (2 tokens), r = 0, 1, V = 0.5, 2: A_2 = 1 - 2 = -1; A_1 = 0 + 1 - 0.5 - 0.25 = 0.25
    rewards = doubles([[1.0, 0.0, 2.0, NAN], [0.0, 1.0, 50.0, NAN]])
    values = doubles([[1.0, 2.0, 4.0, 70.0], [0.5, 2.0, NAN, 9.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[0.875, -0.5, -2.0, 0.0], [0.25, -1.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.875, 1.5, 2.0, 0.0], [0.75, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_a_slow_second_implementation(gamma, gae_lambda):
    # The definition: A_t = sum over l of (gamma lambda)^l delta_{t+l}.
    rewards, values, mask = random_rollout()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for b in range(6):
        length = int(mask[b].sum())
        v = [*values[b, :length].tolist(), 0.0]
        deltas = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(8):
            expected = sum((gamma * gae_lambda) ** k * d for k, d in enumerate(deltas[t:]))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            target = expected + (v[t] if t < length else 0.0)
            assert returns[b, t].item() == pytest.approx(target, abs=1e-12)


def test_lambda_one_gives_discounted_reward_to_go():
    rewards, values, mask = random_rollout(1)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    for b in range(6):
        for t in range(int(mask[b].sum())):
            rest = rewards[b, t : int(mask[b].sum())].tolist()
            to_go = sum(0.9**k * r for k, r in enumerate(rest))
            assert returns[b, t].item() == pytest.approx(to_go, abs=1e-12)
            assert advantages[b, t].item() == pytest.approx(to_go - values[b, t].item(), abs=1e-12)


def test_more_padding_changes_nothing():
    rewards, values, mask = random_rollout(2)
    wider = torch.nn.functional.pad
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    more, more_returns = gae(
        wider(rewards, (2, 3), value=NAN),
        wider(values, (2, 3), value=NAN),
        wider(mask, (2, 3)),
        gamma=1.0,
        gae_lambda=0.95,
    )
    assert torch.equal(more, wider(advantages, (2, 3)))
    assert torch.equal(more_returns, wider(returns, (2, 3)))


def test_targets_carry_no_gradient():
    rewards, values, mask = random_rollout(3)
    advantages, returns = gae(rewards, values.requires_grad_(), mask, gamma=1.0, gae_lambda=0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_a_mask_with_a_hole_is_refused():
    ones = torch.ones(1, 3)
    with pytest.raises(AssertionError, match="one run"):
        gae(ones, ones, torch.tensor([[True, False, True]]), gamma=1.0, gae_lambda=0.95)
    empty = gae(ones, ones, torch.zeros(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=0.95)
    assert empty[0].tolist() == empty[1].tolist() == [[0.0, 0.0, 0.0]]


def test_critic_with_one_value_too_many_is_refused():
    with pytest.raises(AssertionError, match="must match"):
        gae(torch.ones(1, 3), torch.ones(1, 4), torch.ones(1, 3), gamma=1.0, gae_lambda=0.95)
