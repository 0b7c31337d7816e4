"""Two optimizers as one: the same steps, one state, one schedule."""

import copy

import pytest
import torch
from torch import nn

from hf_oscqat.integration.optimizer import MIN_SCALE, OscQATOptimizer, create_optimizer


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([0.5]))


def make(weight: nn.Parameter, scale: nn.Parameter, weight_optimizer: str = "sgd") -> OscQATOptimizer:
    return create_optimizer(
        [{"params": [weight], "weight_decay": 0.1}],
        [scale],
        [scale],
        weight_optimizer=weight_optimizer,
        learning_rate=0.1,
        momentum=0.9,
        adam_betas=(0.9, 0.999),
        adam_epsilon=1e-8,
        scale_learning_rate=0.01,
    )


def set_gradients(weight: nn.Parameter, scale: nn.Parameter, step: int) -> None:
    weight.grad = torch.tensor([0.3, -0.1]) * (step + 1)
    scale.grad = torch.tensor([0.2]) - 0.1 * step


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_are_those_of_the_two_optimizers_apart(kind):
    weight, scale = parameters()
    apart_weight, apart_scale = parameters()
    together = make(weight, scale, kind)
    groups = [{"params": [apart_weight], "weight_decay": 0.1}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups, lr=0.1)
    adam = torch.optim.Adam([apart_scale], lr=0.01)
    for step in range(5):
        set_gradients(weight, scale, step)
        set_gradients(apart_weight, apart_scale, step)
        together.step()
        sgd.step()
        adam.step()
    assert torch.equal(weight, apart_weight)
    assert torch.equal(scale, apart_scale)


def test_state_dict_continues_where_it_was():
    weight, scale = parameters()
    optimizer = make(weight, scale)
    for step in range(3):
        set_gradients(weight, scale, step)
        optimizer.step()
    saved, kept = copy.deepcopy(optimizer.state_dict()), (weight.detach().clone(), scale.detach().clone())
    other_weight, other_scale = (nn.Parameter(tensor) for tensor in kept)
    continued = make(other_weight, other_scale)
    continued.load_state_dict(saved)
    for step in range(3, 6):
        set_gradients(weight, scale, step)
        set_gradients(other_weight, other_scale, step)
        optimizer.step()
        continued.step()
    assert torch.equal(weight, other_weight)
    assert torch.equal(scale, other_scale)


def test_scheduler_reaches_both():
    weight, scale = parameters()
    optimizer = make(weight, scale)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 0.0, lambda _: 0.0])
    set_gradients(weight, scale, 0)
    optimizer.step()
    assert weight.tolist() == [1.0, -2.0]
    assert scale.tolist() == [0.5]


def test_a_scale_stays_positive():
    weight, scale = parameters()
    optimizer = make(weight, scale)
    for _ in range(200):
        scale.grad = torch.ones(1)
        optimizer.step()
    assert scale.item() == pytest.approx(MIN_SCALE)


def test_hook_before_the_step_is_not_called_for_a_step_that_the_scaler_skips():
    weight, scale = parameters()
    optimizer, calls = make(weight, scale), []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    scaler = torch.amp.GradScaler("cpu")
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((weight.sum() + scale.sum()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert len(calls) == 2


def test_a_closure_is_refused():
    optimizer = make(*parameters())
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_unknown_weight_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"'lion'.*'sgd' or 'adamw'"):
        make(*parameters(), "lion")
