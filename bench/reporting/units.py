"""How durations, sizes and ratios are shown."""

from __future__ import annotations

from bench.measuring.stats import Summary


def duration(seconds: float) -> str:
    """Return seconds in a unit that leaves one to three digits before the point."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if float(shown := f"{seconds * factor:.3g}") < 1e3:
            return f"{shown} {unit}"
    return f"{seconds:.3g} s" if seconds < 1e3 else f"{seconds:.0f} s"


def span(summary: Summary) -> str:
    """Return the quartiles of durations, the unit once where both have the same."""
    lower, upper = duration(summary.lower), duration(summary.upper)
    number, _, unit = lower.partition(" ")
    return f"{number if upper.endswith(f' {unit}') else lower} - {upper}"


def ratio(value: float) -> str:
    """Return a ratio with two digits after the point, three if it is small, one if it is large."""
    return f"{value:.{3 if value < 0.2 else 2 if value < 10 else 1}f}"


def times(value: float) -> str:
    """Return a ratio of times."""
    return f"{ratio(value)}x"


def percent(share: float) -> str:
    """Return a share with one digit after the point."""
    return f"{100 * share:.1f}%"


def size(count: float) -> str:
    """Return bytes in a unit that leaves one to four digits before the point, in three digits at least."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1e3 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
