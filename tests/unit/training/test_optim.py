import pytest
import torch
from torch import nn

from rlhf.config import Optimizer
from rlhf.training.optim import build_optimizer, build_schedule, lr_factor, parameter_groups


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    decayed, spared = parameter_groups(model.named_parameters(), weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 3)]
    assert spared["weight_decay"] == 0.0
    assert len(spared["params"]) == 3


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    model[0].requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    assert [p for group in groups for p in group["params"]] == [model[1].weight]


def test_every_setting_reaches_adamw() -> None:
    settings = Optimizer(lr=3e-4, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.5)
    group = build_optimizer(nn.Linear(2, 1, bias=False), settings).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        3e-4,
        (0.8, 0.7),
        1e-3,
        0.5,
    )


def test_one_pass_equals_the_plain_loop() -> None:
    """Both kernels of AdamW, 20 steps on the same gradients, with and without decay."""
    settings = Optimizer(lr=1e-2, weight_decay=0.5)
    ours, plain = (nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    fused = build_optimizer(ours, settings)
    assert fused.defaults["fused"] is True
    loop = build_optimizer(plain, settings)
    for group in loop.param_groups:
        group.update(fused=False, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(4, 5, dtype=torch.float64, generator=generator)
        for layer, optimizer in ((ours, fused), (plain, loop)):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_schedule_by_hand() -> None:
    """Ten steps, two of warm-up, floor 0.1: half-way down the cosine the factor is 0.55."""
    factor = lr_factor(
        Optimizer(warmup_fraction=0.2, warmup_steps_min=0, lr_floor=0.1), total_steps=10
    )
    assert factor(0) == 0.5
    assert factor(1) == 1.0
    assert factor(5) == pytest.approx(0.55)
    assert factor(9) == pytest.approx(0.1)


def test_warmup_has_its_minimum() -> None:
    factor = lr_factor(Optimizer(warmup_fraction=0.03, warmup_steps_min=5), total_steps=100)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_schedule_drives_the_optimizer() -> None:
    layer = nn.Linear(2, 1)
    settings = Optimizer(lr=1.0, warmup_fraction=0.0, warmup_steps_min=2, lr_floor=1.0)
    optimizer = build_optimizer(layer, settings)
    schedule = build_schedule(optimizer, settings, total_steps=4)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    assert seen == [0.5, 1.0, 1.0, 1.0]
