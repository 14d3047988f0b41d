"""What people do around an optimizer in PyTorch: schedulers, averages of weights, parametrizations, torch.func, files.

With agr=False everything gives the numbers of torch.optim.AdamW.
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import agr_cuda

MAKERS = {
    "AdamW": lambda params, **options: agr_cuda.AdamW(params, lr=0.01, agr=False, **options),
    "Adan": lambda params, **options: agr_cuda.Adan(params, lr=0.01, **options),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def torchs(params, **options):
    return torch.optim.AdamW(params, lr=0.01, **options)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))


def loss_of(trained, step=0):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return (trained(x) - x[:, :2]).square().mean()


def train(trained, optimizer, steps, after=None):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(trained, step)
        loss.backward()
        optimizer.step()
        if after is not None:
            after(loss.detach())
        losses.append(loss.item())
    return losses


def assert_near(one, other):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "SWALR": lambda o: SWALR(o, 0.005, anneal_epochs=3),
}


def test_every_scheduler_of_pytorch_is_tried():
    public = {
        name
        for name in dir(lr_scheduler)
        if isinstance(found := getattr(lr_scheduler, name), type)
        and issubclass(found, lr_scheduler.LRScheduler)
        and found.__module__ == lr_scheduler.__name__
    }
    assert public - {"LRScheduler", "_LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(kind, make):
    """The rates, and what OneCycleLR and CyclicLR do to betas, are those of torch.optim.AdamW; resumed as well."""
    ours, theirs, resumed = model(), model(), model()
    # CyclicLR and OneCycleLR set the first beta, of two or three.
    optimizers = [maker(m.parameters()) for maker, m in ((make, ours), (torchs, theirs), (make, resumed))]
    schedulers = [SCHEDULERS[kind](o) for o in optimizers]

    def stepper(scheduler, rates, optimizer):
        def step(loss):
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
            scheduler.step(*([loss] if kind == "ReduceLROnPlateau" else []))

        return step

    found, wanted = [], []
    train(ours, optimizers[0], 5, stepper(schedulers[0], found, optimizers[0]))
    train(theirs, optimizers[1], 5, stepper(schedulers[1], wanted, optimizers[1]))
    if isinstance(optimizers[0], torch.optim.AdamW):
        assert found == wanted
        assert_near(ours, theirs)
    elif kind != "ReduceLROnPlateau":  # whose rates depend on the losses
        assert [lr for lr, _ in found] == [lr for lr, _ in wanted]
    resumed.load_state_dict(ours.state_dict())
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    schedulers[2].load_state_dict(copy.deepcopy(schedulers[0].state_dict()))
    train(ours, optimizers[0], 3, stepper(schedulers[0], found, optimizers[0]))
    train(resumed, optimizers[2], 3, stepper(schedulers[2], wanted, optimizers[2]))
    assert found[-3:] == wanted[-3:]
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_models(average, make):
    trained = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
    averaged = AveragedModel(trained, multi_avg_fn=average)
    seen = []

    def update(_):
        averaged.update_parameters(trained)
        seen.append([p.detach().clone() for p in trained.parameters()])

    train(trained, make(trained.parameters()), 6, update)
    for i, p in enumerate(averaged.module.parameters()):
        wanted = seen[0][i]
        for step, values in enumerate(seen[1:], start=1):
            weight = 0.1 if average else 1 / (step + 1)
            wanted = wanted + (values[i] - wanted) * weight
        torch.testing.assert_close(p, wanted)
    update_bn([torch.randn(8, 4) for _ in range(3)], averaged)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations(kind):
    """The optimizer has the underlying parameters, and AGR regularizes their gradients."""

    def parametrized():
        made = model()
        getattr(parametrizations, kind)(made[0])
        return made

    torch.manual_seed(0)
    ours = parametrized()
    theirs = copy.deepcopy(ours)
    optimizers = MAKERS["AdamW"](ours.parameters()), torchs(theirs.parameters())
    # Spectral norm iterates in every forward pass of training.
    losses = [train(m, o, 8) for m, o in zip((ours, theirs), optimizers, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    regularized = parametrized()
    assert train(regularized, agr_cuda.AdamW(regularized.parameters(), lr=0.01), 8)[-1] < losses[0][0]


def test_tied_weights_are_one_tensor(make):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())[:, :2]

    tied = Tied()
    optimizer = make(tied.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 3
    losses = train(tied, optimizer, 30)
    assert losses[-1] < losses[0]
    assert tied.first.weight is tied.second.weight
    with pytest.raises(ValueError, match="a parameter group has a parameter more than once"):
        make([tied.first.weight, tied.second.weight])


def test_gradients_of_torch_func(make):
    """Gradients are given to the parameters, and the step is as any other."""
    ours, theirs = model(), model()
    optimizers = make(ours.parameters()), make(theirs.parameters())
    weights = dict(ours.named_parameters())
    for step in range(5):

        def loss(values, step=step):
            return loss_of(lambda x: torch.func.functional_call(ours, values, (x,)), step)

        gradients = torch.func.grad(loss)({name: p.detach() for name, p in weights.items()})
        for name, p in weights.items():
            p.grad = gradients[name]
        optimizers[0].step()
    train(theirs, optimizers[1], 5)
    assert_near(ours, theirs)


def test_steps_within_torch_func_are_refused(make):
    """torch.func transforms functions, and a step changes tensors."""
    p = nn.Parameter(torch.ones(3))
    optimizer = make([p])

    def after_a_step(x):
        p.grad = x
        optimizer.step()
        return p.sum()

    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"group 0, parameter 0 belongs to a transform of torch\.func"):
        torch.func.grad(after_a_step)(torch.ones(3))
    assert torch.equal(p, before)
    assert not optimizer.state
    after_a_step(torch.ones(3))
    assert not torch.equal(p, before)


def test_compiled_autograd(make):
    """Hooks and the backward pass are compiled, the step is as it was."""
    ours, theirs = model(), model()
    optimizers = make(ours.parameters()), make(theirs.parameters())

    @torch.compile(backend="eager")
    def backward(step):
        loss_of(ours, step).backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        for step in range(4):
            backward(step)
            optimizers[0].step()
            optimizers[0].zero_grad()
    train(theirs, optimizers[1], 4)
    assert_near(ours, theirs)


def test_safetensors(make):
    """State and parameters are plain tensors: names and numbers go into a file, options into its metadata or beside."""
    files = pytest.importorskip("safetensors.torch")
    ours, resumed = model(), model()
    optimizers = make(ours.parameters()), make(resumed.parameters())
    train(ours, optimizers[0], 3)
    saved = optimizers[0].state_dict()
    flat = {f"{i}.{key}": value for i, state in saved["state"].items() for key, value in state.items()}
    loaded = files.load(files.save(flat))
    state: dict = {}
    for name, value in loaded.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    resumed.load_state_dict(files.load(files.save(ours.state_dict())))
    optimizers[1].load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    for trained, optimizer in zip((ours, resumed), optimizers, strict=True):
        train(trained, optimizer, 3)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), resumed.parameters(), strict=True))


def test_a_file_that_torch_save_makes_is_read_with_weights_only(make):
    trained = model()
    optimizer = make(trained.parameters())
    train(trained, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": trained.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = model()
    other.load_state_dict(loaded["model"])
    resumed = make(other.parameters())
    resumed.load_state_dict(loaded["optimizer"])
    assert train(trained, optimizer, 2) == train(other, resumed, 2)
