"""The optimizers that the benchmarks compare, and how they share a machine's memory."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.workloads import building, contenders
from bench.workloads.contenders import ALL, BY_NAME, PRECISION, YARDSTICK, Contender
from bench.workloads.formats import FORMATS
from bench.workloads.tensors import Workload

ROOT = Path(__file__).resolve().parent.parent


def built_or_skipped(contender: Contender, workload: Workload) -> Any:
    """A contender's step. A peer that is not installed here has nothing to test."""
    try:
        return contender.build(list(workload.parameters), 1e-8)
    except building.LeftOutError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated:DeprecationWarning")  # optimi's
@pytest.mark.parametrize("contender", ALL, ids=lambda contender: contender.name)
def test_contenders_train_and_write_gradients_only_where_declared(
    contender: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(
        torch, "compile", lambda function: function
    )  # which takes half a minute, and changes nothing here
    workload = Workload(((8, 4), (64,)), torch.device("cpu"), torch.float32)
    for gradient in workload.gradients:
        gradient.mul_(1e3)  # more than what is clipped to
    step = built_or_skipped(contender, workload)
    gradients = [gradient.clone() for gradient in workload.gradients]
    parameters = [parameter.detach().clone() for parameter in workload.parameters]
    for _ in range(3):
        step()
    changed = not all(map(torch.equal, gradients, workload.gradients))
    assert changed == contender.writes_gradients
    assert workload.finite()
    for parameter, before in zip(workload.parameters, parameters, strict=True):
        assert torch.equal(parameter, before) == (contender.rule == "gradients")
        torch.testing.assert_close(parameter.detach(), before, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated:DeprecationWarning")  # optimi's
@pytest.mark.parametrize("contender", PRECISION, ids=lambda contender: contender.name)
def test_contenders_with_formats_take_the_step_of_adamw_or_adan(
    contender: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(building, "LEARNING_RATE", 0.01)  # more than bfloat16 rounds away
    assert contender.format
    workload = Workload(((64, 64), (8,)), torch.device("cpu"), contender.format.parameter)
    before = [parameter.detach().clone() for parameter in workload.parameters]
    step = built_or_skipped(contender, workload)
    step()
    for parameter, value, gradient in zip(workload.parameters, before, workload.gradients, strict=True):
        # A first step goes by the learning rate against the gradient, but for weight decay.
        torch.testing.assert_close(parameter.detach(), value - 0.01 * gradient.sign(), atol=2e-3, rtol=0)
    if contender.ours:
        state = step.__self__.state[workload.parameters[0]]
        key = "exp_avg_codes" if contender.format.state == torch.uint8 else "exp_avg"
        assert state[key].dtype == contender.format.state
        assert ("master_param" in state) == contender.format.master


def test_formats_move_the_bytes_of_the_documentation() -> None:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
    lines = (ROOT / "docs" / "precision.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.endswith((" yes |", "ic |"))
    ]
    documented = {tuple(row[:4]): (int(row[5]), int(row[6])) for row in rows if len(row) == 8 and row[5].isdigit()}
    checked = 0
    for stored in FORMATS.values():
        master = "yes" if stored.master else ""
        row = (names[stored.parameter], names[stored.gradient], names.get(stored.state, "8 bits"), master)
        scales = (0.0625, 0.125) if stored.state == torch.uint8 else (0, 0)
        if row in documented:
            checked += 1
            moved = stored.bytes_moved("AdamW") - scales[0], stored.bytes_moved("Adan") - scales[1]
            assert moved == documented[row], row
    assert checked == 10


def test_on_a_gpu_rows_ask_for_their_backend_and_say_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def why_not(backend: str, tensor: torch.Tensor) -> str:
        asked.append(backend)
        return "it was not built"

    monkeypatch.setattr(contenders, "why_not", why_not)
    parameters: Any = [SimpleNamespace(is_cuda=True)]
    for name in ("agr-adamw", "agr-adan-off", "agr-adamw-triton", "agr-adan-triton", "agr-gradients-triton"):
        with pytest.raises(building.LeftOutError, match=r"no (cuda|triton) backend: it was not built") as left_out:
            BY_NAME[name].build(parameters, 1e-8)
        assert left_out.value.status == "not available"
    assert asked == ["cuda", "cuda", "triton", "triton", "triton"]


@pytest.mark.parametrize("rule", ["AdamW", "Adan"])
def test_optimi_is_asked_for_its_triton_kernels_if_it_has_them(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(parameters: object, lr: float, eps: float, weight_decay: float, foreach: object = None) -> None:
        raise AssertionError("it has no such option")

    def having(parameters: object, triton: bool | None = None, **options: object) -> object:
        assert triton
        raise ImportError("Triton could not be imported on this system.")

    for maker, message in ((without, "torch-optimi>=0.3"), (having, "could not be imported")):
        monkeypatch.setitem(sys.modules, "optimi", SimpleNamespace(**{rule: maker}))
        with pytest.raises(building.LeftOutError, match=message) as left_out:
            BY_NAME[f"optimi-{rule.lower()}-triton"].build([], 1e-8)
        assert left_out.value.status == "not available"


@pytest.mark.parametrize("name", ["reference-adamw", "reference-adan"])
def test_the_reference_rows_are_plain_foreach_operations(name: str) -> None:
    workload = Workload(((8, 4), (64,)), torch.device("cpu"), torch.float32)
    step = BY_NAME[name].build(list(workload.parameters), 1e-8)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    called = {event.name for event in profiler.events() or ()}
    assert {"aten::_foreach_lerp_", "aten::_foreach_addcdiv_"} <= called


def test_batches_fit_the_budget_and_keep_targets_sides_together() -> None:
    gpt2 = 4 * 124_439_808
    on_cpu, on_gpu = ([entry for entry in ALL if kind in entry.devices] for kind in ("cpu", "cuda"))
    for entries in (on_cpu, on_gpu):
        assert [len(batch) for batch in contenders.batches(entries, gpt2, 64 * 2**30)] == [len(entries)]
    for entries, gibibytes, count in ((on_cpu, 20, 4), (on_cpu, 16, 5), (on_cpu, 10, 8), (on_gpu, 16, 5)):
        budget = gibibytes * 2**30
        batches = contenders.batches(entries, gpt2, budget)
        assert len(batches) == count
        assert all(contenders.bytes_needed(batch, gpt2) <= budget for batch in batches)
        assert all(batch[0].name == YARDSTICK for batch in batches)
        others = [entry for batch in batches for entry in batch[1:]]
        assert sorted(entry.name for entry in [BY_NAME[YARDSTICK], *others]) == sorted(e.name for e in entries)

    def names(entries: list[Contender], gibibytes: int) -> list[set[str]]:
        return [{entry.name for entry in batch} for batch in contenders.batches(entries, gpt2, gibibytes * 2**30)]

    assert any({"agr-adan", "reference-adan", "optimi-adan-foreach"} <= batch for batch in names(on_cpu, 16))
    for rule in ("adamw", "adan"):
        together = {f"agr-{rule}", f"agr-{rule}-triton"}
        assert any(together <= batch for batch in names(on_gpu, 10))
        assert any({*together, f"optimi-{rule}-triton"} <= batch for batch in names(on_gpu, 16))
    assert contenders.batches([BY_NAME[YARDSTICK]], gpt2, 1) == [[BY_NAME[YARDSTICK]]]
