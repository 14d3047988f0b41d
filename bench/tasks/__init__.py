"""Models on real data, which comes with Python or with the checkout: what optimizers are compared on.

Small ones train within seconds on one core of a CPU, medium ones within a minute, and large ones are of the size of
the AGR paper's, for a GPU.
"""

from __future__ import annotations

from bench.tasks.demonstration import demonstration
from bench.tasks.diffusion import ddpm
from bench.tasks.images import resnet, vit
from bench.tasks.task import Task
from bench.tasks.text import gpt


def _by_name(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


SIZES: dict[str, dict[str, Task]] = {
    "small": _by_name(
        gpt(context=32, batch_size=8, width=64, heads=4, layers=2, lr=3e-3),
        resnet(batch_size=32, channels=16, blocks=1, lr=1e-2),
        vit(batch_size=32, width=32, heads=4, layers=2, lr=7e-3),
        ddpm(batch_size=16, channels=16, blocks=1, lr=1e-2),
    ),
    "medium": _by_name(
        gpt(context=64, batch_size=16, width=96, heads=4, layers=3),
        resnet(batch_size=64, channels=32, blocks=1),
        vit(batch_size=64, width=64, heads=4, layers=3),
        ddpm(batch_size=64, channels=32, blocks=1),
    ),
    "demo": _by_name(demonstration(context=64, batch_size=8, width=128, heads=4, layers=3)),
    "large": _by_name(
        gpt(context=256, batch_size=32, width=768, heads=12, layers=12, lr=3e-4),
        resnet(batch_size=128, channels=256, blocks=8, lr=1e-3),
        vit(batch_size=128, width=384, heads=6, layers=12, lr=5e-4),
        ddpm(batch_size=128, channels=128, blocks=3, lr=2e-4),
    ),
}
#: What is measured where nothing else is said.
TASKS = SIZES["medium"]
