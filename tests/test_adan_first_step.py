"""Adan's difference to the previous gradient is 0 on a parameter's first step, whenever and however that comes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from conftest import case_id, device_of, on_backends
from helpers import (
    ADAN,
    all_params,
    assert_close,
    assert_parameters_close,
    assert_same_bits,
    copies,
    gradient,
    oracle_for,
    oracle_gradients,
    pairs,
    parameters,
    relative_error,
    same_bits,
    to_numpy,
)
from torch import Tensor

import agr_cuda

SHAPES = [(7,), (64, 33), (0,), (31,)]
SMALL = [(7,), (8, 6), (31,)]
LATE = 1  # the parameter whose first step is another than the others'

# A run is written as a word: in a step "." is ordinary, "+" is made under mixed precision, "-" is skipped by it, and in
# those written as "o", "p" and "m" the late parameter has no gradient.
WITHOUT = {"o": ".", "p": "+", "m": "-"}
SCALE = 1024.0


def sixteen_bit(dtype: torch.dtype) -> dict[str, float]:
    """What makes accuracy in 16 bits a fair question: see test_accuracy."""
    return {"lr": 1e-2, "eps": 1e-3} if dtype in (torch.bfloat16, torch.float16) else {"lr": 1e-2}


def give(params: Sequence[Tensor], step: int, late: Sequence[int]) -> None:
    """Gradients that depend on the step alone; none for those of `late`."""
    generator = torch.Generator().manual_seed(step)
    for index, p in enumerate(params):
        g = gradient(p, generator, step)
        p.grad = None if index in late else g


def amp_step(optimizer: Any, found: bool) -> None:
    """As torch.amp.GradScaler makes it of scaled gradients, of which one is infinite where it says so."""
    params = [p for p in all_params(optimizer) if p.grad is not None]
    for p in params:
        p.grad.mul_(SCALE)
        if found and p.numel():
            p.grad.view(-1)[0] = torch.inf
    device = all_params(optimizer)[0].device
    optimizer.grad_scale = torch.tensor(SCALE, device=device)
    optimizer.found_inf = torch.tensor(float(found), device=device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def steps(optimizer: Any, word: str, expected: Any = None, first: int = 0, late: Sequence[int] = (LATE,)) -> None:
    for step, letter in enumerate(word, start=first):
        kind = WITHOUT.get(letter, letter)
        give(all_params(optimizer), step, late if letter in WITHOUT else ())
        grads = oracle_gradients(all_params(optimizer))
        if kind == ".":
            optimizer.step()
        else:
            amp_step(optimizer, kind == "-")
        if expected is not None and kind != "-":
            expected.step(grads)


def made(params: list[Tensor], backend: str | None, **options: Any) -> Any:
    return agr_cuda.Adan(params, backend=backend, **options)


def assert_no_difference(optimizer: Any, p: Tensor) -> None:
    """As it is after p's first step."""
    state = optimizer.state[p]
    assert not state["exp_avg_diff"].any()
    assert not p.numel() or state["exp_avg"].any()


# A first gradient that comes late, or is skipped.

OPTIONS: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.5}, {"capturable": True}, {"no_prox": True, "agr": False}]


@pytest.mark.parametrize("late", [1, 3])
def test_a_first_gradient_at_a_later_step_of_the_group(late: int, backend, float_dtype, device, generator) -> None:
    params = parameters(generator, SHAPES, float_dtype, device)
    optimizer = made(params, backend, **sixteen_bit(float_dtype))
    expected = oracle_for(ADAN, optimizer)
    steps(optimizer, "o" * late, expected)
    assert not optimizer.state.get(params[LATE])
    steps(optimizer, ".", expected, first=late)
    assert_no_difference(optimizer, params[LATE])
    assert optimizer.state[params[0]]["exp_avg_diff"].any()
    steps(optimizer, "..", expected, first=late + 1)
    assert optimizer.state[params[LATE]]["exp_avg_diff"].any()
    assert_close(optimizer, expected)


WORDS = ["oo..", "om-+.", "o-.+", "pm--+.", "--+.", "-m.o.", "o-o+.", "-o-.+", "oo-p-m+."]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("on", "word"), on_backends(*WORDS), ids=case_id)
def test_the_first_step_is_the_first_that_is_made(on: str, word: str, options: dict, generator) -> None:
    """However many of the steps with a gradient before it were skipped; beside the oracle, which knows of none."""
    params = parameters(generator, SMALL, device=device_of(on))
    optimizer = made(params, on, lr=1e-2, **options)
    expected = oracle_for(ADAN, optimizer, options.get("max_grad_norm"))
    begun = False
    for step, letter in enumerate(word):
        steps(optimizer, letter, expected, first=step)
        if letter in ".+" and not begun:
            begun = True
            assert_no_difference(optimizer, params[LATE])
    assert optimizer.state[params[LATE]]["exp_avg_diff"].any() == (sum(letter in ".+" for letter in word) > 1)
    assert_close(optimizer, expected)


@pytest.mark.parametrize("skipped", ["-", "--", "-m-"])
@pytest.mark.parametrize("before", ["", "oo"])
def test_skipped_first_steps_are_as_if_never_made(before: str, skipped: str, backend, float_dtype, device, generator):
    params = parameters(generator, SHAPES, float_dtype, device)
    optimizer = made(params, backend, **sixteen_bit(float_dtype))
    twin = made(copies(params), backend, **sixteen_bit(float_dtype))
    for o, word in ((optimizer, skipped), (twin, "")):
        steps(o, before)
        steps(o, word, first=10)
        steps(o, "++", first=20)
    assert_same_bits(optimizer, twin)


# Interrupted between the skipped and the made step.


def through_a_file(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return loaded(optimizer, torch.load(file, weights_only=True))


def through_state_dict(optimizer: Any) -> Any:
    return loaded(optimizer, copy.deepcopy(optimizer.state_dict()))


def into_itself(optimizer: Any) -> Any:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def through_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def loaded(optimizer: Any, state_dict: dict[str, Any]) -> Any:
    fresh = made(copies(all_params(optimizer)), optimizer.backend, max_grad_norm=optimizer.max_grad_norm)
    fresh.load_state_dict(state_dict)
    return fresh


def looked_at(optimizer: Any) -> Any:
    optimizer.state_dict()
    return optimizer


INTERRUPTIONS = [through_state_dict, through_pickle, through_a_file, copy.deepcopy, into_itself, looked_at]


@pytest.mark.parametrize("word", ["om|-.+", "o-|+.", "--|-+.", "o-|m|-o|+."])
@pytest.mark.parametrize(("on", "how"), on_backends(*INTERRUPTIONS), ids=case_id)
def test_an_interruption_changes_nothing(on: str, how: Callable[[Any], Any], word: str, generator) -> None:
    """Each "|" is one."""
    params = parameters(generator, SMALL, device=device_of(on))
    optimizer, steady = made(params, on, lr=1e-2), made(copies(params), on, lr=1e-2)
    first = 0
    for part in word.split("|"):
        optimizer = how(optimizer) if first else optimizer
        steps(optimizer, part, first=first)
        steps(steady, part, first=first)
        first += len(part)
    assert_same_bits(optimizer, steady)
    assert optimizer.state_dict()["param_groups"][0]["step"] == steady.state_dict()["param_groups"][0]["step"]


# sail-sg/Adan's code goes on from our state dicts, and we from its.


class Sails(torch.optim.Optimizer):
    """The rule of sail-sg/Adan as to first steps, on the update that both have: no AGR, no mixed precision."""

    def __init__(self, params: list[Tensor], max_grad_norm: float = 0.0, **options: Any) -> None:
        defaults = {"lr": 1e-3, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0.0, "no_prox": False}
        super().__init__(params, {**defaults, "max_grad_norm": max_grad_norm, **options})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        grads = [p.grad for p in all_params(self) if p.grad is not None]
        first = self.param_groups[0]
        c = torch.ones((), dtype=torch.float64)
        if first["max_grad_norm"] and grads:
            norm = sum(g.double().square().sum() for g in grads).sqrt()
            c = (first["max_grad_norm"] / (norm + first["eps"])).clamp(max=1.0)
        for group in self.param_groups:
            group["step"] = t = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, t, p, p.grad * c)

    def update(self, group: dict[str, Any], t: int, p: Tensor, g: Tensor) -> None:
        (b1, b2, b3), state = group["betas"], self.state[p]
        if not state:
            state.update({key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_diff", "exp_avg_sq")})
        if "neg_pre_grad" not in state or t == 1:
            state["neg_pre_grad"] = -g
        d = g + state["neg_pre_grad"]
        state["exp_avg"].lerp_(g, 1 - b1)
        state["exp_avg_diff"].lerp_(d, 1 - b2)
        state["exp_avg_sq"].lerp_((g + b2 * d).square(), 1 - b3)
        state["neg_pre_grad"] = -g
        divisor = state["exp_avg_sq"].sqrt() / (1 - b3**t) ** 0.5 + group["eps"]
        along = state["exp_avg"] / (1 - b1**t) + b2 * state["exp_avg_diff"] / (1 - b2**t)
        if group["no_prox"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * along / divisor)
        if not group["no_prox"]:
            p.div_(1 + group["lr"] * group["weight_decay"])

    def restart_opt(self) -> None:
        """It leaves neg_pre_grad as it is; the step count of 0 has the next step overwrite it."""
        for group in self.param_groups:
            group["step"] = 0
            for p in group["params"]:
                for key in ("exp_avg", "exp_avg_diff", "exp_avg_sq"):
                    self.state[p][key] = torch.zeros_like(p.detach())


# Float64, so that what differs is no rounding.
EXACT = {"dtype": torch.float64, "bound": 1e-12}
SAILS_OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": 0.1},
    {"max_grad_norm": 0.5},
    {"no_prox": True, "weight_decay": 0.1, "max_grad_norm": 2.0},
]


def sails_of(params: list[Tensor], **options: Any) -> Sails:
    """On the CPU, from where a checkpoint may come."""
    return Sails([p.detach().cpu().clone().requires_grad_() for p in params], **options)


def continue_alike(ours: Any, theirs: Sails, words: Sequence[str], first: int) -> None:
    """Ordinary steps; the numbers of each, and in the end the states, are the same."""
    for step, letter in enumerate(words, start=first):
        steps(ours, letter, first=step)
        steps(theirs, letter, first=step)
        assert_parameters_close(all_params(ours), all_params(theirs), EXACT["bound"])
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys() == set(ADAN.states)
        for key in ADAN.states:
            assert_parameters_close([ours.state[p][key]], [theirs.state[q][key]], 1e-10)
    assert [int(g["step"]) for g in ours.param_groups] == [g["step"] for g in theirs.param_groups]


@pytest.mark.parametrize("options", SAILS_OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("on", "word"), on_backends("oo", "o-", "o--", "--", "oo-m", "..", "-", "p-", "o-p", every=4), ids=case_id
)
def test_our_state_dict_goes_on_in_sails_code(on: str, word: str, options: dict, generator) -> None:
    """Where the late parameter has had no gradient, or only ones that were skipped, it finds no previous one."""
    params = parameters(generator, SMALL, EXACT["dtype"], device_of(on))
    ours = made(params, on, lr=1e-2, agr=False, **options)
    steps(ours, word)
    theirs = sails_of(params, lr=1e-2, **options)
    saved = copy.deepcopy(ours.state_dict())
    assert_nothing_is_made_up(saved, word)
    saved["param_groups"][0]["max_grad_norm"] = options.get("max_grad_norm", 0.0)
    theirs.load_state_dict(saved)
    continue_alike(ours, theirs, "....", len(word))


def assert_nothing_is_made_up(saved: dict[str, Any], word: str) -> None:
    """A neg_pre_grad where there has been a step, and no other."""
    taken = sum(letter in ".+op" for letter in word)
    own = sum(letter in ".+" for letter in word)
    assert type(saved["param_groups"][0]["step"]) is int
    assert saved["param_groups"][0]["step"] == taken
    for index in range(len(SMALL)):
        state = saved["state"].get(index, {})
        assert ("neg_pre_grad" in state) == bool(own if index == LATE else taken)


@pytest.mark.parametrize("options", SAILS_OPTIONS[1:], ids=str)
@pytest.mark.parametrize(("on", "skipped"), on_backends("", "-", "m", every=2), ids=case_id)
def test_our_state_dict_after_a_restart_goes_on_in_sails_code(on: str, skipped: str, options: dict, generator) -> None:
    params = parameters(generator, SMALL, EXACT["dtype"], device_of(on))
    ours = made(params, on, lr=1e-2, agr=False, **options)
    steps(ours, "..")
    ours.restart_opt()
    steps(ours, skipped, first=2)
    theirs = sails_of(params, lr=1e-2, **options)
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0]["max_grad_norm"] = options["max_grad_norm"]
    theirs.load_state_dict(saved)
    continue_alike(ours, theirs, "...", 3)


@pytest.mark.parametrize("options", SAILS_OPTIONS, ids=str)
@pytest.mark.parametrize(("on", "word"), on_backends("...", "-..", "--+", "+-."), ids=case_id)
def test_sails_restarted_run_goes_on_here(on: str, word: str, options: dict, generator) -> None:
    """Its stale gradients are not this run's, also where the first steps are skipped."""
    theirs = sails_of(parameters(generator, SMALL, EXACT["dtype"]), lr=1e-2, **options)
    steps(theirs, "..")
    theirs.restart_opt()
    assert all(theirs.state[p]["neg_pre_grad"].any() for p in all_params(theirs))
    ours = from_sails(theirs, on, device_of(on), options)
    assert_begins(ours, word)


@pytest.mark.parametrize("word", ["o..", "-o."])
def test_sails_restarted_run_in_which_a_gradient_comes_late(word: str, backend, device, generator) -> None:
    """A count of 0 says that nobody has had a step since: so what is left of the time before is no one's previous
    gradient, also not of a parameter without one in the first step. (In sail-sg's code it is, then.)"""
    theirs = sails_of(parameters(generator, SMALL, EXACT["dtype"]), lr=1e-2)
    steps(theirs, "..")
    theirs.restart_opt()
    assert_begins(from_sails(theirs, backend, device, {}), word)


def from_sails(theirs: Sails, backend: str, device: torch.device, options: dict[str, Any]) -> Any:
    params = [p.detach().to(device).clone().requires_grad_() for p in all_params(theirs)]
    ours = made(params, backend, agr=False, **options)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return ours


def assert_begins(ours: Any, word: str) -> None:
    """As a new run from the present parameters, which is the oracle's."""
    group = {"params": [oracle_parameter_of(p) for p in all_params(ours)]}
    names = ("lr", "betas", "eps", "weight_decay", "no_prox", "agr")
    group |= {name: ours.param_groups[0][name] for name in names}
    expected = oracle.Adan([group], max_grad_norm=ours.max_grad_norm)
    steps(ours, word, expected, first=2)
    assert_close(ours, expected)


def oracle_parameter_of(p: Tensor) -> oracle.Parameter:
    return oracle.Parameter(to_numpy(p), str(p.dtype).removeprefix("torch."))


@pytest.mark.parametrize("options", SAILS_OPTIONS, ids=str)
def test_sails_state_without_a_previous_gradient(options: dict, backend, device, generator) -> None:
    """As one has it that leaves out what the next step could do without: then that has no difference."""
    params = parameters(generator, SMALL, EXACT["dtype"], device)
    theirs = sails_of(params, lr=1e-2, **options)
    steps(theirs, "...")
    del theirs.state[all_params(theirs)[LATE]]["neg_pre_grad"]
    ours = from_sails(theirs, backend, device, options)
    before = ours.state[all_params(ours)[LATE]]["exp_avg_diff"].clone()
    continue_alike(ours, theirs, ".", 3)
    decayed = ours.param_groups[0]["betas"][1] * before
    assert_parameters_close([ours.state[all_params(ours)[LATE]]["exp_avg_diff"]], [decayed], 1e-12)
    continue_alike(ours, theirs, "..", 4)


@pytest.mark.parametrize("skipped", ["-", "-m", "--"])
def test_sails_state_without_a_previous_gradient_and_steps_that_are_skipped(skipped: str, backend, device, generator):
    """The oracle goes on in which it is missing as well; the step after the skipped ones has no difference."""
    params = parameters(generator, SMALL, EXACT["dtype"], device)
    theirs = sails_of(params, lr=1e-2)
    steps(theirs, "...")
    del theirs.state[all_params(theirs)[LATE]]["neg_pre_grad"]
    ours = from_sails(theirs, backend, device, {})
    steps(ours, skipped, first=3)
    continue_alike(ours, theirs, "...", 6)


def test_sails_restart_with_averages_that_a_program_kept(backend, device, generator) -> None:
    """A count of 0 has the next step count as the first, whatever the averages and neg_pre_grad are."""
    params = parameters(generator, SMALL, EXACT["dtype"], device)
    theirs = sails_of(params, lr=1e-2)
    steps(theirs, "...")
    theirs.param_groups[0]["step"] = 0
    ours = from_sails(theirs, backend, device, {})
    continue_alike(ours, theirs, "...", 3)


# restart_opt().


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("on", "words"),
    on_backends(("..", ".."), ("..", "oo.."), ("oo", "oo.."), ("oo", ".."), (".o", "o.o."), ("+-", "-+."),
                ("o-", "m+."), (".", "o-o.+"), ("..", "-m-+p.")),
    ids=case_id,
)  # fmt: skip
def test_after_restart_opt_everyone_has_a_first_step(on: str, words: tuple, capturable: bool, generator) -> None:
    """Whether it had gradients just before or after it, or in steps that were skipped."""
    before, after = words
    params = parameters(generator, SMALL, device=device_of(on))
    optimizer = made(params, on, lr=1e-2, max_grad_norm=2.0, capturable=capturable)
    expected = oracle_for(ADAN, optimizer, 2.0)
    steps(optimizer, before, expected)
    optimizer.restart_opt()
    expected.restart()
    assert optimizer.state_dict()["param_groups"][0]["step"] == 0
    begun = False
    for step, letter in enumerate(after, start=len(before)):
        steps(optimizer, letter, expected, first=step)
        if letter in ".+" and not begun:
            begun = True
            assert_no_difference(optimizer, params[LATE])
    assert optimizer.state_dict()["param_groups"][0]["step"] == sum(letter not in "-m" for letter in after)
    assert_close(optimizer, expected)


@pytest.mark.parametrize("capturable", [False, True])
def test_restart_opt_is_a_new_optimizer_at_the_present_parameters(capturable, backend, float_dtype, device, generator):
    params = parameters(generator, SHAPES, float_dtype, device)
    options = {**sixteen_bit(float_dtype), "capturable": capturable}
    optimizer = made(params, backend, **options)
    steps(optimizer, "o..")
    optimizer.restart_opt()
    fresh = made(copies(params), backend, **options)
    for o in (optimizer, fresh):
        steps(o, "..o", first=3)
    assert_same_bits(optimizer, fresh)


@pytest.mark.parametrize(("on", "how"), on_backends(*INTERRUPTIONS), ids=case_id)
def test_an_interruption_after_restart_opt_changes_nothing(on: str, how: Callable[[Any], Any], generator) -> None:
    params = parameters(generator, SMALL, device=device_of(on))
    optimizer, steady = made(params, on, lr=1e-2), made(copies(params), on, lr=1e-2)
    for o in (optimizer, steady):
        steps(o, "..")
        o.restart_opt()
    optimizer = how(optimizer)
    for o in (optimizer, steady):
        steps(o, "o.", first=2)
    optimizer = how(optimizer)
    for o in (optimizer, steady):
        steps(o, ".", first=4)
    assert_same_bits(optimizer, steady)


def test_groups_restart_together_and_those_added_begin_by_themselves(backend, device, generator) -> None:
    params, added = (parameters(generator, SMALL, device=device) for _ in range(2))
    optimizer = made(params, backend, lr=1e-2)
    expected = oracle_for(ADAN, optimizer)
    steps(optimizer, "o.", expected)
    optimizer.add_param_group({"params": added})
    expected.add_group({"params": [oracle_parameter_of(p) for p in added], "lr": 1e-2})
    late = (LATE, LATE + len(SMALL))
    steps(optimizer, "o.", expected, first=2, late=late)
    assert_no_difference(optimizer, added[LATE])
    assert optimizer.state[added[0]]["exp_avg_diff"].any()
    assert_close(optimizer, expected)
    optimizer.restart_opt()
    expected.restart()
    steps(optimizer, "o.", expected, first=4, late=late)
    for index in late:
        assert_no_difference(optimizer, all_params(optimizer)[index])
    assert_close(optimizer, expected)


# Infinities and NaN.

BAD = [torch.nan, torch.inf, -torch.inf]


def is_bad(p: Tensor) -> Tensor:
    """Every fifth element."""
    return (torch.arange(p.numel(), device=p.device) % 5 == 2).view(p.shape)


def steps_with(optimizer: Any, word: str, at: int, value: float) -> None:
    """In step `at` the bad elements of every gradient are that."""
    for step, letter in enumerate(word):
        give(all_params(optimizer), step, (LATE,) if letter in WITHOUT else ())
        for p in all_params(optimizer):
            if step == at and p.grad is not None:
                p.grad[is_bad(p)] = value
        if WITHOUT.get(letter, letter) == ".":
            optimizer.step()
        else:
            device = all_params(optimizer)[0].device
            optimizer.found_inf = torch.tensor(float(letter in "-m"), device=device)
            optimizer.step()
            del optimizer.found_inf


@pytest.mark.parametrize(("word", "at"), [("..", 0), ("..", 1), ("o..", 1), ("o-.", 2)])
def test_what_is_not_finite_stays_where_it_is(word: str, at: int, backend, float_dtype, device, generator) -> None:
    """Without AGR, each element is for itself: beside the bad ones all have the bits that they have without them."""
    params = parameters(generator, SMALL, float_dtype, device)
    options = {**sixteen_bit(float_dtype), "agr": False}
    plain = made(copies(params), backend, **options)
    steps_with(plain, word, at, 1.0)
    for value in BAD:
        optimizer = made(copies(params), backend, **options)
        steps_with(optimizer, word, at, value)
        for p, q in zip(all_params(optimizer), all_params(plain), strict=True):
            bad = is_bad(p)
            assert p[bad].isnan().all()
            assert same_bits(p[~bad], q[~bad])
            for key in ADAN.states:
                assert same_bits(optimizer.state[p][key][~bad], plain.state[q][key][~bad]), key


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("agr", [False, True])
@pytest.mark.parametrize(
    ("on", "case"), on_backends(("..", 0), ("o..", 1), ("o.", 1), ("o-.", 2), ("o..", 2)), ids=case_id
)
def test_what_is_not_finite_is_the_oracles(on: str, case: tuple, agr: bool, value: float, generator) -> None:
    """In every parameter and state: on a first step the difference is 0 also where the gradient is not finite."""
    word, at = case
    params = parameters(generator, SMALL, device=device_of(on))
    optimizer = made(params, on, lr=1e-2, agr=agr)
    expected = oracle_for(ADAN, optimizer)
    steps_with(optimizer, word, at, value)
    for step, letter in enumerate(word):
        give(params, step, (LATE,) if letter in WITHOUT else ())
        for p in params:
            if step == at and p.grad is not None:
                p.grad[is_bad(p)] = value
        if letter not in "-m":
            expected.step(oracle_gradients(params))
    for label, x, y in pairs(optimizer, expected):
        finite = torch.as_tensor(y).isfinite()
        assert same_kind(x, torch.as_tensor(y)), label
        if finite.any():
            assert relative_error(x.detach().cpu()[finite], y[finite.numpy()]) <= 1e-6, label
    if at == word.rindex(".") and "." not in word[:at]:
        assert not optimizer.state[params[LATE]]["exp_avg_diff"].any()


def same_kind(x: Tensor, y: Tensor) -> bool:
    """NaN and infinities of either sign are in the same places."""
    kinds = [torch.where(z.isfinite(), 2.0, z.nan_to_num(0.0, 1.0, -1.0)) for z in (x.detach().cpu().double(), y)]
    return torch.equal(*kinds)
