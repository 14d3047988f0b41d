"""The pictures of README.md and docs/: from which results each is drawn, and by what."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from bench.figures import stored
from bench.reporting import effect_chart, pictures, step_chart, sweep_chart, train_chart
from bench.reporting.pictures import Draw


@dataclass(frozen=True)
class Picture:
    """A picture of stored results."""

    path: Path
    draw: Draw
    results: tuple[str, ...]

    def is_current(self) -> bool:
        """Whether it shows its results as they are now."""
        return pictures.is_current(self.path, self.draw, *map(stored.path, self.results))

    def save(self) -> None:
        """Draw it anew."""
        pictures.save(self.path, self.draw, *map(stored.path, self.results))


def beside(draw: Draw, result: str) -> Picture:
    """Return the picture that a command has drawn beside its result."""
    return Picture(stored.path(result).with_suffix(".png"), draw, (result,))


def of_example(name: str, result: str) -> Picture:
    """Return the picture in docs/ that a program of examples/ draws of its result."""
    folder = str(stored.ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)  # where they find each other
    return Picture(stored.ROOT / "docs" / f"{name}.png", import_module(name).figure, (result,))


PICTURES = (
    beside(step_chart.figure, "step-cpu-float32-2-cores"),
    beside(step_chart.figure, "step-cpu-precision-2-cores"),
    beside(sweep_chart.figure, "sweep-cpu-2-cores"),
    beside(train_chart.figure, "train-full"),
    beside(effect_chart.figure, "effect-small-models"),
    of_example("train_in_16_bits", "train-in-16-bits-cpu"),
    of_example("watch_coefficients", "watch-coefficients-cpu"),
)
