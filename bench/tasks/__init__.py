"""Small models on real data, which train within a minute on a CPU: what optimizers are compared on."""

from __future__ import annotations

from bench.tasks import images, text
from bench.tasks.task import Task

TASKS: dict[str, Task] = {"gpt": text.GPT_TASK, "resnet": images.RESNET_TASK, "vit": images.VIT_TASK}


def task_named(name: str) -> Task:
    """Return the task of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: allowed are {', '.join(TASKS)}")
    return TASKS[name]
