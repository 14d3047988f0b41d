"""A picture beside a result that a command wrote, where what draws it is installed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def draw(document: Path, chart: str) -> str:
    """Draw a stored result as a PNG beside it.

    Args:
        document: the result.
        chart: the module of bench.reporting whose `figure` draws it.

    Returns:
        What was written, to be shown: both files, or why there is one.
    """
    try:
        # Imported now, since it takes a second; and it may be missing on a machine that was set up for training alone.
        from bench.reporting import pictures

        figure = import_module(f"bench.reporting.{chart}").figure
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "bench":
            raise
        return f"{document}, and no picture, since {package} is not installed"
    pictures.save(document.with_suffix(".png"), figure, document)
    return f"{document} and .png"
