"""Files that an earlier version has written are read by this one, and go on with the same numbers.

Run as a program, this file writes the checkpoint of the version that it runs with: tests/checkpoints/VERSION.pt.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import agr_cuda

FOLDER = Path(__file__).parent / "checkpoints"
STEPS = 3  # before a file is written, and after it is read

#: By name: the optimizer, the parameters' type, and what else is special. Entries are added, never changed.
CASES = {
    "adamw": (agr_cuda.AdamW, torch.float32, {}),
    "adamw-amsgrad": (agr_cuda.AdamW, torch.float32, {"amsgrad": True, "max_grad_norm": 1.0}),
    "adamw-master": (agr_cuda.AdamW, torch.bfloat16, {"master_weights": True}),
    "adamw-stochastic": (agr_cuda.AdamW, torch.bfloat16, {"stochastic_rounding": True, "rounding_seed": 5}),
    "adamw-8bit": (agr_cuda.AdamW, torch.float32, {"state_dtype": "8bit"}),
    "adan": (agr_cuda.Adan, torch.float32, {"max_grad_norm": 1.0}),
    "adan-8bit": (agr_cuda.Adan, torch.float32, {"state_dtype": "8bit"}),
}


def begun(case):
    """A matrix (large enough for 8-bit state where it is to have that) and a bias, in two groups, with names."""
    make, dtype, options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    model = (nn.Linear(70, 60) if options.get("state_dtype") == "8bit" else nn.Linear(7, 6)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    groups = [{"params": [("weight", model.weight)]}, {"params": [("bias", model.bias)], "weight_decay": 0.0}]
    # By the reference, whose numbers depend on no processor.
    return model, make(groups, lr=0.01, weight_decay=0.1, backend="reference", **options)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def write(path):
    saved = {}
    for case in CASES:
        model, optimizer = begun(case)
        train(model, optimizer, range(STEPS))
        saved[case] = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(model, optimizer, range(STEPS, 2 * STEPS))
        saved[case]["later"] = copy.deepcopy(model.state_dict())
    path.parent.mkdir(exist_ok=True)
    torch.save(saved, path)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.pt")), ids=lambda path: path.stem)
def test_a_file_of_an_earlier_version_goes_on(path):
    saved = torch.load(path, weights_only=True)
    assert saved.keys() <= CASES.keys()
    for case, kept in saved.items():
        model, optimizer = begun(case)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        train(model, optimizer, range(STEPS, 2 * STEPS))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, kept["later"][name], rtol=1e-6, atol=1e-7, msg=f"{case}: {name}")


def test_there_is_a_file_of_every_minor_version():
    assert (FOLDER / "0.1.0.pt").exists()


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / f"{agr_cuda.__version__}.pt")
