"""State of other types, masters and codes: saved and loaded bit for bit, converted to what the groups' options say."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    ADAN,
    METHODS,
    Method,
    all_params,
    assert_same_bits,
    copies,
    parameter,
    parameters,
    run,
    same_bits,
    snapshot,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import agr_cuda
from agr_cuda.quantization import dequantize, quantize

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(31,), (70, 60), ()]
STATES = [None, FP32, BF16, "8bit"]
#: (type of the parameters, options).
KINDS: list[tuple[torch.dtype, dict[str, Any]]] = [
    *((BF16, {"state_dtype": state}) for state in STATES[1:]),
    *((FP32, {"state_dtype": state}) for state in STATES[2:]),
    *((BF16, {"master_weights": True, "state_dtype": state}) for state in STATES),
    (FP16, {"master_weights": True, "state_dtype": "8bit"}),
    (BF16, {"stochastic_rounding": True, "rounding_seed": 9, "state_dtype": BF16}),
]


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def made(method: Method, params: list[Tensor], **options: Any) -> Any:
    return method.ours(params, lr=0.01, backend="reference", **options)


def begun(method: Method, dtype: torch.dtype, **options: Any) -> Any:
    optimizer = made(method, parameters(torch.Generator().manual_seed(5), SHAPES, dtype), **options)
    run(optimizer, 3)
    return optimizer


def values_of(optimizer: Any, p: Tensor, key: str) -> Tensor:
    """An average as numbers."""
    state = optimizer.state[p]
    if f"{key}_scale" in state:
        return dequantize(state[f"{key}_codes"], state[f"{key}_scale"], signed=not key.endswith("_sq"))
    return state[key]


def assert_holds(optimizer: Any, p: Tensor, key: str, values: Tensor, state_dtype: Any) -> None:
    """The average is stored in this type, and is what `values` become when they are converted."""
    state = optimizer.state[p]
    if state_dtype == "8bit" and p.numel() >= 4096 and p.is_contiguous():
        codes, scales = quantize(values.float(), signed=not key.endswith("_sq"))
        assert same_bits(state[f"{key}_codes"], codes)
        assert same_bits(state[f"{key}_scale"], scales)
        assert key not in state
    else:
        assert not {f"{key}_scale", f"{key}_codes"} & state.keys()
        assert same_bits(state[key], values.to(FP32 if state_dtype == "8bit" else state_dtype))


def state_dtype_of(p: Tensor, options: dict[str, Any]) -> Any:
    if options.get("state_dtype") is not None:
        return options["state_dtype"]
    return FP32 if options.get("master_weights") else p.dtype


# Saved and loaded.


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize(("dtype", "options"), KINDS, ids=str)
def test_a_run_resumes_bit_for_bit(dtype: torch.dtype, options: dict, how: str, method: Method) -> None:
    optimizer = begun(method, dtype, **options)
    if how == "file":
        other = made(method, copies(all_params(optimizer)), **options)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert_same_bits(optimizer, other)
    for o in (optimizer, other):
        run(o, range(3, 6))
    assert_same_bits(optimizer, other)


@pytest.mark.parametrize("stored_as", [torch.contiguous_format, torch.channels_last])
def test_codes_survive_a_checkpoint_that_keeps_no_memory_layout(stored_as, method: Method, generator) -> None:
    def image(layout: torch.memory_format) -> list[Tensor]:
        given = parameter((4, 16, 9, 8), torch.Generator().manual_seed(1)).detach()
        return [given.to(memory_format=layout).requires_grad_()]

    optimizer = made(method, image(torch.contiguous_format), state_dtype="8bit")
    run(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] = {
        k: x.contiguous(memory_format=stored_as) if isinstance(x, Tensor) and x.dim() == 4 else x
        for k, x in saved["state"][0].items()
    }
    for layout in (torch.contiguous_format, torch.channels_last):
        other = made(method, image(layout), state_dtype="8bit")
        other.load_state_dict(copy.deepcopy(saved))
        (p,), (q,) = all_params(optimizer), all_params(other)
        for key in method.states:
            if q.is_contiguous():
                assert same_bits(other.state[q][f"{key}_codes"], optimizer.state[p][f"{key}_codes"])
                assert same_bits(other.state[q][f"{key}_scale"], optimizer.state[p][f"{key}_scale"])
            else:
                assert_holds(other, q, key, values_of(optimizer, p, key), "8bit")
        run(other, range(2, 3))


def test_codes_of_a_parameter_whose_memory_layout_changes_become_numbers(method: Method) -> None:
    optimizer = begun(method, FP32, state_dtype="8bit")
    other = made(method, [p.detach().t().contiguous().t().requires_grad_() for p in all_params(optimizer)[1:2]])
    other.param_groups[0]["state_dtype"] = "8bit"
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {0: saved["state"][1]}
    saved["param_groups"][0]["params"] = [0]
    other.load_state_dict(saved)
    (q,) = all_params(other)
    for key in method.states:
        assert other.state[q][key].stride() == q.stride()
        assert_holds(other, q, key, values_of(optimizer, all_params(optimizer)[1], key), "8bit")


@pytest.mark.parametrize(("dtype", "options"), [(FP32, {}), (BF16, {}), (BF16, {"master_weights": True})], ids=str)
@pytest.mark.parametrize("target", STATES)
@pytest.mark.parametrize("source", STATES)
def test_loading_converts(source: Any, target: Any, dtype: torch.dtype, options: dict, method: Method) -> None:
    optimizer = begun(method, dtype, state_dtype=source, **options)
    other = made(method, copies(all_params(optimizer)), state_dtype=target, **options)
    saved = through_a_file(optimizer.state_dict())
    other.load_state_dict(saved)
    assert saved["state"].keys() == other.state_dict()["state"].keys()
    for p, q in zip(all_params(optimizer), all_params(other), strict=True):
        for key in method.states:
            if source == target:  # the codes themselves, which are not made again
                mine, theirs = optimizer.state[p], other.state[q]
                assert mine.keys() == theirs.keys()
                kept = f"{key}_codes" if f"{key}_codes" in mine else key
                assert same_bits(theirs[kept], mine[kept])
                continue
            wanted = state_dtype_of(q, {"state_dtype": target, **options})
            assert_holds(other, q, key, values_of(optimizer, p, key), wanted)
        if options:
            assert same_bits(other.state[q]["master_param"], optimizer.state[p]["master_param"])
    run(other, range(3, 5))


@pytest.mark.parametrize(("dtype", "options"), [(FP32, {}), (BF16, {}), (BF16, {"master_weights": True})], ids=str)
@pytest.mark.parametrize("target", STATES)
@pytest.mark.parametrize("source", STATES)
def test_a_changed_option_converts_as_loading_does(
    source: Any, target: Any, dtype: torch.dtype, options: dict, method: Method
) -> None:
    optimizer = begun(method, dtype, state_dtype=source, **options)
    other = made(method, copies(all_params(optimizer)), state_dtype=target, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["state_dtype"] = target
    for o in (optimizer, other):
        run(o, range(3, 6))
    assert_same_bits(optimizer, other)


@pytest.mark.parametrize("before", [False, True])
def test_master_weights_may_come_and_go(before: bool, method: Method) -> None:
    optimizer = begun(method, BF16, master_weights=before)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.pop("master_param", None)
    twin = made(method, copies(all_params(optimizer)), master_weights=not before)
    twin.load_state_dict(saved)
    optimizer.param_groups[0]["master_weights"] = not before
    for o in (optimizer, twin):
        run(o, range(3, 5))
    assert_same_bits(optimizer, twin)
    assert ("master_param" in optimizer.state[all_params(optimizer)[0]]) is not before


def test_the_seed_is_saved_where_it_counts(method: Method) -> None:
    assert "rounding_seed" not in begun(method, BF16).state_dict()["param_groups"][0]
    optimizer = begun(method, BF16, stochastic_rounding=True, rounding_seed=7)
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["rounding_seed"] == 7
    other = made(method, copies(all_params(optimizer)), stochastic_rounding=True)
    other.load_state_dict(saved)
    for o in (optimizer, other):
        run(o, range(3, 5))
    assert_same_bits(optimizer, other)
    plain = begun(method, BF16)
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["stochastic_rounding"] is False
    saved["param_groups"][0]["rounding_seed"] = -1
    unchanged = snapshot(other)
    with pytest.raises(ValueError, match="rounding_seed is -1"):
        other.load_state_dict(saved)
    unchanged()


def test_what_the_options_do_not_know_is_cast_as_torch_does(method: Method) -> None:
    """And state that is no parameter's is left as it is."""
    optimizer = begun(method, BF16, state_dtype=FP32)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].update(own=torch.tensor([1.0]), counted=torch.tensor([3]), nested=[torch.tensor([2.0])])
    saved["state"]["other"] = {"value": torch.tensor([4.0])}
    theirs = torch.optim.SGD(copies(all_params(optimizer)))
    theirs.load_state_dict({**saved, "param_groups": theirs.state_dict()["param_groups"]})
    optimizer.load_state_dict(saved)
    for o in (optimizer, theirs):
        state = o.state[all_params(o)[0]]
        assert [state[key].dtype for key in ("own", "counted")] == [BF16, BF16]
        assert state["nested"][0].dtype == BF16
        assert o.state["other"]["value"].dtype == FP32


@pytest.mark.parametrize("to", [None, FP32, "8bit"])
def test_codes_without_their_scales_are_refused(to: Any, method: Method) -> None:
    optimizer = begun(method, FP32, state_dtype="8bit")
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]["exp_avg_scale"]
    other = made(method, copies(all_params(optimizer)), state_dtype=to)
    other.load_state_dict(saved)
    for p in all_params(other):
        p.grad = torch.ones_like(p)
    unchanged = snapshot(other)
    with pytest.raises(
        RuntimeError, match=r"exp_avg_codes of group 0, parameter 1 are codes of 8 bits, and exp_avg_scale is mis"
    ):
        other.step()
    unchanged()
    other.state[all_params(other)[1]]["exp_avg_scale"] = torch.zeros(16)
    with pytest.raises(RuntimeError, match=r"exp_avg_scale .* shape \(16,\); it must .*17"):
        other.step()


# Checkpoints of others.


@pytest.mark.parametrize(("dtype", "options"), KINDS, ids=str)
def test_a_run_of_torchs_continues_and_goes_back(dtype: torch.dtype, options: dict) -> None:
    theirs = torch.optim.AdamW(parameters(torch.Generator().manual_seed(5), SHAPES, dtype), lr=0.01)
    run(theirs, 3)
    saved = through_a_file(theirs.state_dict())
    ours = agr_cuda.AdamW(copies(all_params(theirs)), agr=False, backend="reference", **options)
    ours.load_state_dict(copy.deepcopy(saved))
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert_holds(ours, p, key, theirs.state[q][key], state_dtype_of(p, options))
    run(ours, range(3, 4))
    if options.get("master_weights"):
        start = torch.optim.AdamW([p.detach().float().requires_grad_() for p in all_params(theirs)], lr=0.01)
        start.load_state_dict(saved)
        for p, q in zip(all_params(ours), all_params(start), strict=True):
            q.grad = p.grad.float()
        start.step()
        if options["state_dtype"] in (None, FP32):
            for p, q in zip(all_params(ours), all_params(start), strict=True):
                torch.testing.assert_close(ours.state[p]["master_param"], q.detach(), rtol=1e-6, atol=1e-7)
    # torch.optim knows no codes: they go back through a group that has none.
    plain = agr_cuda.AdamW(copies(all_params(ours)), backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    back = torch.optim.AdamW(copies(all_params(ours)))
    back.load_state_dict(through_a_file(plain.state_dict()))
    for p, q in zip(all_params(ours), all_params(back), strict=True):
        assert back.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(back.state[q][key], values_of(ours, p, key).to(dtype))
    run(back, range(4, 5))


@pytest.mark.parametrize(("dtype", "options"), KINDS, ids=str)
@pytest.mark.parametrize("step", [0, 3])
def test_a_run_of_sails_continues(step: int, dtype: torch.dtype, options: dict) -> None:
    """At step 0, after its restart_opt(), the previous gradients of its state do not count."""
    source = begun(ADAN, dtype)
    saved = through_a_file(source.state_dict())
    group = saved["param_groups"][0]
    saved["param_groups"] = [{k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "no_prox", "params")}]
    saved["param_groups"][0].update(max_grad_norm=0.0, foreach=True, fused=False, step=step)
    ours = made(ADAN, copies(all_params(source)), **options)
    ours.load_state_dict(saved)
    for p, q in zip(all_params(ours), all_params(source), strict=True):
        for key in ADAN.states[:3] if step == 0 else ADAN.states:
            assert_holds(ours, p, key, source.state[q][key], state_dtype_of(p, options))
    run(ours, range(3, 5))
    assert all(values_of(ours, p, key).isfinite().all() for p in all_params(ours) for key in ADAN.states)


def checkpoint(optimizer: Any, model: torch.nn.Module, folder: Any) -> None:
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)


def restore(optimizer: Any, model: torch.nn.Module, folder: Any) -> None:
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(saved, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"])


@pytest.mark.parametrize("target", ["8bit", None, BF16, "torch"])
def test_distributed_checkpoints_do_not_take_codes_for_numbers(target: Any, tmp_path) -> None:
    models = [torch.nn.Linear(64, 80, bias=False) for _ in range(2)]
    for model in models:
        model.weight.data.copy_(torch.linspace(-1, 1, 64 * 80).view(80, 64))
    optimizer = agr_cuda.AdamW(models[0].parameters(), state_dtype="8bit", backend="reference")
    if target == "torch":
        other = torch.optim.AdamW(models[1].parameters())
    else:
        other = agr_cuda.AdamW(models[1].parameters(), state_dtype=target, backend="reference")
    run(optimizer, 3)
    checkpoint(optimizer, models[0], tmp_path)
    if target == "8bit":
        restore(other, models[1], tmp_path)
        models[1].load_state_dict(models[0].state_dict())
        assert_same_bits(optimizer, other)
    else:
        with pytest.raises(dcp.CheckpointException, match=r"Missing key.*exp_avg"):
            restore(other, models[1], tmp_path)


def test_torchs_optimizer_does_not_take_codes_for_numbers() -> None:
    optimizer = begun(METHODS[0], FP32, state_dtype="8bit")
    assert optimizer.state_dict()["state"][1].keys() == {
        "step", "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale",
    }  # fmt: skip
    theirs = torch.optim.AdamW(copies(all_params(optimizer)))
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(KeyError, match="exp_avg"):
        run(theirs, range(3, 4))


# Masters.


def test_masters_that_another_optimizer_has_carried_along_do_not_count(generator) -> None:
    """torch.optim.AdamW keeps them, cast to the parameter's type, and moves the parameter."""
    ours = agr_cuda.AdamW(parameters(generator, SHAPES, BF16), lr=0.01, master_weights=True, backend="reference")
    run(ours, 2)
    theirs = torch.optim.AdamW(copies(all_params(ours)), lr=0.01)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    run(theirs, range(2, 30))
    assert "master_param" in theirs.state[all_params(theirs)[0]]
    back = agr_cuda.AdamW(copies(all_params(theirs)), master_weights=True, backend="reference")
    back.load_state_dict(copy.deepcopy(theirs.state_dict()))
    back.param_groups[0]["lr"] = 0.0
    run(back, range(30, 31))
    for p, q in zip(all_params(back), all_params(theirs), strict=True):
        assert same_bits(p, q)
        assert same_bits(back.state[p]["master_param"], q.float())


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_masters_without_a_place_are_told_of(dtype: torch.dtype, method: Method) -> None:
    saved = copy.deepcopy(begun(method, BF16, master_weights=True).state_dict())
    other = begun(method, dtype)
    with pytest.warns(UserWarning, match="has master weights of parameters that have none here"):
        other.load_state_dict(saved)
    assert not any("master_param" in other.state[p] for p in all_params(other))


def test_masters_loaded_before_the_first_step_make_a_whole_state(method: Method, generator) -> None:
    params = parameters(generator, SHAPES, BF16)
    early, late = (made(method, copies(params), master_weights=True) for _ in range(2))
    early.load_master_weights([p.detach().float() for p in params])
    wanted = {"master_param", *method.states} | ({"step"} if method is not ADAN else set())
    assert all(early.state[p].keys() == wanted for p in all_params(early))
    if method is not ADAN:
        theirs = torch.optim.AdamW(copies(params))
        theirs.load_state_dict(copy.deepcopy(early.state_dict()))
        run(theirs, 1)
    for o in (early, late):
        run(o, 3)
    assert_same_bits(early, late)


def test_a_float32_checkpoint_starts_masters_and_takes_them_back(method: Method) -> None:
    """The parameters of a run in float32, its state, and back: nothing is lost on the way."""
    whole = begun(method, FP32)
    ours = made(method, [p.detach().to(BF16).requires_grad_() for p in all_params(whole)], master_weights=True)
    ours.load_state_dict(through_a_file(whole.state_dict()))
    ours.load_master_weights([p.detach() for p in all_params(whole)])
    for p, q in zip(all_params(ours), all_params(whole), strict=True):
        assert same_bits(ours.state[p]["master_param"], q)
        assert same_bits(p, q.to(BF16))
        assert all(same_bits(ours.state[p][key], whole.state[q][key]) for key in method.states)
    back = made(method, [p.detach().float().requires_grad_() for p in all_params(ours)])
    saved = through_a_file(ours.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # It is said once.
            back.load_state_dict(saved)
    assert [w.filename for w in caught] == [__file__]
    assert "has master weights of parameters that have none here: load_master_weights" in str(caught[0].message)
    back.load_master_weights(saved)
    assert_same_bits(back, whole)
    for step in (3, 4):
        run(ours, [step])
        for p, q in zip(all_params(back), all_params(ours), strict=True):
            p.grad = q.grad.float()
        back.step()
        assert all(
            same_bits(ours.state[p]["master_param"], q) for p, q in zip(all_params(ours), all_params(back), strict=True)
        )


def test_masters_are_loaded_by_name(method: Method, generator) -> None:
    params = parameters(generator, SHAPES, BF16)
    optimizer = method.ours([("a", params[0]), ("b", params[1]), ("c", params[2])], master_weights=True)
    values = {
        name: torch.randn(p.shape, generator=generator, dtype=FP64) for name, p in zip("abc", params, strict=True)
    }
    optimizer.load_master_weights({**values, "more": None})
    for p, value in zip(params, values.values(), strict=True):
        assert same_bits(optimizer.state[p]["master_param"], value.float())
        assert same_bits(p, value.float().to(BF16))
    held = optimizer.state[params[0]]["master_param"]
    optimizer.load_master_weights(values)
    assert optimizer.state[params[0]]["master_param"] is held


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (lambda ps: {"a": ps[0], "b": ps[1]}, KeyError, "master weights are missing for c"),
        (lambda ps: ps[:2], ValueError, r"2 master weights are given, and there are 3 parameters"),
        (
            lambda ps: iter([*ps[:2], ps[0]]),
            ValueError,
            r"master weight 2 is \(31,\); it must be a tensor of shape \(\)",
        ),
        (lambda ps: [*ps[:2], 1.0], ValueError, "master weight 2 is float; it must be a tensor"),
        (
            lambda ps: {"state": {}, "param_groups": [{"params": [0]}]},
            ValueError,
            "state dict has 1 parameters, and there",
        ),
        (lambda ps: {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}, KeyError, "has no master_param"),
        (lambda ps: [ps[0], ps[1].to_sparse(), ps[2]], ValueError, "master weight 1 is torch.sparse_coo, .*; it must"),
        (lambda ps: [*ps[:2], ps[2].to("meta")], ValueError, "master weight 2 is a meta tensor; it must be a dense"),
        (lambda ps: [*ps[:2], ps[2].to(torch.complex64)], ValueError, "weight 2 is torch.strided, torch.complex64; it"),
    ],
)
def test_wrong_masters_are_refused_before_anything_changes(
    weights: Any, error: type[Exception], message: str, method: Method, generator
) -> None:
    params = parameters(generator, SHAPES, BF16)
    optimizer = method.ours(zip("abc", params, strict=True), master_weights=True, backend="reference")
    run(optimizer, 1)
    unchanged = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_master_weights(weights([p.detach() * 2 for p in params]))
    unchanged()


def test_names_need_named_parameters(method: Method, generator) -> None:
    params = parameters(generator, SHAPES, BF16)
    with pytest.raises(RuntimeError, match=r"does not know its parameters' names: make it from model.named_parameters"):
        method.ours(params, master_weights=True).load_master_weights({"a": params[0]})


def test_what_a_program_writes_counts_after_a_reset(method: Method) -> None:
    written, twin = (begun(method, BF16, master_weights=True) for _ in range(2))
    for p, q in zip(all_params(written), all_params(twin), strict=True):
        p.data.mul_(2)
        q.data.mul_(2)
        twin.state[q]["master_param"].copy_(q.detach())
    held = [written.state[p]["master_param"] for p in all_params(written)]
    written.reset_master_weights()
    assert all(written.state[p]["master_param"] is x for p, x in zip(all_params(written), held, strict=True))
    for o in (written, twin):
        run(o, range(3, 5))
    assert_same_bits(written, twin)
    made(method, all_params(written), master_weights=True).reset_master_weights()  # before the first step


# In flux.


@pytest.mark.parametrize("how", ["no gradient", "deepcopy", "pickle", "failed step", "loaded"])
@pytest.mark.parametrize(
    ("dtype", "name", "value"),
    [(FP32, "state_dtype", BF16), (BF16, "state_dtype", FP32), (BF16, "master_weights", True)],
    ids=str,
)
def test_options_back_at_their_defaults_still_convert(
    dtype: torch.dtype, name: str, value: Any, how: str, method: Method, generator
) -> None:
    optimizer = method.ours(parameters(generator, SHAPES, dtype), lr=0.01, **{name: value})
    run(optimizer, 2)
    if how == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0][name] = method.ours([torch.zeros(2)]).param_groups[0][name]
    if how == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
    elif how == "pickle":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    first, other, _ = all_params(optimizer)
    gradients = [torch.randn(p.shape, generator=generator).to(dtype) for p in all_params(optimizer)]
    for p, grad in zip(all_params(optimizer), gradients, strict=True):
        p.grad = grad
    if how == "no gradient":
        other.grad = None
        optimizer.step()
        other.grad = gradients[1]
    elif how == "failed step":
        first.grad = gradients[0].to_sparse()
        with pytest.raises(RuntimeError, match="must be dense"):
            optimizer.step()
        first.grad = gradients[0]
    optimizer.step()
    assert "reference" not in optimizer.backends
    for p in all_params(optimizer):
        assert all(optimizer.state[p][key].dtype == dtype for key in method.states)
        assert "master_param" not in optimizer.state[p]


@pytest.mark.parametrize("options", [{"state_dtype": BF16}, {"state_dtype": "8bit"}, {"state_dtype": FP32}], ids=str)
@pytest.mark.parametrize(("before", "after"), [(FP32, BF16), (BF16, FP32)])
def test_parameters_may_change_their_type(
    before: torch.dtype, after: torch.dtype, options: dict, method: Method
) -> None:
    """As by model.bfloat16(). The state goes on as it is."""
    optimizer = begun(method, before, **options)
    saved = copy.deepcopy(optimizer.state_dict())
    for p in all_params(optimizer):
        p.grad = None
        p.data = p.data.to(after)
    other = made(method, copies(all_params(optimizer)), **options)
    other.load_state_dict(saved)
    for o in (optimizer, other):
        run(o, range(3, 5))
    assert_same_bits(optimizer, other)


def test_a_model_becomes_one_with_masters(method: Method) -> None:
    """In a group that has others too, master_weights=True waits for the parameters to be of 16 bits, and goes again."""
    first, second = parameter((31,), torch.Generator(), FP32), parameter((7,), torch.Generator(), BF16)
    optimizer = made(method, [first, second], master_weights=True)
    run(optimizer, 1)
    assert "master_param" not in optimizer.state[first]
    for dtype in (BF16, FP32):
        first.grad = None
        first.data = first.data.to(dtype)
        run(optimizer, 1)
        assert ("master_param" in optimizer.state[first]) is (dtype == BF16)
        assert optimizer.state[first]["exp_avg"].dtype == FP32


@pytest.mark.parametrize("source", ["8bit", FP32])
@pytest.mark.parametrize("target", ["8bit", None])
def test_restart_opt_starts_afresh(source: Any, target: Any) -> None:
    """Also if the options have changed since the last step."""
    optimizer = begun(ADAN, BF16, state_dtype=source, master_weights=True)
    twin = made(ADAN, copies(all_params(optimizer)), state_dtype=target, master_weights=True)
    twin.load_master_weights(optimizer.state_dict())
    optimizer.param_groups[0]["state_dtype"] = target
    optimizer.restart_opt()
    assert not any(values_of(optimizer, p, "exp_avg").any() for p in all_params(optimizer))
    for o in (optimizer, twin):
        run(o, range(3, 5))
    assert_same_bits(optimizer, twin)


def test_a_late_parameter_of_codes_starts_with_no_difference() -> None:
    params = parameters(torch.Generator().manual_seed(1), [(70, 60), (70, 60)], FP32)
    optimizer = made(ADAN, params, state_dtype="8bit", agr=False)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not values_of(optimizer, params[1], "exp_avg_diff").any()
    del optimizer.state[params[1]]["neg_pre_grad_codes"]
    optimizer.step()
    assert not values_of(optimizer, params[1], "exp_avg_diff").any()


def test_a_group_is_added_later(method: Method) -> None:
    optimizer = begun(method, BF16, state_dtype="8bit")
    late = parameter((70, 60), torch.Generator(), BF16)
    optimizer.add_param_group({"params": [late], "state_dtype": BF16, "master_weights": True})
    run(optimizer, 1)
    assert optimizer.state[late]["exp_avg"].dtype == BF16
    assert optimizer.state[late]["master_param"].dtype == FP32
    other = made(method, copies(all_params(optimizer)[:3]), state_dtype="8bit")
    other.add_param_group({"params": copies([late]), "state_dtype": BF16, "master_weights": True})
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for o in (optimizer, other):
        run(o, range(1, 3))
    assert_same_bits(optimizer, other)


# torch.distributed's checkpoints.


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("through_files", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "8bit"},
        {"master_weights": True},
        {"master_weights": True, "state_dtype": "8bit"},
        {"stochastic_rounding": True, "rounding_seed": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_distributed_checkpoints_hold_all(
    options: dict, through_files: bool, flatten: bool, method: Method, tmp_path
) -> None:
    flat = StateDictOptions(flatten_optimizer_state_dict=flatten)
    models = [torch.nn.Sequential(torch.nn.Linear(64, 70), torch.nn.Linear(70, 3)).to(BF16) for _ in range(2)]
    one, other = (made(method, list(model.parameters()), **options) for model in models)
    run(one, 3)
    models[1].load_state_dict(models[0].state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], one, options=flat))
    if through_files:
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "saved", no_dist=True)
        saved = get_optimizer_state_dict(models[1], other, options=flat)
        dcp.load({"optimizer": saved}, checkpoint_id=tmp_path / "saved", no_dist=True)
        models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], other, saved, options=flat)
    models[1].load_state_dict(models[0].state_dict())
    assert_same_bits(one, other)
    for o in (one, other):
        run(o, range(3, 5))
    assert_same_bits(one, other)


def _fails(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}, {"master_weights": True}], ids=str)
def test_a_load_that_fails_changes_nothing(when: str, options: dict, method: Method, generator) -> None:
    params = [parameter(shape, generator, BF16) for shape in ((70, 60), (5,))]
    optimizer = made(method, params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    state, groups, unchanged = optimizer.state, optimizer.param_groups, snapshot(optimizer)
    register = f"register_load_state_dict_{'pre' if when == 'before' else 'post'}_hook"
    hook = getattr(optimizer, register)(_fails)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(saved)
    hook.remove()
    # Among what is loaded is a tensor that cannot be converted.
    broken = copy.deepcopy(saved)
    index = saved["param_groups"][0]["params"][-1]
    broken["state"][index][method.states[0]] = torch.zeros(5, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        optimizer.load_state_dict(broken)
    assert optimizer.state is state
    assert optimizer.param_groups is groups
    unchanged()
    optimizer.step()


def test_a_warning_that_is_an_error_stops_a_load_that_changes_nothing(method: Method, generator) -> None:
    half = [parameter((5,), generator, BF16)]
    source = made(method, half, master_weights=True)
    half[0].grad = torch.ones_like(half[0])
    source.step()
    params = [p.detach().float().requires_grad_() for p in half]
    optimizer = made(method, params)
    params[0].grad = torch.ones(5)
    optimizer.step()
    unchanged = snapshot(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has master weights of parameters that have none here"):
            optimizer.load_state_dict(source.state_dict())
    unchanged()
    optimizer.step()


def test_masters_that_another_optimizer_has_carried_along_are_not_loaded(generator) -> None:
    p = parameter((5,), generator, BF16)
    p.grad = torch.ones_like(p)
    source = agr_cuda.AdamW([p], master_weights=True)
    source.step()
    torchs = torch.optim.AdamW([p], lr=0.1)
    torchs.load_state_dict(source.state_dict())
    torchs.step()
    later = p.detach().float().requires_grad_()
    optimizer = agr_cuda.AdamW([later])
    with pytest.raises(KeyError, match="master_param is of 16 bits: an optimizer without master weights has carried"):
        optimizer.load_master_weights(torchs.state_dict())
    assert torch.equal(later, p.float())


def test_state_loaded_in_inference_mode_is_ordinary(method: Method, generator) -> None:
    p = parameter((5,), generator, BF16)
    p.grad = torch.ones_like(p)
    optimizer = made(method, [p], master_weights=True)
    optimizer.step()
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.reset_master_weights()
    optimizer.load_master_weights([torch.full((5,), 0.3)])
    optimizer.step()


def test_a_pickle_from_before_the_options_gets_their_defaults(method: Method, generator) -> None:
    p = parameter((5,), generator)
    p.grad = torch.ones_like(p)
    optimizer = made(method, [p])
    optimizer.step()
    kept = optimizer.__getstate__()
    newer = ("state_dtype", "master_weights", "stochastic_rounding", "rounding_seed")
    old = {
        "defaults": {name: value for name, value in kept["defaults"].items() if name not in newer},
        "state": kept["state"],
        "param_groups": [
            {name: value for name, value in group.everything().items() if name not in newer}
            for group in kept["param_groups"]
        ],
    }
    again = method.ours.__new__(method.ours)
    again.__setstate__(old)
    again.step()
    assert [again.param_groups[0][name] for name in newer] == [None, False, False, 0]


def test_sparse_state_is_refused(method: Method, generator) -> None:
    p = parameter((5,), generator)
    p.grad = torch.ones_like(p)
    optimizer = method.ours([p])
    optimizer.step()
    optimizer.state[p]["exp_avg"] = torch.zeros(5).to_sparse()
    with pytest.raises(RuntimeError, match=r"exp_avg of group 0, parameter 0 is torch\.sparse_coo; it must be dense"):
        optimizer.step()


def test_arguments_of_a_subclass_do_not_become_options(method: Method, generator) -> None:
    class Warmed(method.ours):
        def __init__(self, params: Any, warmth: float = 0.1) -> None:
            super().__init__(params)
            self.warmth = warmth

    p = parameter((5,), generator)
    p.grad = torch.ones_like(p)
    optimizer = Warmed([p])
    optimizer.step()
    keys = optimizer.param_groups[0].everything().keys()
    for again in (copy.deepcopy(optimizer), optimizer):
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert again.param_groups[0].everything().keys() == keys
