"""The benchmarks' contenders: others' optimizers take the step that they are compared for, or say why they cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench.workloads import building, contenders, peers
from bench.workloads.building import LeftOutError, NotInstalledError
from bench.workloads.contenders import ALL, BY_NAME, PRECISION, YARDSTICK, Contender
from bench.workloads.tensors import Workload

CPU = torch.device("cpu")
OPTIMIZERS = [entry for entry in ALL if entry.rule != "gradients" and "cpu" in entry.devices]


def trained(contender: Contender, steps: int = 3) -> list[torch.Tensor]:
    """Return the parameters after some steps with two sets of gradients in turn."""
    workload = Workload(((16, 8), (64,)), CPU, torch.float32)
    step = contender.build(workload.parameters, 1e-8)
    for number in range(steps):
        workload.turn(number)
        kept = [gradient.clone() for gradient in workload.gradients]
        step()
        torch._foreach_copy_(workload.gradients, kept)  # some write them
    return [parameter.detach() for parameter in workload.parameters]


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peers'
@pytest.mark.parametrize("contender", OPTIMIZERS, ids=lambda contender: contender.name)
def test_contenders_of_a_rule_train_alike(contender: Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # which takes minutes, and changes nothing here
    monkeypatch.setattr(building, "LEARNING_RATE", 0.01)
    ours = BY_NAME[f"agr-{contender.rule.lower()}" + ("" if contender.agr else "-off")]
    try:
        found = trained(contender)
    except LeftOutError as error:
        pytest.skip(str(error))
    expected = trained(ours)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, atol=2e-5, rtol=0)
    without = trained(BY_NAME[f"agr-{contender.rule.lower()}" + ("-off" if contender.agr else "")])
    assert not torch.allclose(expected[1], without[1], atol=5e-5, rtol=0), "which this could tell from each other"


# Which are chosen


def test_by_default_what_compiles_for_minutes_is_left_out_on_a_cpu_and_named_it_is_not() -> None:
    every = [entry.name for entry in ALL]
    slow = ["torch-adamw-compiled", "three-lines-compiled", "three-lines-step-compiled"]
    choice = contenders.choose("cpu", None, every)
    assert not {*slow} & {entry.name for entry in choice.entries}
    assert slow in choice.left_out.values()
    named = contenders.choose("cpu", [BY_NAME[slow[0]]], every, always=[YARDSTICK])
    assert [entry.name for entry in named.entries] == [YARDSTICK, slow[0]]
    assert not named.left_out
    on_gpu = contenders.choose("cuda", None, every)
    assert {*slow} < {entry.name for entry in on_gpu.entries}


def test_nobody_is_left_out_in_silence() -> None:
    for device in ("cpu", "cuda"):
        choice = contenders.choose(device, None, BY_NAME)
        left_out = [name for names in choice.left_out.values() for name in names]
        assert sorted([*left_out, *(entry.name for entry in choice.entries)]) == sorted(BY_NAME)
    assert "deepspeed-adamw" in contenders.choose("cuda", None, BY_NAME).left_out["for a CPU alone"]
    assert "agr-adan-triton" in contenders.choose("cpu", None, BY_NAME).left_out["for a GPU alone"]


def test_every_peer_is_there() -> None:
    modules = {entry.module for entry in (*ALL, *PRECISION) if "cpu" in entry.devices}
    assert modules == {
        *("agr_cuda", "torch", "deepspeed", "optimi", "pytorch_optimizer", "timm", "torchao", "bitsandbytes")
    }
    assert len(BY_NAME) == len(ALL) + len(PRECISION), "names are unique"
    rivals = {rival for entry in BY_NAME.values() for rival in entry.rivals}
    assert rivals <= BY_NAME.keys()


# What cannot run


def test_a_missing_package_is_named_as_pip_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("optimi", "torch-optimi"), ("timm.optim", "timm"), ("deepspeed.ops.adam", "deepspeed")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(NotInstalledError, match=f"not installed: pip install {name}$"):
            building.imported(module)


def test_a_package_that_cannot_be_imported_says_what_it_needs_or_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needing.py").write_text("import agr_cuda_no_such_package.part")
    (tmp_path / "broken.py").write_text("raise OSError('libcudart.so.13: no such file')")
    with pytest.raises(NotInstalledError, match=r"pip install agr_cuda_no_such_package, which needing needs$"):
        building.imported("needing")
    with pytest.raises(LeftOutError, match=r"broken cannot be imported: OSError: libcudart\.so\.13") as left_out:
        building.imported("broken")
    assert building.why_unmeasured(left_out.value)[0] == "not available"
    assert building.why_unmeasured(RuntimeError("no")) == ("failed", "RuntimeError: no")


class Unbuilt:
    """DeepSpeed's optimizer where its operation cannot be compiled."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("requires the cpu_adam op, which failed to build/load.") from OSError("no ninja")


def test_deepspeed_says_why_its_operation_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("deepspeed.ops.adam")
    monkeypatch.setattr(module, "DeepSpeedCPUAdam", Unbuilt, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    parameters = Workload(((4,),), CPU, torch.float32).parameters
    for name in ("deepspeed-adamw", "three-lines-deepspeed"):
        with pytest.raises(LeftOutError, match=r"failed to build/load\. no ninja"):
            BY_NAME[name].build(parameters, 1e-8)
    with pytest.raises(LeftOutError, match="takes no float64"):
        BY_NAME["deepspeed-adamw"].build(Workload(((4,),), CPU, torch.float64).parameters, 1e-8)


def test_torchvision_without_its_library_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defined: list[str] = []
    monkeypatch.setattr(torch.library, "define", lambda name, schema: defined.append(name))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    peers.define_torchvision_operators()
    assert not defined, "there is no torchvision to help"
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    peers.define_torchvision_operators()
    assert defined == ["torchvision::nms", "torchvision::qnms"]


def test_state_by_arithmetic_is_averages_and_masters() -> None:
    expected = {"agr-adamw": 8, "agr-adan": 16, "agr-gradients": 0, "agr-adamw-bfloat16-master": 12}
    for name, count in expected.items():
        entry = BY_NAME[name]
        assert entry.stored(torch.float32).state_bytes(entry.rule) == count
    assert BY_NAME["agr-adamw-float32-8bit"].stored(torch.float32).state_bytes("AdamW") == 2.03125
