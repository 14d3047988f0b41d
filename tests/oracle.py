"""The optimizers in float64 NumPy, independent of the package: what the tests compare with.

Everything is computed in float64. Parameters and states of a 16-bit type are rounded to it, to nearest, ties
to even, at the end of every step, because that is where a 16-bit optimizer loses information; float32 and
float64 values are never rounded, so their distance to a float32 run is that run's whole error.

tests/stored.py has the other ways to store numbers: in codes of 8 bits, and rounded at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray

# Storage type -> (bits of the significand with the implied one, exponent of the smallest normal, largest).
SIXTEEN_BIT = {
    "bfloat16": (8, -126, (2 - 2.0**-7) * 2.0**127),
    "float16": (11, -14, 65504.0),
}


def round_to(x: Array, storage: str) -> Array:
    """x as the storage type holds it: to nearest, ties to even, subnormals kept, overflow to infinity."""
    if storage not in SIXTEEN_BIT:
        return x
    bits, smallest_exponent, largest = SIXTEEN_BIT[storage]
    _, exponent = np.frexp(x)  # |x| = f 2^exponent, f in [1/2, 1): the leading bit stands for 2^(exponent-1)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, smallest_exponent) - (bits - 1))
    rounded = np.where(np.isfinite(x), np.rint(x / unit) * unit, x)
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, rounded), rounded)


def psi(g: Array) -> Array:
    """g_i (1 - |g_i| / S), S = sum |g_j| over the tensor; 0 where S is 0. |.| is the modulus of complex g."""
    s = np.abs(g).sum()
    if s == 0:
        return np.zeros_like(g)
    return g * (1 - np.abs(g) / s)


def as_real(x: Array) -> Array:
    """A complex array as one of pairs (real part, imaginary part), as torch.view_as_real shows it."""
    return np.stack([x.real, x.imag], axis=-1) if np.iscomplexobj(x) else x


@dataclass
class Parameter:
    """One parameter tensor. `value` and the states are real: a complex parameter is stored as pairs."""

    value: Array
    storage: str = "float64"
    state: dict[str, Array] = field(default_factory=dict)
    steps: int = 0  # how many steps this parameter has had


@dataclass
class Group:
    params: list[Parameter]
    options: dict[str, Any]
    steps: int = 0  # how many steps the group has had, with gradients or without

    def __getitem__(self, name: str) -> Any:
        return self.options[name]


class Optimizer:
    """What AdamW and Adan share: groups, clipping, the sign of `maximize`, AGR, rounding to storage."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, groups: Iterable[dict[str, Any]], max_grad_norm: float | None = None, **options: Any) -> None:
        self.max_grad_norm = max_grad_norm
        self.groups: list[Group] = []
        self.common = self.defaults | options
        for group in groups:
            self.add_group(group)

    def add_group(self, group: dict[str, Any]) -> None:
        own = {name: value for name, value in group.items() if name != "params"}
        unknown = (self.common.keys() | own.keys()) - self.defaults.keys()
        assert not unknown, f"the oracle knows no option {unknown}"
        self.groups.append(Group(list(group["params"]), self.common | own))

    def params(self) -> Iterator[Parameter]:
        for group in self.groups:
            yield from group.params

    def step(self, grads: Sequence[Array | None]) -> None:
        """One step. `grads` has an entry for each parameter of each group in order; None: no gradient."""
        given = iter(grads)
        with np.errstate(all="ignore"):
            c = self.clip_coefficient(grads)
            for group in self.groups:
                group.steps += 1
                for p in group.params:
                    g = next(given)
                    if g is None:
                        continue
                    p.steps += 1
                    g = c * g
                    if group["maximize"]:
                        g = -g
                    if group["agr"]:
                        g = psi(g)
                    self.update(group, p, as_real(g))
                    p.value = round_to(p.value, p.storage)
                    for name, value in p.state.items():
                        p.state[name] = round_to(value, p.storage)

    def clip_coefficient(self, grads: Sequence[Array | None]) -> Any:
        """min(1, max_grad_norm / (norm + e)), the norm over all gradients before AGR."""
        if not self.max_grad_norm:
            return 1.0
        norm = np.sqrt(sum(np.sum(np.abs(g) ** 2) for g in grads if g is not None))
        return np.minimum(1.0, np.float64(self.max_grad_norm) / (norm + self.clip_eps()))  # a NaN stays

    def clip_eps(self) -> float:
        raise NotImplementedError

    def update(self, group: Group, p: Parameter, g: Array) -> None:
        raise NotImplementedError


class AdamW(Optimizer):
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2,
        "amsgrad": False, "maximize": False, "agr": True,
    }  # fmt: skip

    def clip_eps(self) -> float:
        return 1e-6  # torch.nn.utils.clip_grad_norm_'s

    def update(self, group: Group, p: Parameter, g: Array) -> None:
        lr, (b1, b2), eps, wd = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        t = p.steps
        m = p.state.get("exp_avg", np.zeros_like(g))
        v = p.state.get("exp_avg_sq", np.zeros_like(g))

        p.value = p.value * (1 - lr * wd)
        m = p.state["exp_avg"] = m + (1 - b1) * (g - m)
        v = p.state["exp_avg_sq"] = b2 * v + (1 - b2) * g**2
        if group["amsgrad"]:
            w = p.state.get("max_exp_avg_sq", np.zeros_like(g))
            v = p.state["max_exp_avg_sq"] = np.maximum(w, v)  # a NaN stays, as in torch.maximum
        p.value = p.value - lr / (1 - b1**t) * m / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps)


class Adan(Optimizer):
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-3, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0.0,
        "no_prox": False, "maximize": False, "agr": True,
    }  # fmt: skip

    def clip_eps(self) -> float:
        return float(self.groups[0]["eps"])

    def update(self, group: Group, p: Parameter, g: Array) -> None:
        lr, (b1, b2, b3), eps, wd = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        t = group.steps
        m = p.state.get("exp_avg", np.zeros_like(g))
        u = p.state.get("exp_avg_diff", np.zeros_like(g))
        n = p.state.get("exp_avg_sq", np.zeros_like(g))

        d = g + p.state["neg_pre_grad"] if "neg_pre_grad" in p.state else np.zeros_like(g)
        p.state["neg_pre_grad"] = -g
        m = p.state["exp_avg"] = b1 * m + (1 - b1) * g
        u = p.state["exp_avg_diff"] = b2 * u + (1 - b2) * d
        n = p.state["exp_avg_sq"] = b3 * n + (1 - b3) * (g + b2 * d) ** 2
        denominator = np.sqrt(n) / np.sqrt(1 - b3**t) + eps
        along_m = lr / (1 - b1**t) * m / denominator
        along_u = lr * b2 / (1 - b2**t) * u / denominator
        if group["no_prox"]:
            p.value = p.value * (1 - lr * wd) - along_m - along_u
        else:
            p.value = (p.value - along_m - along_u) / (1 + lr * wd)

    def restart(self) -> None:
        """Forget everything but the parameters, as restart_opt() does."""
        for group in self.groups:
            group.steps = 0
            for p in group.params:
                p.steps = 0
                p.state.clear()
