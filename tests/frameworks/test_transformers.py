"""transformers: both ways of handing over an optimizer, the Trainer's own clipping, bfloat16."""

import pytest
import torch
from conftest import TOLERANCE, distance, weights_of
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import agr_cuda

STEPS = 6


@pytest.fixture
def trainer(tmp_path):
    """Return a function that makes a Trainer. `optimizers` is a function of the model here."""

    def make(*, optimizers=None, optimizer_cls_and_kwargs=None, **settings):
        set_seed(0)
        tiny = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(**tiny, num_attention_heads=2))
        texts = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(32, (32, 8))]
        given = {"use_cpu": True, "report_to": "none", "max_steps": STEPS, "weight_decay": 0.1, **settings}
        arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **given)
        if optimizers is not None:
            return Trainer(model, arguments, train_dataset=texts, optimizers=optimizers(model))
        return Trainer(model, arguments, train_dataset=texts, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs)

    return make


def trained(trainer):
    trainer.train()
    return weights_of(trainer.model)


def agr_adamw(**options):
    return agr_cuda.AdamW, {"lr": 1e-2, **options}


def optimizer_of(trainer):
    """Return the optimizer itself, which accelerate has wrapped."""
    return trainer.optimizer.optimizer


def test_an_optimizer_object_trains_as_a_class_with_options(trainer):
    by_class = trainer(optimizer_cls_and_kwargs=agr_adamw())

    def optimizers(model):
        names = by_class.get_decay_parameter_names(model)
        split = [[p for n, p in model.named_parameters() if (n in names) == decays] for decays in (True, False)]
        groups = [{"params": split[0], "weight_decay": 0.1}, {"params": split[1], "weight_decay": 0.0}]
        return agr_cuda.AdamW(groups, lr=1e-2), None  # Trainer's own schedule

    assert distance(trained(trainer(optimizers=optimizers)), trained(by_class)) == 0


def test_the_class_gets_groups_without_weight_decay_and_its_own_learning_rate(trainer):
    made = trainer(optimizer_cls_and_kwargs=agr_adamw(), learning_rate=0.5)
    made.create_optimizer()
    assert type(made.optimizer) is agr_cuda.AdamW
    assert [(group["weight_decay"], group["lr"], group["agr"]) for group in made.optimizer.param_groups] == [
        (0.1, 1e-2, True),
        (0.0, 1e-2, True),
    ]


def test_the_optimizers_clipping_replaces_trainers(trainer):
    choice = agr_adamw(agr=False)
    by_trainer = trained(trainer(optimizer_cls_and_kwargs=choice, max_grad_norm=0.1))
    by_optimizer = trained(trainer(optimizer_cls_and_kwargs=agr_adamw(agr=False, max_grad_norm=0.1), max_grad_norm=0.0))
    unclipped = trained(trainer(optimizer_cls_and_kwargs=choice, max_grad_norm=0.0))
    assert distance(by_optimizer, by_trainer) < TOLERANCE
    assert distance(by_optimizer, unclipped) > 30 * TOLERANCE


def test_trainer_clips_before_the_optimizer_does(trainer):
    """With 1.0, unless it is told otherwise. What the optimizer measures is what has been clipped."""
    made = trainer(optimizer_cls_and_kwargs=agr_adamw(max_grad_norm=5.0))
    trained(made)
    assert float(optimizer_of(made).grad_norm) == pytest.approx(1.0, rel=1e-5)
    made = trainer(optimizer_cls_and_kwargs=agr_adamw(max_grad_norm=5.0), max_grad_norm=0.0)
    trained(made)
    assert float(optimizer_of(made).grad_norm) > 1.05


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"state_dtype": "8bit"}], ids=str)
def test_bfloat16_is_resumed_to_the_bit(trainer, options):
    settings = {"bf16": True, "save_steps": 3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    whole = trained(trainer(optimizer_cls_and_kwargs=agr_adamw(**options), **settings))
    resumed = trainer(optimizer_cls_and_kwargs=agr_adamw(**options), **settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert distance(weights_of(resumed.model), whole) == 0
    in_float32 = trained(trainer(optimizer_cls_and_kwargs=agr_adamw(**options), **{**settings, "bf16": False}))
    assert distance(in_float32, whole) > 0
