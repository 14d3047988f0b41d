"""Kernels that are wrong, made from the PTX of right ones, and whether that is noticed."""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import compiled
import pytest
import torch
from helpers import ADAMW
from kernel_tests import (
    CASES,
    KERNELS,
    REGULARIZED,
    Kernel,
    check_cache_policies,
    check_cache_policies_of_regularization,
    follow,
    follow_regularization,
)


@dataclass(frozen=True)
class Mutation:
    """What is changed, as a regular expression and what takes the place of what it finds."""

    name: str
    pattern: str
    replacement: str
    step: int = 1  # every place of so many makes a mutant
    at_once: bool = False  # one mutant has all places changed
    dtype: torch.dtype = torch.float32
    optimizers: tuple[str, ...] = ("adamw", "adan", "regularize")

    def mutants(self, ptx: str, executed: Callable[[int], bool]) -> Iterator[str]:
        """One for each place that is executed. A mutation that finds no place is an error: it tests nothing any more.

        Args:
            ptx: of the right kernel.
            executed: whether the instruction that ends at a place in the text is executed.
        """
        places = list(re.finditer(self.pattern, ptx))[:: self.step]
        places = [place for place in places if executed(place.end())]
        assert places, f"{self.name}: {self.pattern} is not in the PTX, or not executed"
        if self.at_once:
            yield re.sub(self.pattern, self.replacement, ptx)
            return
        for place in places:
            yield ptx[: place.start()] + place.expand(self.replacement) + ptx[place.end() :]


# What stands between an instruction and one shortly after it: comments, and a few more instructions.
BETWEEN = r"[^\n]*\n(?:[^\n]*\n){0,16}?\s*"
# How the epoch of a word comes into %r of \2, and its comparison with this step's.
EPOCH = rf"((?:tmp, |, 32;\s*cvt\.u32\.u64\s+)(%r\d+)\b{BETWEEN}setp\.(?:ne|eq)\.s32\s+%p\d+, (%r\d+)), \2;"

COUNTING = ("adamw", "adan")  # regularize_gradients_ counts no steps

MUTATIONS = [
    # Words of a double are told apart in float64 only: half of them have but its last bits.
    Mutation("a word of another step is taken", EPOCH, r"\1, \3;", dtype=torch.float64),
    Mutation("a word is stored weakly", r"st\.relaxed\.gpu\.global\.v2", "st.global.v2"),
    Mutation("a word is loaded weakly", r"ld\.relaxed\.gpu\.global\.(v2\.)?u64", r"ld.global.\1u64"),
    Mutation("a word is not stored", r"(st\.relaxed\.gpu\.global\.v2\.u64 \S+ \{%rd\d+), %rd\d+\}", r"\1, _}"),
    # A ticket may be the last wherever it is drawn, but at most places seldom is.
    Mutation("the epoch stays what it is", r"st\.relaxed\.gpu\.global\.u32[^\n]*\n", "", at_once=True),
    Mutation("the last block does not acquire", r"atom\.acq_rel", "atom.release", optimizers=COUNTING),
    Mutation("other blocks do not release", r"atom\.acq_rel", "atom.acquire", optimizers=COUNTING),
    Mutation(
        "counters do not return to 0",
        r"(atom\.relaxed\S* %r\d+, \[%rd\d+\]), %r\d+;", r"\1, -2;", at_once=True,
    ),
    Mutation("all are the first to be counted", r"(atom\.relaxed\S* %r\d+, \[%rd\d+\]), %r\d+;", r"\1, 0;"),
    Mutation("a block does not wait for its warps", r"bar\.sync\s+0;", ""),
    # Other barriers of warps keep the compiler from moving loads: they are for speed alone.
    Mutation(
        "a warp does not wait for its lanes",
        rf"(st\.shared\.u32\s+\[%r\d+\], %rd\d+;{BETWEEN})bar\.warp\.sync\s+-1;", r"\1",
    ),
    Mutation("all of a warp must have been last", r"vote\.sync\.any", "vote.sync.all"),
    Mutation("a lane adds up what others do", r"shfl\.sync\.down", "shfl.sync.up", step=20),
    Mutation("what is read again is evicted first", r"createpolicy(\S*)evict_last", r"createpolicy\1evict_first"),
    Mutation("what is not read again is evicted last", r"createpolicy(\S*)evict_first", r"createpolicy\1evict_last"),
    Mutation("a load is off by a vector", r"(ld\.global\.L1\S* \{[^}]*\}, \[%rd\d+)\]", r"\1+16]", step=8),
    Mutation("a load leaves a register out", r"ld\.global\.L1(\S* \{)%r\d+,([^;]*);", r"ld.global.L1\1_,\2;", step=8),
    Mutation("a store is missing", r"st\.global\.(L2::cache_hint\.)?v4\.u32[^\n]*\n", "", step=3),
    Mutation("a magnitude has a sign", r"abs\.f32(\s)", r"mov.f32\1", step=40),
    Mutation(
        "a step counts twice",
        rf"(cvt\.f64\.f32\s+(%fd\d+),{BETWEEN}add\.rn\.f64\s+%fd\d+, \2), 0d3FF0{{13}};",
        r"\1, 0d4000000000000000;", optimizers=COUNTING,
    ),
]  # fmt: skip


LIMIT = 5_000_000  # of the instructions of a launch: these have a tenth of it
# Small problems that together reach all of a kernel's synchronization.
SCENARIOS = (
    "clipped segments",
    "segments",
    "clipped",
    "absent",
    "groups",
    "offset",
    "clipped offset",
    "device",
    "scaled",
    "launches",
    "two chunks",
    "no tactics in segments",
)


def noticed(
    ptx: dict[str, str], optimizer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seeds: int = 8
) -> str | None:
    """How it is noticed, with so many interleavings, that a kernel of parameters of a type is wrong; or None."""
    module = compiled.load(ptx)
    try:
        module.configure(seed=1, multiprocessors=4, limit=LIMIT)
        if optimizer == "regularize":
            check_cache_policies_of_regularization(module, dtype)
        else:
            check_cache_policies(module, kernel_of(optimizer, dtype))
        for seed, name in itertools.product(range(seeds), SCENARIOS):
            module.configure(seed=1000 * seed, multiprocessors=3 + seed, limit=LIMIT)
            with monkeypatch.context() as environment:
                if optimizer != "regularize":
                    kernel = kernel_of(optimizer, dtype)
                    case = CASES[name](kernel.method)
                    case.set_environment(environment)
                    follow(kernel, case)
                elif name in REGULARIZED:
                    case = CASES[name](ADAMW)
                    case.set_environment(environment)
                    follow_regularization(dtype, case)
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def kernel_of(optimizer: str, dtype: torch.dtype) -> Kernel:
    return next(kernel for kernel in KERNELS if (kernel.method.name.lower(), kernel.dtype) == (optimizer, dtype))


@functools.cache
def executed(architecture: str, optimizer: str, dtype: torch.dtype, seeds: int) -> Callable[[int], bool]:
    """Whether the right kernel, with which nothing is to be noticed, is executed at a place in its text."""
    kernels = compiled.kernels(architecture)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert noticed(kernels, optimizer, dtype, monkeypatch, seeds) is None
    counts: dict[str, list[int]] = defaultdict(list)  # of each text, in order
    covered = compiled.launcher().coverage()
    ptx = kernels[unit_of(optimizer, dtype)]
    compiled.load({"alone": ptx})
    mine = {name for name, *_ in compiled.launcher().coverage()}
    for name, _, text, count in covered:
        if name in mine:
            counts[text].append(count)
    executions = []  # by line
    for line in ptx.split("\n"):
        of_text = counts.get(line.strip(" \t;"))
        executions.append(of_text.pop(0) if of_text else 0)
    return lambda end: executions[ptx.count("\n", 0, end - 1)] > 0


def unit_of(optimizer: str, dtype: torch.dtype) -> str:
    """Return the name of the PTX in which the kernel of parameters of a type is."""
    unit = "gradients" if optimizer == "regularize" else str(dtype).removeprefix("torch.")
    return f"{optimizer}_{unit}"
