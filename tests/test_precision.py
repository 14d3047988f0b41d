"""State of other types, master weights, codes of 8 bits and rounding at random, on every backend that takes them.

Each step starts from what is stored, and is compared with the float64 oracle's step from the same numbers, stored in
the same way: what a backend stores must be what a number is stored as that float32 arithmetic may have found; see
tests/stored.py. So the bits of nearly all elements are known, of those rounded at random too.

Where Python interprets the kernels, some of the cases are followed, for fewer steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import stored
import torch
from conftest import case_id, device_of, interpreted_by_python
from helpers import STEPS, all_params, assert_same_bits, relative_error, same_bits, snapshot
from precisions import (
    DTYPES,
    LARGE,
    RULES,
    TAKEN,
    UNSIGNED,
    Case,
    assert_between,
    exact,
    fill_gradients,
    leaf,
    made,
    on_cases,
    problem,
    step_beside_oracle,
)
from torch import Tensor

from agr_cuda.quantization import code_values, dequantize, quantize
from agr_cuda.rounding import philox, random_bits, round_stochastically

SEED = 2**40 + 7  # with something in both words of the key


IN_FLOAT32 = Case("float32", "float32", None, master=False, stochastic=False)
IN_CODES = Case("float32", "float32", "8bit", master=False, stochastic=False)
AT_RANDOM = Case("bfloat16", "bfloat16", None, master=False, stochastic=True)
WITH_MASTER = Case("bfloat16", "bfloat16", None, master=True, stochastic=False)

#: Every way to store what a step writes, with gradients of both types.
KINDS = [
    IN_CODES,
    AT_RANDOM,
    Case("float32", "bfloat16", "bfloat16", master=False, stochastic=True),
    Case("bfloat16", "float32", "bfloat16", master=True, stochastic=True),
    Case("bfloat16", "bfloat16", "8bit", master=True, stochastic=False),
    Case("float16", "float16", None, master=True, stochastic=False),
    Case("float16", "float32", "8bit", master=False, stochastic=False),
]


#: The ways to store numbers that make sense and differ: parameter, gradient and state, master, rounding at random.
ALL = """
    float32-float32-own float32-float32-bfloat16 float32-float32-bfloat16-stochastic float32-float32-8bit
    float32-bfloat16-own float32-bfloat16-bfloat16 float32-bfloat16-bfloat16-stochastic float32-bfloat16-8bit
    bfloat16-bfloat16-own bfloat16-bfloat16-own-stochastic bfloat16-bfloat16-float32
    bfloat16-bfloat16-float32-stochastic bfloat16-bfloat16-8bit bfloat16-bfloat16-8bit-stochastic
    bfloat16-float32-own bfloat16-float32-own-stochastic bfloat16-float32-float32 bfloat16-float32-float32-stochastic
    bfloat16-float32-8bit bfloat16-float32-8bit-stochastic
    bfloat16-bfloat16-own-master bfloat16-bfloat16-bfloat16-master bfloat16-bfloat16-bfloat16-master-stochastic
    bfloat16-bfloat16-8bit-master
    bfloat16-float32-own-master bfloat16-float32-bfloat16-master bfloat16-float32-bfloat16-master-stochastic
    bfloat16-float32-8bit-master
    float16-float16-own float16-float16-float32 float16-float16-bfloat16 float16-float16-bfloat16-stochastic
    float16-float16-8bit
    float16-float32-own float16-float32-float32 float16-float32-bfloat16 float16-float32-bfloat16-stochastic
    float16-float32-8bit
    float16-float16-own-master float16-float16-bfloat16-master float16-float16-bfloat16-master-stochastic
    float16-float16-8bit-master
    float16-float32-own-master float16-float32-bfloat16-master float16-float32-bfloat16-master-stochastic
    float16-float32-8bit-master
"""
#: Those that each backend takes. docs/precision.md has the same list. What cuda takes depends on what is compiled.
TAKES = {"cpu": ALL, "triton": ALL, "reference": ALL}


@pytest.mark.parametrize("on", [on for on in TAKEN if on != "cuda"])
def test_what_each_backend_takes(on: str) -> None:
    assert [str(case) for case in TAKEN[on]] == TAKES[on].split()


# Beside the oracle.


def follow(on: str, rule: str, case: Case, params: Any, generator: torch.Generator, steps: int, **options: Any) -> None:
    """Steps on random gradients beside the oracle."""
    optimizer = made(on, rule, case, params, rounding_seed=SEED, **options)
    for _ in range(min(steps, 2) if interpreted_by_python(on) else steps):
        fill_gradients(all_params(optimizer), generator)
        step_beside_oracle(rule, case, optimizer)


@pytest.mark.parametrize(("on", "rule", "case"), on_cases(every=7), ids=case_id)
def test_every_way_to_store_numbers(on: str, rule: str, case: Case, generator) -> None:
    """With AGR and without. Gradients of another type, and random numbers, are the same in every step: 4 are enough."""
    size = LARGE if case.state == "8bit" else 1003
    with_agr, without = problem(on, case, generator, [(size,), (size,)])
    groups = [{"params": [with_agr]}, {"params": [without], "agr": False}]
    follow(on, rule, case, groups, generator, STEPS if case.gradient == case.parameter and not case.stochastic else 4)


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 0.5}, {"capturable": True}, {"maximize": True, "weight_decay": 0.0}, {"eps": 1e-8}],
    ids=str,
)
@pytest.mark.parametrize(("on", "rule", "case"), on_cases(KINDS, ("amsgrad", "adan"), every=9), ids=case_id)
def test_each_option_in_turn(on: str, rule: str, case: Case, options: dict[str, Any], generator) -> None:
    follow(on, rule, case, problem(on, case, generator), generator, 2, **options)


@pytest.mark.parametrize(("on", "rule", "case"), on_cases(KINDS, ("amsgrad", "adan"), every=5, rest=1), ids=case_id)
def test_sizes_around_those_of_blocks(on: str, rule: str, case: Case, generator) -> None:
    """256 elements share a scale; tensors of fewer than 4096 have none."""
    sizes = [(0,), (1,), (255,), (256,), (257,), (4095,), (4096,), (4097,), (4351,), (4352,), (64, 65)]
    params = problem(on, case, generator, sizes[::3] if interpreted_by_python(on) else sizes)
    follow(on, rule, case, params, generator, 2, agr=False)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def at_an_offset(elements: int) -> Callable[[Tensor], Tensor]:
    def moved(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(elements), x.reshape(-1)])[elements:].view(x.shape)

    return moved


LAYOUTS: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    (channels_last, channels_last),
    (transposed, torch.clone),  # with a gradient that is not in the parameter's memory order
    (at_an_offset(1), at_an_offset(3)),
    (torch.clone, at_an_offset(5)),
]


@pytest.mark.parametrize(("on", "rule", "case"), on_cases(KINDS, ("amsgrad", "adan"), every=9, rest=3), ids=case_id)
def test_other_memory_orders_and_alignments(on: str, rule: str, case: Case, generator) -> None:
    """Random numbers and blocks of codes go by the order of memory."""
    params = []
    for of_value, of_gradient in LAYOUTS[::2] if interpreted_by_python(on) else LAYOUTS:
        for p in problem(on, case, generator, [(7, 5, 12, 11), (3, 2, 5, 7)]):
            params.append(leaf(of_value(p.detach()), of_gradient(p.grad)))
    follow(on, rule, case, params, generator, 2)


# GradScaler.


def amp_step(step: Callable[[], None], optimizer: Any, grad_scale: float, found_inf: float) -> None:
    device = all_params(optimizer)[0].device
    optimizer.grad_scale = torch.tensor(grad_scale, device=device)
    optimizer.found_inf = torch.tensor(found_inf, device=device)
    step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize(("on", "rule", "case"), on_cases(KINDS, every=8), ids=case_id)
def test_scaled_gradients_and_skipped_steps(on: str, rule: str, case: Case, generator) -> None:
    """A skipped step changes nothing at all, and is not counted: the next has its random numbers."""
    optimizer = made(on, rule, case, problem(on, case, generator), rounding_seed=SEED)
    for skipped in (False, True, False):
        fill_gradients(all_params(optimizer), generator, 1000.1)
        if skipped:
            all_params(optimizer)[0].grad[3] = torch.inf
            check = snapshot(optimizer)
            amp_step(optimizer.step, optimizer, 1000.1, 1.0)
            check()
        else:
            amp_step(lambda: step_beside_oracle(rule, case, optimizer, 1000.1), optimizer, 1000.1, 0.0)


@pytest.mark.parametrize(
    ("on", "rule", "case"),
    on_cases([case for case in KINDS if case.parameter == "float16"], ("adamw", "adan"), every=3),
    ids=case_id,
)
def test_a_model_that_overflows_under_grad_scaler(on: str, rule: str, case: Case, generator) -> None:
    """The scaler halves its scale until nothing overflows; until then nothing changes, and then as if never scaled.

    The scaler unscales for the reference, and refuses to in float16: its gradients are in float32.
    """
    fused, device, shape = on != "reference", device_of(on), (64, 65)
    in_float32 = case._replace(gradient="float32")
    case = case if fused else in_float32
    (p,), (twin,) = (problem(on, c, torch.Generator().manual_seed(0), [shape]) for c in (case, in_float32))
    inputs = torch.randn(16, shape[0], generator=generator).to(device, torch.float16)
    optimizer, unscaled = made(on, rule, case, [p], fused=fused), made(on, rule, in_float32, [twin])
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**20)
    taken = []
    for _ in range(6):
        scale = scaler.get_scale()
        weights = p.detach().clone().requires_grad_()
        scaler.scale((inputs @ weights).float().square().mean()).backward()
        p.grad.copy_(weights.grad)
        before = [(x, x.clone()) for x in (p.detach(), *optimizer.state.get(p, {}).values())]
        scaler.step(optimizer)
        scaler.update()
        taken.append(bool(weights.grad.isfinite().all()))
        assert scaler.get_scale() == (scale if taken[-1] else scale / 2)
        if taken[-1]:
            twin.grad.copy_(weights.grad.float() / scale)
            unscaled.step()
        else:
            assert all(same_bits(x, was) for x, was in before)
    assert taken == [False, False, False, True, True, True]
    if case.master:
        assert relative_error(optimizer.state[p]["master_param"], exact(unscaled.state[twin]["master_param"])) <= 1e-6
    else:
        assert relative_error(p, exact(twin)) <= 2.0**-11


# Master weights.


@pytest.mark.parametrize(
    ("on", "rule", "case"),
    on_cases([WITH_MASTER, WITH_MASTER._replace(gradient="float32")], ("adamw", "adan"), every=3),
    ids=case_id,
)
def test_masters_follow_training_in_float32(on: str, rule: str, case: Case, generator) -> None:
    (p,) = problem(on, case, generator, [(300,)])
    whole = leaf(p.detach().float(), torch.zeros(300, device=p.device))
    options = {"lr": 1e-3, "eps": 1e-8}
    optimizer = made(on, rule, case, [p], **options)
    in_float32 = made(on, rule, IN_FLOAT32, [whole], **options)
    start = exact(p)
    for _ in range(15 if interpreted_by_python(on) else 100):
        fill_gradients([p], generator)
        whole.grad.copy_(p.grad)
        optimizer.step()
        in_float32.step()
    master = optimizer.state[p]["master_param"]
    assert relative_error(master, exact(whole)) <= 1e-6
    assert same_bits(p, master.to(p.dtype))
    assert np.abs(exact(master) - start).min() > 0


# Rounding at random.


def test_the_random_numbers_are_philox() -> None:
    """Known answers of the authors' (Random123, kat_vectors), and the numbers of elements from them."""
    answers = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in answers:
        assert tuple(map(int, philox(tuple(torch.tensor([c]) for c in counter), key))) == words
        assert tuple(map(int, stored.philox(counter, key))) == words
    draw = {"seed": SEED, "step": 3, "index": 5, "array": 2}
    assert random_bits(torch.arange(1003), **draw).tolist() == stored.random_bits(1003, **draw).tolist()
    high = torch.tensor([2**35 + 8 + 5])  # an element whose block has a high word
    word = stored.philox((1, 1, 3, 8 * 5 + 2), (SEED % 2**32, SEED >> 32))[2]
    assert int(random_bits(high, **draw)) == int(word) >> 16


def test_what_rounding_at_random_makes_of_any_number(generator) -> None:
    """Up as often as the bits that are cut off say; finite stays finite, NaN and infinities stay what they are."""
    edges = torch.tensor([0.0, -0.0, 1.0, 1e-45, -1e-40, 1e-38, 3.4028235e38, -3.4e38, 3.3895314e38, 0.1])
    patterns = torch.randint(-(2**31), 2**31, (20000,), generator=generator, dtype=torch.int64).to(torch.int32)
    values = torch.cat([edges, patterns.view(torch.float32)])
    values = values[values.isfinite()]
    for bits in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        rounded = round_stochastically(values, torch.full(values.shape, bits))
        assert rounded.dtype == torch.bfloat16
        np.testing.assert_array_equal(exact(rounded), stored.round_at_random(exact(values), np.float64(bits)))
        assert torch.equal(rounded.signbit(), values.signbit())
    others = torch.tensor([torch.inf, -torch.inf, torch.nan])
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for bits in (0, 0xFFFF):
        assert same_bits(round_stochastically(others[:2], torch.full((2,), bits)), others[:2].bfloat16())
        assert round_stochastically(nans, torch.full((3,), bits)).isnan().all()


def decayed(on: str, rule: str, value: Tensor, decay: float, **options: Any) -> Tensor:
    """bfloat16 values of a new parameter after a step without a gradient, which makes them p (1 - decay)."""
    p = leaf(value.bfloat16(), torch.zeros_like(value, dtype=torch.bfloat16))
    own = {"no_prox": True} if rule == "adan" else {}
    made(on, rule, AT_RANDOM, [p], lr=1.0, weight_decay=decay, **own, **options).step()
    return p.detach()


@pytest.mark.parametrize(("on", "rule", "case"), on_cases([AT_RANDOM], ("adamw",)), ids=case_id)
def test_the_mean_of_rounded_numbers_is_exact(on: str, rule: str, case: Case) -> None:
    """Over the whole range of exponents: to 5 standard errors of a million draws (where Python draws, of 24,000)."""
    few = interpreted_by_python(on)
    exponents = torch.tensor([-130, -126, -60, -10, 0, 1, 50, 127])
    values = (
        (torch.tensor([1.0, -1.6640625, 1.9921875])[:, None].double() * 2.0**exponents).bfloat16().float().reshape(-1)
    )
    count = (24_000 if few else 1_000_000) // len(values)
    decay = 1 / 300
    p = values.to(device_of(on)).repeat_interleave(count)
    rounded = exact(decayed(on, rule, p, decay)).reshape(len(values), count)
    wanted = exact(values) * (1 - decay)
    _, exponent = np.frexp(wanted)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, -126) - 7)
    low = np.floor(wanted / unit)
    up = rounded / unit[:, None] - low[:, None]
    assert set(np.unique(up)) <= {0.0, 1.0}
    chance = wanted / unit - low
    errors = np.abs(up.mean(1) - chance)
    # Below the smallest normal number, the step's product is itself rounded: to 2^-16 of the unit.
    assert (errors <= 5 * np.sqrt(chance * (1 - chance) / count) + 2.0**-15).all(), errors
    together = (up - chance[:, None]).sum() / np.sqrt((chance * (1 - chance) * count).sum())
    assert abs(together) <= 5


@pytest.mark.parametrize(("on", "rule", "case"), on_cases([AT_RANDOM], ("adamw", "adan")), ids=case_id)
def test_the_bits_are_those_of_the_definition(on: str, rule: str, case: Case, generator) -> None:
    """Where float32 arithmetic is exact: p (1 - 2^-9), then that of it, in the parameters 0 and 1 of two steps."""
    params = [leaf(x.detach(), x.grad) for x in problem(on, case, generator)]
    own = {"no_prox": True} if rule == "adan" else {}
    optimizer = made(on, rule, case, params, lr=1.0, weight_decay=2.0**-9, rounding_seed=SEED, **own)
    for step in (1, 2):
        before = [p.detach().float() for p in params]
        optimizer.step()
        for index, (p, x) in enumerate(zip(params, before, strict=True)):
            elements = torch.arange(p.numel(), device=p.device)
            bits = random_bits(elements, seed=SEED, step=step, index=index, array=0)
            assert same_bits(p, round_stochastically(x * (1 - 2.0**-9), bits))


@pytest.mark.parametrize(("on", "rule", "case"), on_cases([AT_RANDOM], ("adamw",)), ids=case_id)
def test_all_random_numbers_differ(on: str, rule: str, case: Case) -> None:
    """Of seeds, of steps, of parameters and of arrays: halfway between two numbers, half of the elements differ."""
    ups = {}
    ones = torch.ones(2048, device=device_of(on))
    for seed in (0, 1, 2**32):
        ups[f"seed {seed}"] = decayed(on, rule, ones, 2.0**-9, rounding_seed=seed) == 1
    g = (ones * 165 / 128).bfloat16()  # 3/4 of it is halfway, and nearly so 3/4 of its square
    params = [leaf(ones.bfloat16(), g) for _ in range(2)]
    optimizer = made(on, rule, case, params, betas=(0.25, 0.25), lr=0.0, agr=False)
    for step in (1, 2):
        optimizer.step()
        for index, p in enumerate(params):
            for key in RULES[rule][2]:
                average = optimizer.state[p][key]
                ups[f"{key} of {index} in step {step}"] = average == average.max()
                average.zero_()
    found = list(ups.items())
    for i, (name, up) in enumerate(found):
        assert 0.4 < up.double().mean() < 0.6, name
        for other, its in found[:i]:
            assert 0.4 < (up != its).double().mean() < 0.6, f"{name} and {other}"


@pytest.mark.parametrize(("on", "rule", "case"), on_cases([AT_RANDOM], ("adamw", "adan")), ids=case_id)
def test_rounding_makes_no_infinity_and_no_nan(on: str, rule: str, case: Case) -> None:
    """Of a parameter that a step moves beyond bfloat16's numbers. Averages of infinities and NaN are what they are."""
    device, count = device_of(on), 512
    largest = torch.finfo(torch.bfloat16).max
    p = leaf(*(torch.full((count,), x, device=device, dtype=torch.bfloat16) for x in (largest, -1.0)))
    made(on, rule, case, [p], lr=0.75 * 2.0**120, weight_decay=0.0, eps=0.0, agr=False).step()
    assert (p == largest).all()

    gradient = torch.full((count,), torch.inf, device=device, dtype=torch.bfloat16)
    gradient[1::2] *= -1
    gradient[0] = torch.nan
    p = leaf(torch.ones_like(gradient), gradient)
    optimizer = made(on, rule, case, [p], agr=False)
    optimizer.step()
    for key in {"exp_avg", "neg_pre_grad"} & optimizer.state[p].keys():
        average, sign = optimizer.state[p][key], -1 if key == "neg_pre_grad" else 1
        assert average[0].isnan()
        assert torch.equal(average[1:], sign * gradient[1:])
    assert p[0].isnan()


@pytest.mark.parametrize(
    ("on", "rule", "case"), on_cases([AT_RANDOM._replace(gradient="float32")], ("adamw", "adan")), ids=case_id
)
def test_averages_beyond_bfloat16_are_its_largest(on: str, rule: str, case: Case) -> None:
    largest, top = torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).max
    gradient = torch.tensor([top, -top], device=device_of(on)).repeat(256)
    p = leaf(torch.ones_like(gradient).bfloat16(), gradient)
    optimizer = made(on, rule, case, [p], agr=False, betas=(0.0, 0.92, 0.99)[: 3 if rule == "adan" else 2])
    optimizer.step()
    for key in {"exp_avg", "neg_pre_grad"} & optimizer.state[p].keys():
        sign = -1 if key == "neg_pre_grad" else 1
        assert torch.equal(optimizer.state[p][key].float(), gradient.sign() * sign * largest)


@pytest.mark.parametrize(("on", "rule", "case"), on_cases(KINDS, ("amsgrad", "adan"), every=7, rest=2), ids=case_id)
def test_two_halves_of_a_run_are_the_whole(on: str, rule: str, case: Case) -> None:
    """By a state dict between them, in a new optimizer of the same options; the seed is in the state dict."""

    def part(optimizer: Any, steps: range) -> Any:
        for step in steps:
            fill_gradients(all_params(optimizer), torch.Generator().manual_seed(step))
            optimizer.step()
        return optimizer

    def begun() -> list[Tensor]:
        return problem(on, case, torch.Generator().manual_seed(0))

    half = 1 if interpreted_by_python(on) else 3
    whole = part(made(on, rule, case, begun(), rounding_seed=SEED), range(2 * half))
    first = part(made(on, rule, case, begun(), rounding_seed=SEED), range(half))
    params = [leaf(p.detach().clone(), p.grad) for p in all_params(first)]
    second = made(on, rule, case, params)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same_bits(part(second, range(half, 2 * half)), whole)


# Training.


def regression(
    width: int, outputs: int, rows: int, noise: float, device: torch.device
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The weights that noisy numbers were made from, and the loss of others: the mean square of what they miss."""
    generator = torch.Generator().manual_seed(5)
    weights = 0.55 + 0.4 * torch.rand(width, outputs, generator=generator)
    x = torch.randn(rows, width, generator=generator)
    y = (x @ weights + noise * torch.randn(rows, outputs, generator=generator)).to(device)
    x = x.to(device)
    return weights.to(device), lambda w: (x @ w.float() - y).square().mean()


def trained(
    on: str, rule: str, case: Case, start: Tensor, loss: Callable[[Tensor], Tensor], steps: int, lr: float
) -> float:
    """The loss after so many steps."""
    dtype = DTYPES[case.gradient]
    p = leaf(start.to(DTYPES[case.parameter], copy=True), torch.zeros_like(start, dtype=dtype))
    optimizer = made(on, rule, case, [p], lr=lr, weight_decay=0.0, eps=1e-8, rounding_seed=3)
    for _ in range(steps):
        w = p.detach().float().requires_grad_()
        loss(w).backward()
        p.grad.copy_(w.grad)
        optimizer.step()
    return float(loss(p.detach()))


@pytest.mark.parametrize(("on", "rule", "case"), on_cases([AT_RANDOM], ("adamw", "adan"), every=2), ids=case_id)
def test_training_by_less_than_half_a_unit(on: str, rule: str, case: Case) -> None:
    """To nearest, a bfloat16 parameter from 1/2 to 1 is never moved by less than 2^-9."""
    weights, loss = regression(16, 1, 256, 0.55, device_of(on))
    start = (weights + 0.05).bfloat16().float()
    run = {"start": start, "loss": loss, "lr": 1.5e-3}
    whole = trained("reference", rule, IN_FLOAT32, steps=40, **run)
    at_random = trained(on, rule, case, steps=40, **run)
    to_nearest = trained(on, rule, case._replace(stochastic=False), steps=10, **run)
    assert float(loss(start)) > 1.2 * whole
    assert abs(at_random - whole) <= 0.02 * whole
    assert to_nearest == float(loss(start))


@pytest.mark.parametrize(("on", "rule", "case"), on_cases([IN_CODES], ("adamw", "adan"), every=2), ids=case_id)
def test_training_with_state_of_8_bits(on: str, rule: str, case: Case) -> None:
    """To the noise of the problem, which Adan's longer averages take longer to reach; Python begins near it."""
    few = interpreted_by_python(on)
    weights, loss = regression(64, 64, 512, 1.0, device_of(on))
    steps = 12 if few else 300 if rule == "adan" else 100
    run = {"start": weights * (0.9 if few else 0.0), "loss": loss, "steps": steps, "lr": 2e-2}
    whole, coded = trained("reference", rule, IN_FLOAT32, **run), trained(on, rule, case, **run)
    assert whole < (0.7 if few else 0.03) * float(loss(run["start"]))
    assert coded != whole
    assert abs(coded - whole) <= 0.01 * whole


# Codes of 8 bits.


def blocks_of(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Blocks of 256 numbers, by what is particular about them."""
    generator = torch.Generator().manual_seed(8)
    normal = torch.randn(256, generator=generator)
    decades = normal * 10 ** (-9 * torch.rand(256, generator=generator))
    made_of = {
        "normal": normal,
        "over nine decades": decades,
        "large": normal * 1e37,
        "just above denormal": decades.clamp(-1, 1).index_fill(0, torch.tensor([0]), 1.0) * 2.0**-126,
        "denormal": normal.clamp(-1, 1) * 2.0**-128,
        "one number": torch.zeros(256).index_fill(0, torch.tensor([77]), 0.3),
        "zero": torch.zeros(256),
        "alike": torch.full((256,), 0.7),
        "alike and negative": torch.full((256,), -0.7),
    }
    return {name: block.to(device) for name, block in made_of.items()}


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_the_middles_of_intervals(signed: bool) -> None:
    values = np.array(code_values(signed))
    np.testing.assert_allclose(values, stored.code_values(signed), rtol=1e-14)
    assert len(values) == 256
    codes = torch.arange(256, dtype=torch.uint8)
    if signed:
        np.testing.assert_array_equal(values[128:], -values[:128])
        codes = codes[codes != 128]  # -0, which nothing is stored as
    assert len({values[code] for code in codes}) == len(codes)
    scales = torch.tensor([1.0])
    again, scale = quantize(dequantize(codes, scales, signed), signed)
    assert torch.equal(scale, scales)
    assert torch.equal(again, codes)


def assert_kept(name: str, kept: np.ndarray, x: np.ndarray, signed: bool, exactly: bool = True) -> None:
    """What is promised of a block: half an interval, and what is 0, positive and the largest."""
    scale, slack = np.abs(x).max(), 0.0 if exactly else 1e-6
    if scale < 2.0**-126:
        assert (kept == 0).all(), name
        return
    with np.errstate(divide="ignore"):
        decade = np.clip(np.floor(-np.log10(np.abs(x) / scale)), 0, 5 if signed else 6)
    half = 0.45 * 10.0**-decade / 2.0 ** ((6 if signed else 7) - decade)
    if not signed:
        half = np.maximum(half, 0.325e-6)  # the smallest value, which is also that of all smaller second moments
        assert (kept[x > 2.0**-149] > 0).all(), name
    assert (np.abs(kept - x) <= half * scale * (1 + 1e-5) + slack * np.abs(x) + 1e-44).all(), name
    assert (kept[x == 0] == 0).all(), name
    largest = np.abs(x) == scale
    assert (np.abs(kept - x)[largest] <= slack * scale).all(), name
    assert (kept * np.sign(x) >= 0).all(), name


@pytest.mark.parametrize("signed", [True, False])
def test_what_a_block_of_codes_keeps(signed: bool) -> None:
    for name, block in blocks_of().items():
        x = block if signed else block.abs()
        codes, scales = quantize(x, signed)
        assert_kept(name, exact(dequantize(codes, scales, signed)), exact(x), signed)
        if float(scales) >= 2.0**-126:
            low, high = (stored.in_code(exact(x) / float(scales) * (1 + error), signed) for error in (-4e-6, 4e-6))
            low, high = np.minimum(low, high), np.maximum(low, high)
            assert_between(name, stored.code_values(signed)[codes.numpy()], low, high)


@pytest.mark.parametrize("signed", [True, False])
def test_a_block_with_an_infinity_or_nan_is_nan(signed: bool) -> None:
    for bad in (torch.inf, -torch.inf, torch.nan):
        x = torch.ones(3 * 256 + 10)
        x[256 + 9] = bad
        kept = dequantize(*quantize(x, signed), signed)
        assert kept[256:512].isnan().all()
        assert torch.equal(kept[:256], x[:256])
        assert torch.equal(kept[512:], x[512:])


@pytest.mark.parametrize(("on", "rule", "case"), on_cases([IN_CODES], every=2), ids=case_id)
def test_what_a_step_keeps_in_codes(on: str, rule: str, case: Case) -> None:
    """The same blocks as gradients, from which the averages of a first step are one product; NaN keeps to its block."""
    named = blocks_of(device_of(on))
    gradient = torch.cat([*named.values()] * 2 + [torch.ones(77, device=device_of(on))])
    bad = 3 * 256
    gradient[bad + 1] = torch.nan
    p = leaf(torch.ones_like(gradient), gradient)
    optimizer = made(on, rule, case, [p], agr=False)
    optimizer.step()
    betas, state = optimizer.defaults["betas"], optimizer.state[p]
    averages = {"exp_avg": 1 - betas[0], "exp_avg_sq": 1 - betas[-1], "neg_pre_grad": -1.0}
    for key in (key for key in averages if f"{key}_codes" in state):
        signed, g = key not in UNSIGNED, exact(gradient)
        kept = exact(dequantize(state[f"{key}_codes"], state[f"{key}_scale"], signed))
        wanted = averages[key] * (g if signed else g * g)
        assert np.isnan(kept[bad : bad + 256]).all()
        for begin in range(0, len(wanted), 256):
            x, found = wanted[begin : begin + 256], kept[begin : begin + 256]
            if begin != bad and 2.0**-125 < np.abs(x).max() < 2.0**128:  # where float32 has all of its bits
                assert_kept(f"{key}, block {begin // 256}", found, x, signed, exactly=False)
    assert p[torch.arange(len(p), device=p.device) // 256 != 3].isfinite().all()
    assert p[bad + 1].isnan()


# AGR.


@pytest.mark.parametrize(
    ("on", "rule", "case"),
    on_cases([WITH_MASTER, IN_FLOAT32._replace(gradient="bfloat16"), AT_RANDOM._replace(state="float32")]),
    ids=case_id,
)
def test_agr_is_not_lost_in_16_bits(on: str, rule: str, case: Case, generator) -> None:
    """In bfloat16, 1 - |g| / S is 1 for a tensor of some size. In float32 it is what the formula says."""
    (p,) = problem(on, case, generator, [(3000,)])
    p.grad.copy_(1 + torch.rand(3000, generator=generator))
    g, s = p.grad, p.grad.abs().sum(dtype=torch.bfloat16)
    assert torch.equal(g * (1 - g.abs() / s), g)
    betas = (0.0, 0.92, 0.99)[: 3 if rule == "adan" else 2]
    optimizer = made(on, rule, case, [p], betas=betas)
    optimizer.step()
    average, plain = exact(optimizer.state[p]["exp_avg"]), exact(g)
    share = plain / plain.sum()
    np.testing.assert_allclose(average, plain * (1 - share), rtol=1e-6)
    np.testing.assert_allclose(1 - average / plain, share, rtol=1e-3)
    assert (average != plain).all()


@pytest.mark.parametrize("beta", [0.9, 0.99])
def test_codes_are_the_same_for_both_signs(beta: float, method, backend: str, device: torch.device) -> None:
    """Also where the largest element of a block is negative, step after step."""
    (start,) = torch.randn(1, 4096, generator=torch.Generator().manual_seed(2))
    constant = torch.ones(4096).index_fill(0, torch.arange(0, 4096, 3), 0.01)
    moved = []
    for sign in (1, -1):
        p = (sign * start).to(device).requires_grad_()
        optimizer = method.ours([p], lr=0.01, betas=(beta, *_BETAS[method.name]), state_dtype="8bit", backend=backend)
        for _ in range(3 if backend == "triton" else 60):
            p.grad = (sign * constant).to(device)
            optimizer.step()
        moved.append(sign * p.detach().cpu())
        exp_avg = dequantize(*(optimizer.state[p][f"exp_avg_{key}"] for key in ("codes", "scale")), signed=True)
        if backend != "triton" and beta == 0.9:
            largest = exp_avg[constant.to(device) == 1].abs()
            assert (largest >= 0.99).all()
    assert torch.equal(*moved)


_BETAS = {"AdamW": (0.999,), "Adan": (0.92, 0.99)}
