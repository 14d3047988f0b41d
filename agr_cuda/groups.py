"""The parameter group: a dictionary of options, some of which (such as `agr`) are left out of checkpoints."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from .precision import PRECISION_OPTIONS, says_state

#: The options that are read and set like any other, but that iteration leaves out.
HIDDEN_OPTIONS = ("agr", *PRECISION_OPTIONS)
#: Those, and one that is left out where it has no meaning.
UNSAVED_OPTIONS = (*HIDDEN_OPTIONS, "rounding_seed")
#: No option, and left out as well: that a step has been prepared with options that say of what type the state is. The
#: options may be back at their defaults since; the state of before is then still converted.
STATE_CONVERTED = "_state_converted"


def converts_state(group: dict[str, Any]) -> bool:
    """Whether state of another type than the group's options say is converted. The group remembers that it is."""
    if says_state(group):
        group[STATE_CONVERTED] = True
    return STATE_CONVERTED in group


class ParameterGroup(dict[str, Any]):
    """The options of a parameter group. Some are read and set like any other option, but iteration leaves them out.

    Code that saves, loads or compares groups iterates over their keys, and torch.distributed.checkpoint requires each
    key in the checkpoint. Checkpoints of torch.optim.AdamW have neither `agr` nor the options that say how numbers are
    stored, and load into this package's optimizers as well as the other way round. Iterating over a group therefore
    gives exactly the keys of torch's group, and `rounding_seed` where numbers are rounded by it.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        if isinstance(options, ParameterGroup):
            self.update(options._hidden())

    def _hides(self, key: str) -> bool:
        return key in (*HIDDEN_OPTIONS, STATE_CONVERTED) or (
            key == "rounding_seed" and not self.get("stochastic_rounding")
        )

    def _hidden(self) -> dict[str, Any]:
        return {key: self[key] for key in super().__iter__() if self._hides(key)}

    def __iter__(self) -> Iterator[str]:
        return (key for key in super().__iter__() if not self._hides(key))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys(self) -> KeysView[str]:  # type: ignore[override]  # dict's own view would include hidden options
        """Return a view of the keys that are not hidden."""
        return KeysView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]  # as in keys()
        """Return a view of the values whose keys are not hidden."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # as in keys()
        """Return a view of the (key, value) pairs whose keys are not hidden."""
        return ItemsView(self)

    def copy(self) -> ParameterGroup:
        """Return a shallow copy, including hidden options."""
        return type(self)(self)

    def everything(self) -> dict[str, Any]:
        """Return a plain dictionary of all options, including hidden ones."""
        return {**self, **self._hidden()}

    def __reduce__(self) -> tuple[Any, ...]:  # used by copy.copy, copy.deepcopy and pickle
        return type(self), (self.everything(),)
