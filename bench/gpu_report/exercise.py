"""A short program for tools that watch a GPU: `python -m bench.gpu_report.exercise check`, or `profile CASES.json`.

`check` is for compute-sanitizer. It takes steps of every rule in every type, over tensors of odd sizes, of one and of
many chunks, with and without clipping, half of them at addresses that no vector access can use, and compares the
result with the CPU backend's. Random numbers are drawn on the CPU, so that hardly any kernels but the optimizer's run.

`profile` is for ncu. It takes one step of every case between cudaProfilerStart and cudaProfilerStop, one kernel each,
and writes to CASES.json what they are, in that order; with --only, of one case alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import agr_cuda
from bench.workloads.formats import ACCESSES
from bench.workloads.shapes import model_set
from bench.workloads.tensors import Workload

# One element, odd sizes, several chunks whatever a chunk's size, and a matrix.
SIZES = ((1,), (3,), (0,), (1009,), (64, 33), (4097,), (70_001,), (1_000_003,))
STEPS = 3
EPS = 1e-3  # well above the smallest second moment of float16, whose rounding would otherwise decide the step
# The two backends add in different orders. 16-bit storage may round to neighbours, twice: here up to 8 times epsilon.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 7e-2, torch.float16: 9e-3}


class RegularizedDescent(torch.optim.Optimizer):
    """Gradient descent with agr_cuda.regularize_gradients_ before every step."""

    def __init__(self, parameters: list[torch.Tensor], **options: Any) -> None:
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Regularize the gradients in place, and follow them."""
        (group,) = self.param_groups
        agr_cuda.regularize_gradients_(
            group["params"], max_norm=group["max_grad_norm"] or None, backend=group["backend"]
        )
        for parameter in group["params"]:
            parameter.sub_(parameter.grad, alpha=group["lr"])


@dataclass(frozen=True)
class Rule:
    """An optimizer with options that choose its rule."""

    label: str
    name: str  # in agr_cuda; "gradients" for RegularizedDescent
    options: dict[str, Any]

    def optimizer(self, parameters: list[torch.Tensor], **options: Any) -> torch.optim.Optimizer:
        """Return the optimizer of these parameters."""
        maker = RegularizedDescent if self.name == "gradients" else getattr(agr_cuda, self.name)
        made: torch.optim.Optimizer = maker(parameters, **self.options, **options)
        return made


ADAMW = Rule("AGR-AdamW", "AdamW", {})
ADAMW_OFF = Rule("AdamW, agr off", "AdamW", {"agr": False})
AMSGRAD = Rule("AGR-AdamW, amsgrad", "AdamW", {"amsgrad": True})
ADAN = Rule("AGR-Adan", "Adan", {})
GRADIENTS = Rule("regularized gradients", "gradients", {})


def placed(values: torch.Tensor, device: str, offset: int) -> torch.Tensor:
    """Return the values on the device, `offset` elements behind the beginning of an allocation."""
    memory = torch.empty(values.numel() + offset, dtype=values.dtype, device=device)
    tensor = memory[offset:].view(values.shape)
    tensor.copy_(values)
    return tensor


def compare(
    rule: Rule,
    dtype: torch.dtype,
    offset: int,
    max_grad_norm: float,
    backends: tuple[tuple[str, str], tuple[str, str]] = (("cuda", "cuda"), ("cpu", "cpu")),
) -> float:
    """Take steps with two backends, each given with its device; return the largest difference of their parameters."""
    generator = torch.Generator().manual_seed(1)

    def random() -> list[torch.Tensor]:
        return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]

    values = random()
    sides = []
    for backend, device in backends:
        parameters = [placed(value, device, offset).requires_grad_() for value in values]
        options = {"lr": 1e-2, "eps": EPS, "weight_decay": 0.1, "max_grad_norm": max_grad_norm, "backend": backend}
        sides.append((device, parameters, rule.optimizer(parameters, **options)))
    for _ in range(STEPS):
        gradients = random()
        for device, parameters, optimizer in sides:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = placed(gradient, device, offset)
            optimizer.step()
    difference = 0.0
    for mine, theirs in zip(sides[0][1], sides[1][1], strict=True):
        if mine.numel():
            apart = (mine.detach().cpu().double() - theirs.detach().double()).abs().max().item()
            difference = max(difference, apart) if apart == apart else float("nan")  # max() would lose NaN
    return difference


def check() -> int:
    """Compare everything; returns 1 if something is off."""
    wrong = 0
    for rule in (ADAMW, AMSGRAD, ADAN, GRADIENTS):
        for dtype, tolerance in TOLERANCES.items():
            for offset, max_grad_norm in ((0, 0.0), (1, 1.0)):
                difference = compare(rule, dtype, offset, max_grad_norm)
                ok = difference <= tolerance
                wrong += not ok
                what = f"{rule.label}, {dtype}, offset {offset}, max_grad_norm {max_grad_norm:g}"
                print(f"{'ok  ' if ok else 'WRONG'} {what}: off by {difference:.3g}", flush=True)
    torch.cuda.synchronize()
    return int(wrong > 0)


@dataclass(frozen=True)
class Case:
    """One step that ncu profiles."""

    rule: str
    set: str
    dtype: str
    elements: int
    bytes_per_element: int  # that the rule must move


PROFILED = (
    (ADAMW, "gpt2", torch.float32),
    (ADAMW_OFF, "gpt2", torch.float32),
    (ADAN, "gpt2", torch.float32),
    (ADAMW, "gpt2", torch.bfloat16),
    (ADAMW, "vit-b-16", torch.float32),
    (ADAMW, "llama-3.2-1b", torch.float32),
)


def profile(path: Path, only: int | None) -> int:
    """Take the profiled steps, one kernel each, and write what they are."""
    cases = []
    for rule, set_name, dtype in PROFILED if only is None else PROFILED[only : only + 1]:
        model = model_set(set_name)
        workload = Workload(model.shapes, torch.device("cuda"), dtype)
        optimizer = rule.optimizer(list(workload.parameters), lr=1e-6, backend="cuda")
        for number in range(2):  # state is made and the plan laid
            workload.turn(number)
            optimizer.step()
        workload.turn(0)
        profiler: Any = torch.cuda.profiler  # its functions have no types
        torch.cuda.synchronize()
        profiler.start()
        optimizer.step()
        torch.cuda.synchronize()
        profiler.stop()
        dtype_name = str(dtype).removeprefix("torch.")
        needed = ACCESSES[rule.name] * dtype.itemsize
        cases.append(Case(rule.label, set_name, dtype_name, model.elements, needed))
        path.write_text(json.dumps([asdict(case) for case in cases], indent=1) + "\n")
        del optimizer, workload
        torch.cuda.empty_cache()  # room in which ncu saves what the next case's kernel writes
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report.exercise", description=__doc__)
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("check")
    profiling = modes.add_parser("profile")
    profiling.add_argument("path", type=Path, metavar="CASES.json")
    profiling.add_argument("--only", type=int, metavar="NUMBER", help="take one case alone, counted from 0")
    return parser


def main() -> int:
    """Do what the command line asks for; returns the exit code."""
    args = build_parser().parse_args()
    if not torch.cuda.is_available():
        print("PyTorch finds no GPU here", file=sys.stderr)
        return 2
    return check() if args.mode == "check" else profile(args.path, args.only)


if __name__ == "__main__":
    sys.exit(main())
