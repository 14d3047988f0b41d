"""Kernels that are wrong, made from the PTX of right ones, and whether that is noticed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import compiled
import pytest
from kernel_tests import CASES, Kernel, check_cache_policies, follow


@dataclass(frozen=True)
class Mutation:
    """What is changed, as a regular expression and what takes the place of what it finds."""

    name: str
    pattern: str
    replacement: str
    step: int = 1  # every place of so many makes a mutant
    #: Mutants that are right all the same: the optimizer and the place.
    harmless: tuple[tuple[str, int], ...] = ()

    def mutants(self, optimizer: str, ptx: str) -> Iterator[tuple[int, str]]:
        """One for each place. A mutation that finds no place is an error: it tests nothing any more."""
        places = list(re.finditer(self.pattern, ptx))
        assert places, f"{self.name}: {self.pattern} is not in the PTX"
        for number, place in enumerate(places[:: self.step]):
            if (optimizer, number) not in self.harmless:
                yield number, ptx[: place.start()] + place.expand(self.replacement) + ptx[place.end() :]


# Between an instruction and one shortly after it in the same basic block.
BETWEEN = r"[^\n]*\n(?:(?!\$L|\s*bra|\s*@)[^\n]*\n){0,12}?\s*"

MUTATIONS = [
    Mutation(
        "a release is relaxed", r"st\.release\.gpu", "st.relaxed.gpu",
        # Of a tensor's sums, with clipping: they are released once more, with the norm.
        harmless=(("adamw", 0), ("adan", 0)),
    ),
    Mutation("an acquire is relaxed", r"ld\.acquire\.gpu", "ld.relaxed.gpu"),
    Mutation("an arrival does not release", r"atom\.add\.acq_rel", "atom.add.acquire"),
    Mutation("an arrival does not acquire", r"atom\.add\.acq_rel", "atom.add.release"),
    Mutation("an arrival is relaxed", r"atom\.add\.acq_rel", "atom.add.relaxed"),
    Mutation("a block does not wait for its warps", r"bar\.sync\s+0;", ""),
    # Other barriers of warps keep the compiler from moving loads: they are for speed alone.
    Mutation("a warp does not wait for its first lane", rf"(vote\.sync{BETWEEN})bar\.warp\.sync\s+-1;", r"\1"),
    Mutation("all of a warp must have been last", r"vote\.sync\.any", "vote.sync.all"),
    Mutation("a counter is not reset", r"(mov\.u32\s+(%r\d+), 0;\n\s*)st\.global\.u32\s+\[[^\]]*\], \2;", r"\1"),
    Mutation(
        "a sum of another step is taken",
        rf"(ld\.acquire\S* (%r\d+),{BETWEEN}setp\.eq\S*\s+%p\d+, \2,) %r\d+;", r"\1 \2;",
    ),
    Mutation("every ticket is the first", r"(atom\.global\.inc\.u32\s+%r\d+, \[%rd\d+\]), -2;", r"\1, 0;"),
    Mutation(
        "a lane adds up what others do", r"shfl\.sync\.down", "shfl.sync.up", step=20,
        harmless=(("adamw", 5),),  # the norm is a sum of squares alone, that of magnitudes beside it is 0
    ),
    Mutation("what is read again is evicted first", r"createpolicy(\S*)evict_last", r"createpolicy\1evict_first"),
    Mutation("what is not read again is evicted last", r"createpolicy(\S*)evict_first", r"createpolicy\1evict_last"),
    Mutation("a load is off by a vector", r"(ld\.global\.L1\S* \{[^}]*\}, \[%rd\d+)\]", r"\1+16]", step=8),
    Mutation("a load leaves a register out", r"ld\.global\.L1(\S* \{)%r\d+,([^;]*);", r"ld.global.L1\1_,\2;", step=8),
    Mutation("a store is missing", r"st\.global\.L2::cache_hint[^\n]*\n", "", step=3),
    Mutation("a magnitude has a sign", r"abs\.f32(\s)", r"mov.f32\1", step=40),
    Mutation(
        "a step is not counted",
        r"(ld\.f32\s+(%f\d+), (\[%rd\d+\]);\s*add\.f32\s+%f\d+, \2), 0f3F800000;", r"\1, 0f00000000;",
        harmless=(("adamw", 1), ("adan", 0)),  # AdamW counts by parameter, Adan by group
    ),
]  # fmt: skip


LIMIT = 5_000_000  # of the instructions of a launch: these have a tenth of it
# Small problems that together reach all of a kernel's synchronization.
SCENARIOS = ("clipped segments", "segments", "clipped", "absent", "groups", "offset", "device")


def noticed(ptx: dict[str, str], kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """How it is noticed that a kernel is wrong, or None."""
    module = compiled.load(ptx)
    try:
        module.configure(seed=1, multiprocessors=4, limit=LIMIT)
        check_cache_policies(module, kernel)
        for seed, name in itertools.product(range(4), SCENARIOS):
            module.configure(seed=1000 * seed, multiprocessors=3 + seed, limit=LIMIT)
            case = CASES[name](kernel.method)
            with monkeypatch.context() as environment:
                for limit, value in case.limits.items():
                    environment.setenv(f"AGR_CUDA_{limit}", str(value))
                follow(kernel, case)
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
