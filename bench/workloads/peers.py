"""How others' optimizers are built where it takes more than their options, and AGR as one writes it around them."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import torch

from bench.workloads.building import Builder, LeftOutError, Parameters, Step, imported, optimizer
from bench.workloads.formats import FORMATS

Regularize = Callable[[torch.Tensor], object]

MAX_NORM = 1.0  # of what clips gradients

torch_fused = optimizer("torch.optim", "AdamW", fused=True)
torch_foreach = optimizer("torch.optim", "AdamW", foreach=True)


def regularize(gradient: torch.Tensor) -> None:
    """AGR as one writes it."""
    total = gradient.abs().sum()
    gradient.mul_(1 - gradient.abs() / total)


def compiled_lines() -> Regularize:
    """Return these lines compiled, for a tensor at a time.

    Each tensor as a row of elements, so that all shapes share two programs: of the first tensor's size, and of any
    size. One program for all tensors together would take minutes to compile.
    """
    compiled = torch.compile(regularize)
    return lambda gradient: compiled(gradient.view(-1))


def after_agr(build: Builder, make_lines: Callable[[], Regularize] = lambda: regularize) -> Builder:
    """Return a builder for a step that regularizes each gradient, then takes that of another optimizer."""

    def make(parameters: Parameters, eps: float) -> Step:
        step, lines = build(parameters, eps), make_lines()

        @torch.no_grad()
        def regularized_step() -> None:
            for parameter in parameters:
                assert parameter.grad is not None
                lines(parameter.grad)
            step()

        return regularized_step

    return make


def compiled(build: Builder) -> Builder:
    """Return a builder for a step that torch.compile makes one program of, for all tensors together."""

    def make(parameters: Parameters, eps: float) -> Step:
        step = build(parameters, eps)

        def whole_step() -> None:
            step()

        made: Step = torch.compile(whole_step)
        return made

    return make


def clip_grad_norm(parameters: Parameters, eps: float) -> Step:
    """PyTorch's clipping, which has no AGR: the same bytes, but for a second read from memory."""
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)


def torch_masters(parameters: Parameters, eps: float) -> Step:
    """Float32 masters as one trains with them by PyTorch alone: copies around the fused AdamW's step."""
    weights = [parameter.detach() for parameter in parameters]
    masters = [weight.float() for weight in weights]
    gradients = [torch.empty_like(master) for master in masters]
    trained = [torch.nn.Parameter(master) for master in masters]  # the same memory
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    step = torch_fused(trained, eps)

    @torch.no_grad()
    def step_of_masters() -> None:
        torch._foreach_copy_(gradients, [grad for parameter in parameters if (grad := parameter.grad) is not None])
        step()
        torch._foreach_copy_(weights, masters)

    return step_of_masters


def deepspeed(parameters: Parameters, eps: float) -> Step:
    """DeepSpeed's optimizer for a CPU, as AdamW, with averages of the parameters' type.

    It compiles its C++ operation when it is first built on a machine, which takes a minute or more, and keeps it.
    """
    if parameters[0].dtype == torch.float64:
        raise LeftOutError("it takes no float64")
    made = optimizer("deepspeed.ops.adam", "DeepSpeedCPUAdam", adamw_mode=True, fp32_optimizer_states=False)
    try:
        return made(parameters, eps)
    except RuntimeError as error:
        raise LeftOutError(f"{error} {error.__cause__ or ''}".rstrip()) from error


def timm_adan(parameters: Parameters, eps: float) -> Step:
    """Adan as timm has it, its foreach operations."""
    define_torchvision_operators()
    return optimizer("timm.optim", "Adan", foreach=True)(parameters, eps)


def define_torchvision_operators() -> None:
    """Make torchvision, which timm imports, importable beside a PyTorch without CUDA.

    Package indexes have torchvision for PyTorch's build with CUDA alone. Beside another its library does not load, and
    importing it fails at these two operators, which no optimizer calls.
    """
    try:
        imported("torchvision")
    except LeftOutError as error:
        if "torchvision::nms does not exist" in str(error):
            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float iou) -> Tensor")


def optimi_triton(rule: str) -> Builder:
    """One of optimi's optimizers by its Triton kernels, a launch for each tensor."""

    def build(parameters: Parameters, eps: float) -> Step:
        if "triton" not in signature(getattr(imported("optimi"), rule)).parameters:
            raise LeftOutError("this torch-optimi has no Triton kernels: pip install 'torch-optimi>=0.3'")
        try:
            # Kahan sums, its default for AdamW in 16 bits, would be one more tensor to read and write.
            return optimizer("optimi", rule, triton=True, kahan_sum=False)(parameters, eps)
        except ImportError as error:
            raise LeftOutError(str(error)) from error

    return build


def torchao(name: str, stored: str) -> Builder:
    """One of torchao's optimizers, which compile themselves, for every shape anew."""
    return optimizer("torchao.optim", name, bf16_stochastic_round=FORMATS[stored].stochastic)
