"""Adan with AGR."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .groups import ParameterGroup
from .optimizer import AGROptimizer
from .options import number, number_or_tensor, shown
from .plan import StepPlan
from .scaling import Scaling
from .tensors import StateTensor, is_wrapper

_STATES = (
    StateTensor("exp_avg"),
    StateTensor("exp_avg_diff"),
    StateTensor("exp_avg_sq"),
    # An element that is NaN says that there is no previous gradient. A checkpoint without it says so of the parameter.
    StateTensor("neg_pre_grad", initial=math.nan, may_lack=True),
)


class Adan(AGROptimizer):
    r"""Adan with Adaptive Gradient Regularization, in place of sail-sg's Adan.

    For the gradient :math:`g` of one parameter tensor and the number :math:`t` of its group's step, from 1:

    .. math::
        g &\leftarrow g_i \left(1 - |g_i| / \textstyle\sum_j |g_j|\right) \quad \text{(with } agr\text{)} \\
        d &\leftarrow g - g_{previous} \quad \text{(0 on the parameter's first step)} \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \qquad u \leftarrow \beta_2 u + (1 - \beta_2) d \\
        n &\leftarrow \beta_3 n + (1 - \beta_3) (g + \beta_2 d)^2
            \qquad D = \sqrt{n} / \sqrt{1 - \beta_3^t} + \epsilon \\
        p &\leftarrow \left(p - \frac{\gamma}{1 - \beta_1^t} \frac{m}{D}
            - \frac{\gamma\beta_2}{1 - \beta_2^t} \frac{u}{D}\right) / (1 + \gamma\lambda)

    The first line is arXiv 2407.16944, the rest arXiv 2208.06677, with betas in the convention of its authors' code
    (0.98 decays slowly). State and state dict are sail-sg/Adan's, so that its checkpoints load.

    Args:
        params: parameters, or named parameters, or dictionaries of parameter groups. Every option below but
            `max_grad_norm` and `backend` can differ between groups.
        lr: the learning rate :math:`\gamma`, a number or a tensor of one element.
        betas: :math:`\beta_1`, :math:`\beta_2` and :math:`\beta_3`, each in [0, 1). A warning says so if all are below
            0.5, as those of the paper, in its own convention, are.
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\lambda`, at least 0.
        max_grad_norm: clip by the global L2 norm of all gradients, before AGR, to this; None or 0 does not. As in
            sail-sg's Adan, the first group's `eps` is added to the norm. `grad_norm` is the norm of the last step.
        no_prox: decay weights as AdamW does, by :math:`p (1 - \gamma\lambda)`, instead of the last division.
        foreach: True asks for the reference backend.
        fused: True refuses the reference backend, but for DTensors, which no other takes; and has torch.amp.GradScaler
            leave scale and infinities to the step, which then does not wait for the device. Gradients stay scaled.
        agr: regularize the gradient. False gives sail-sg's Adan. A tensor of one element never trains with it. It is
            not in state dicts, and stays what it is when one is loaded.
        maximize: negate the gradient.
        capturable: keep the group's step count on the GPU of the cuda or triton backend, so that a step can be captured
            in a graph. Mixed precision, which decides there whether a step is made, does so by itself.
        backend: "cuda", "triton", "cpu" or "reference" for all parameters; None chooses for each.

    Raises:
        TypeError: for what is no number, or no boolean, where one is wanted.
        ValueError: for a number out of range.
        RuntimeError: for options that contradict each other, and for a backend that is not there.
    """

    _rule = "adan"
    _betas = 3
    _structure = ("agr", "no_prox", "foreach", "fused", "capturable")

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
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, at step 0; see torch.optim.Optimizer.add_param_group."""
        if isinstance(param_group, dict):
            param_group = ParameterGroup(param_group)
            param_group["step"] = 0  # whatever another optimizer, made from the same dictionary, has counted there
        super().add_param_group(param_group)
        betas = self.param_groups[-1]["betas"]
        if all(beta < 0.5 for beta in betas):
            self._warn_once(
                "betas",
                f"betas is {shown(betas)}, with which averages forget nearly everything in a step. Betas are in the "
                "convention of sail-sg/Adan, (0.98, 0.92, 0.99) by default: 1 minus those of the paper",
            )

    def _unsaved_options(self) -> dict[str, Any]:
        return {"step": 0}

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        for i, group in enumerate(state_dict["param_groups"]):
            if group.get("step") is None and any(state_dict["state"].get(p) for p in group["params"]):
                raise RuntimeError(
                    f"group {i} of the state dict has no step, and its parameters have state; it must say how many "
                    "steps that is of"
                )
        adapted = super()._adapted(state_dict)
        # sail-sg's restart_opt() leaves the gradients from before in the state, and knows by the step that they are.
        begun_anew = {i for group in adapted["param_groups"] if not group["step"] for i in group["params"]}
        state = {
            i: {key: value for key, value in of_one.items() if key != "neg_pre_grad"} if i in begun_anew else of_one
            for i, of_one in adapted["state"].items()
        }
        return {**adapted, "state": state}

    def _states(self, group: dict[str, Any]) -> tuple[StateTensor, ...]:
        return _STATES

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2, beta3 = map(number, group["betas"])
        eps, weight_decay = map(number, (group["eps"], group["weight_decay"]))
        no_prox = 1.0 if group["no_prox"] else 0.0
        sign = -1.0 if group["maximize"] else 1.0
        lr, steps = map(number_or_tensor, (group["lr"], group["step"]))
        return lr, beta1, beta2, beta3, eps, weight_decay, no_prox, sign, steps

    def _clip_eps(self) -> float:
        return number(self.param_groups[0]["eps"])  # as sail-sg's Adan has

    def _place_counts(self, plan: StepPlan, scaling: Scaling) -> None:
        if not plan.on_devices and not any(isinstance(group["step"], Tensor) for group in self.param_groups):
            return
        # A launch raises the counts of all groups, those that have no tensor in it too.
        device_of = {index: launch.device for launch in reversed(plan.on_devices) for index in launch.groups}
        devices = {launch.device for launch in plan.on_devices}
        unknown = scaling.found_inf is not None and not plan.on_host  # whether this step will be counted
        for index, group in enumerate(self.param_groups):
            step = group["step"]
            device = device_of.get(index)
            if device is None and unknown:
                device = plan.on_devices[0].device
            if isinstance(step, Tensor):
                if step.device not in devices:  # where nothing counts any more
                    group["step"] = int(number(step))
                elif device is not None and (step.dtype != torch.float32 or step.numel() != 1):
                    group["step"] = torch.full((), number(step), dtype=torch.float32, device=device)
            elif device is not None and (group["capturable"] or scaling.found_inf is not None):
                group["step"] = torch.full((), number(step), dtype=torch.float32, device=device)

    def _counted_by_host(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if not isinstance(group["step"], Tensor)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim.Optimizer.state_dict does, with step counts as plain numbers.

        What is saved of a parameter with whose state no step has been made (the first may have been skipped) lacks
        "neg_pre_grad": so sail-sg's Adan takes its next step for its first, as this one does.
        """
        # Before the hooks that a program has registered: they get what others get.
        with self._hook(self.register_state_dict_post_hook, _saved, prepend=True):
            return super().state_dict()

    @torch.no_grad()
    def restart_opt(self) -> None:
        """Begin anew: step counts and averages become zero, and the next step counts as every parameter's first."""
        for group in self.param_groups:
            if isinstance(group["step"], Tensor):
                group["step"].zero_()  # in place, as all of this: a captured graph goes on with it
            else:
                group["step"] = 0
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                for spec in _STATES:
                    if isinstance(state.get(spec.key), Tensor):
                        spec.fill(state[spec.key])


def _saved(saved: dict[str, Any]) -> dict[str, Any]:
    """Change a state dict that has just been made into one that sail-sg's Adan takes."""
    for group in saved["param_groups"]:
        if isinstance(group.get("step"), Tensor):
            group["step"] = int(group["step"].item())
    for index in _without_previous_gradient(saved["state"]):
        saved["state"][index] = {k: v for k, v in saved["state"][index].items() if k != "neg_pre_grad"}
    return saved


def _without_previous_gradient(states: dict[Any, Any]) -> list[Any]:
    """Return the keys of those states whose "neg_pre_grad" no step has written."""
    # Of all at once, the first element; of those where it is NaN, and few if any are, the others.
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
