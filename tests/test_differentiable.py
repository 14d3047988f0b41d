"""differentiable=True: gradients flow through step(), to parameters, gradients, states and learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import agr_cuda


@pytest.mark.parametrize("options", [
    {}, {"agr": False}, {"amsgrad": True}, {"maximize": True}, {"max_grad_norm": 0.5}, {"weight_decay": 0.0},
], ids=str)  # fmt: skip
def test_differentiable_step_passes_gradcheck(options: dict, generator) -> None:
    def values(*, positive: bool = False) -> Tensor:
        x = torch.randn(6, generator=generator, dtype=torch.float64)
        return (x.abs() + 0.1 if positive else x).requires_grad_()

    names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 3 if options.get("amsgrad") else 2]
    inputs = [values(), values(), values(), values(positive=True), values(positive=True)][: 2 + len(names)]
    if options.get("amsgrad"):
        inputs[4] = (inputs[3].detach() + torch.tensor([1.0, -0.05] * 3, dtype=torch.float64)).requires_grad_()

    def stepped(p: Tensor, g: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        p = p.clone()
        p.grad = g
        optimizer = agr_cuda.AdamW([p], lr=0.1, differentiable=True, **options)
        optimizer.state[p] = {"step": torch.tensor(10.0, dtype=torch.float64)}
        optimizer.state[p] |= {name: state.clone() for name, state in zip(names, states, strict=True)}
        optimizer.step()
        return (p, *(optimizer.state[p][name] for name in names))

    assert torch.autograd.gradcheck(stepped, inputs)


def test_a_learning_rate_can_be_learned_through_a_step() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    p = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True).clone()
    p.grad = torch.tensor([0.5, 0.2, -0.4], dtype=torch.float64)
    agr_cuda.AdamW([p], lr=lr, weight_decay=0.0, differentiable=True).step()
    p.sum().backward()
    torch.testing.assert_close(lr.grad, torch.tensor(-1.0, dtype=torch.float64))  # the update is lr sign(g)
