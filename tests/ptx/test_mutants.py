"""That the tests of this folder see what they look for: they fail on kernels whose PTX has been changed.

Ordinarily, on one mutant of each kind; with AGR_PTX_MUTANTS=all, on those of every place, of both optimizers, for the
oldest and the newest architecture.
"""

from __future__ import annotations

import itertools
import os

import compiled
import pytest
import torch
from compiled import NEWEST, OLDEST
from mutants import MUTATIONS, Mutation, noticed

import agr_cuda.cuda

ALL = os.environ.get("AGR_PTX_MUTANTS") == "all"
OPTIMIZERS = list(itertools.product([OLDEST, NEWEST], ["adamw", "adan", "regularize"]))


pytestmark = pytest.mark.skipif(compiled.nvcc() is None, reason="there is no nvcc")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
@pytest.mark.parametrize(("architecture", "optimizer"), OPTIMIZERS if ALL else OPTIMIZERS[:1])
def test_a_wrong_kernel_is_noticed(
    mutation: Mutation, architecture: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, name = compiled.kernels(architecture), f"{optimizer}_{str(mutation.dtype).removeprefix('torch.')}"
    mutants = mutation.mutants(optimizer, right[name])
    with agr_cuda.cuda.rehearsal(compiled.launcher().launcher):
        for number, ptx in mutants if ALL else itertools.islice(mutants, 1):
            reason = noticed({**right, name: ptx}, optimizer, mutation.dtype, monkeypatch)
            print(f"place {number}: {reason}")
            assert reason is not None, f"place {number}"


def test_a_mutation_without_a_place_is_an_error() -> None:
    with pytest.raises(AssertionError, match="is not in the PTX"):
        list(Mutation("none", "no such text", "").mutants("adamw", "ret;"))


def test_right_kernels_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would tell nothing."""
    with agr_cuda.cuda.rehearsal(compiled.launcher().launcher):
        assert noticed(compiled.kernels(OLDEST), "adamw", torch.float32, monkeypatch) is None
