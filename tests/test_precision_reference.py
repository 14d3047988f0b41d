"""The reference stores masters, codes and rounded numbers as their definitions say, and computes as in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ADAMW, ADAN, METHODS, Method, all_params, parameter, same_bits, snapshot
from torch import Tensor

from agr_cuda import quantization, reference, rounding, storage

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = 2**40 + 3
EVERY = [
    *((dtype, FP32, {"state_dtype": state}) for dtype in (BF16, FP16) for state in (None, FP32, BF16, "8bit")),
    *((FP32, grad, {"state_dtype": state}) for grad in (FP32, BF16) for state in (None, BF16, "8bit")),
    *((BF16, BF16, {"master_weights": True, "state_dtype": state}) for state in (None, BF16, "8bit")),
    (FP16, FP32, {"master_weights": True}),
    *((BF16, BF16, {"stochastic_rounding": True, "state_dtype": state}) for state in (None, FP32, "8bit")),
    (FP32, FP32, {"stochastic_rounding": True, "state_dtype": BF16}),
    (BF16, FP32, {"stochastic_rounding": True, "state_dtype": BF16, "master_weights": True}),
]


def problems(generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Of few elements and of some thousand; 0-d; of a layout other than the usual; with gaps."""
    image = torch.randn(2, 32, 9, 8, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    gaps = torch.randn(70, 130, generator=generator).to(dtype)[:, ::2]
    given = [parameter(shape, generator, dtype) for shape in [(), (31,), (64, 65)]]
    return [x.detach().requires_grad_() for x in (*given, image, gaps)]


def in_memory(x: Tensor) -> Tensor:
    """The index of each element in the order of memory."""
    indices = torch.empty_like(x, dtype=torch.int64)
    torch.as_strided(indices, (x.numel(),), (1,)).copy_(torch.arange(x.numel()))
    return indices


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "rule", [(ADAMW, {}), (ADAMW, {"amsgrad": True}), (ADAN, {})], ids=["AdamW", "AMSGrad", "Adan"]
)
@pytest.mark.parametrize(("dtype", "of_gradient", "options"), EVERY, ids=str)
def test_a_step_is_one_in_float32_between_reading_and_storing(
    dtype: torch.dtype,
    of_gradient: torch.dtype,
    options: dict,
    rule: tuple[Method, dict[str, Any]],
    foreach: bool,
    generator,
) -> None:
    method, variant = rule
    params = problems(generator, dtype)
    optimizer = method.ours(
        params, lr=0.01, foreach=foreach, backend="reference", rounding_seed=SEED, **variant, **options
    )
    stochastic, master = options.get("stochastic_rounding", False), options.get("master_weights", False)
    coded = [options.get("state_dtype") == "8bit" and p.numel() >= 4096 and p.is_contiguous() for p in params]
    numbers = [p.detach().float().requires_grad_() for p in params]
    # Operations on lists of tensors round differently, and those with codes or random numbers are done one by one.
    in_lists = [foreach and not stochastic and not x for x in coded]
    groups = [{"params": [q], "foreach": x} for q, x in zip(numbers, in_lists, strict=True)]
    twin = method.ours(groups, lr=0.01, backend="reference", **variant)
    keys = [*method.states, *(["max_exp_avg_sq"] if variant else [])]
    for step in range(1, 4):
        for p, q in zip(params, numbers, strict=True):
            p.grad_dtype = of_gradient
            p.grad = torch.randn(p.shape, generator=generator).to(of_gradient)
            q.grad = p.grad.float()
        optimizer.step()
        twin.step()
        for index, (p, q) in enumerate(zip(params, numbers, strict=True)):
            mine, theirs = optimizer.state[p], twin.state[q]

            def rounded(
                x: Tensor, to: torch.dtype, array: int, p: Tensor = p, index: int = index, step: int = step
            ) -> Tensor:
                if to != BF16 or not stochastic:
                    return x.to(to)
                bits = rounding.random_bits(in_memory(p), seed=SEED, step=step, index=index, array=array)
                return rounding.round_stochastically(x, bits)

            if master:
                assert same_bits(mine["master_param"], q)
                assert same_bits(p, q.to(dtype))
            else:
                assert same_bits(p, rounded(q.detach(), dtype, 0))
                q.data.copy_(p)
            state = options.get("state_dtype") or (FP32 if master else dtype)
            for array, key in enumerate(keys, 1):
                if not coded[index]:
                    wanted = rounded(theirs[key], FP32 if state == "8bit" else state, array)
                    assert same_bits(mine[key], wanted), key
                    theirs[key].copy_(wanted)
                    continue
                signed = not key.endswith("_sq")
                codes, scales = quantization.quantize(torch.empty_like(p, dtype=FP32).copy_(theirs[key]), signed)
                assert same_bits(mine[f"{key}_codes"], codes), key
                assert same_bits(mine[f"{key}_scale"], scales), key
                theirs[key].copy_(quantization.dequantize(codes, scales, signed))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {"max_grad_norm": 1.0}) for method in METHODS),
        *((method, {"lr": torch.tensor(0.01, dtype=torch.float64)}) for method in METHODS),
        (ADAMW, {"capturable": True}),  # Adan's step count is in its group
    ],
    ids=str,
)
def test_scalars_are_rounded_where_options_are_float64_tensors(options: dict, method: Method) -> None:
    """Without dimensions of their own, they take part in float64 arithmetic as float64 numbers."""
    steps = []
    for shape in ((), (1,)):
        p = torch.ones(shape, dtype=BF16, requires_grad=True)
        optimizer = method.ours(
            [p], agr=False, stochastic_rounding=True, backend="reference", **{"lr": 0.01, **options}
        )
        for _ in range(3):
            p.grad = torch.full_like(p, 0.3)
            optimizer.step()
        steps.append(p.detach().reshape(1))
    assert same_bits(*steps)
    assert steps[0] != 1


@pytest.mark.parametrize("options", [{"state_dtype": FP32}, {"master_weights": True}, {"state_dtype": BF16}], ids=str)
def test_lists_of_tensors_are_still_updated_together(
    options: dict, method: Method, generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference.ReferenceLaunch, "_update_one", lambda *_: pytest.fail("one by one"))
    params = problems(generator, BF16)
    optimizer = method.ours(params, foreach=True, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("options", [{"state_dtype": "8bit"}, {"stochastic_rounding": True}, {}], ids=str)
@pytest.mark.parametrize("master", [False, True])
def test_a_step_that_mixed_precision_skips_changes_nothing(
    options: dict, master: bool, method: Method, generator
) -> None:
    if options.get("stochastic_rounding") and master:
        options = {**options, "state_dtype": BF16}
    params = problems(generator, BF16)[1:4]
    optimizer = method.ours(params, backend="reference", master_weights=master, **options)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(BF16)
    optimizer.step()
    unchanged = snapshot(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.ones(1)
    optimizer.step()
    unchanged()


def test_a_parameter_with_a_master_is_not_read(method: Method, generator) -> None:
    p, q = (torch.full((31,), 0.5, dtype=BF16).requires_grad_() for _ in range(2))
    optimizer, twin = (method.ours([x], backend="reference", master_weights=True) for x in (p, q))
    for step in range(3):
        for x in (p, q):
            x.grad = torch.linspace(-1, 1, 31).to(BF16) * (step + 1)
        if step:
            p.data.fill_(7)
        optimizer.step()
        twin.step()
        assert same_bits(p, q)


def test_large_tensors_are_rounded_in_parts(method: Method, generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers."""
    results = []
    for chunk in (1 << 20, 100):
        monkeypatch.setattr(storage, "_CHUNK", chunk)
        params = problems(torch.Generator().manual_seed(1), BF16)
        optimizer = method.ours(params, lr=0.01, backend="reference", stochastic_rounding=True)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(all_params(optimizer))
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))
