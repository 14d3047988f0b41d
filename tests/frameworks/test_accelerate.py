"""accelerate: gradients that are accumulated, its clipping, bfloat16, and what prepare() makes of an optimizer."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate_loop import train
from conftest import TOLERANCE, distance, weights_of
from torch import nn
from torch.nn import functional as F

import agr_cuda


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(number, size=4):
    return [torch.randn(size, 8, generator=torch.Generator().manual_seed(i)) for i in range(number)]


def loss_of(model, inputs):
    return F.cross_entropy(model(inputs), inputs[:, :4].argmax(1))


@pytest.mark.parametrize("optimizer", [agr_cuda.AdamW, agr_cuda.Adan])
def test_accumulated_batches_train_as_one_large_one(optimizer):
    """AGR is applied once, to the sum: the step is called once for all."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = make_model()
    model, update = accelerator.prepare(model, optimizer(model.parameters(), lr=1e-2))
    for inputs in batches(8):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, inputs))
            update.step()
            update.zero_grad()
    whole = make_model()
    update = optimizer(whole.parameters(), lr=1e-2)
    for pair in zip(*[iter(batches(8))] * 2, strict=True):
        update.zero_grad()
        loss_of(whole, torch.cat(pair)).backward()
        update.step()
    assert distance(weights_of(model), weights_of(whole)) < TOLERANCE


def test_clipping_by_accelerate_comes_before_the_optimizers():
    accelerator = Accelerator(cpu=True)
    model = make_model()
    model, update = accelerator.prepare(model, agr_cuda.AdamW(model.parameters(), max_grad_norm=5.0))
    accelerator.backward(100 * loss_of(model, batches(1)[0]))
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    update.step()
    assert norm > 5
    assert float(update.optimizer.grad_norm) == pytest.approx(1.0, rel=1e-5)


def test_prepare_and_loading_leave_each_group_its_agr(tmp_path):
    """Both load a state dict into the optimizer, in which there is no agr."""
    accelerator = Accelerator(cpu=True)
    model = make_model()
    matrices, biases = ([p for p in model.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices}, {"params": biases, "agr": False}]
    model, update = accelerator.prepare(model, agr_cuda.AdamW(groups, agr=True))
    assert [group["agr"] for group in update.param_groups] == [True, False]
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    assert [group["agr"] for group in update.param_groups] == [True, False]
    assert all("agr" not in group for group in update.state_dict()["param_groups"])


def test_bfloat16_is_resumed_to_the_bit(monkeypatch, tmp_path):
    in_float32 = weights_of(train(tmp_path / "float32", 8))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` does
    AcceleratorState._reset_state(reset_partial_state=True)
    whole = weights_of(train(tmp_path / "whole", 8))
    train(tmp_path / "stopped", 4)
    assert distance(weights_of(train(tmp_path / "stopped", 8, resume=True)), whole) == 0
    assert distance(whole, in_float32) > 0


def test_a_prepared_optimizer_can_be_copied():
    accelerator = Accelerator(cpu=True)
    model = make_model()
    _, update = accelerator.prepare(model, agr_cuda.AdamW(model.parameters(), agr=False))
    assert copy.deepcopy(update).param_groups[0]["agr"] is False
