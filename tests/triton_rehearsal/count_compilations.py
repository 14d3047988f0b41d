"""Makes steps with launches that launch nothing, and counts what is compiled, launched and copied.

Run in a process of its own, in which Triton does not interpret: everything but the launch itself is Triton's own, on
tensors in the host's memory. Prints JSON.
"""

import json
import warnings
from types import SimpleNamespace

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import agr_cuda
from agr_cuda import triton as backend
from agr_cuda import triton_kernels

launched = []


class Launcher:
    """Stands for what Triton compiles to call the GPU's driver."""

    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, *arguments):
        launched.append(self.name)


class Driver:
    """Stands for a GPU of compute capability 9.0."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        load_binary=lambda *arguments: (0, 0, 0, 0, 1024),
    )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Operations(TorchDispatchMode):
    """Notes the operations of PyTorch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def compiled():
    kernels = (triton_kernels.reduce_step, triton_kernels.update_step, triton_kernels.regularize_step)
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def parameters(dtype, count):
    made = [torch.nn.Parameter(torch.randn(1 + 37 * k, dtype=dtype)) for k in range(count)]
    return [{"params": made[::2]}, {"params": made[1::2], "agr": False, "maximize": True, "weight_decay": 0.3}]


def scheduled_steps(optimizer, steps=50):
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
    for k in range(steps):
        for group in optimizer.param_groups:
            group["rounding_seed"] = k
            group["betas"] = tuple(beta * (1 - 1e-4 * k) for beta in group["betas"])
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        optimizer.step()
        scheduler.step()


def main():
    driver.set_active(Driver())
    backend.device_types = lambda: ("cpu",)
    backend.why_missing = lambda: None
    found = {"triton": triton.__version__, "compilations": [], "steps": {}}
    found |= {"compilations_to_regularize": [], "regularized": {}}
    for name in ("AdamW", "Adan"):
        for dtype in (torch.float32, torch.bfloat16):
            before = compiled()
            # Sizes, numbers of tensors and groups, and options that change nothing of what is computed on what.
            for count in (1, 2, 17):
                optimizer = getattr(agr_cuda, name)(parameters(dtype, count), backend="triton", lr=1e-3)
                scheduled_steps(optimizer)
            found["compilations"].append(compiled() - before)

    before = compiled()
    for count in (2, 17):
        stored = {"state_dtype": torch.float32, "stochastic_rounding": True}
        scheduled_steps(agr_cuda.AdamW(parameters(torch.bfloat16, count), backend="triton", **stored))
    found["compilations_to_round"] = compiled() - before

    optimizer = agr_cuda.AdamW(parameters(torch.float32, 16), backend="triton")
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for kind in ("same", "new"):
        if kind == "new":
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.zeros_like(p)
        launched.clear()
        with Operations() as operations:
            optimizer.step()
        found["steps"][kind] = {"launches": list(launched), "operations": operations.names}

    for dtype in (torch.float32, torch.bfloat16):
        before = compiled()
        for count in (1, 2, 17):
            params = [p for group in parameters(dtype, count) for p in group["params"]]
            for scale in (None, 2.0, torch.ones(())):
                for p in params:
                    p.grad = torch.randn_like(p)
                agr_cuda.regularize_gradients_(params, grad_scale=scale, backend="triton")
        found["compilations_to_regularize"].append(compiled() - before)
    for kind in ("same", "new"):
        if kind == "new":
            for p in params:
                p.grad = torch.zeros_like(p)
        launched.clear()
        with Operations() as operations:
            agr_cuda.regularize_gradients_(params, backend="triton")
        found["regularized"][kind] = {"launches": list(launched), "operations": operations.names}
    print(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
