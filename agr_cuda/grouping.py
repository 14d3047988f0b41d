"""Sort a model's parameters into groups: weight decay and AGR for matrices, neither for biases, norms and scalars."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .options import check_flag, check_nonnegative
from .sharding import check_whole

#: What a parameter can be, in the order in which it is asked.
KINDS = ("scalar", "excluded", "norm", "bias", "vector", "embedding", "matrix")
#: The kinds that have weight decay and AGR unless the program says otherwise.
MATRICES = ("matrix", "embedding")

_NORMS = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer, whose repr is a table of what is in them.

    Each is a dictionary with "params", "param_names", "weight_decay" and "agr". Further options can be set in it.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], kinds: dict[str, str], frozen: int) -> None:
        super().__init__(groups)
        self.kinds = kinds
        """The kind of each parameter, by its name."""
        self._frozen = frozen

    def __repr__(self) -> str:
        rows = [("group", "parameters", "kind", "tensors", "elements", "weight_decay", "agr")]
        for index, group in enumerate(self):
            alike: dict[tuple[str, str], list[Tensor]] = {}
            parameters = list(group["params"])
            names = group.get("param_names", ())
            for i, parameter in enumerate(parameters):
                name = names[i] if len(names) == len(parameters) else "?"
                # Layers that differ in their number alone share a row.
                pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
                alike.setdefault((pattern, self.kinds.get(name, "")), []).append(parameter)
            options = (str(group.get("weight_decay", "")), str(group.get("agr", "")))
            for (pattern, kind), found in alike.items():
                counts = f"{len(found):,}", f"{sum(p.numel() for p in found):,}"
                rows.append((str(index), pattern, kind, *counts, *options))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        numbers = (3, 4)
        lines = [
            "  ".join(
                cell.rjust(width) if i in numbers else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        if self._frozen:
            lines.append(f"left out, since they require no gradient: {self._frozen:,} tensors")
        return "\n".join(lines)


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    agr: bool = True,
    *,
    weight_decay_on: Collection[str] = MATRICES,
    agr_on: Collection[str] = MATRICES,
    exclude: Iterable[str] = (),
) -> ParameterGroups:
    """Return parameter groups with weight decay and AGR for matrices, and neither for biases, norms and scalars.

    Weight decay of biases and norms is commonly left out. AGR changes an update by about the share that single elements
    have of a tensor's abs-sum: much for a bias of ten elements, and for a tensor of one element everything, so that it
    would never train.

    Every parameter is of one kind, the first of these that fits. Decay and AGR apply by kind:

        scalar      it has one element
        excluded    its name, or a pattern that its name fits, is in `exclude`, or in what no_weight_decay() returns, a
                    method that timm's models have, of the model or of a module in it
        norm        it belongs to one of PyTorch's normalization modules (LayerNorm, RMSNorm, GroupNorm, BatchNorm*d,
                    SyncBatchNorm, InstanceNorm*d), or a subclass
        bias        the last part of its name contains "bias"
        vector      it has at most one dimension, as the norms of other libraries have
        embedding   it is the weight of nn.Embedding or nn.EmbeddingBag, tied to others or not
        matrix      anything else: weights of linear layers, convolutions and attention

    Parameters that require no gradient are left out, and tied ones are there once, under their first name. The groups
    can be given to any optimizer; those of PyTorch keep "agr" without using it. Since they have names, PyTorch wants
    names of groups that are added later, too: `optimizer.add_param_group({"params": head.named_parameters()})`, or one
    of parameter_groups(head). `print` shows them as a table:

        groups = agr_cuda.parameter_groups(model, weight_decay=0.1)
        print(groups)
        optimizer = agr_cuda.AdamW(groups, lr=3e-4)

    Args:
        model: the model. With FSDP2 or tensor parallelism, before or after it is sharded.
        weight_decay: the weight decay of the kinds in `weight_decay_on`, at least 0 (default: 0.01). Others have 0.
        agr: whether AGR applies to the kinds in `agr_on` (default: True). Others have none.
        weight_decay_on: the kinds that have weight decay (default: "matrix" and "embedding").
        agr_on: the kinds that have AGR (default: "matrix" and "embedding"). "scalar" is not allowed.
        exclude: names of parameters that have neither, or patterns of names, as in fnmatch: "*.pos_embed". What
            wrappers put before a name (torch.compile "_orig_mod.", DistributedDataParallel "module.") may be left out.

    Returns:
        A list of at most four dictionaries for an optimizer's `params`, the one with decay and AGR first. Those without
        parameters are left out. They have the parameters' names ("param_names").

    Raises:
        TypeError: for a model that is no nn.Module, and an option of the wrong type.
        ValueError: for a negative weight decay, an unknown kind, a name or pattern in `exclude` that no parameter fits,
            and a parameter that is not initialized yet.
        RuntimeError: for a model of FullyShardedDataParallel (FSDP1), whose parameters are flat.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module, whose parameters have names")
    check_nonnegative("weight_decay", weight_decay)
    check_flag("agr", agr)
    decaying = _check_kinds("weight_decay_on", weight_decay_on, KINDS)
    regularized = _check_kinds("agr_on", agr_on, KINDS[1:])
    kind_of = _kinds_by_module(model)
    is_excluded = _excluded(model, exclude)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {
        (decays, regularizes): {
            "params": [],
            "param_names": [],
            "weight_decay": weight_decay if decays else 0.0,
            "agr": regularizes,
        }
        for decays in (True, False)
        for regularizes in (True, False)
    }
    kinds_found: dict[str, str] = {}
    frozen = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen += 1
            continue
        if is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet; run the model once, so that lazy modules are initialized")
        check_whole(name, parameter, "parameter_groups", ", or make the groups by hand")
        kind = kinds_found[name] = _kind(name, parameter, kind_of.get(parameter), is_excluded(name))
        group = groups[kind in decaying, bool(agr) and kind in regularized]
        group["params"].append(parameter)
        group["param_names"].append(name)
    return ParameterGroups((group for group in groups.values() if group["params"]), kinds_found, frozen)


def _check_kinds(option: str, kinds: Any, allowed: Collection[str]) -> tuple[str, ...]:
    must = f"it must be a collection of {', '.join(map(repr, allowed))}"
    if isinstance(kinds, str) or not isinstance(kinds, Iterable):
        raise TypeError(f"{option} is {kinds!r}; {must}")
    found = tuple(kinds)
    for kind in found:
        if kind not in allowed:
            raise ValueError(f"{option} has {kind!r}; {must}")
    return found


def _kind(name: str, parameter: Tensor, of_module: str | None, excluded: bool) -> str:
    if parameter.numel() == 1:
        return "scalar"
    if excluded:
        return "excluded"
    if of_module == "norm":
        return "norm"
    if "bias" in name.rpartition(".")[2]:
        return "bias"
    return "vector" if parameter.dim() <= 1 else of_module or "matrix"


def _kinds_by_module(model: nn.Module) -> dict[Tensor, str]:
    """Return which parameters belong to a normalization module or an embedding."""
    found: dict[Tensor, str] = {}
    for module in model.modules():
        kind = "norm" if isinstance(module, _NORMS) else "embedding" if isinstance(module, _EMBEDDINGS) else None
        if kind is not None:
            own = list(module.parameters(recurse=False))
            if is_parametrized(module):  # then the weight is computed from others, which are the parameters
                parametrized: Any = module
                own += parametrized.parametrizations.parameters()
            for parameter in own:
                if kind == "norm" or parameter not in found:
                    found[parameter] = kind
    return found


def _excluded(model: nn.Module, exclude: Iterable[str]) -> Callable[[str], bool]:
    """Return whether a parameter of a name is excluded."""
    if isinstance(exclude, str):
        raise TypeError(f"exclude is {exclude!r}; it must be a list of names or patterns")
    # A tied parameter has several names, of which any may be excluded.
    first_name = {parameter: name for name, parameter in model.named_parameters()}
    first_of: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for spelled in (name, _unwrapped(name)):
            first_of.setdefault(spelled, set()).add(first_name[parameter])
    excluded: set[str] = set()
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude has {pattern!r}; it must be a list of names or patterns")
        fitting = first_of.get(pattern) or {
            first for name, firsts in first_of.items() if fnmatchcase(name, pattern) for first in firsts
        }
        if not fitting:
            names = _shortened([name for name, _ in model.named_parameters()])
            raise ValueError(f"exclude has {pattern!r}, which no parameter's name fits; names are {names}")
        excluded |= fitting
    for prefix, module in model.named_modules():
        for name in _without_decay(module):
            excluded |= first_of.get(f"{prefix}.{name}" if prefix else name, set())
    return excluded.__contains__


def _unwrapped(name: str) -> str:
    """Return a parameter's name without what torch.compile and data parallelism put before it."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _without_decay(module: nn.Module) -> Iterable[str]:
    """Return the names that a module says are to have no weight decay, if it does. Some may not be there."""
    said: Any = getattr(module, "no_weight_decay", None)
    said = said() if callable(said) else said
    if isinstance(said, str):
        raise TypeError(f"no_weight_decay of the {type(module).__name__} is {said!r}; it must be a set of names")
    return said or ()


def _shortened(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown + (f", ... ({len(names)})" if len(names) > 5 else "")
