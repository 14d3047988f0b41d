"""AdamW and Adan with AGR in plain PyTorch: the definition with which every other backend is compared.

`psi`, `adamw` and `adan` are the equations for one tensor. `foreach_psi`, `foreach_adamw` and `foreach_adan` are the
same for lists of tensors, with PyTorch's foreach operations. `ReferenceLaunch` applies them to an optimizer's
parameters, on any device and of any floating-point or complex dtype, differentiably if the group asks for that.

Sources: AGR is from arXiv 2407.16944, AdamW from arXiv 1711.05101, Adan from arXiv 2208.06677.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import Hyperparameters, Launch
from .scaling import Scaling
from .sharding import read_gradients
from .storage import read_numbers, write_numbers
from .tensors import Binding

if TYPE_CHECKING:
    from .clipping import Clipping

Number = float | Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic on `dtype`: float32 for the 16-bit types, or else `dtype` itself."""
    return torch.promote_types(dtype, torch.float32)


def psi(g: Tensor, total: Tensor | None = None) -> Tensor:
    """Return the regularized gradient g (1 - |g| / S), where S is the sum of |g| over all elements.

    S is `total` if `g` is a part of a larger tensor, whose other parts are in other processes.

    A 16-bit gradient is computed and returned in float32, because 1 - |g| / S would round to 1 in its own type. An
    all-zero gradient gives zeros. For complex gradients, |g| is the modulus.
    """
    g = g.to(compute_dtype(g.dtype))
    magnitude = g.abs()
    total = magnitude.sum() if total is None else total
    total = torch.where(total == 0, torch.ones_like(total), total)
    return g * (1 - magnitude / total)


def sum_of_squares(g: Tensor) -> Tensor:
    """Return the sum of |g|^2 over all elements, of shape (), in float64 if the device supports it.

    Squares of large gradients exceed float32.
    """
    magnitude = g.abs()
    wide = compute_dtype(magnitude.dtype) if magnitude.device.type == "mps" else torch.float64
    squares = magnitude.to(wide).square().sum()
    # The sum of a DTensor is a DTensor on the same mesh. As a full tensor it can be added to any other sum.
    full: Tensor = squares.full_tensor() if hasattr(squares, "full_tensor") else squares
    return full


#: Denormal averages are set to 0 in every step whose number is a multiple of this; as in csrc/cpu/executor.cpp.
_SWEEP_INTERVAL = 25


def _sweeps(average: Tensor, t: Number) -> bool:
    """Return whether denormal averages may be set to 0 in step `t`: on a CPU, in every 25th step.

    The averages of an element whose gradient stays 0 decay to denormal numbers and stay there, and CPUs compute slowly
    with those; see docs/design.md on averages that decay. If `t` is a tensor, `_faded` checks the step number.
    """
    return average.device.type == "cpu" and (isinstance(t, Tensor) or t % _SWEEP_INTERVAL == 0)


def _faded(average: Tensor, g: Tensor, t: Number) -> Tensor:
    """Return a mask of the elements of an average of gradients to set to 0: it is denormal and the gradient is 0."""
    return (g == 0) & (average.abs() < torch.finfo(average.dtype).tiny) & (t % _SWEEP_INTERVAL == 0)


def _negligible(square: Tensor, eps: Number) -> Tensor:
    """Return a mask of the elements of an average of squares that may be set to 0 once the averages of gradients are.

    Such an element is denormal, and its root is less than eps.
    """
    return (square < torch.finfo(square.dtype).tiny) & (square.sqrt() < eps)


def _scaled_quotient(average: Tensor, denominator: Tensor, scale: Number) -> Tensor:
    """Return scale * average / denominator, computed as average / (denominator / scale).

    Otherwise scale * average could be denormal, or average / denominator infinite, although the result is neither. A
    scale of 0 gives 0.
    """
    if isinstance(scale, Tensor) and scale.requires_grad:  # This form has a finite derivative at a scale of 0 too.
        return scale * average / denominator
    return average / (denominator / scale)


def adamw(
    p: Tensor, g: Tensor, averages: Sequence[Tensor], t: Number,
    *, lr: Number, betas: Sequence[Number], eps: float, weight_decay: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the parameter `p` and its averages after AdamW's step `t`; steps are counted from 1.

    The averages are exp_avg `m`, exp_avg_sq `v` and, for AMSGrad, max_exp_avg_sq `w`.
    """
    m, v, *maximum = averages
    w = maximum[0] if maximum else None
    b1, b2 = betas
    # lerp computes m + (1 - b1) (g - m) from the nearer end; by itself that formula loses a g that is small beside m.
    m = torch.lerp(m, g, (1 - b1).to(m) if isinstance(b1, Tensor) else 1 - b1)
    # Multiplied in this order because g * g may be infinite although the whole product is finite.
    v = b2 * v + (1 - b2) * g * g
    largest = v if w is None else torch.maximum(w, v)
    denominator = largest.sqrt() / (1 - b2**t) ** 0.5 + eps
    p = p - (lr * weight_decay * p + _scaled_quotient(m, denominator, lr / (1 - b1**t)))
    if _sweeps(m, t):
        gone = _faded(m, g, t)
        m = m.masked_fill(gone, 0)
        v = v.masked_fill(gone & _negligible(v, eps), 0)
        if w is not None:
            largest = largest.masked_fill(gone & _negligible(largest, eps), 0)
    return (p, m, v) if w is None else (p, m, v, largest)


def adan(
    p: Tensor, g: Tensor, averages: Sequence[Tensor], t: Number,
    *, lr: Number, betas: Sequence[Number], eps: float, weight_decay: float, no_prox: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the parameter `p` and its averages after Adan's step `t`; steps are counted from 1.

    The averages are exp_avg `m`, exp_avg_diff `u`, exp_avg_sq `n` and neg_pre_grad. The latter is the negated previous
    gradient, or NaN before an element's first step; the difference of gradients is then 0, as in the group's first
    step. After a gradient of NaN, `m` is NaN too, and m - m keeps it.
    """
    m, u, n, neg_previous = averages
    b1, b2, b3 = betas
    d = torch.zeros_like(g) if t == 1 else torch.where(neg_previous.isnan(), m - m, g + neg_previous)
    m = b1 * m + (1 - b1) * g
    u = b2 * u + (1 - b2) * d
    look_ahead = g + b2 * d
    # Multiplied in this order because the square may be infinite although the whole product is finite.
    n = b3 * n + (1 - b3) * look_ahead * look_ahead
    denominator = n.sqrt() / (1 - b3**t) ** 0.5 + eps
    step = _scaled_quotient(m, denominator, lr / (1 - b1**t))
    step = step + _scaled_quotient(u, denominator, lr * b2 / (1 - b2**t))
    # The new p is (p - step) / (1 + lr wd), or p (1 - lr wd) - step with no_prox; as p - change it is rounded once.
    change = lr * weight_decay * p + step
    p = p - (change if no_prox else change / (1 + lr * weight_decay))
    if _sweeps(m, t):
        m_gone, u_gone = _faded(m, g, t), _faded(u, g, t)
        m = m.masked_fill(m_gone, 0)
        u = u.masked_fill(u_gone, 0)
        n = n.masked_fill(m_gone & u_gone & _negligible(n, eps), 0)
    return p, m, u, n, -g


def foreach_psi(grads: list[Tensor], of_wholes: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return `psi` of each tensor of a list. The tensors are real, and have one device and dtype."""
    totals = torch.stack(list(torch._foreach_norm(grads, 1) if of_wholes is None else of_wholes))
    totals = torch.where(totals == 0, torch.ones_like(totals), totals)
    kept = torch._foreach_abs(grads)
    torch._foreach_div_(kept, list(totals.unbind()))
    torch._foreach_neg_(kept)
    torch._foreach_add_(kept, 1)
    return list(torch._foreach_mul(grads, list(kept)))


def foreach_adamw(
    p: list[Tensor], g: list[Tensor], averages: Sequence[list[Tensor]], t: float,
    *, lr: float, betas: Sequence[float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Do `adamw` for lists of tensors, in place."""
    m, v, *maximum = averages
    w = maximum[0] if maximum else None
    b1, b2 = betas
    torch._foreach_lerp_(m, g, 1 - b1)
    torch._foreach_mul_(v, b2)
    # 1 - b2 is not passed to addcmul as its value, because a GPU would then compute g * g first.
    torch._foreach_addcmul_(v, torch._foreach_mul(g, 1 - b2), g)
    if w is not None:
        torch._foreach_maximum_(w, v)
    denominator = torch._foreach_sqrt(v if w is None else w)
    torch._foreach_div_(denominator, (1 - b2**t) ** 0.5)
    torch._foreach_add_(denominator, eps)
    change = torch._foreach_mul(p, lr * weight_decay)
    torch._foreach_addcdiv_(change, m, torch._foreach_div(denominator, lr / (1 - b1**t)))
    torch._foreach_sub_(p, change)
    if _sweeps(m[0], t):
        for i, gradient in enumerate(g):
            gone = _faded(m[i], gradient, t)
            m[i].masked_fill_(gone, 0)
            for squares in (v,) if w is None else (v, w):
                squares[i].masked_fill_(gone & _negligible(squares[i], eps), 0)


def foreach_adan(
    p: list[Tensor], g: list[Tensor], averages: Sequence[list[Tensor]], t: float,
    *, lr: float, betas: Sequence[float], eps: float, weight_decay: float, no_prox: bool,
) -> None:  # fmt: skip
    """Do `adan` for lists of tensors, in place."""
    m, u, n, neg_previous = averages
    b1, b2, b3 = betas
    d = list(torch._foreach_add(neg_previous, g))
    if t == 1:
        torch._foreach_zero_(d)
    else:
        d = [torch.where(was.isnan(), average - average, x) for was, average, x in zip(neg_previous, m, d, strict=True)]
    torch._foreach_lerp_(m, g, 1 - b1)
    torch._foreach_lerp_(u, d, 1 - b2)
    torch._foreach_mul_(d, b2)
    torch._foreach_add_(d, g)
    torch._foreach_mul_(n, b3)
    torch._foreach_addcmul_(n, torch._foreach_mul(d, 1 - b3), d)  # as in foreach_adamw
    denominator = torch._foreach_sqrt(n)
    torch._foreach_div_(denominator, (1 - b3**t) ** 0.5)
    torch._foreach_add_(denominator, eps)
    change = torch._foreach_mul(p, lr * weight_decay)
    torch._foreach_addcdiv_(change, m, torch._foreach_div(denominator, lr / (1 - b1**t)))
    torch._foreach_addcdiv_(change, u, torch._foreach_div(denominator, lr * b2 / (1 - b2**t)))
    if not no_prox:
        torch._foreach_div_(change, 1 + lr * weight_decay)
    torch._foreach_sub_(p, change)
    torch._foreach_copy_(neg_previous, g)
    torch._foreach_neg_(neg_previous)
    if _sweeps(m[0], t):
        for i, gradient in enumerate(g):
            m_gone, u_gone = _faded(m[i], gradient, t), _faded(u[i], gradient, t)
            m[i].masked_fill_(m_gone, 0)
            u[i].masked_fill_(u_gone, 0)
            n[i].masked_fill_(m_gone & u_gone & _negligible(n[i], eps), 0)


#: Each rule for one tensor, which returns new tensors, and for lists of tensors, in place.
_RULES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[..., None]]] = {
    "adamw": (adamw, foreach_adamw),
    "adan": (adan, foreach_adan),
}


def _rule_options(rule: str, hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Return the keyword arguments of a rule, from a group's hyperparameters in the native core's order."""
    if rule == "adan":
        lr, *betas, eps, weight_decay, no_prox, _, _, _ = hyperparameters
        return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "no_prox": bool(no_prox)}
    lr, *betas, eps, weight_decay, _, _ = hyperparameters
    return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}


class ReferenceLaunch(Launch):
    """The update of all parameters of the reference backend."""

    def __init__(self, rule: str, bindings: Sequence[Binding]) -> None:
        super().__init__(bindings)
        self.rule = rule
        self._groups: Sequence[dict[str, Any]] = []
        self._options: list[dict[str, Any]] = []
        self._scaling = Scaling(None, None)
        self._gradients: dict[int, Tensor] = {}
        self._abs_sums: dict[int, Tensor] = {}

    def prepare(
        self, groups: Sequence[dict[str, Any]], hyperparameters: Sequence[Hyperparameters], scaling: Scaling
    ) -> None:
        """Keep the hyperparameters unchanged, tensors included; see Launch.prepare."""
        self._groups, self._scaling = groups, scaling
        found = zip(self.bindings, read_gradients(self.bindings), strict=True)
        self._gradients = {binding.index: gradient for binding, gradient in found if gradient is not None}
        self._abs_sums = {}
        self._options = [_rule_options(self.rule, values) for values in hyperparameters]

    def square_sum(self) -> Number:
        """Return the sum of squares as a tensor, so that the host does not wait for it; see Launch.square_sum."""
        total: Number = 0.0
        for binding in self.bindings:
            grad = self._gradients.get(binding.index)
            if grad is None:
                continue
            differentiable = bool(self._groups[binding.group].get("differentiable", False))
            with torch.set_grad_enabled(differentiable):
                squares = sum_of_squares(grad if differentiable else grad.detach())
                total = squares if isinstance(total, float) else total + squares.to(total.device)
        return total if self._scaling.grad_scale is None else total / self._scaling.factor() ** 2

    @torch.no_grad()
    def sums(self) -> Tensor:
        """Return the sums of each gradient; see Launch.sums."""
        found = []
        for binding in self.bindings:
            gradient = self._gradients.get(binding.index)
            if gradient is None:
                found.append(torch.zeros(2, dtype=torch.float64, device=binding.parameter.device))
            else:
                magnitude = gradient.abs()
                found.append(torch.stack([magnitude.sum(dtype=torch.float64), sum_of_squares(gradient)]))
        return torch.stack([x.to(found[0].device) for x in found], dim=1)

    def set_abs_sums(self, abs_sums: Tensor) -> None:
        """Take the abs-sums of whole tensors; see Launch.set_abs_sums."""
        self._abs_sums = {b.index: x for b, x in zip(self.bindings, abs_sums.unbind(), strict=True)}

    def update(self, clipping: Clipping, counted: Sequence[dict[str, Any]]) -> None:
        """Update the parameters; see Launch.update."""
        assert clipping.coefficient is not None
        clip = clipping.coefficient
        if self._scaling.grad_scale is not None:
            clip = clip / self._scaling.factor()
        foreach_batches: dict[tuple[Any, ...], list[Binding]] = defaultdict(list)
        for binding in self.bindings:
            if binding.index not in self._gradients:
                continue
            group = self._groups[binding.group]
            if self._uses_foreach(binding, group):
                t = self._step_count(binding, group)
                key = binding.group, binding.parameter.device, binding.parameter.dtype, binding.precision, t
                foreach_batches[key].append(binding)
                continue
            with torch.set_grad_enabled(bool(group.get("differentiable", False))):
                self._update_one(binding, group, clip)
        with torch.no_grad():
            for (*_, t), bindings in foreach_batches.items():
                self._update_foreach(bindings, clip, t)
        self._gradients, self._abs_sums = {}, {}
        for group in counted:
            group["step"] += 1

    def _uses_foreach(self, binding: Binding, group: dict[str, Any]) -> bool:
        if group.get("differentiable") or group["capturable"] or isinstance(group["lr"], Tensor):
            return False
        if binding.parameter.is_complex() or not binding.plain:
            return False
        if binding.precision.quantized or binding.precision.stochastic:  # There are no such operations on lists.
            return False
        if group["foreach"] is None:  # torch.optim makes the same choice
            return binding.parameter.device.type != "cpu"
        return bool(group["foreach"])

    def _step_count(self, binding: Binding, group: dict[str, Any]) -> Any:
        """Return the number of this step, from 1."""
        if binding.count is None:
            return group["step"] + 1
        step = binding.count.reshape(())
        if not group["capturable"]:
            return float(step) + 1
        # In float64 if the device supports it, for the accuracy of the bias corrections.
        return (step if step.device.type == "mps" else step.double()) + 1

    def _update_one(self, binding: Binding, group: dict[str, Any], clip: Number) -> None:
        p, g = binding.parameter, self._gradients[binding.index]
        if isinstance(clip, Tensor):
            clip = (clip if torch.is_grad_enabled() else clip.detach()).to(g.device)
        scale = -clip if group["maximize"] else clip
        g = g.to(compute_dtype(p.dtype))
        total = self._abs_sum_of(binding, g.abs().dtype) if group["agr"] else None
        if total is not None:  # The whole's abs-sum is of gradients without scale.
            g = psi(g, total)
        g = g * scale
        if group["agr"] and total is None:
            g = psi(g)
        stored = read_numbers(binding)
        if p.is_complex():
            stored = [torch.view_as_real(x) for x in stored]
            g = torch.view_as_real(g)
        # Always copies, because autograd may save these tensors, and the originals are changed in place below.
        now, *averages = [x.to(g.dtype, copy=True) for x in stored]
        t = self._step_count(binding, group)
        options = self._options[binding.group]
        lr = options["lr"]
        if isinstance(lr, Tensor):  # It has one element, but perhaps several dimensions.
            options = {**options, "lr": lr.reshape(()).to(torch.promote_types(lr.dtype, now.real.dtype))}
        update, _ = _RULES[self.rule]
        write_numbers(binding, stored, update(now, g, averages, t, **options), t, group["rounding_seed"])
        if binding.count is not None:
            binding.count.add_(1)

    def _abs_sum_of(self, binding: Binding, dtype: torch.dtype) -> Tensor | None:
        """Return the abs-sum of the whole of which a gradient is a part; None if it is the whole itself."""
        total = self._abs_sums.get(binding.index)
        return None if total is None else total.to(binding.parameter.device, dtype)

    def _update_foreach(self, bindings: Sequence[Binding], clip: Number, t: Any) -> None:
        group, options = self._groups[bindings[0].group], self._options[bindings[0].group]
        parameters = [binding.parameter for binding in bindings]
        dtype = compute_dtype(parameters[0].dtype)
        g = [self._gradients[binding.index].to(dtype) for binding in bindings]
        totals = [self._abs_sum_of(b, dtype) for b in bindings] if group["agr"] else []
        of_wholes = [total for total in totals if total is not None]
        if of_wholes:  # as in _update_one
            g = foreach_psi(g, of_wholes)
        if isinstance(clip, Tensor):
            clip = clip.detach().to(device=parameters[0].device, dtype=dtype)
        if isinstance(clip, Tensor) or clip != 1 or group["maximize"]:
            g = list(torch._foreach_mul(g, -clip if group["maximize"] else clip))
        if group["agr"] and not of_wholes:
            g = foreach_psi(g)
        stored = [list(column) for column in zip(*map(read_numbers, bindings), strict=True)]
        now, *averages = [[x.to(dtype) for x in column] for column in stored]  # the tensors themselves if they can be
        _, update = _RULES[self.rule]
        update(now, g, averages, t, **options)
        counts = [b.count for b in bindings if b.count is not None]
        if counts:
            torch._foreach_add_(counts, 1)
        for column, values in zip(stored, [now, *averages], strict=True):
            if any(x is not value for x, value in zip(column, values, strict=True)):
                torch._foreach_copy_(column, values)
        if bindings[0].precision.master:
            torch._foreach_copy_(parameters, stored[0])


class ReferenceGradientLaunch(Launch):
    """The regularization, in place, of gradients that no other backend takes; see agr_cuda/gradient_plan.py."""

    def __init__(self) -> None:
        super().__init__([])
        #: The gradients of this call.
        self.given: Sequence[Tensor] = ()
        self._scaling = Scaling(None, None)

    def prepare(
        self, groups: Sequence[dict[str, Any]], hyperparameters: Sequence[Hyperparameters], scaling: Scaling
    ) -> None:
        """Take the scale and the overflow flag; see Launch.prepare."""
        self._scaling = scaling

    @torch.no_grad()
    def square_sum(self) -> Number:
        """Return the sum of squares as a tensor, so that the host does not wait for it; see Launch.square_sum."""
        total: Number = 0.0
        for gradient in self.given:
            squares = sum_of_squares(gradient)
            total = squares if isinstance(total, float) else total + squares.to(total.device)
        if isinstance(total, float):
            return total
        grad_scale, _ = self._scaling.to(total.device)
        return total if grad_scale is None else total / grad_scale.reshape(()).to(total.dtype) ** 2

    @torch.no_grad()
    def update(self, clipping: Clipping, counted: Sequence[dict[str, Any]]) -> None:
        """Replace every gradient; see Launch.update. The host waits for nothing."""
        assert clipping.coefficient is not None
        for gradient in self.given:
            clip = clipping.coefficient
            clip = clip.to(gradient.device) if isinstance(clip, Tensor) else clip
            grad_scale, found_inf = self._scaling.to(gradient.device)
            g = gradient.to(compute_dtype(gradient.dtype)) * clip
            if grad_scale is not None:
                g = g / grad_scale.reshape(())
            g = psi(g)
            if found_inf is not None:
                g = torch.where(found_inf.reshape(()) != 0, gradient.to(g.dtype), g)
            gradient.copy_(g)
