"""AdamW with Adaptive Gradient Regularization (AGR)."""

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
from .precision import PRECISION_OPTIONS
from .tensors import StateTensor

#: The entry that torch.optim.AdamW adds to its parameter groups, and so to its checkpoints, since PyTorch 2.7.
_TORCH_ENTRIES = {"decoupled_weight_decay": True} if "decoupled_weight_decay" in signature(Adam).parameters else {}

_STATE_SPECS = (
    StateTensor("exp_avg"),
    StateTensor("exp_avg_sq", signed=False),
    StateTensor("step", role="count", dtype=torch.float32),
)
_AMSGRAD_STATE_SPECS = (*_STATE_SPECS[:2], StateTensor("max_exp_avg_sq", signed=False), *_STATE_SPECS[2:])


class AdamW(AGROptimizer, torch.optim.AdamW):
    r"""AdamW with Adaptive Gradient Regularization (AGR), a replacement for torch.optim.AdamW.

    For the gradient $g$ of one parameter tensor, in the tensor's step $t$, counted from 1:

    $$
    \begin{align*}
        g &\leftarrow g_i \left(1 - |g_i| / \textstyle\sum_j |g_j|\right) \quad \text{(with } agr\text{)} \\
        p &\leftarrow p (1 - \gamma\lambda) \\
        m &\leftarrow m + (1 - \beta_1)(g - m) \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t} \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}
    \end{align*}
    $$

    The first line is from arXiv 2407.16944, the others from arXiv 1711.05101. The state and the state dict are those of
    torch.optim.AdamW, so that checkpoints of either load into the other. The class is a subclass of torch.optim.AdamW
    so that isinstance checks of other programs succeed; it runs none of that class's code.

    Args:
        params: an iterable of parameters, of named parameters, or of dictionaries that define parameter groups. Groups
            can differ in every option below except `max_grad_norm` and `backend`.
        lr: the learning rate $\gamma$, at least 0: a number or a tensor of one element (default: 1e-3).
        betas: $\beta_1$ and $\beta_2$, each in [0, 1): numbers or tensors of one element (default: (0.9,
            0.999)).
        eps: $\epsilon$, at least 0 (default: 1e-8).
        weight_decay: $\lambda$, at least 0 (default: 1e-2).
        amsgrad: whether to divide by the largest $v$ so far, state "max_exp_avg_sq" (default: False).
        agr: whether to regularize the gradient (default: True). False gives torch.optim.AdamW. With AGR, a tensor of
            one element never trains, because its regularized gradient is 0. State dicts do not contain this option;
            loading one keeps its current value.
        max_grad_norm: the largest global L2 norm of all gradients; larger ones are clipped before AGR, as by
            torch.nn.utils.clip_grad_norm_. None or 0 does not clip (default: None). The property `grad_norm` is the
            norm of the last step.
        maximize: whether to maximize the objective, by negating the gradient (default: False).
        foreach: True selects the reference backend (default: None).
        capturable: whether a step can be captured in a CUDA graph; keeps step counts on the parameters' devices
            (default: False).
        differentiable: whether autograd can differentiate through the step; selects the reference backend (default:
            False).
        fused: True refuses the reference backend, except for DTensors that no other backend takes. It also has
            torch.amp.GradScaler leave unscaling and the check for inf and NaN to the step, which then does not
            synchronize with the device; gradients stay scaled (default: None).
        backend: "cuda", "triton", "cpu" or "reference" for all parameters; None chooses one for each parameter
            (default: None).
        state_dtype: the type of the averages: torch.float32, torch.bfloat16, or "8bit" for blocks of 8-bit codes with a
            scale (of parameters with 4,096 elements or more; others keep float32). None is the parameter's type, or
            float32 with master weights (default: None).
        master_weights: whether bfloat16 and float16 parameters have a float32 copy, state "master_param", that steps
            update and then round to the parameter. A program that writes into such a parameter calls
            `reset_master_weights` afterwards, or the next step undoes what it wrote (default: False).
        stochastic_rounding: whether bfloat16 parameters without master weights, and bfloat16 averages, are rounded up
            or down at random so that the expectation is exact (default: False).
        rounding_seed: the seed of those random numbers, which is saved in state dicts: an integer of at least 0 and
            less than 2**53 (default: 0). All replicas of a parameter must have the same.

    Raises:
        TypeError: for an option that is not a number, or not a boolean, but should be.
        ValueError: for an option out of range, and for a backend of unknown name.
        RuntimeError: for options that contradict each other, and for a backend that is not available.
    """

    _rule = "adamw"
    _num_betas = 2
    _launch_options = ("agr", "amsgrad", "foreach", "fused", "capturable", "differentiable", *PRECISION_OPTIONS)

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
        state_dtype: torch.dtype | str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
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
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see torch.optim.Optimizer.add_param_group."""
        if isinstance(param_group, dict):
            param_group = ParameterGroup(param_group)
            given = param_group.get("decoupled_weight_decay", True)
            if given is not True:
                raise ValueError(f"decoupled_weight_decay is {given!r}; AdamW's must be True")
            param_group.update(_TORCH_ENTRIES)
        super().add_param_group(param_group)

    def _with_defaults(self, group: dict[str, Any]) -> ParameterGroup:
        completed = super()._with_defaults(group)
        completed.update(_TORCH_ENTRIES)  # A checkpoint may come from torch.optim.Adam, which sets it to False.
        return completed

    def _adapt_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        adapted = super()._adapt_state_dict(state_dict)
        state = dict(adapted["state"])
        for group in adapted["param_groups"]:
            # A checkpoint of apex has one step count for each group, in the group.
            uncounted = [i for i in group["params"] if "exp_avg" in state.get(i, ()) and "step" not in state[i]]
            if uncounted and "step" in group:
                steps = float(group.pop("step"))
                state.update({i: {**state[i], "step": steps} for i in uncounted})
        counts: set[int] = set()
        for i, parameter_state in state.items():
            # A count shared by several parameters would be incremented once for each of them, and a count that is a
            # view into a larger storage could not be moved to a GPU by itself. Both get a copy.
            if isinstance(parameter_state, dict) and isinstance(step := parameter_state.get("step"), Tensor):
                if id(step) in counts or step.untyped_storage().nbytes() > step.element_size():
                    state[i] = {**parameter_state, "step": step.clone()}
                counts.add(id(step))
        return {**adapted, "state": state}

    def _clip_eps(self) -> float:
        return 1e-6  # the constant of torch.nn.utils.clip_grad_norm_

    def _declared_state(self, group: dict[str, Any]) -> tuple[StateTensor, ...]:
        return _AMSGRAD_STATE_SPECS if group["amsgrad"] else _STATE_SPECS

    def _hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        differentiable = group["differentiable"]
        beta1, beta2 = [x if type(x) is float else scalar_or_number(x, differentiable) for x in group["betas"]]
        sign = -1.0 if group["maximize"] else 1.0
        lr, eps, weight_decay = number_or_tensor(group["lr"]), number(group["eps"]), number(group["weight_decay"])
        return lr, beta1, beta2, eps, weight_decay, sign, float(group["rounding_seed"])
