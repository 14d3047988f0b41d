"""peft: LoRA's adapters are trained, and nothing else."""

import pytest
import torch
from conftest import distance, weights_of
from peft import LoraConfig, get_peft_model
from peft_lora import train
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import agr_cuda


def split(weights):
    """Return the adapters, and the rest."""
    adapters = {name: value for name, value in weights.items() if ".lora_" in name}
    return adapters, {name: value for name, value in weights.items() if name not in adapters}


@pytest.mark.parametrize("optimizer", [agr_cuda.AdamW, agr_cuda.Adan])
def test_only_adapters_are_trained(tmp_path, optimizer):
    adapters, base = split(weights_of(train(tmp_path / "long", 4, optimizer=optimizer)))
    before, untrained = split(weights_of(train(tmp_path / "none", 0, optimizer=optimizer)))
    assert distance(base, untrained) == 0
    assert len(adapters) == 8  # two matrices for each of q_proj and v_proj, in two layers
    assert all(not torch.equal(adapters[name], before[name]) for name in adapters)


def test_state_is_of_adapters_alone(tmp_path):
    train(tmp_path, 2)
    saved = torch.load(tmp_path / "optimizer.pt")["optimizer"]
    assert sorted(saved["state"]) == list(range(8))
    assert {4} == {size for state in saved["state"].values() for size in state["exp_avg"].shape} - {32}


@pytest.mark.parametrize("optimizer", [agr_cuda.AdamW, agr_cuda.Adan])
def test_frozen_parameters_may_be_given_too(optimizer):
    """They have no gradient: they get no state, no weight decay, and are no part of the norm."""
    trained = []
    for everything in (True, False):
        set_seed(0)
        tiny = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**tiny, num_attention_heads=2)), LoraConfig(r=2))
        given = [parameter for parameter in model.parameters() if everything or parameter.requires_grad]
        update = optimizer(given, lr=1e-2, weight_decay=0.1, max_grad_norm=0.1)
        for _ in range(3):
            tokens = torch.randint(32, (4, 8))
            update.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            update.step()
        assert len(update.state) == 4
        trained.append(weights_of(model))
    assert distance(*trained) == 0
