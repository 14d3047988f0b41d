"""That the tests of this folder see what they look for: they fail on kernels whose PTX has been changed.

Ordinarily, on one mutant of each kind; with AGR_PTX_MUTANTS=all, on those of every place, of both optimizers, for the
oldest and the newest architecture.
"""

from __future__ import annotations

import itertools
import os

import compiled
import pytest
from compiled import NEWEST, OLDEST
from mutants import MUTATIONS, Mutation, executed, noticed, unit_of

import agr_cuda.cuda

ALL = os.environ.get("AGR_PTX_MUTANTS") == "all"
# (mutation, architecture, kernel): without ALL, of one architecture, and the first kernel that a mutation is of.
CASES = [
    (mutation, architecture, kernel)
    for mutation, architecture in itertools.product(MUTATIONS, [OLDEST, NEWEST])
    for kernel in mutation.optimizers
    if ALL or (architecture, kernel) == (OLDEST, mutation.optimizers[0])
]


pytestmark = pytest.mark.skipif(compiled.nvcc() is None, reason="there is no nvcc")


@pytest.mark.parametrize(
    ("mutation", "architecture", "optimizer"), CASES, ids=["-".join([m.name, *rest]) for m, *rest in CASES]
)
def test_a_wrong_kernel_is_noticed(
    mutation: Mutation, architecture: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, name = compiled.kernels(architecture), unit_of(optimizer, mutation.dtype)
    with agr_cuda.cuda.rehearsal(compiled.launcher().launcher):
        mutants = mutation.mutants(right[name], executed(architecture, optimizer, mutation.dtype, 4 if ALL else 1))
        for number, ptx in enumerate(mutants if ALL else itertools.islice(mutants, 1)):
            reason = noticed({**right, name: ptx}, optimizer, mutation.dtype, monkeypatch)
            print(f"mutant {number}: {reason}")
            assert reason is not None, f"mutant {number}"


def test_a_mutation_without_a_place_is_an_error() -> None:
    with pytest.raises(AssertionError, match="is not in the PTX"):
        list(Mutation("none", "no such text", "").mutants("ret;", lambda place: True))
    with pytest.raises(AssertionError, match="not executed"):
        list(Mutation("none", "ret", "").mutants("ret;", lambda place: False))
