"""The optimizers that are compared, and which of them fit in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from bench.workloads import peers
from bench.workloads.building import Builder, LeftOutError, Parameters, Step, optimizer
from bench.workloads.formats import ACCESSES, FORMATS, Format, averages
from bench.workloads.peers import MAX_NORM, after_agr, compiled, torch_foreach, torch_fused
from bench.workloads.tensors import SHARED_COPIES

YARDSTICK = "torch-adamw-fused"


@dataclass(frozen=True)
class Contender:
    """One row of the comparison."""

    name: str  # as --contenders takes it
    label: str  # for tables and charts
    rule: str  # "AdamW", "Adan", or "gradients" for what changes gradients alone
    agr: bool  # whether it applies AGR
    build: Builder  # raises LeftOutError where it cannot run
    module: str  # the package that it comes from
    writes_gradients: bool = False  # whether its step changes p.grad
    scratch: int = 0  # temporary copies of the model's size that a step makes, about
    devices: tuple[str, ...] = ("cpu", "cuda")  # kinds of device where it is measured
    rivals: tuple[str, ...] = ()  # whom it is compared with, round by round, besides the yardstick
    format: Format | None = None  # as what its numbers are stored; None: all as the run's type
    compiles: bool = False  # for minutes, on a CPU, if there are hundreds of tensors: there it runs where it is named

    @property
    def ours(self) -> bool:
        """Whether it is agr_cuda's."""
        return self.module == "agr_cuda"

    def bytes_per_element(self, dtype: torch.dtype) -> float:
        """Return the bytes that its rule must move where the run's type is `dtype`."""
        return self.stored(dtype).bytes_moved(self.rule)

    def stored(self, dtype: torch.dtype) -> Format:
        """Return as what its numbers are stored where the run's type is `dtype`."""
        return self.format or Format.uniform(dtype)

    @property
    def copies(self) -> int:
        """Tensors of the model's size that it keeps: its state, and private gradients if it writes them."""
        master = self.format is not None and self.format.master
        return averages(self.rule) + master + self.writes_gradients


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


def _peer(name: str, module: str, label: str, build: Builder, rule: str = "AdamW", **more: Any) -> Contender:
    return Contender(name, f"{module} {label}", rule, False, build, module, **more)


def _three_lines(
    name: str,
    around: str,
    build: Builder,
    make_lines: Callable[[], peers.Regularize] | None = None,
    whole: Callable[[Builder], Builder] | None = None,
    module: str = "torch",
    rule: str = "AdamW",
    **more: Any,
) -> Contender:
    """AGR as one writes it, in three lines before another's step; the lines compiled, or lines and step as a whole."""
    label = f"{'compiled ' if make_lines else ''}three-line AGR + {around}"
    built = after_agr(build, make_lines) if make_lines else after_agr(build)
    built = whole(built) if whole else built
    return Contender(name, label, rule, True, built, module, writes_gradients=True, scratch=1, **more)


def _peer_triton(rule: str) -> Contender:
    """One of optimi's optimizers by its Triton kernels; without AGR."""
    name, build = f"optimi-{rule.lower()}-triton", peers.optimi_triton(rule)
    return Contender(name, f"optimi {rule}, Triton", rule, False, build, "optimi", devices=("cuda",))


def _stored(rule: str, name: str, backend: str | None = None) -> Contender:
    """One of agr_cuda's optimizers that stores its numbers in the format of that name."""
    options = FORMATS[name].options
    build = of_backend(backend, rule, **options) if backend else _native(rule, agr=True, **options)
    own, others = f"agr-{rule.lower()}-{name}", STORED[name] if rule == "AdamW" else ()
    more: dict[str, Any] = {"devices": ("cuda",), "rivals": (own, *others)} if backend else {"rivals": others}
    label = f"agr_cuda {rule}, {name}{', Triton' if backend else ''}"
    full = f"{own}-{backend}" if backend else own
    return Contender(full, label, rule, True, build, "agr_cuda", format=FORMATS[name], **more)


def _peer_stored(
    name: str, module: str, label: str, stored: str, build: Builder, scratch: int = 0, **more: Any
) -> Contender:
    """Another's AdamW that stores its numbers so; what it moves besides the format's bytes is its own affair."""
    label = f"{module} {label}, {stored}"
    return Contender(name, label, "AdamW", False, build, module, scratch=scratch, format=FORMATS[stored], **more)


# What agr_cuda's rows store, and who else stores AdamW's numbers so, or nearly.
STORED = {
    "bfloat16": ("torch-adamw-fused-bfloat16", "optimi-adamw-kahan"),
    "bfloat16-stochastic": ("torchao-adamw-bfloat16-stochastic", "optimi-adamw-kahan"),
    "bfloat16-master": ("torch-adamw-fused-master",),
    **{
        name: tuple(f"{module}-adamw-{name}" for module in ("torchao", "bitsandbytes", "pytorch-optimizer"))
        for name in ("float32-8bit", "bfloat16-8bit")
    },
}
_bitsandbytes = optimizer("bitsandbytes.optim", "AdamW8bit")
_flash = optimizer("pytorch_optimizer", "FlashAdamW")  # averages of 8 bits, in blocks of 32
_optimi_adan = optimizer("optimi", "Adan", foreach=True)

ALL = (
    _ours("agr-adamw", "AdamW", "AdamW", rivals=("deepspeed-adamw",)),
    _triton("agr-adamw-triton", "AdamW"),
    _ours("agr-adamw-off", "AdamW, agr off", "AdamW", agr=False),
    _reference("reference-adamw", "AdamW", scratch=3),
    _peer(YARDSTICK, "torch", "AdamW, fused", torch_fused),
    _peer("torch-adamw-foreach", "torch", "AdamW, foreach", torch_foreach, scratch=1),
    _peer_triton("AdamW"),
    _peer("deepspeed-adamw", "deepspeed", "CPUAdam, AdamW", peers.deepspeed, devices=("cpu",)),
    _peer("torch-adamw-compiled", "torch", "AdamW, step compiled", compiled(torch_foreach), compiles=True),
    _three_lines("three-lines", "torch fused", torch_fused),
    _three_lines("three-lines-foreach", "torch foreach", torch_foreach),
    _three_lines("three-lines-compiled", "torch fused", torch_fused, peers.compiled_lines, compiles=True),
    _three_lines("three-lines-step-compiled", "torch, step compiled", torch_foreach, whole=compiled, compiles=True),
    _three_lines("three-lines-deepspeed", "deepspeed", peers.deepspeed, module="deepspeed", devices=("cpu",)),
    _peer("bitsandbytes-adamw", "bitsandbytes", "AdamW", optimizer("bitsandbytes.optim", "AdamW"), scratch=1),
    _ours("agr-adan", "Adan", "Adan", rivals=("optimi-adan-foreach", "reference-adan")),
    _triton("agr-adan-triton", "Adan"),
    _ours("agr-adan-off", "Adan, agr off", "Adan", agr=False),
    _reference("reference-adan", "Adan", scratch=5),
    _peer_triton("Adan"),
    _peer("optimi-adan-foreach", "optimi", "Adan, foreach", _optimi_adan, "Adan", writes_gradients=True),
    # By default, on a GPU that is Triton's, or foreach.
    _peer("optimi-adan", "optimi", "Adan, default", optimizer("optimi", "Adan"), "Adan", devices=("cpu",)),
    _peer(
        "pytorch-optimizer-adan", "pytorch_optimizer", "Adan", optimizer("pytorch_optimizer", "Adan"), "Adan", scratch=1
    ),
    _peer("timm-adan-foreach", "timm", "Adan, foreach", peers.timm_adan, "Adan", scratch=1),
    _three_lines("three-lines-adan", "optimi Adan, foreach", _optimi_adan, module="optimi", rule="Adan"),
    _gradients("agr-gradients", ""),
    _gradients(
        "agr-gradients-clipping", ", clipping", options={"max_norm": MAX_NORM}, rivals=("torch-clip-grad-norm",)
    ),
    _gradients("agr-gradients-triton", ", Triton", "triton", devices=("cuda",), rivals=("agr-gradients",)),
    _gradients("reference-gradients", ", reference", "reference"),
    _peer(
        "torch-clip-grad-norm",
        "torch",
        "clip_grad_norm_, foreach",
        peers.clip_grad_norm,
        "gradients",
        writes_gradients=True,
    ),
)
# Each stores its numbers in a format of its own, whatever the run's type.
PRECISION = (
    *(_stored(rule, name) for rule in ("AdamW", "Adan") for name in STORED),
    *(_stored(rule, name, "triton") for rule in ("AdamW", "Adan") for name in STORED),
    _peer_stored("torch-adamw-fused-bfloat16", "torch", "AdamW, fused", "bfloat16", torch_fused),
    _peer_stored("torch-adamw-fused-master", "torch", "AdamW, fused", "bfloat16-master", peers.torch_masters, 1),
    _peer_stored("optimi-adamw-kahan", "optimi", "AdamW, Kahan sums", "bfloat16", optimizer("optimi", "AdamW"), 1),
    *(
        _peer_stored(f"torchao-adamw-{name}", "torchao", label, name, peers.torchao(label, name))
        for label, name in (
            ("_AdamW", "bfloat16-stochastic"),
            ("AdamW8bit", "float32-8bit"),
            ("AdamW8bit", "bfloat16-8bit"),
        )
    ),
    *(
        _peer_stored(f"bitsandbytes-adamw-{name}", "bitsandbytes", "AdamW8bit", name, _bitsandbytes)
        for name in ("float32-8bit", "bfloat16-8bit")
    ),
    *(
        _peer_stored(f"pytorch-optimizer-adamw-{name}", "pytorch_optimizer", "FlashAdamW", name, _flash)
        for name in ("float32-8bit", "bfloat16-8bit")
    ),
)
BY_NAME = {contender.name: contender for contender in (*ALL, *PRECISION)}


def contender(name: str) -> Contender:
    """Return the contender of that name; ValueError, naming it and what is allowed, for any other."""
    if name not in BY_NAME:
        raise ValueError(f"unknown contender {name!r}: allowed are {', '.join(BY_NAME)}")
    return BY_NAME[name]


@dataclass(frozen=True)
class Choice:
    """Contenders to measure, and the names of those that are not, by the reason."""

    entries: list[Contender]
    left_out: dict[str, list[str]]


def choose(
    device: str, named: Sequence[Contender] | None, default: Iterable[str], always: Sequence[str] = ()
) -> Choice:
    """Choose what to measure on a kind of device: of the contenders that were named, or else of the default ones."""
    names = {*(default if named is None else (entry.name for entry in named)), *always}
    choice = Choice([], {})
    for entry in (*ALL, *PRECISION):
        if entry.name not in names:
            continue
        if device not in entry.devices:
            reason = f"for a {'GPU' if device == 'cpu' else 'CPU'} alone"
        elif entry.compiles and device == "cpu" and named is None:
            reason = "on a CPU only where they are named, since they may compile for minutes"
        else:
            choice.entries.append(entry)
            continue
        choice.left_out.setdefault(reason, []).append(entry.name)
    return choice


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
