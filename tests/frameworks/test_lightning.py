"""Lightning: mixed precision in bfloat16 and float16, its clipping, and optimizers that unscale themselves."""

import pytest
import torch
from conftest import TOLERANCE, distance, weights_of
from lightning.pytorch.plugins import MixedPrecision
from lightning_module import train

import agr_cuda

#: A weight that differs in the last place may be rounded to the neighbouring 16-bit number for the next forward pass.
REDUCED_TOLERANCE = 3e-4


def float32(**settings):
    return {"accelerator": "cpu", **settings}


def bfloat16(**settings):
    return float32(precision="bf16-mixed", **settings)


def float16(init_scale=2.0**16, **settings):
    """Lightning turns precision="16-mixed" into bfloat16 on CPUs, unless it is handed the plugin."""
    return float32(plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale)), **settings)


def changed(settings, **more):
    """Return what makes the settings with more of them. A GradScaler counts, so that each run needs its own."""
    return lambda: settings(**more)


@pytest.fixture
def trained(tmp_path_factory):
    """Return a function that trains, in one go or with a stop, and gives the weights."""

    def run(settings, *, stops=False, **options):
        folder = tmp_path_factory.mktemp("run")
        if stops:
            train(folder, 2, settings=settings(), **options)
        return weights_of(train(folder, 4, resume=stops, settings=settings(), **options))

    return run


@pytest.mark.parametrize("settings", [bfloat16, float16])
@pytest.mark.parametrize("optimizer", [agr_cuda.AdamW, agr_cuda.Adan])
def test_mixed_precision_is_resumed_to_the_bit(trained, settings, optimizer):
    whole = trained(settings, optimizer=optimizer)
    assert distance(trained(settings, optimizer=optimizer, stops=True), whole) == 0
    assert distance(trained(float32, optimizer=optimizer), whole) > 0


@pytest.mark.parametrize("settings", [bfloat16, float16])
def test_mixed_precision_without_agr_trains_as_torch_does(trained, settings):
    theirs = trained(settings, optimizer=torch.optim.AdamW)
    assert distance(trained(settings, agr=False), theirs) < REDUCED_TOLERANCE
    assert distance(trained(settings), theirs) > 3 * REDUCED_TOLERANCE


@pytest.mark.parametrize("fused", [False, True])
def test_steps_with_infinities_are_skipped(trained, fused):
    """The scale is so large that gradients overflow, until it has been halved often enough."""
    huge = changed(float16, init_scale=2.0**30, gradient_clip_val=None)
    ours = trained(huge, agr=False, fused=fused)
    assert distance(ours, trained(huge, optimizer=torch.optim.AdamW)) < REDUCED_TOLERANCE
    assert distance(ours, trained(changed(float16, gradient_clip_val=None), agr=False)) > 100 * REDUCED_TOLERANCE


def test_the_optimizers_clipping_replaces_lightnings(trained):
    clipped, unclipped = changed(float32, gradient_clip_val=0.1), changed(float32, gradient_clip_val=None)
    assert distance(trained(clipped), trained(unclipped, max_grad_norm=0.1)) < TOLERANCE
    assert distance(trained(clipped), trained(unclipped)) > 30 * TOLERANCE


def test_an_optimizer_that_unscales_is_clipped_by_itself_since_lightning_refuses(trained):
    clipped, unclipped = changed(float16, gradient_clip_val=0.1), changed(float16, gradient_clip_val=None)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trained(clipped, fused=True)
    by_itself = trained(unclipped, fused=True, max_grad_norm=0.1)
    assert distance(by_itself, trained(clipped)) < REDUCED_TOLERANCE
    assert distance(by_itself, trained(unclipped)) > 100 * REDUCED_TOLERANCE
