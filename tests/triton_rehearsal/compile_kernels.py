"""Compiles every variant of the Triton kernels ahead of time, which needs no GPU, and writes down what came of it.

Run in a process of its own, in which Triton does not interpret: python compile_kernels.py FOLDER. For every variant and
target it leaves the assembly and, for NVIDIA, the machine code; and then an index of them.
"""

import inspect
import json
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agr_cuda import triton as backend
from agr_cuda import triton_gradients, triton_kernels
from agr_cuda.precision import Precision

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, BF16, F16, F64, U8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8
# Parameters, gradients, and how numbers are stored; and what takes longer to compile, for some of the targets.
TYPES = [
    *((t, t, Precision(t)) for t in (F32, BF16, F16, F64)),
    *((t, F32, Precision(t)) for t in (BF16, F16)),
    (F32, BF16, Precision(F32)),
]
PRECISE_TARGETS = ("sm_90", "gfx942")
PRECISE_TYPES = [
    (F32, F32, Precision(U8)),
    (F32, BF16, Precision(BF16)),
    (BF16, BF16, Precision(BF16, stochastic=True)),
    (BF16, F32, Precision(U8, stochastic=True)),
    (BF16, BF16, Precision(F32, master=True)),
    (F16, F16, Precision(U8, master=True)),
]
# What pointers point to: all others to words of 64 bits.
POINTERS = {"grad_scale": "*fp32", "found_inf": "*fp32"}
FLOATS = ("groups_float", "magnitude_sums", "square_sums", "sums", "coefficients", "clip")


def source(kernel, constants):
    """Return what is compiled, all pointers being aligned to 16 bytes as PyTorch's allocators give them out."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {n: POINTERS.get(n, "*fp64" if n in FLOATS else "*i64") for n in names}
    if "constexprs" in inspect.signature(ASTSource).parameters:
        at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
        return ASTSource(fn=kernel, signature=signature, constexprs=at, attrs=aligned)
    return ASTSource(fn=kernel, signature=signature, constants=constants)  # Triton 3.2


def types(parameter, gradient, precision):
    """Return the types of a variant for its name."""
    words = [str(dtype)[6:] for dtype in (parameter, gradient, precision.state)]
    return "-".join(words + ["master"] * precision.master + ["stochastic"] * precision.stochastic)


def variants(target):
    """Yield name, kernel, constants, type of parameters and precision of what launches ask for."""
    for rule in ("adamw", "adan"):
        for parameter, gradient, precision in TYPES + (PRECISE_TYPES if target in PRECISE_TARGETS else []):
            constants = triton_kernels.constants(rule, parameter, gradient, precision)
            sizes = {"BLOCK": backend.block_elements(parameter), "REST": backend.REST, "SUMS": backend.SUMS}
            name = f"update-{rule}-{types(parameter, gradient, precision)}"
            yield name, triton_kernels.update_step, constants | sizes, parameter, precision
        for parameter, gradient, precision in TYPES:  # on which alone reductions depend
            constants = triton_kernels.constants(rule, parameter, gradient, precision)
            constants = {key: constants[key] for key in triton_kernels.REDUCE_CONSTANTS}
            sizes = {"BLOCK": backend.block_elements(parameter), "TENSORS": backend.TENSORS}
            name = f"reduce-{rule}-{types(parameter, gradient, precision)}"
            for squares, suffix in ((False, ""), (True, "-squares")):
                constants["SQUARES"] = squares
                yield name + suffix, triton_kernels.reduce_step, constants | sizes, parameter, precision
    # Of the regularization of gradients in place; its reductions are AdamW's.
    for gradient in dict.fromkeys(parameter for parameter, _, _ in TYPES):
        precision = Precision(gradient)
        constants = triton_kernels.constants("regularize", gradient, gradient, precision)
        block = triton_gradients.BLOCKS * backend.block_elements(gradient)
        sizes = {"BLOCK": block, "REST": backend.REST, "SUMS": backend.SUMS}
        chosen = {name: constants[name] for name in ("GRADIENT", "TYPE")} | sizes
        name = f"update-regularize-{types(gradient, gradient, precision)}"
        yield name, triton_kernels.regularize_step, chosen, gradient, precision


def main(folder):
    index = {}
    for target_name, target in TARGETS.items():
        for name, kernel, constants, parameter, precision in variants(target_name):
            kind, rule, *types = name.removesuffix("-squares").split("-")
            options = backend.compiler_options(rule, parameter, precision, nvidia=target.backend == "cuda")
            made = triton.compile(source(kernel, constants), target=target, options=options)
            path = folder / f"{name}-{target_name}"
            for kind in ("ptx", "amdgcn"):
                if kind in made.asm:
                    path.with_suffix(".s").write_text(made.asm[kind])
            if "cubin" in made.asm:
                path.with_suffix(".cubin").write_bytes(made.asm["cubin"])
            index[path.name] = {"kernel": kind, "rule": rule, "types": "-".join(types), "target": target_name}
    (folder / "index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
