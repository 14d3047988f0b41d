"""What is run: tasks, arms, steps, seeds, and the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.training.arms import ARMS

SMALLEST_OF_INTEREST = 0.005  # of the loss: a change below it is nobody's reason to choose an optimizer
TARGET = (
    1.05  # times the loss that the optimizer alone ends with in the search: steps are counted until a run is below that
)


@dataclass(frozen=True)
class Setting:
    """A design of the comparison.

    Attributes:
        size: of the tasks, see bench.tasks.
        steps: of a training, by task.
        warmup: the share of steps over which the learning rate rises, before it falls to 0 as a cosine.
        evaluations: how often the held-out loss is taken, at equal distances.
        seeds: of each set.
        sets: the first seed of each set of judged runs.
        search_seeds: of each point of the search, from 0 on.
        lr_factors: the search's learning rates, as factors of the task's.
        adan_factor: of Adan's learning rates to AdamW's; its authors advise 5 to 10 times as much for large models.
        weight_decays: the search's weight decays.
        arms: what is compared.

    Raises:
        ValueError: where a seed is in two sets, or in a set and in the search.
    """

    size: str
    steps: Mapping[str, int]
    warmup: float = 0.1
    evaluations: int = 10
    seeds: int = 10
    sets: tuple[int, ...] = (1000, 2000)
    search_seeds: int = 2
    lr_factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    adan_factor: float = 3.0
    weight_decays: tuple[float, ...] = (0.01, 0.1)
    arms: tuple[str, ...] = field(default=tuple(ARMS))

    def __post_init__(self) -> None:
        begins = sorted([*self.sets])
        for first, following in zip([0, *begins], begins, strict=False):
            length = self.seeds if first in begins else self.search_seeds
            if first + length > following:
                raise ValueError(
                    f"sets of {self.seeds} seeds from {', '.join(map(str, self.sets))} overlap, or overlap with the "
                    f"search's {self.search_seeds} from 0: allowed are sets that share no seed"
                )

    def record(self) -> dict[str, Any]:
        """Return it as what JSON has."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Setting:
        """Return what `record` returned for it."""
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in record.items()}
        return cls(**values)

    def of_a_run(self) -> dict[str, Any]:
        """Return what of it decides what comes of a run."""
        return {name: getattr(self, name) for name in ("size", "steps", "warmup", "evaluations")}


#: An optimizer alone, with AGR, and with the controls: what stands before and after its name.
CONTROLLED = (("", ""), ("agr-", ""), ("", "-placebo"), ("", "-bit"))
SETTINGS = {
    "full": Setting("small", {"gpt": 400, "resnet": 250, "vit": 300, "ddpm": 200}),
    "short": Setting(
        "small",
        {"gpt": 60, "resnet": 80, "vit": 80, "ddpm": 60},
        seeds=3,
        sets=(1000,),
        search_seeds=1,
        weight_decays=(0.01,),
    ),
    "tiny": Setting(
        "small",
        {"gpt": 4, "resnet": 6, "vit": 6, "ddpm": 4},
        evaluations=2,
        seeds=2,
        sets=(1000,),
        search_seeds=1,
        lr_factors=(1.0, 3.0),
        weight_decays=(0.01,),
        arms=tuple(f"{before}adamw{after}" for before, after in CONTROLLED),
    ),
    # Whether the differences between the demonstration's optimizers are chance.
    "demo": Setting(
        "demo",
        {"gpt": 500},
        seeds=2,
        sets=(1000,),
        search_seeds=1,
        lr_factors=(1.0,),
        adan_factor=10 / 3,
        weight_decays=(0.1,),
        arms=tuple(f"{before}{rule}{after}" for rule in ("adamw", "adan") for before, after in CONTROLLED),
    ),
    "large": Setting(
        "large",
        {"gpt": 150, "resnet": 200, "vit": 200, "ddpm": 200},
        seeds=10,
        sets=(1000,),
        search_seeds=1,
        lr_factors=(1.0,),
        weight_decays=(0.1,),
        arms=("adamw", "agr-adamw", "adamw-placebo", "adamw-bit", "adan", "agr-adan"),
    ),
}
