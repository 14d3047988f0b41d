"""torchtitan: the optimizer container, what it saves, and the implementations that its configuration can ask for."""

import copy

import pytest
import torch
from conftest import distance, weights_of
from torch import nn
from torchtitan.components.optimizer import ParamGroupConfig
from torchtitan_container import Optimizers

import agr_cuda


@pytest.fixture
def container():
    """Return a function that makes a model and the container of its optimizers: biases apart, without AGR."""

    def make(name="AGR-AdamW", other=None, implementation="fused", **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        theirs = {"lr": 1e-2, "weight_decay": 0.0}
        if other is None:
            theirs |= {"agr": False, **options}
        groups = [
            ParamGroupConfig(pattern=r"bias$", optimizer_name=other or name, optimizer_kwargs=theirs),
            ParamGroupConfig(pattern=r".*", optimizer_name=name, optimizer_kwargs={"lr": 1e-2, **options}),
        ]
        config = Optimizers.Config(param_groups=groups, implementation=implementation)
        return model, config.build(model_parts=[model])

    return make


def step(model, optimizers, seed=0):
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    optimizers.zero_grad()
    nn.functional.cross_entropy(model(inputs), inputs[:, :4].argmax(1)).backward()
    optimizers.step()


@pytest.mark.parametrize(("name", "optimizer"), [("AGR-AdamW", agr_cuda.AdamW), ("AGR-Adan", agr_cuda.Adan)])
def test_patterns_have_their_own_options(container, name, optimizer):
    _, optimizers = container(name)
    (made,) = optimizers
    assert type(made) is optimizer
    assert [group["agr"] for group in made.param_groups] == [False, True]
    assert made.param_groups[0]["param_names"] == ["0.bias", "2.bias"]


def test_torchs_optimizers_are_still_there(container):
    model, optimizers = container("AGR-AdamW", "AdamW")
    assert [type(made) for made in optimizers] == [torch.optim.AdamW, agr_cuda.AdamW]
    step(model, optimizers)


@pytest.mark.parametrize("name", ["AGR-AdamW", "AGR-Adan"])
def test_saving_before_the_first_step_changes_no_weight(container, name):
    """The container makes a step with gradients of zero, for which AGR as its authors wrote it would give NaN."""
    model, optimizers = container(name)
    before = weights_of(model)
    saved = optimizers.state_dict()
    assert distance(weights_of(model), before) == 0
    assert all(value.isfinite().all() for value in saved.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", ["AGR-AdamW", "AGR-Adan"])
def test_what_is_saved_has_names_and_no_agr(container, name):
    model, optimizers = container(name)
    step(model, optimizers)
    saved = optimizers.state_dict()
    assert {"state.0.weight.exp_avg", "param_groups.2.bias.lr"} <= saved.keys()
    assert not any(key.endswith(".agr") for key in saved)
    other_model, other = container(name)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(saved))  # Loading copies no tensors that are of the right type already.
    assert [group["agr"] for group in other.optimizers[0].param_groups] == [False, True]
    step(model, optimizers, 1)
    step(other_model, other, 1)
    assert distance(weights_of(model), weights_of(other_model)) == 0


@pytest.mark.parametrize(
    ("implementation", "backend"), [("fused", "cpu"), ("for-loop", "cpu"), ("foreach", "reference")]
)
def test_the_implementation_chooses_the_backend(container, implementation, backend):
    """The fused kernels for two of the three."""
    model, optimizers = container(implementation=implementation)
    step(model, optimizers)
    assert optimizers.optimizers[0].backends == [backend]


def test_averages_in_bfloat16_are_asked_for_with_state_dtype(container):
    model, optimizers = container(implementation="fused_opt_states_bf16")
    with pytest.raises(RuntimeError, match=r"state is a torch\.bfloat16"):
        step(model, optimizers)
    for implementation in ("fused", "fused_opt_states_bf16"):
        model, optimizers = container(implementation=implementation, state_dtype=torch.bfloat16)
        step(model, optimizers)
        assert optimizers.optimizers[0].backends == ["cpu"]
        saved = optimizers.state_dict()
        assert saved["state.0.weight.exp_avg"].dtype == torch.bfloat16
