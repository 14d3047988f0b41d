"""A parameter group: a dictionary of options, of which one is not in checkpoints."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any


class ParameterGroup(dict[str, Any]):
    """The options of a parameter group. `agr` is read and set like every other, and is not among the keys.

    What saves, loads or compares groups walks their keys, and torch.distributed.checkpoint asks a checkpoint for each
    of them. `agr` says how this program trains; the groups of torch.optim.AdamW, whose checkpoints load into this
    package's and the other way round, know nothing of it. So whoever walks a group finds the keys that torch's has.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        if "agr" in options:
            self["agr"] = options["agr"]

    def __iter__(self) -> Iterator[str]:
        return (key for key in super().__iter__() if key != "agr")

    def __len__(self) -> int:
        return super().__len__() - ("agr" in self)

    def keys(self) -> KeysView[str]:  # type: ignore[override]  # dict's own view would show all that is stored
        """Return a view of the keys, without `agr`."""
        return KeysView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]  # as keys
        """Return a view of their values."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # as keys
        """Return a view of keys and values."""
        return ItemsView(self)

    def copy(self) -> ParameterGroup:
        """Return a copy, `agr` included."""
        return type(self)(self)

    def __reduce__(self) -> tuple[Any, ...]:  # for copy.copy, copy.deepcopy and pickle
        return type(self), ({**self, **({"agr": self["agr"]} if "agr" in self else {})},)
