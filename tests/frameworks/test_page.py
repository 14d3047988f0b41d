"""The code of docs/frameworks.md runs. tests/test_documentation.py runs that of all other pages."""

import pytest
import torch
import transformers.training_args
from pages import FRAMEWORKS, examples

EXAMPLES = examples(FRAMEWORKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all blocks, since a block may read what another wrote."""
    return tmp_path_factory.mktemp("page")


def test_the_page_has_a_block_for_every_framework():
    shown = [example.parsed for example in EXAMPLES if not example.region.lexemes.get("directive")]
    for name in ("transformers", "accelerate", "lightning", "timm", "torchtitan", "peft"):
        assert any(f"from {name}" in code or f"import {name}" in code for code in shown), name


@pytest.mark.parametrize("example", [pytest.param(example, id=str(example.line)) for example in EXAMPLES])
def test_the_code_of_the_page_runs(example, folder, monkeypatch):
    monkeypatch.chdir(folder)
    # The page is for GPUs. On CPUs, which have bfloat16 too, TrainingArguments would want to be told use_cpu=True.
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    torch.manual_seed(0)
    example.evaluate()
