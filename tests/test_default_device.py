"""A step depends on no default of the program's: every tensor that the package makes names its device and its type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ADAMW, assert_same_bits, copies, give_gradients, parameters, run
from torch.overrides import TorchFunctionMode

import agr_cuda

PACKAGE = Path(agr_cuda.__file__).parent
SHAPES = [(31,), (64, 33)]

# What makes a tensor out of nothing. (Functions called *_like take what they do not name from a tensor.)
FACTORIES = (
    torch.arange, torch.as_tensor, torch.empty, torch.empty_strided, torch.eye, torch.frombuffer, torch.full,
    torch.linspace, torch.ones, torch.rand, torch.randn, torch.tensor, torch.zeros,
)  # fmt: skip


class NamesOf(TorchFunctionMode):
    """Notes what the package asks of a factory without naming a device or a type."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.unnamed: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import sys

        kwargs = kwargs or {}
        caller = sys._getframe(1)
        while caller is not None and not Path(caller.f_code.co_filename).is_relative_to(PACKAGE):
            caller = caller.f_back
        if function in FACTORIES and caller is not None:
            self.calls += 1
            on_host = function is torch.frombuffer  # which takes no device: the buffer is where it is
            missing = [
                name for name in ("device", "dtype") if name not in kwargs and not (on_host and name == "device")
            ]
            if missing:
                self.unnamed.append(
                    f"{caller.f_code.co_filename}:{caller.f_lineno}: {function.__name__} lacks {missing}"
                )
        return function(*args, **kwargs)


@contextmanager
def other_defaults() -> Iterator[None]:
    """A default device on which nothing can be read, and a default type that nothing has."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


OPTIONS = [{}, {"max_grad_norm": 0.1}, {"capturable": True}]


def make(method: Any, backend: str, options: dict[str, Any], params: list[torch.Tensor]) -> Any:
    return method.ours(params, backend=backend, **options)


def scaled_step(optimizer: torch.optim.Optimizer) -> None:
    """As GradScaler makes it where no gradient was looked at: found_inf is a plain number."""
    optimizer.grad_scale, optimizer.found_inf = None, 0.0
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_does_not_depend_on_the_defaults(options: dict, method, backend, device, generator) -> None:
    params = parameters(generator, SHAPES, device=device)
    one, other = make(method, backend, options, params), make(method, backend, options, copies(params))
    for step in range(3):
        for optimizer, surroundings in ((one, None), (other, other_defaults)):
            ps = optimizer.param_groups[0]["params"]
            give_gradients(ps, torch.Generator().manual_seed(step), step)
            act = scaled_step if step == 2 else type(optimizer).step
            if surroundings is None:
                act(optimizer)
            else:
                with surroundings():
                    act(optimizer)
                    if optimizer.max_grad_norm:
                        assert optimizer.grad_norm.device == device
    assert_same_bits(one, other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_tensor_made_names_its_device_and_type(options: dict, method, backend, device, generator) -> None:
    optimizer = make(method, backend, options, parameters(generator, SHAPES, device=device))
    with NamesOf() as names:
        run(optimizer, 2)
        scaled_step(optimizer)
        optimizer.grad_norm  # noqa: B018  # it makes a tensor
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, 1)
    assert names.unnamed == []
    assert names.calls > 0


def test_memory_for_graphs_is_the_hosts(generator, monkeypatch) -> None:
    """What the Triton backend pins, which happens on a GPU alone, is named as well."""
    if "triton" not in agr_cuda.available_backends():
        assert agr_cuda.backends.why_missing("triton")
        return
    from conftest import device_of

    optimizer = ADAMW.ours(parameters(generator, SHAPES, device=device_of("triton")), backend="triton")
    run(optimizer, 1)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: asked.append(kwargs))
    optimizer._plan.launches[0]._new_pinned_buffer()
    assert [(kwargs["device"], kwargs["dtype"]) for kwargs in asked] == [("cpu", torch.int64)]
