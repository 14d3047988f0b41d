"""What the tests in other frameworks share. They run in an environment of their own: `make frameworks`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# All are read on import. As in tests/conftest.py, threads that wait by spinning make small operations far slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Frameworks would take a GPU, on which sums may differ from run to run.

import pytest
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # Package indexes have torchvision for PyTorch's build with CUDA. Beside one without, its library does not load, and
    # importing it fails at these two operators, which nothing here calls. timm and transformers import it.
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float iou) -> Tensor")

from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "frameworks"
sys.path.insert(0, str(EXAMPLES))
sys.path.append(str(ROOT / "tests"))  # for pages; last, since there is a conftest too
#: How far weights may be from those that torch.optim.AdamW trains. They have not the same bits, since the kernels order
#: the same operations differently and fuse some: a step may differ in the last place, which is 6e-8 for a weight of 1.
TOLERANCE = 1e-6

Weights = dict[str, torch.Tensor]


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def distance(a: Weights, b: Weights) -> float:
    """Return the largest difference of any element."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def accelerate_forgets() -> Iterator[None]:
    """All of a process's Accelerators share a state, which says what precision they have."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
