"""AdamW with AGR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .binding import Binding
from .optimizer import AGROptimizer
from .options import number, number_or_tensor


class AdamW(AGROptimizer):
    r"""AdamW with Adaptive Gradient Regularization, in place of torch.optim.AdamW.

    For the gradient :math:`g` of one parameter tensor and the number :math:`t` of its step, from 1:

    .. math::
        g &\leftarrow g_i \left(1 - |g_i| / \textstyle\sum_j |g_j|\right) \quad \text{(with } agr\text{)} \\
        p &\leftarrow p (1 - \gamma\lambda) \\
        m &\leftarrow m + (1 - \beta_1)(g - m) \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t} \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    The first line is arXiv 2407.16944, the rest arXiv 1711.05101. State and state dict are torch.optim.AdamW's, so that
    checkpoints of either load into the other.

    Args:
        params: parameters, or named parameters, or dictionaries of parameter groups. Every option below but
            `max_grad_norm` and `backend` can differ between groups.
        lr: the learning rate :math:`\gamma`, a number or a tensor of one element.
        betas: :math:`\beta_1` and :math:`\beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\lambda`, at least 0.
        amsgrad: divide by the largest :math:`v` so far (state "max_exp_avg_sq").
        agr: regularize the gradient. False gives torch.optim.AdamW. A tensor of one element never trains with it.
        max_grad_norm: clip by the global L2 norm of all gradients, before AGR, to this; None or 0 does not.
        maximize: negate the gradient.
        foreach: True asks for the reference backend.
        capturable: keep the step count on the parameter's device, so that a step can be captured in a graph.
        differentiable: let autograd see the step; uses the reference backend.
        fused: True refuses the reference backend.
        backend: "cuda", "triton", "cpu" or "reference" for all parameters; None chooses for each.

    Raises:
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
        }
        super().__init__(params, defaults, max_grad_norm, backend)

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2 = map(number, group["betas"])
        sign = -1.0 if group["maximize"] else 1.0
        return number_or_tensor(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], sign

    def _missing_state(self, binding: Binding) -> dict[str, Tensor]:
        made = super()._missing_state(binding)
        # A step count is one float32, on the device where a graph shall capture it or a launch counts for itself (as
        # with torch.optim.AdamW's fused operation), else on the CPU. torch's older releases saved a plain number.
        there = self.param_groups[binding.group]["capturable"] or binding.backend in ("cuda", "triton")
        device = binding.parameter.device if there else torch.device("cpu")
        step = binding.state.get("step", 0.0)
        wanted = torch.float32
        if not isinstance(step, Tensor) or step.dtype != wanted or step.device != device or step.dim() != 0:
            made["step"] = torch.as_tensor(step, dtype=wanted, device=device).detach().reshape(()).clone()
        return made
