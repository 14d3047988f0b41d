"""The optimizers that are compared: how each is built, and which of them fit in memory together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Literal

import torch

from bench.workloads.formats import ACCESSES, FORMATS, Format, averages
from bench.workloads.tensors import SHARED_COPIES

Parameters = list[torch.nn.Parameter]
Step = Callable[[], object]
Builder = Callable[[Parameters, float], Step]  # parameters, eps -> the step

Unmeasured = Literal["not installed", "not available"]

LEARNING_RATE = 1e-6  # so small that the parameters stay finite whatever the number of rounds
WEIGHT_DECAY = 1e-2
EPS = {torch.float16: 1e-4}  # 1e-8 is zero in float16, and plain foreach operations would divide by it
DEFAULT_EPS = 1e-8
YARDSTICK = "torch-adamw-fused"
MAX_NORM = 1.0  # of what clips gradients
PIP_NAMES = {
    "agr_cuda": "agr-cuda",
    "torch": "torch",
    "optimi": "torch-optimi",
    "pytorch_optimizer": "pytorch_optimizer",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
}


@dataclass(frozen=True)
class Contender:
    """One row of the comparison."""

    name: str  # as --contenders takes it
    label: str  # for tables and charts
    rule: str  # "AdamW", "Adan", or "gradients" for what changes gradients alone
    agr: bool  # whether it applies AGR
    build: Builder
    module: str  # the package that it comes from
    writes_gradients: bool = False  # whether its step changes p.grad
    scratch: int = 0  # temporary copies of the model's size that a step makes, about
    devices: tuple[str, ...] = ("cpu", "cuda")  # kinds of device where it is measured
    rivals: tuple[str, ...] = ()  # whom it is compared with, round by round, besides the yardstick
    format: Format | None = None  # as what its numbers are stored; None: all as the run's type

    @property
    def ours(self) -> bool:
        """Whether it is agr_cuda's."""
        return self.module == "agr_cuda"

    def bytes_per_element(self, dtype: torch.dtype) -> float:
        """Return the bytes that its rule must move where the run's type is `dtype`."""
        return (self.format or Format.uniform(dtype)).bytes_moved(self.rule)

    @property
    def copies(self) -> int:
        """Tensors of the model's size that it keeps: its state, and private gradients if it writes them."""
        master = self.format is not None and self.format.master
        return averages(self.rule) + master + self.writes_gradients


class LeftOutError(Exception):
    """A contender cannot run here, by no fault of its own; the message says why, or what it needs."""

    status: Unmeasured = "not available"


class NotInstalledError(LeftOutError):
    """Its package is not there; the message names it as pip does."""

    status = "not installed"


def eps_for(dtype: torch.dtype) -> float:
    """Return the eps that optimizers of parameters of this type are given."""
    return EPS.get(dtype, DEFAULT_EPS)


def build(contender: Contender, parameters: Parameters, eps: float) -> Step:
    """Return the contender's step. Raises LeftOutError where it cannot run."""
    try:
        import_module(contender.module)
    except ModuleNotFoundError as error:
        if error.name == contender.module:
            raise NotInstalledError(f"not installed: pip install {PIP_NAMES[contender.module]}") from error
        raise
    return contender.build(parameters, eps)


def optimizer(module: str, name: str, **options: Any) -> Builder:
    """Return a builder for one of the module's optimizers with these options."""

    def make(parameters: Parameters, eps: float) -> Step:
        made = getattr(import_module(module), name)
        step: Step = made(parameters, lr=LEARNING_RATE, eps=eps, weight_decay=WEIGHT_DECAY, **options).step
        return step

    return make


def _regularize(gradient: torch.Tensor) -> None:
    """AGR as one writes it."""
    total = gradient.abs().sum()
    gradient.mul_(1 - gradient.abs() / total)


def _before_fused(regularize: Callable[[torch.Tensor], object], parameters: Parameters, eps: float) -> Step:
    """Return a step that regularizes each gradient, then takes that of PyTorch's fused AdamW."""
    step = optimizer("torch.optim", "AdamW", fused=True)(parameters, eps)

    @torch.no_grad()
    def regularized_step() -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            regularize(parameter.grad)
        step()

    return regularized_step


def _three_lines(parameters: Parameters, eps: float) -> Step:
    """AGR as one writes it in three lines before any optimizer, here PyTorch's fused AdamW."""
    return _before_fused(_regularize, parameters, eps)


def _three_lines_compiled(parameters: Parameters, eps: float) -> Step:
    """AGR as above, but its three lines compiled, a tensor at a time.

    Each tensor as a row of elements, so that all shapes share two programs: of the first tensor's size, and of any
    size. One program for all tensors together would take minutes to compile.
    """
    compiled = torch.compile(_regularize)
    return _before_fused(lambda gradient: compiled(gradient.view(-1)), parameters, eps)


def why_not(backend: str, tensor: torch.Tensor) -> str | None:
    """Return why agr_cuda's backend does not take parameters like `tensor` here, or None if it does."""
    backends = import_module("agr_cuda.backends")
    reason: str | None = backends.why_missing(backend) or backends.why_not(backend, tensor)
    return reason


def of_backend(backend: str, rule: str, **options: Any) -> Builder:
    """Return a builder for one of agr_cuda's optimizers on a backend; it raises LeftOutError where that is missing."""
    make = optimizer("agr_cuda", rule, backend=backend, **options)

    def checked(parameters: Parameters, eps: float) -> Step:
        reason = why_not(backend, parameters[0])
        if reason is not None:
            raise LeftOutError(f"no {backend} backend: {reason}")
        return make(parameters, eps)

    return checked


def _native(rule: str, **options: Any) -> Builder:
    """Return a builder for one of agr_cuda's optimizers on the backend that is made for the parameters' device.

    On a CPU agr_cuda chooses. On a GPU it could choose another than cuda, which has a row of its own.
    """
    on_cpu, on_gpu = optimizer("agr_cuda", rule, **options), of_backend("cuda", rule, **options)

    def make(parameters: Parameters, eps: float) -> Step:
        return (on_gpu if parameters[0].is_cuda else on_cpu)(parameters, eps)

    return make


def _ours(name: str, label: str, rule: str, agr: bool = True, rivals: tuple[str, ...] = ()) -> Contender:
    return Contender(name, f"agr_cuda {label}", rule, agr, _native(rule, agr=agr), "agr_cuda", rivals=rivals)


def _reference(name: str, rule: str, scratch: int) -> Contender:
    build = optimizer("agr_cuda", rule, backend="reference", foreach=True)
    return Contender(name, f"agr_cuda {rule}, foreach", rule, True, build, "agr_cuda", scratch=scratch)


def _triton(name: str, rule: str) -> Contender:
    build, rivals = of_backend("triton", rule), (f"agr-{rule.lower()}", f"optimi-{rule.lower()}-triton")
    return Contender(name, f"agr_cuda {rule}, Triton", rule, True, build, "agr_cuda", devices=("cuda",), rivals=rivals)


def _gradients(name: str, note: str, backend: str | None = None, **more: Any) -> Contender:
    """Return agr_cuda.regularize_gradients_ on a backend, by default the one made for the gradients' device."""
    options = more.pop("options", {})

    def build(parameters: Parameters, eps: float) -> Step:
        chosen = backend or ("cuda" if parameters[0].is_cuda else None)
        reason = None if chosen is None else why_not(chosen, parameters[0])
        if reason is not None:
            raise LeftOutError(f"no {chosen} backend: {reason}")
        regularize: Callable[..., object] = import_module("agr_cuda").regularize_gradients_
        return lambda: regularize(parameters, backend=chosen, **options)

    label = f"agr_cuda regularize_gradients_{note}"
    return Contender(name, label, "gradients", True, build, "agr_cuda", writes_gradients=True, **more)


def _clip_grad_norm(parameters: Parameters, eps: float) -> Step:
    """PyTorch's clipping, which has no AGR: the same bytes, but for a second read from memory."""
    return lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)


def _torch(name: str, label: str, scratch: int = 0, **options: Any) -> Contender:
    build = optimizer("torch.optim", "AdamW", **options)
    return Contender(name, f"torch {label}", "AdamW", False, build, "torch", scratch=scratch)


def _peer_adan(name: str, module: str, label: str, foreach: bool = False, **more: Any) -> Contender:
    build = optimizer(module, "Adan", **({"foreach": True} if foreach else {}))
    return Contender(name, f"{module} {label}", "Adan", False, build, module, **more)


def _peer_triton(name: str, rule: str) -> Contender:
    """One of optimi's optimizers by its Triton kernels, a launch for each tensor; without AGR."""

    def build(parameters: Parameters, eps: float) -> Step:
        if "triton" not in signature(getattr(import_module("optimi"), rule)).parameters:
            raise LeftOutError("this torch-optimi has no Triton kernels: pip install 'torch-optimi>=0.3'")
        try:
            # Kahan sums, its default for AdamW in 16 bits, would be one more tensor to read and write.
            return optimizer("optimi", rule, triton=True, kahan_sum=False)(parameters, eps)
        except ImportError as error:
            raise LeftOutError(str(error)) from error

    return Contender(name, f"optimi {rule}, Triton", rule, False, build, "optimi", devices=("cuda",))


def _stored(rule: str, name: str, backend: str | None = None) -> Contender:
    """One of agr_cuda's optimizers that stores its numbers in the format of that name."""
    options = FORMATS[name].options
    build = of_backend(backend, rule, **options) if backend else _native(rule, agr=True, **options)
    own, peers = f"agr-{rule.lower()}-{name}", STORED[name] if rule == "AdamW" else ()
    more: dict[str, Any] = {"devices": ("cuda",), "rivals": (own, *peers)} if backend else {"rivals": peers}
    label = f"agr_cuda {rule}, {name}{', Triton' if backend else ''}"
    full = f"{own}-{backend}" if backend else own
    return Contender(full, label, rule, True, build, "agr_cuda", format=FORMATS[name], **more)


def _peer_stored(
    name: str, module: str, label: str, stored: str, build: Builder, scratch: int = 0, **more: Any
) -> Contender:
    """Another's AdamW that stores its numbers so; what it moves besides the format's bytes is its own affair."""
    label = f"{module} {label}, {stored}"
    return Contender(name, label, "AdamW", False, build, module, scratch=scratch, format=FORMATS[stored], **more)


def _torch_masters(parameters: Parameters, eps: float) -> Step:
    """Float32 masters as one trains with them by PyTorch alone: copies around the fused AdamW's step."""
    weights = [parameter.detach() for parameter in parameters]
    masters = [weight.float() for weight in weights]
    gradients = [torch.empty_like(master) for master in masters]
    trained = [torch.nn.Parameter(master) for master in masters]  # the same memory
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    step = _torch_fused(trained, eps)

    @torch.no_grad()
    def step_of_masters() -> None:
        torch._foreach_copy_(gradients, [grad for parameter in parameters if (grad := parameter.grad) is not None])
        step()
        torch._foreach_copy_(weights, masters)

    return step_of_masters


def _torchao(name: str, stored: str) -> Builder:
    """One of torchao's optimizers, which compile themselves, for every shape anew."""
    return optimizer("torchao.optim", name, bf16_stochastic_round=FORMATS[stored].stochastic)


# What agr_cuda's rows store, and who else stores AdamW's numbers so, or nearly.
STORED = {
    "bfloat16": ("torch-adamw-fused-bfloat16", "optimi-adamw-kahan"),
    "bfloat16-stochastic": ("torchao-adamw-bfloat16-stochastic", "optimi-adamw-kahan"),
    "bfloat16-master": ("torch-adamw-fused-master",),
    "float32-8bit": ("torchao-adamw-float32-8bit", "bitsandbytes-adamw-float32-8bit"),
    "bfloat16-8bit": ("torchao-adamw-bfloat16-8bit", "bitsandbytes-adamw-bfloat16-8bit"),
}
_torch_fused = optimizer("torch.optim", "AdamW", fused=True)
_bitsandbytes = optimizer("bitsandbytes.optim", "AdamW8bit")

ALL = (
    _ours("agr-adamw", "AdamW", "AdamW"),
    _triton("agr-adamw-triton", "AdamW"),
    _ours("agr-adamw-off", "AdamW, agr off", "AdamW", agr=False),
    _reference("reference-adamw", "AdamW", scratch=3),
    _torch(YARDSTICK, "AdamW, fused", fused=True),
    _torch("torch-adamw-foreach", "AdamW, foreach", foreach=True, scratch=1),
    Contender("three-lines", "three-line AGR + torch fused", "AdamW", True, _three_lines, "torch", True, scratch=1),
    Contender(
        "three-lines-compiled",
        "compiled three-line AGR + torch fused",
        "AdamW",
        agr=True,
        build=_three_lines_compiled,
        module="torch",
        writes_gradients=True,
        devices=("cuda",),  # on a CPU, compiling would take longer than the benchmark
    ),
    _peer_triton("optimi-adamw-triton", "AdamW"),
    _ours("agr-adan", "Adan", "Adan", rivals=("optimi-adan-foreach", "reference-adan")),
    _triton("agr-adan-triton", "Adan"),
    _ours("agr-adan-off", "Adan, agr off", "Adan", agr=False),
    _reference("reference-adan", "Adan", scratch=5),
    _peer_triton("optimi-adan-triton", "Adan"),
    _peer_adan("optimi-adan-foreach", "optimi", "Adan, foreach", foreach=True, writes_gradients=True),
    _peer_adan("optimi-adan", "optimi", "Adan, default", devices=("cpu",)),  # on a GPU that is Triton's, or foreach
    _peer_adan("pytorch-optimizer-adan", "pytorch_optimizer", "Adan", scratch=1),
    _gradients("agr-gradients", ""),
    _gradients(
        "agr-gradients-clipping", ", clipping", options={"max_norm": MAX_NORM}, rivals=("torch-clip-grad-norm",)
    ),
    _gradients("agr-gradients-triton", ", Triton", "triton", devices=("cuda",), rivals=("agr-gradients",)),
    _gradients("reference-gradients", ", reference", "reference"),
    Contender(
        "torch-clip-grad-norm",
        "torch clip_grad_norm_, foreach",
        "gradients",
        agr=False,
        build=_clip_grad_norm,
        module="torch",
        writes_gradients=True,
    ),
)
# Each stores its numbers in a format of its own, whatever the run's type.
PRECISION = (
    *(_stored(rule, name) for rule in ("AdamW", "Adan") for name in STORED),
    *(_stored(rule, name, "triton") for rule in ("AdamW", "Adan") for name in STORED),
    _peer_stored("torch-adamw-fused-bfloat16", "torch", "AdamW, fused", "bfloat16", _torch_fused),
    _peer_stored("torch-adamw-fused-master", "torch", "AdamW, fused", "bfloat16-master", _torch_masters, 1),
    _peer_stored("optimi-adamw-kahan", "optimi", "AdamW, Kahan sums", "bfloat16", optimizer("optimi", "AdamW"), 1),
    *(
        _peer_stored(f"torchao-adamw-{name}", "torchao", label, name, _torchao(label, name))
        for label, name in (
            ("_AdamW", "bfloat16-stochastic"),
            ("AdamW8bit", "float32-8bit"),
            ("AdamW8bit", "bfloat16-8bit"),
        )
    ),
    *(
        _peer_stored(f"bitsandbytes-adamw-{name}", "bitsandbytes", "AdamW8bit", name, _bitsandbytes, devices=("cuda",))
        for name in ("float32-8bit", "bfloat16-8bit")
    ),
)
BY_NAME = {contender.name: contender for contender in (*ALL, *PRECISION)}


def contender(name: str) -> Contender:
    """Return the contender of that name; ValueError, naming it and what is allowed, for any other."""
    if name not in BY_NAME:
        raise ValueError(f"unknown contender {name!r}: allowed are {', '.join(BY_NAME)}")
    return BY_NAME[name]


def bytes_needed(contenders: Sequence[Contender], model_bytes: int) -> int:
    """Return the bytes for these contenders alive together; model_bytes are those of all parameters.

    Those that store their numbers in formats of their own are counted as if they stored them in the run's type.
    """
    workloads = {entry.format.parameter if entry.format else None for entry in contenders}
    copies = SHARED_COPIES * len(workloads) + sum(entry.copies for entry in contenders)
    return model_bytes * (copies + max((entry.scratch for entry in contenders), default=0))


def batches(contenders: Sequence[Contender], model_bytes: int, budget: int) -> list[list[Contender]]:
    """Cut the contenders into batches that fit into `budget` bytes, each led by the yardstick.

    All in one batch where they fit; else AdamW and Adan apart, so that a target's two sides stay together,
    and each cut further where it must be. A contender too large for the budget on its own gets a batch to
    itself all the same.
    """
    yardstick = BY_NAME[YARDSTICK]
    others = [entry for entry in contenders if entry is not yardstick]
    if bytes_needed([yardstick, *others], model_bytes) <= budget:
        return [[yardstick, *others]]
    result: list[list[Contender]] = []
    for rule in ACCESSES:
        batch: list[Contender] = []
        for entry in (entry for entry in others if entry.rule == rule):
            if batch and bytes_needed([yardstick, *batch, entry], model_bytes) > budget:
                result.append([yardstick, *batch])
                batch = []
            batch.append(entry)
        if batch:
            result.append([yardstick, *batch])
    return result or [[yardstick]]
