"""Train with torch.optim's SGD and Muon with and without AGR: one call between backward() and step().

A perceptron learns scikit-learn's handwritten digits. Muon, which takes matrices alone, shares the work with SGD, which
gets the biases; one call regularizes and clips the gradients of both, by one norm.

Needs: pip install "agr-cuda[examples]", and PyTorch 2.9 or later for Muon
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import agr_cuda


def optimizers_of(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together train all parameters of the model."""
    if name == "SGD":
        return [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]
    matrices, others = ([p for p in model.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.SGD(others, lr=0.1, momentum=0.9)]


def train(name: str, agr: bool, steps: int, device: str) -> tuple[float, float]:
    """Return the share of test images that are told right, and the mean norm of gradients before clipping."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    images, labels = (torch.tensor(x, device=device) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    optimizers, norms = optimizers_of(name, model), []
    for _ in range(steps):
        batch = torch.randint(0, 1500, (64,)).to(device)
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images[batch]), labels[batch]))
        clip = agr_cuda.regularize_gradients_ if agr else nn.utils.clip_grad_norm_
        norm = clip(model.parameters(), max_norm=1.0)
        assert norm is not None  # since max_norm was given
        norms.append(norm)
        for optimizer in optimizers:
            optimizer.step()
    right = (model(images[1500:]).argmax(1) == labels[1500:]).double().mean()
    return float(right), float(torch.stack(norms).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="steps of each optimizer (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    args = parser.parse_args()
    for name in ("SGD", "Muon") if hasattr(torch.optim, "Muon") else ("SGD",):
        for agr in (False, True):
            right, norm = train(name, agr, args.steps, args.device)
            label = f"{name} with AGR" if agr else name
            print(f"{label:13}  {100 * right:.1f}% right, mean norm {norm:.6f}")
