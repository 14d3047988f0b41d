"""Adan with Adaptive Gradient Regularization (AGR)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .groups import ParameterGroup
from .optimizer import AGROptimizer
from .options import format_value, number, number_or_tensor
from .plan import StepPlan
from .precision import PRECISION_OPTIONS
from .scaling import Scaling
from .tensors import StateTensor, is_wrapper

_STATE_SPECS = (
    StateTensor("exp_avg"),
    StateTensor("exp_avg_diff"),
    StateTensor("exp_avg_sq", signed=False),
    # NaN marks an element that has no previous gradient. A checkpoint without this key marks the whole parameter.
    StateTensor("neg_pre_grad", initial=math.nan, optional=True),
)


class Adan(AGROptimizer):
    r"""Adan with Adaptive Gradient Regularization (AGR), a replacement for sail-sg's Adan.

    For the gradient $g$ of one parameter tensor, in its group's step $t$, counted from 1:

    $$
    \begin{align*}
        g &\leftarrow g_i \left(1 - |g_i| / \textstyle\sum_j |g_j|\right) \quad \text{(with } agr\text{)} \\
        d &\leftarrow g - g_{previous} \quad \text{(0 on the parameter's first step)} \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \qquad u \leftarrow \beta_2 u + (1 - \beta_2) d \\
        n &\leftarrow \beta_3 n + (1 - \beta_3) (g + \beta_2 d)^2
            \qquad D = \sqrt{n} / \sqrt{1 - \beta_3^t} + \epsilon \\
        p &\leftarrow \left(p - \frac{\gamma}{1 - \beta_1^t} \frac{m}{D}
            - \frac{\gamma\beta_2}{1 - \beta_2^t} \frac{u}{D}\right) / (1 + \gamma\lambda)
    \end{align*}
    $$

    The first line is from arXiv 2407.16944, the others from arXiv 2208.06677, with betas in the convention of its
    authors' code, sail-sg/Adan, where 0.98 means slow decay: 1 minus those of the paper. The state and the state dict
    are those of sail-sg/Adan, so that its checkpoints load.

    Args:
        params: an iterable of parameters, of named parameters, or of dictionaries that define parameter groups. Groups
            can differ in every option below except `max_grad_norm` and `backend`.
        lr: the learning rate $\gamma$, at least 0: a number or a tensor of one element (default: 1e-3).
        betas: $\beta_1$, $\beta_2$ and $\beta_3$, each in [0, 1) (default: (0.98, 0.92, 0.99)). A
            warning is given if all are below 0.5, as they are in the paper's own convention.
        eps: $\epsilon$, at least 0 (default: 1e-8).
        weight_decay: $\lambda$, at least 0 (default: 0).
        max_grad_norm: the largest global L2 norm of all gradients; larger ones are clipped before AGR. As in sail-sg's
            Adan, the first group's `eps` is added to the norm. None or 0 does not clip (default: 0). The property
            `grad_norm` is the norm of the last step.
        no_prox: whether to decay weights as AdamW does, multiplying by $1 - \gamma\lambda$ before the update,
            instead of the division in the last line (default: False).
        foreach: True selects the reference backend (default: None).
        fused: True refuses the reference backend, except for DTensors that no other backend takes. It also has
            torch.amp.GradScaler leave unscaling and the check for inf and NaN to the step, which then does not
            synchronize with the device; gradients stay scaled (default: None).
        agr: whether to regularize the gradient (default: True). False gives sail-sg's Adan. With AGR, a tensor of one
            element never trains, because its regularized gradient is 0. State dicts do not contain this option; loading
            one keeps its current value.
        maximize: whether to maximize the objective, by negating the gradient (default: False).
        capturable: whether a step can be captured in a CUDA graph; keeps a group's step count on the GPU if the cuda or
            triton backend updates the group (default: False). With mixed precision the count is kept there anyway,
            since the GPU decides whether a step is skipped.
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

    _rule = "adan"
    _num_betas = 3
    _launch_options = ("agr", "no_prox", "foreach", "fused", "capturable", *PRECISION_OPTIONS)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 0.0,
        no_prox: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        *,
        agr: bool = True,
        maximize: bool = False,
        capturable: bool = False,
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
            "no_prox": no_prox,
            "foreach": foreach,
            "fused": fused,
            "agr": agr,
            "maximize": maximize,
            "capturable": capturable,
            "max_grad_norm": max_grad_norm,
            "backend": backend,
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which starts at step 0; see torch.optim.Optimizer.add_param_group."""
        if isinstance(param_group, dict):
            param_group = ParameterGroup(param_group)
            param_group["step"] = 0  # The dictionary may hold the count of another optimizer that was made from it.
        super().add_param_group(param_group)
        betas = self.param_groups[-1]["betas"]
        if all(beta < 0.5 for beta in betas):
            self._warn_once(
                "betas",
                f"betas is {format_value(betas)}, with which averages forget nearly everything in a step. Betas are in "
                "the convention of sail-sg/Adan, (0.98, 0.92, 0.99) by default: 1 minus those of the paper",
            )

    def _options_if_missing(self) -> dict[str, Any]:
        return {"step": 0}

    def _adapt_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        for i, group in enumerate(state_dict["param_groups"]):
            if group.get("step") is None and any(state_dict["state"].get(p) for p in group["params"]):
                raise RuntimeError(
                    f"group {i} of the state dict has no step, and its parameters have state; it must say how many "
                    "steps that is of"
                )
        adapted = super()._adapt_state_dict(state_dict)
        # sail-sg's restart_opt() leaves old gradients in the state, and ignores them because the group's step is 0.
        restarted = {i for group in adapted["param_groups"] if not group["step"] for i in group["params"]}
        previous = next(spec for spec in _STATE_SPECS if spec.key == "neg_pre_grad")
        ignored = previous.key, previous.codes_key, previous.scales_key
        state = {
            i: {key: x for key, x in parameter_state.items() if key not in ignored}
            if i in restarted
            else parameter_state
            for i, parameter_state in adapted["state"].items()
        }
        return {**adapted, "state": state}

    def _declared_state(self, group: dict[str, Any]) -> tuple[StateTensor, ...]:
        return _STATE_SPECS

    def _hyperparameters(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2, beta3 = map(number, group["betas"])
        eps, weight_decay = map(number, (group["eps"], group["weight_decay"]))
        no_prox = 1.0 if group["no_prox"] else 0.0
        sign = -1.0 if group["maximize"] else 1.0
        lr, steps = map(number_or_tensor, (group["lr"], group["step"]))
        return lr, beta1, beta2, beta3, eps, weight_decay, no_prox, sign, steps, float(group["rounding_seed"])

    def _clip_eps(self) -> float:
        return number(self.param_groups[0]["eps"])  # as in sail-sg's Adan

    def _place_step_counts(self, plan: StepPlan, scaling: Scaling) -> None:
        if not plan.device_launches and not any(isinstance(group["step"], Tensor) for group in self.param_groups):
            return
        # A launch increments the counts of all groups, including those that have no tensor in it.
        device_of = {index: launch.device for launch in reversed(plan.device_launches) for index in launch.groups}
        devices = {launch.device for launch in plan.device_launches}
        # With mixed precision, the device decides whether this step counts, unless the host has to know it anyway.
        decided_on_device = scaling.found_inf is not None and not plan.updates_on_host
        for index, group in enumerate(self.param_groups):
            step = group["step"]
            device = device_of.get(index)
            if device is None and decided_on_device:
                device = plan.device_launches[0].device
            if isinstance(step, Tensor):
                if step.device not in devices:  # No launch on that device increments the count any more.
                    group["step"] = int(number(step))
                elif device is not None and (step.dtype != torch.float32 or step.numel() != 1):
                    group["step"] = torch.full((), number(step), dtype=torch.float32, device=device)
            elif device is not None and (group["capturable"] or scaling.found_inf is not None):
                group["step"] = torch.full((), number(step), dtype=torch.float32, device=device)

    def _groups_counted_on_host(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if not isinstance(group["step"], Tensor)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim.Optimizer.state_dict does, with step counts as plain numbers.

        The saved state of a parameter that has had no step yet (mixed precision may have skipped the first) lacks
        "neg_pre_grad". sail-sg's Adan then treats the parameter's next step as its first, as this optimizer does.
        """
        # This hook runs before those that the program has registered, so that they get the converted state dict.
        with self._temporary_hook(self.register_state_dict_post_hook, _convert_for_saving, prepend=True):
            return super().state_dict()

    @torch.no_grad()
    def restart_opt(self) -> None:
        """Restart: reset step counts and averages to 0. The next step is treated as every parameter's first."""
        for group in self.param_groups:
            if isinstance(group["step"], Tensor):
                group["step"].zero_()  # All resets are in place, so that captured graphs still use these tensors.
            else:
                group["step"] = 0
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                for spec in _STATE_SPECS:
                    numbers, codes, scales = map(state.get, (spec.key, spec.codes_key, spec.scales_key))
                    if isinstance(numbers, Tensor):
                        spec.fill_initial(numbers)
                    if isinstance(codes, Tensor) and isinstance(scales, Tensor):
                        spec.fill_initial(scales)  # Each code of 0 then stands for that value.
                        codes.zero_()


def _convert_for_saving(saved: dict[str, Any]) -> dict[str, Any]:
    """Convert a newly made state dict in place into one that sail-sg's Adan loads, and return it."""
    for group in saved["param_groups"]:
        if isinstance(group.get("step"), Tensor):
            group["step"] = int(group["step"].item())
    for index in _without_previous_gradient(saved["state"]):
        saved["state"][index] = {k: v for k, v in saved["state"][index].items() if k != "neg_pre_grad"}
    return saved


def _without_previous_gradient(states: dict[Any, Any]) -> list[Any]:
    """Return the keys of the states whose "neg_pre_grad" has not been written by any step."""
    # The first elements of all tensors are read together, in one transfer for each device. Only if a first element is
    # NaN, which is rare, is the whole tensor checked.
    plain = {
        index: state["neg_pre_grad"]
        for index, state in states.items()
        if isinstance(state, dict) and isinstance(state.get("neg_pre_grad"), Tensor)
    }
    plain = {i: x for i, x in plain.items() if x.numel() > 0 and x.device.type != "meta" and not is_wrapper(x)}
    by_device: dict[torch.device, list[Any]] = {}
    for index, previous in plain.items():
        by_device.setdefault(previous.device, []).append(index)
    found = []
    for indices in by_device.values():
        firsts = torch.stack([plain[i][(0,) * plain[i].dim()].isnan() for i in indices]).tolist()
        found += [i for i, missing in zip(indices, firsts, strict=True) if missing and bool(plain[i].isnan().all())]
    return found
