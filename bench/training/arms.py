"""The arms of the comparison: an optimizer, and what happens to its gradients before the update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import agr_cuda

RULES = {"AdamW": agr_cuda.AdamW, "Adan": agr_cuda.Adan}
EVERYWHERE = ("matrix", "embedding", "norm", "bias", "vector")  # as the paper has it
MATRICES = ("matrix", "embedding")  # as agr_cuda.parameter_groups has it by default
MAX_NORM = 1.0

Treatment = Callable[[Tensor, torch.Generator], None]  # changes a gradient in place


def placebo(gradient: Tensor, generator: torch.Generator) -> None:
    """Scale a gradient by the coefficients that AGR has for it, shuffled within the tensor.

    It takes as much of the gradient as AGR on average, but not where AGR takes it.
    """
    coefficients = gradient.abs() / gradient.abs().sum().clamp_min(torch.finfo(gradient.dtype).tiny)
    order = torch.randperm(gradient.numel(), generator=generator).to(gradient.device)
    gradient.mul_(1 - coefficients.flatten()[order].view_as(gradient))


def centralize(gradient: Tensor, generator: torch.Generator) -> None:
    """Take away the mean over all dimensions but the first: gradient centralization.

    Yong, Huang, Hua and Zhang, https://arxiv.org/abs/2004.01461, which has it for matrices and convolutions.
    """
    if gradient.dim() > 1:
        gradient.sub_(gradient.mean(tuple(range(1, gradient.dim())), keepdim=True))


def normalize(gradient: Tensor, generator: torch.Generator) -> None:
    """Scale a gradient to a root mean square of 1, tensor by tensor: gradient normalization."""
    gradient.div_(gradient.square().mean().sqrt().clamp_min(torch.finfo(gradient.dtype).tiny))


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        name: as the command line takes it.
        label: for tables.
        rule: the optimizer.
        agr_on: the kinds of parameters on which AGR is, of agr_cuda.parameter_groups.
        treatment: what is done to each gradient.
        clips: whether gradients are clipped to MAX_NORM.
        flips: whether training begins with one bit flipped, the last one of one weight, which matters.
        searches: whether learning rate and weight decay are searched for it. A control has those of its base alone.
    """

    name: str
    label: str
    rule: str
    agr_on: tuple[str, ...] = ()
    treatment: Treatment | None = None
    clips: bool = False
    flips: bool = False
    searches: bool = False

    @property
    def base(self) -> str:
        """The name of the arm with which it is compared: its optimizer alone."""
        return self.rule.lower()

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return its optimizer of a model: agr_cuda's, on the backend that is chosen for the model's device."""
        groups = agr_cuda.parameter_groups(model, weight_decay, agr=bool(self.agr_on), agr_on=self.agr_on or MATRICES)
        made: torch.optim.Optimizer = RULES[self.rule](groups, lr=lr, max_grad_norm=MAX_NORM if self.clips else None)
        return made


def flip_a_bit(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Flip the last bit of a model's first weight on which the loss depends.

    The very first may be of a token that no text has. The model is evaluated, so that it learns no statistics by it.
    """
    parameters = [*model.parameters()]
    model.eval()
    gradients = torch.autograd.grad(loss(), parameters)
    model.train()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        places = (gradient * parameter.detach()).flatten().nonzero()
        if len(places):
            weight = parameter.detach().view(-1).narrow(0, int(places[0]), 1)
            weight.view(torch.int32).bitwise_xor_(1)
            return


def _of_rule(rule: str) -> list[Arm]:
    """Return an optimizer alone, with AGR, and with the two controls."""
    name = rule.lower()
    return [
        Arm(name, rule, rule, searches=True),
        Arm(f"agr-{name}", f"AGR-{rule}", rule, EVERYWHERE, searches=True),
        Arm(f"{name}-placebo", f"{rule}, placebo", rule, treatment=placebo),
        Arm(f"{name}-bit", f"{rule}, one bit", rule, flips=True),
    ]


_ALL = (
    *_of_rule("AdamW"),
    Arm("agr-adamw-matrices", "AGR-AdamW, matrices", "AdamW", MATRICES),
    Arm("adamw-centralized", "AdamW, centralized", "AdamW", treatment=centralize, searches=True),
    Arm("adamw-normalized", "AdamW, normalized", "AdamW", treatment=normalize, searches=True),
    Arm("adamw-clipped", "AdamW, clipped", "AdamW", clips=True, searches=True),
    *_of_rule("Adan"),
)
ARMS = {arm.name: arm for arm in _ALL}
