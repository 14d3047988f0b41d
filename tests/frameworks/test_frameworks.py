"""In every framework: torch.optim.AdamW's numbers without AGR, and with it the same after a stop, to the bit."""

import functools
import importlib
import runpy
import sys

import pytest
import torch
from conftest import EXAMPLES, TOLERANCE, distance, weights_of

import agr_cuda

CLASSES = torch.optim.AdamW, agr_cuda.AdamW, agr_cuda.Adan
#: The same three, as each example takes them.
FRAMEWORKS = {
    "transformers_trainer": CLASSES,
    "accelerate_loop": CLASSES,
    "lightning_module": CLASSES,
    "timm_registry": ("adamw", "agradamw", "agradan"),
    "torchtitan_container": ("AdamW", "AGR-AdamW", "AGR-Adan"),
    "peft_lora": CLASSES,
}
STOP, END = 4, 8


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request, tmp_path_factory):
    """Give the three optimizers, and how to train with one of them, in one go or with a stop."""
    train = importlib.import_module(request.param).train

    @functools.cache
    def trained(optimizer, **options):
        folder = tmp_path_factory.mktemp("whole")
        return weights_of(train(folder, END, optimizer=optimizer, **options))

    def resumed(before, after):
        folder = tmp_path_factory.mktemp("stopped")
        train(folder, STOP, **before)
        return weights_of(train(folder, END, resume=True, **after))

    return *FRAMEWORKS[request.param], trained, resumed


def test_without_agr_it_trains_as_torch_does(framework):
    torchs, adamw, _, trained, _ = framework
    assert distance(trained(adamw, agr=False), trained(torchs)) < TOLERANCE


def test_agr_has_an_effect(framework):
    """The test above would otherwise tell nothing."""
    torchs, adamw, _, trained, _ = framework
    assert distance(trained(adamw), trained(torchs)) > 30 * TOLERANCE


def test_without_agr_a_resumed_run_trains_as_torch_does(framework):
    torchs, adamw, _, trained, resumed = framework
    ours = {"optimizer": adamw, "agr": False}
    assert distance(resumed(ours, ours), trained(torchs)) < TOLERANCE


@pytest.mark.parametrize("first", ["torch.optim", "agr_cuda"])
def test_a_run_goes_on_with_the_other_optimizer(framework, first):
    """The framework's own checkpoints load both ways."""
    torchs, adamw, _, trained, resumed = framework
    parts = {"optimizer": torchs}, {"optimizer": adamw, "agr": False}
    assert distance(resumed(*parts if first == "torch.optim" else parts[::-1]), trained(torchs)) < TOLERANCE


@pytest.mark.parametrize("which", ["AdamW", "Adan"])
def test_with_agr_a_resumed_run_has_the_bits_of_one_that_never_stopped(framework, which):
    _, adamw, adan, trained, resumed = framework
    ours = {"optimizer": adamw if which == "AdamW" else adan}
    assert distance(resumed(ours, ours), trained(**ours)) == 0


def test_whether_there_is_agr_says_the_resumed_program_and_not_the_checkpoint(framework):
    _, adamw, _, trained, resumed = framework
    ours = {"optimizer": adamw}
    changed = resumed(ours, {**ours, "agr": False})
    assert distance(changed, trained(adamw)) > 10 * TOLERANCE
    assert distance(changed, trained(adamw, agr=False)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_example_runs_as_a_script_and_is_resumed(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    length = "--epochs" if name in ("lightning_module", "timm_registry") else "--steps"
    for arguments in ([length, "4"], [length, "8", "--resume"]):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert list(tmp_path.glob("runs/*/*"))
