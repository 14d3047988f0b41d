"""Gradient release: updates in the backward pass are those of ordinary steps, and gradients are gone."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

import agr_cuda

STEPS = 6


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 70), nn.GELU(), nn.LayerNorm(70), nn.Linear(70, 70), nn.GELU(), nn.Linear(70, 3)]
    return nn.Sequential(*layers).to(dtype)


def groups(of):
    return agr_cuda.parameter_groups(of, 0.1)


def batches(steps=STEPS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, generator=generator).to(dtype) for _ in range(steps)]


def train(trained, optimizer, inputs, scheduler=None):
    for x in inputs:
        optimizer.zero_grad()
        trained(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(one, other, optimizers):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    first, second = (optimizer.state_dict() for optimizer in optimizers)
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for index, mine in first["state"].items():
        theirs = second["state"][index]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (agr_cuda.AdamW, {}),
        (agr_cuda.AdamW, {"amsgrad": True, "maximize": True, "agr": False}),
        (agr_cuda.Adan, {}),
        (agr_cuda.Adan, {"no_prox": True}),
        (agr_cuda.AdamW, {"state_dtype": "8bit"}),
        (agr_cuda.Adan, {"state_dtype": torch.float32, "dtype": torch.bfloat16}),
        (agr_cuda.AdamW, {"master_weights": True, "dtype": torch.bfloat16}),
        # Each parameter has random numbers of its own, whichever is updated first.
        (agr_cuda.AdamW, {"stochastic_rounding": True, "rounding_seed": 3, "dtype": torch.bfloat16}),
        (agr_cuda.Adan, {"stochastic_rounding": True, "dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_updates_are_those_of_steps(backend, device, optimizer, options):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    ordinary, released = model(dtype).to(device), model(dtype).to(device)
    optimizers = [optimizer(groups(m), lr=0.01, backend=backend, **options) for m in (ordinary, released)]
    agr_cuda.release_gradients(released, optimizers[1])
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in optimizers]
    steps = 2 if backend == "triton" else STEPS
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Detected call of `lr_scheduler.step")
        for trained, mine, scheduler in zip((ordinary, released), optimizers, schedulers, strict=True):
            train(trained, mine, [x.to(device) for x in batches(steps, dtype)], scheduler)
    assert all(p.grad is None for p in released.parameters())
    assert_same(ordinary, released, optimizers)


def test_masters_of_some_parameters_of_a_group():
    mixed = [model(), model()]
    for m in mixed:
        m[3].to(torch.bfloat16)
        m.forward = lambda x, m=m: m[5](m[3](m[2](m[1](m[0](x))).bfloat16()).float())
    optimizers = [agr_cuda.AdamW(m.parameters(), lr=0.01, master_weights=True) for m in mixed]
    agr_cuda.release_gradients(mixed[1], optimizers[1])
    for m, optimizer in zip(mixed, optimizers, strict=True):
        train(m, optimizer, batches())
    assert_same(*mixed, optimizers)
    assert "master_param" in optimizers[1].state[mixed[1][3].weight]
    assert "master_param" not in optimizers[1].state[mixed[1][0].weight]


def test_at_most_one_gradient_is_there_at_a_time():
    released = nn.Sequential(*(nn.Linear(30, 30, bias=False) for _ in range(8)))
    optimizer = agr_cuda.AdamW(released.parameters())
    most = []
    for p in released.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(q.grad is not None for q in released.parameters()))
        )
    agr_cuda.release_gradients(released, optimizer)
    train(released, optimizer, [torch.randn(2, 30) for _ in range(3)])
    assert most == [1] * 24


PEAK = """
import sys, torch, agr_cuda
from torch import nn
release, size, layers = sys.argv[1] == "release", 1024, 24
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))
optimizer = agr_cuda.AdamW(model.parameters())
if release:
    agr_cuda.release_gradients(model, optimizer)
for _ in range(3):
    model(torch.randn(1, size)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


def test_the_memory_of_gradients_is_gone():
    command = [sys.executable, "-c", PEAK]
    # glibc then gives freed memory back to the system, of which the peak is measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    kept, released = (
        int(subprocess.run([*command, how], capture_output=True, text=True, check=True, env=environment).stdout)
        for how in ("keep", "release")
    )
    gradients = 24 * 1024 * 1024 * 4
    assert kept - released > 0.8 * gradients


def test_the_handle_ends_it():
    ordinary, released = model(), model()
    optimizers = [agr_cuda.Adan(m.parameters(), lr=0.01) for m in (ordinary, released)]
    train(ordinary, optimizers[0], batches())
    with agr_cuda.release_gradients(released, optimizers[1]):
        train(released, optimizers[1], batches()[:3])
    assert not hasattr(optimizers[1], "_step_supports_amp_scaling")
    train(released, optimizers[1], batches()[3:])
    assert all(p.grad is not None for p in released.parameters())
    assert_same(ordinary, released, optimizers)


def test_checkpoints_and_options_in_between():
    ordinary, released = model(), model()
    optimizers = [agr_cuda.AdamW(m.parameters(), lr=0.01) for m in (ordinary, released)]
    agr_cuda.release_gradients(released, optimizers[1])
    for trained, optimizer in zip((ordinary, released), optimizers, strict=True):
        train(trained, optimizer, batches()[:2])
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": []})
        gc.collect()  # the handle is kept by the optimizer
        optimizer.param_groups[0].update(agr=False, lr=0.1, state_dtype=torch.bfloat16)
        train(trained, optimizer, batches()[2:4])
        assert all((p.grad is None) == (trained is released) for p in trained.parameters())
        optimizer.param_groups[0]["state_dtype"] = None
        train(trained, optimizer, batches()[4:])
    assert_same(ordinary, released, optimizers)
    for again in (copy.deepcopy(optimizers[1]), pickle.loads(pickle.dumps(optimizers[1]))):
        for p in again.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        again.step()  # of a copy, gradients are not released
        assert again.state[again.param_groups[0]["params"][0]]["step"] == STEPS + 1


def test_other_parameters_are_updated_by_the_step():
    first, second = model(), nn.Linear(3, 3)
    frozen = second.bias.requires_grad_(False)
    optimizer = agr_cuda.AdamW([*first.parameters(), *second.parameters()], lr=0.01)
    agr_cuda.release_gradients([*first.parameters(), frozen], optimizer)
    frozen.requires_grad_(True)
    before = second.weight.detach().clone(), frozen.detach().clone()
    second(first(torch.ones(2, 6))).sum().backward()
    assert all(p.grad is None for p in first.parameters())
    assert second.weight.grad is not None
    optimizer.step()
    assert not torch.equal(second.weight, before[0])
    assert not torch.equal(frozen, before[1])


def test_tied_weights_and_checkpointing():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.layers[2].weight = self.layers[0].weight

        def forward(self, x):
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x

    ordinary, released = Tied(), Tied()
    optimizers = [agr_cuda.AdamW(m.parameters(), lr=0.01) for m in (ordinary, released)]
    agr_cuda.release_gradients(released, optimizers[1])
    for m, optimizer in zip((ordinary, released), optimizers, strict=True):
        train(m, optimizer, batches())
    assert_same(ordinary, released, optimizers)


def test_a_closure_works():
    ordinary, released = model(), model()
    optimizers = [agr_cuda.AdamW(m.parameters(), lr=0.01) for m in (ordinary, released)]
    agr_cuda.release_gradients(released, optimizers[1])
    for m, optimizer in zip((ordinary, released), optimizers, strict=True):
        for x in batches():

            def closure(m=m, optimizer=optimizer, x=x):
                optimizer.zero_grad()
                loss = m(x).square().mean()
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
    assert_same(ordinary, released, optimizers)


def test_hooks_of_the_optimizer_run_once_a_step():
    released = model()
    optimizer = agr_cuda.AdamW(released.parameters())
    agr_cuda.release_gradients(released, optimizer)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(released, optimizer, batches())
    assert len(calls) == STEPS


def test_nothing_keeps_the_model_alive():
    released = model()
    optimizer = agr_cuda.AdamW(released.parameters())
    agr_cuda.release_gradients(released, optimizer)
    train(released, optimizer, batches(2))
    gone = weakref.ref(released[0].weight), weakref.ref(optimizer)
    del released, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    # Without its optimizer, a model keeps its gradients.
    kept = model()
    agr_cuda.release_gradients(kept, agr_cuda.AdamW(kept.parameters()))
    gc.collect()
    kept(batches()[0]).sum().backward()
    assert all(p.grad is not None for p in kept.parameters())


def test_a_compiled_function_may_call_the_backward_pass():
    ordinary, released = model(), model()
    optimizers = [agr_cuda.AdamW(m.parameters(), lr=0.01) for m in (ordinary, released)]
    agr_cuda.release_gradients(released, optimizers[1])

    @torch.compile(backend="eager")
    def compiled_step(x):
        released(x).square().mean().backward()
        optimizers[1].step()

    train(ordinary, optimizers[0], batches())
    for x in batches():
        compiled_step(x)
    assert_same(ordinary, released, optimizers)


def test_groups_that_became_plain_dictionaries_are_completed():
    released = model()
    optimizer = agr_cuda.AdamW(released.parameters())
    agr_cuda.release_gradients(released, optimizer)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with pytest.warns(UserWarning, match="came without options that now have their defaults"):
        train(released, optimizer, batches(1))
    assert optimizer.backends == ["cpu"]


def test_a_subclass_keeps_what_it_has_set():
    class Warmed(agr_cuda.AdamW):
        def __init__(self, params, warmth):
            super().__init__(params)
            self.warmth = warmth

        def _hyperparameters(self, group):
            lr, *others = super()._hyperparameters(group)
            return (lr * self.warmth, *others)

    ordinary, released = model(), model()
    optimizers = [Warmed(m.parameters(), 0.1) for m in (ordinary, released)]
    agr_cuda.release_gradients(released, optimizers[1])
    for m, optimizer in zip((ordinary, released), optimizers, strict=True):
        train(m, optimizer, batches())
    assert_same(ordinary, released, optimizers)


def test_an_earlier_hook_may_take_the_gradient():
    released = model()
    optimizer = agr_cuda.AdamW(released.parameters())
    taken = released[0].weight
    taken.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    agr_cuda.release_gradients(released.named_parameters(), optimizer)
    train(released, optimizer, batches(2))
    assert taken not in optimizer.state
    assert len(optimizer.state) == len(list(released.parameters())) - 1


class TestRefusals:
    @pytest.mark.parametrize("given", ["module", "parameters"])
    def test_data_parallelism(self, given, tmp_path):
        """What is not seen beforehand is seen at the end of the step: the sum is written after the release."""

        def refuse() -> None:
            parallel = nn.parallel.DistributedDataParallel(model())
            optimizer = agr_cuda.AdamW(parallel.parameters())
            for wrapper in (parallel, nn.Sequential(parallel)):
                with pytest.raises(RuntimeError, match="model has a DistributedDataParallel"):
                    agr_cuda.release_gradients(wrapper, optimizer)
            agr_cuda.release_gradients(parallel.module if given == "module" else parallel.parameters(), optimizer)
            parallel(batches()[0]).sum().backward()
            with pytest.raises(RuntimeError, match="has a gradient again, after its gradient has been used"):
                optimizer.step()

        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            # The model is gone when it returns. As the last owner of the process group it would wait for the group's
            # thread, and that thread for Python's lock, which it holds (github.com/pytorch/pytorch/issues/56297).
            refuse()
        finally:
            torch.distributed.destroy_process_group()

    def test_accumulation(self):
        released = model()
        optimizer = agr_cuda.AdamW(released.named_parameters(), lr=0.01)
        agr_cuda.release_gradients(released, optimizer)
        released(batches()[0]).sum().backward()
        before = [p.detach().clone() for p in released.parameters()]
        with pytest.raises(RuntimeError, match=r"group 0, parameter \d+ \('.*'\) has a second gradient since the last"):
            released(batches()[1]).sum().backward()
        assert all(torch.equal(p, old) for p, old in zip(released.parameters(), before, strict=True))
        with pytest.raises(RuntimeError, match="has a gradient again"):
            optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        released(batches()[1]).sum().backward()

    @pytest.mark.parametrize("fused", [None, True])
    def test_gradient_scalers(self, fused):
        released = model()
        optimizer = agr_cuda.AdamW(released.parameters(), fused=fused)
        agr_cuda.release_gradients(released, optimizer)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(released(batches()[0]).sum()).backward()
        with pytest.raises(RuntimeError, match=r"scaled losses cannot be released\. bfloat16 needs no"):
            scaler.step(optimizer)

    @pytest.mark.parametrize(
        ("options", "later"),
        [({"max_grad_norm": 1.0}, {}), ({"capturable": True}, {}), ({"differentiable": True}, {})],
        ids=str,
    )
    def test_options(self, options, later):
        released = model()
        ((name, value),) = options.items()
        with pytest.raises(RuntimeError, match=f"{name} is {value}.*{name}=(None|False)"):
            agr_cuda.release_gradients(released, agr_cuda.AdamW(released.parameters(), **options))
        optimizer = agr_cuda.AdamW(released.parameters())
        agr_cuda.release_gradients(released, optimizer)
        if name == "max_grad_norm":
            optimizer.max_grad_norm = value
        else:
            optimizer.param_groups[0][name] = value
        before = [p.detach().clone() for p in released.parameters()]
        with pytest.raises(RuntimeError, match=f"{name} is {value}"):
            released(batches()[0]).sum().backward()
        with pytest.raises(RuntimeError, match=f"{name} is {value}"):
            optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(released.parameters(), before, strict=True))

    def test_other_things(self):
        released = model()
        optimizer = agr_cuda.AdamW(released.parameters())
        with pytest.raises(TypeError, match=r"optimizer is a SGD; it must be agr_cuda.AdamW or agr_cuda.Adan"):
            agr_cuda.release_gradients(released, torch.optim.SGD(released.parameters()))
        with pytest.raises(TypeError, match="model has a str; it must be a module or an iterable of tensors"):
            agr_cuda.release_gradients(["a"], optimizer)
        with pytest.raises(ValueError, match="the optimizer has no parameter of the model that requires a gradient"):
            agr_cuda.release_gradients(nn.Linear(2, 2), optimizer)
        agr_cuda.release_gradients(released, optimizer)
        with pytest.raises(RuntimeError, match="gradients of this optimizer are released already"):
            agr_cuda.release_gradients(released, optimizer)
        optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
        with pytest.raises(RuntimeError, match="is no longer there in the optimizer"):
            released(batches()[0]).sum().backward()

    def test_errors_name_the_parameter(self):
        table = nn.Embedding(5, 3, sparse=True)
        optimizer = agr_cuda.AdamW([{"params": model().parameters()}, {"params": table.parameters()}])
        agr_cuda.release_gradients(table, optimizer)
        with pytest.raises(RuntimeError, match=r"the gradient of group 1, parameter 0 is torch\.sparse_coo"):
            table(torch.tensor([1])).sum().backward()
