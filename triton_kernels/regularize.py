"""The second launch of the regularization of gradients in place: psi. Each program rewrites a chunk of a gradient."""

import triton
import triton.language as tl

from .rules import aligned, regularized
from .update import _abs_sum, _load, _store, _task


@triton.jit
def _regularize_elements(
    begin, end, gradient, scale, total, rest, inverse, lift,
    TYPE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        mask = at < end if MASKED else None
        g = _load(gradient, at, mask, TYPE)
        _store(gradient, at, regularized(g, total, rest, inverse, lift) * scale, mask)


@triton.jit
def regularize_step(
    limits, rows, tasks, gradients, sums, clip, grad_scale, found_inf,
    GRADIENT: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Replace the gradients by clip / grad_scale * psi, or do nothing if `found_inf` is nonzero."""
    skipped = (tl.load(found_inf) != 0.0).to(tl.int32)
    _, _, row, first, count, address = _task(limits, rows, tasks, gradients, skipped)
    # Rounded as in the step of an optimizer, which computes the first factor in its first launch.
    scale = 1.0 / tl.load(grad_scale).to(tl.float64) * tl.load(clip)
    total, rest, inverse, lift = _abs_sum(row, sums, scale, TYPE, SUMS)
    scale = scale.to(TYPE)
    gradient = address.to(tl.pointer_type(GRADIENT)) + first
    # As in update_step: full blocks of aligned gradients with 16-byte accesses, and then the rest, masked.
    full = tl.where(gradient.to(tl.int64) % 16 == 0, count // BLOCK * BLOCK, 0)
    _regularize_elements(0, full, aligned(gradient), scale, total, rest, inverse, lift, TYPE, BLOCK, False)
    _regularize_elements(full, count, gradient, scale, total, rest, inverse, lift, TYPE, REST, True)
