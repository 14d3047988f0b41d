"""The first launch of a step: the abs-sum of every chunk, and the coefficients of every tensor's update rule.

The first programs compute coefficients, each for a block of tensors. Each of the programs after them reduces a chunk.
"""

import triton
import triton.language as tl

from . import tables as t
from .rules import aligned, power, square_root


@triton.jit
def _sums(
    gradient, begin, end, magnitudes, lost, squares,
    TYPE: tl.constexpr, BLOCK: tl.constexpr, SQUARES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the elements from `begin` to `end` to blocks of partial sums, and the rounding errors to `lost`."""
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        # The second launch reads the gradient again, so it should stay in the cache.
        if MASKED:
            g = tl.load(gradient + start + lanes, mask=start + lanes < end, other=0.0, eviction_policy="evict_last")
        else:
            g = tl.load(gradient + start + lanes, eviction_policy="evict_last")
        x = tl.abs(g.to(TYPE))
        # Knuth's two-sum is as accurate as float64, of which many GPUs have very few units. The abs-sum must be that
        # accurate if one element outweighs all others, because psi of that element depends on the others' small sum.
        after = magnitudes + x
        taken = after - magnitudes
        lost += (magnitudes - (after - taken)) + (x - taken)
        magnitudes = after
        if SQUARES:
            # In float64, because the square of a large gradient exceeds float32.
            wide = g.to(tl.float64)
            squares += wide * wide
    return magnitudes, lost, squares


@triton.jit
def _reduce(
    task, tasks, rows, gradients, magnitude_sums, square_sums, chunk_elements,
    GRADIENT: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(tasks + 2 * task)
    chunk = tl.load(tasks + 2 * task + 1)
    row = rows + tensor * t.ROW
    elements = tl.load(row + t.ELEMENTS)
    first = chunk * chunk_elements
    address = tl.load(gradients + tensor)
    # The plan limits a chunk to 2^31 elements. A tensor without a gradient in this step has sums of 0.
    count = tl.where(address != 0, tl.minimum(elements - first, chunk_elements), 0).to(tl.int32)
    gradient = address.to(tl.pointer_type(GRADIENT)) + first
    magnitudes = tl.zeros((BLOCK,), TYPE)
    lost = tl.zeros((BLOCK,), TYPE)
    squares = tl.zeros((BLOCK,), tl.float64)
    full = count // BLOCK * BLOCK
    # Both branches add the same elements in the same lanes, so that sums do not depend on the alignment.
    if gradient.to(tl.int64) % 16 == 0:
        g = aligned(gradient)
        magnitudes, lost, squares = _sums(g, 0, full, magnitudes, lost, squares, TYPE, BLOCK, SQUARES, False)
    else:
        magnitudes, lost, squares = _sums(gradient, 0, full, magnitudes, lost, squares, TYPE, BLOCK, SQUARES, False)
    magnitudes, lost, squares = _sums(gradient, full, count, magnitudes, lost, squares, TYPE, BLOCK, SQUARES, True)
    # The rounding error of an infinite sum is NaN; it is dropped so that the sum stays infinite.
    lost = tl.where(magnitudes - magnitudes == 0, lost, 0.0)
    total = tl.sum(magnitudes.to(tl.float64) + lost.to(tl.float64), 0)
    place = tl.load(row + t.FIRST_CHUNK) + chunk
    tl.store(magnitude_sums + place, total)
    if SQUARES:
        tl.store(square_sums + place, tl.sum(squares, 0))


@triton.jit
def _divisor(correction, eps, scale):
    """Return a and b such that a sqrt(v) + b = (sqrt(v) correction + eps) / scale.

    The average of gradients is divided by that, so that the quotient is the step. For a scale of 0, b is infinite and
    the step is 0.
    """
    inverse = 1.0 / scale
    root = correction * inverse
    moves = root < 2.0**127
    return tl.where(moves, root, 1.0), tl.where(moves, eps * inverse, float("inf"))


@triton.jit
def _decide(
    block, rows, gradients, groups, groups_float, coefficients, grad_scale, tensors,
    ADAN: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Compute the coefficients of a block of tensors in float64, so that they are rounded only once, and store them."""
    tensor = block * TENSORS + tl.arange(0, TENSORS)
    # The state of a tensor without a gradient may have been moved or freed, so it is not read.
    there = tl.load(gradients + tensor, mask=tensor < tensors, other=0) != 0
    row = rows + tensor * t.ROW
    group = tl.load(row + t.GROUP_INDEX, mask=there, other=0) * t.GROUP
    words, options = groups + group, groups_float + group

    # The step number, from 1, comes from the tensor's own count, its group's count on the device, or the host.
    step = tl.load(row + t.STEP, mask=there, other=0)
    count = tl.load(words + t.COUNT, mask=there, other=0)
    counter = tl.where(step != 0, step, count)
    counted = tl.load(counter.to(tl.pointer_type(tl.float32)), mask=counter != 0, other=0.0).to(tl.float64) + 1.0
    n = tl.where(counter != 0, counted, tl.load(options + t.T, mask=there, other=1.0))

    lr = tl.load(options + t.LR, mask=there, other=0.0)
    single = tl.load(words + t.LR_FLOAT32, mask=there, other=0)
    double = tl.load(words + t.LR_FLOAT64, mask=there, other=0)
    lr_single = tl.load(single.to(tl.pointer_type(tl.float32)), mask=single != 0, other=0.0).to(tl.float64)
    lr_double = tl.load(double.to(tl.pointer_type(tl.float64)), mask=double != 0, other=0.0)
    lr = tl.where(single != 0, lr_single, tl.where(double != 0, lr_double, lr))

    beta1 = tl.load(options + t.BETA1, mask=there, other=0.0)
    beta2 = tl.load(options + t.BETA2, mask=there, other=0.0)
    eps = tl.load(options + t.EPS, mask=there, other=0.0)
    decay = lr * tl.load(options + t.WEIGHT_DECAY, mask=there, other=0.0)
    correction1 = 1.0 - power(beta1, n)
    correction2 = 1.0 - power(beta2, n)
    out = coefficients + tensor * t.COEFFICIENTS
    if ADAN:
        beta3 = tl.load(options + t.BETA3, mask=there, other=0.0)
        no_prox = tl.load(options + t.NO_PROX, mask=there, other=0.0) != 0.0
        divisor = tl.where(no_prox, 1.0, 1.0 + decay)
        tl.store(out + 0, beta1, mask=there)
        tl.store(out + 1, 1.0 - beta1, mask=there)
        tl.store(out + 2, beta2, mask=there)
        tl.store(out + 3, 1.0 - beta2, mask=there)
        tl.store(out + 4, beta3, mask=there)
        tl.store(out + 5, 1.0 - beta3, mask=there)
        root, eps = _divisor(1.0 / square_root(1.0 - power(beta3, n)), eps, lr / divisor / correction1)
        tl.store(out + 6, root, mask=there)
        tl.store(out + 7, eps, mask=there)
        tl.store(out + 8, tl.where(no_prox, 1.0 - decay, 1.0 / divisor), mask=there)
        tl.store(out + 9, beta2 * correction1 / correction2, mask=there)
        tl.store(out + 10, tl.where(n == 1.0, 1.0, 0.0), mask=there)
    else:
        tl.store(out + 0, 1.0 - decay, mask=there)
        tl.store(out + 1, tl.where(beta1 > 0.5, 1.0 - beta1, (1.0 - beta1) - 1.0), mask=there)
        tl.store(out + 2, beta2, mask=there)
        tl.store(out + 3, 1.0 - beta2, mask=there)
        root, eps = _divisor(1.0 / square_root(correction2), eps, lr / correction1)
        tl.store(out + 4, root, mask=there)
        tl.store(out + 5, eps, mask=there)
    scale = tl.load(options + t.SIGN, mask=there, other=1.0) / tl.load(grad_scale).to(tl.float64)
    tl.store(out + t.GRADIENT_SCALE, scale, mask=there)
    tl.store(out + t.STEP_NUMBER, n, mask=there)


@triton.jit
def reduce_step(
    limits, rows, tasks, gradients, groups, groups_float, magnitude_sums, square_sums, coefficients, grad_scale,
    ADAN: tl.constexpr, GRADIENT: tl.constexpr, TYPE: tl.constexpr, SQUARES: tl.constexpr,
    BLOCK: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Reduce every chunk of every gradient, and compute the coefficients of every tensor."""
    program = tl.program_id(0)
    tensors = tl.load(limits)
    deciding = (tensors + TENSORS - 1) // TENSORS
    if program < deciding:
        _decide(program, rows, gradients, groups, groups_float, coefficients, grad_scale, tensors, ADAN, TENSORS)
    else:
        chunk_elements = tl.load(limits + 1)
        task = program - deciding
        _reduce(
            task, tasks, rows, gradients, magnitude_sums, square_sums, chunk_elements, GRADIENT, TYPE, BLOCK, SQUARES
        )
