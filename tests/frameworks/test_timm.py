"""timm: optimizers by name, and layer-wise decay of the learning rate."""

import pytest
import timm
import timm_registry  # noqa: F401  # which registers the names
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn

import agr_cuda


def make_model():
    torch.manual_seed(0)
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **tiny)


def test_the_names_are_in_timms_list():
    assert {"agradamw", "agradan"} <= set(list_optimizers("agr*"))


@pytest.mark.parametrize(("name", "optimizer", "betas"), [("agradamw", "AdamW", 2), ("agradan", "Adan", 3)])
def test_options_reach_the_optimizer(name, optimizer, betas):
    given = (0.9,) * betas
    made = create_optimizer_v2(make_model(), name, lr=0.1, weight_decay=0.05, betas=given, agr=False, max_grad_norm=2.0)
    assert type(made) is getattr(agr_cuda, optimizer)
    assert made.max_grad_norm == 2.0
    assert [(group["weight_decay"], group["agr"]) for group in made.param_groups] == [(0.0, False), (0.05, False)]
    assert all(group["betas"] == given for group in made.param_groups)


def test_a_name_with_an_underscore_would_be_timms_own_optimizer():
    """Why the names have none."""
    assert type(create_optimizer_v2(make_model(), "agr_adamw")) is torch.optim.AdamW


def test_each_layer_is_trained_with_its_own_learning_rate():
    model = make_model()
    optimizer = create_optimizer_v2(model, "agradamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {0.5**depth for depth in range(4)}  # patches, two blocks, head
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}, "until a schedule scales it"
    CosineLRScheduler(optimizer, t_initial=10).step(0)
    assert all(group["lr"] == 1e-3 * group["lr_scale"] for group in optimizer.param_groups)
    biases = [(group, group["params"][-1]) for group in optimizer.param_groups if group["weight_decay"] == 0]
    before = [bias.detach().clone() for _, bias in biases]
    nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    optimizer.step()
    for (group, bias), old in zip(biases, before, strict=True):
        moved = float((bias.detach() - old).abs().max())  # Adam's first step is the learning rate, of any gradient
        assert moved == pytest.approx(1e-3 * group["lr_scale"], rel=1e-2)


def test_layer_decay_survives_a_checkpoint():
    options = {"lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.5}
    saved = create_optimizer_v2(make_model(), "agradamw", **options).state_dict()
    loaded = create_optimizer_v2(make_model(), "agradamw", **{**options, "layer_decay": 0.75, "agr": False})
    loaded.load_state_dict(saved)
    assert {group["lr_scale"] for group in loaded.param_groups} == {0.5**depth for depth in range(4)}
    assert not any(group["agr"] for group in loaded.param_groups)
