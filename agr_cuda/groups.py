"""The parameter group: a dictionary of options, one of which (`agr`) is left out of checkpoints."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any


class ParameterGroup(dict[str, Any]):
    """The options of a parameter group. `agr` is read and set like any other option, but iteration leaves it out.

    Code that saves, loads or compares groups iterates over their keys, and torch.distributed.checkpoint requires each
    key in the checkpoint. Checkpoints of torch.optim.AdamW have no `agr`, and load into this package's optimizers as
    well as the other way round. Iterating over a group therefore gives exactly the keys of torch's group.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        if "agr" in options:
            self["agr"] = options["agr"]

    def __iter__(self) -> Iterator[str]:
        return (key for key in super().__iter__() if key != "agr")

    def __len__(self) -> int:
        return super().__len__() - ("agr" in self)

    def keys(self) -> KeysView[str]:  # type: ignore[override]  # dict's own view would include `agr`
        """Return a view of the keys, without `agr`."""
        return KeysView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]  # as in keys()
        """Return a view of the values, without that of `agr`."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # as in keys()
        """Return a view of the (key, value) pairs, without `agr`."""
        return ItemsView(self)

    def copy(self) -> ParameterGroup:
        """Return a shallow copy, including `agr`."""
        return type(self)(self)

    def __reduce__(self) -> tuple[Any, ...]:  # used by copy.copy, copy.deepcopy and pickle
        return type(self), ({**self, **({"agr": self["agr"]} if "agr" in self else {})},)
