"""AdamW with AGR."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.optimizer import ParamsT

from .groups import ParameterGroup
from .optimizer import AGROptimizer
from .options import number, number_or_tensor, scalar_or_number
from .tensors import StateTensor

#: What the groups of this release's torch.optim.AdamW say besides options, from 2.7 on, and so its checkpoints.
_SAID_BY_TORCH = {"decoupled_weight_decay": True} if "decoupled_weight_decay" in signature(Adam).parameters else {}

_STATES = (
    StateTensor("exp_avg"),
    StateTensor("exp_avg_sq"),
    StateTensor("step", role="count", dtype=torch.float32),
)
_AMSGRAD_STATES = (*_STATES[:2], StateTensor("max_exp_avg_sq"), *_STATES[2:])


class AdamW(AGROptimizer, torch.optim.AdamW):
    r"""AdamW with Adaptive Gradient Regularization, in place of torch.optim.AdamW.

    For the gradient :math:`g` of one parameter tensor and the number :math:`t` of its step, from 1:

    .. math::
        g &\leftarrow g_i \left(1 - |g_i| / \textstyle\sum_j |g_j|\right) \quad \text{(with } agr\text{)} \\
        p &\leftarrow p (1 - \gamma\lambda) \\
        m &\leftarrow m + (1 - \beta_1)(g - m) \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t} \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    The first line is arXiv 2407.16944, the rest arXiv 1711.05101. State and state dict are torch.optim.AdamW's, so that
    checkpoints of either load into the other. It is a subclass of torch.optim.AdamW, so that a program that asks what
    an optimizer is gets the answer for AdamW; it runs none of that class's code.

    Args:
        params: parameters, or named parameters, or dictionaries of parameter groups. Every option below but
            `max_grad_norm` and `backend` can differ between groups.
        lr: the learning rate :math:`\gamma`, a number or a tensor of one element.
        betas: :math:`\beta_1` and :math:`\beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\lambda`, at least 0.
        amsgrad: divide by the largest :math:`v` so far (state "max_exp_avg_sq").
        agr: regularize the gradient. False gives torch.optim.AdamW. A tensor of one element never trains with it. It is
            not in state dicts, and stays what it is when one is loaded.
        max_grad_norm: clip by the global L2 norm of all gradients, before AGR, to this, as
            torch.nn.utils.clip_grad_norm_ does; None or 0 does not. `grad_norm` is the norm of the last step.
        maximize: negate the gradient.
        foreach: True asks for the reference backend.
        capturable: keep the step count on the parameter's device, so that a step can be captured in a graph.
        differentiable: let autograd see the step; uses the reference backend.
        fused: True refuses the reference backend, but for DTensors, which no other takes; and has torch.amp.GradScaler
            leave scale and infinities to the step, which then does not wait for the device. Gradients stay scaled.
        backend: "cuda", "triton", "cpu" or "reference" for all parameters; None chooses for each.

    Raises:
        TypeError: for what is no number, or no boolean, where one is wanted.
        ValueError: for a number out of range.
        RuntimeError: for options that contradict each other, and for a backend that is not there.
    """

    _rule = "adamw"
    _betas = 2
    _structure = ("agr", "amsgrad", "foreach", "fused", "capturable", "differentiable")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        agr: bool = True,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "agr": agr,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "max_grad_norm": max_grad_norm,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see torch.optim.Optimizer.add_param_group."""
        if isinstance(param_group, dict):
            param_group = ParameterGroup(param_group)
            given = param_group.get("decoupled_weight_decay", True)
            if given is not True:
                raise ValueError(f"decoupled_weight_decay is {given!r}; AdamW's must be True")
            param_group.update(_SAID_BY_TORCH)
        super().add_param_group(param_group)

    def _completed(self, group: dict[str, Any]) -> ParameterGroup:
        completed = super()._completed(group)
        completed.update(_SAID_BY_TORCH)  # a checkpoint may be torch.optim.Adam's
        return completed

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        adapted = super()._adapted(state_dict)
        state = dict(adapted["state"])
        for group in adapted["param_groups"]:
            # apex counts a group's steps, in the group.
            uncounted = [i for i in group["params"] if "exp_avg" in state.get(i, ()) and "step" not in state[i]]
            if uncounted and "step" in group:
                steps = float(group.pop("step"))
                state.update({i: {**state[i], "step": steps} for i in uncounted})
        counts: set[int] = set()
        for i, of_one in state.items():
            # A count that several parameters share would be raised by each, and one that is part of more memory (as
            # views are saved) could not go to a GPU by itself.
            if isinstance(of_one, dict) and isinstance(step := of_one.get("step"), Tensor):
                if id(step) in counts or step.untyped_storage().nbytes() > step.element_size():
                    state[i] = {**of_one, "step": step.clone()}
                counts.add(id(step))
        return {**adapted, "state": state}

    def _clip_eps(self) -> float:
        return 1e-6  # as torch.nn.utils.clip_grad_norm_ has

    def _states(self, group: dict[str, Any]) -> tuple[StateTensor, ...]:
        return _AMSGRAD_STATES if group["amsgrad"] else _STATES

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        differentiable = group["differentiable"]
        beta1, beta2 = [x if type(x) is float else scalar_or_number(x, differentiable) for x in group["betas"]]
        sign = -1.0 if group["maximize"] else 1.0
        return number_or_tensor(group["lr"]), beta1, beta2, number(group["eps"]), number(group["weight_decay"]), sign
