"""coefficients: what AGR does to each gradient, beside the definition in float64."""

import math

import pytest
import torch
from torch import nn

import agr_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_numbers_are_those_of_the_definition(dtype):
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    for i, shape in enumerate([(), (1,), (7,), (64, 33), (100_003,)]):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = (torch.randn(shape, generator=generator) * 100).to(dtype)
        model.register_parameter(f"p{i}", p)
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    found = agr_cuda.coefficients(model)
    assert list(found) == ["p0", "p1", "p2", "p3", "p4"]
    for name, ours in found.items():
        g = getattr(model, name).grad
        absolute = g.to(torch.complex128 if dtype.is_complex else torch.float64).abs()
        a = absolute / absolute.sum()
        wanted = absolute.sum(), a.max(), a.mean(), a.square().sum()
        assert ours == pytest.approx([x.item() for x in wanted], rel=1e-12 if dtype == torch.float64 else 1e-7)
        if not dtype.is_complex:
            removed = 1 - (absolute * (1 - a)).sum() / absolute.sum()
            assert ours.removed == pytest.approx(removed.item(), rel=1e-6)


def test_parameters_are_named_by_the_caller_or_by_position():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    second.grad = torch.tensor([1.0, -2.0, 1.0])
    wanted = (4.0, 0.5, pytest.approx(1 / 3), pytest.approx(0.375))
    assert agr_cuda.coefficients([first, second]) == {"1": wanted}
    assert agr_cuda.coefficients([("a", first), ("b", second)]) == {"b": wanted}
    assert agr_cuda.coefficients(second) == {"0": wanted}
    assert agr_cuda.coefficients([]) == {}
    for wrong in ([1], [("a", 2)], [(0, first)]):
        with pytest.raises(TypeError, match="it must be a tensor, or a pair of a name and a tensor"):
            agr_cuda.coefficients(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_do_not_overflow(dtype):
    p = nn.Parameter(torch.zeros(4096, dtype=dtype))
    p.grad = torch.full_like(p, torch.finfo(dtype).max / 2)
    (found,) = agr_cuda.coefficients([p]).values()
    assert found[1:] == pytest.approx([1 / 4096] * 3)


def test_zeros_nothing_and_infinities():
    zeros, nothing, infinite = (nn.Parameter(torch.zeros(n)) for n in (5, 0, 2))
    for p in (zeros, nothing, infinite):
        p.grad = torch.zeros_like(p)
    infinite.grad[0] = math.inf
    found = agr_cuda.coefficients([zeros, nothing, infinite])
    assert found["0"] == found["1"] == (0, 0, 0, 0)
    assert found["2"].abs_sum == math.inf
    assert all(map(math.isnan, found["2"][1:]))
    infinite.grad[0] = math.nan
    assert all(map(math.isnan, agr_cuda.coefficients([infinite])["0"]))


def test_what_has_no_coefficients_is_refused():
    sparse, flat = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    sparse.grad = torch.zeros(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"the gradient of w is torch.sparse_coo; it must be dense"):
        agr_cuda.coefficients([("w", sparse)])
    flat.grad = torch.zeros(3)
    flat._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="piece of a flat parameter of FullyShardedDataParallel, and coefficients"):
        agr_cuda.coefficients([flat])
    same = nn.Parameter(torch.zeros(3))
    same.grad = torch.zeros(3)
    with pytest.raises(ValueError, match="there are two parameters of the name 'a'"):
        agr_cuda.coefficients([("a", same), ("a", same)])
    nowhere = nn.Parameter(torch.zeros(3, device="meta"))
    nowhere.grad = torch.zeros(3, device="meta")
    with pytest.raises(RuntimeError, match="the gradient of 0 is on the meta device"):
        agr_cuda.coefficients([nowhere])


@pytest.mark.parametrize("size", [1e-200, 1e200, 1e308])
def test_float64_neither_vanishes_nor_overflows(size):
    p = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    p.grad = torch.full_like(p, size)
    (found,) = agr_cuda.coefficients([p]).values()
    assert found[1:] == pytest.approx([0.1] * 3)


def test_8_bit_floating_point():
    p = nn.Parameter(torch.zeros(3))
    p.grad_dtype = None
    p.grad = torch.tensor([1.0, 2.0, -1.0]).to(torch.float8_e4m3fn)
    assert agr_cuda.coefficients([p])["0"] == (4, 0.5, pytest.approx(1 / 3), pytest.approx(0.375))
