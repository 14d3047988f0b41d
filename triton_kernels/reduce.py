"""The first launch of a step: the abs-sum of every chunk, and for every tensor the numbers that its rule multiplies by.

Programs from 0 on make numbers, for a block of tensors each. Those after them reduce a chunk each.
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
    """Add elements from `begin` to `end` to blocks of sums, and what rounding takes from `magnitudes` to `lost`."""
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        # The second launch reads them again.
        if MASKED:
            g = tl.load(gradient + start + lanes, mask=start + lanes < end, other=0.0, eviction_policy="evict_last")
        else:
            g = tl.load(gradient + start + lanes, eviction_policy="evict_last")
        x = tl.abs(g.to(TYPE))
        # Knuth's two-sum: as good as float64 where there are next to no float64 units. An abs-sum must be that good
        # where one element outweighs all others: psi of it is their small sum.
        after = magnitudes + x
        taken = after - magnitudes
        lost += (magnitudes - (after - taken)) + (x - taken)
        magnitudes = after
        if SQUARES:
            # In float64: a gradient may be larger than the root of float32's largest number.
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
    # At most 2^31 elements, as the plan has seen to. A tensor without a gradient in this step has sums of 0.
    count = tl.where(address != 0, tl.minimum(elements - first, chunk_elements), 0).to(tl.int32)
    gradient = address.to(tl.pointer_type(GRADIENT)) + first
    magnitudes = tl.zeros((BLOCK,), TYPE)
    lost = tl.zeros((BLOCK,), TYPE)
    squares = tl.zeros((BLOCK,), tl.float64)
    full = count // BLOCK * BLOCK
    # The same elements in the same lanes, however they are aligned.
    if gradient.to(tl.int64) % 16 == 0:
        g = aligned(gradient)
        magnitudes, lost, squares = _sums(g, 0, full, magnitudes, lost, squares, TYPE, BLOCK, SQUARES, False)
    else:
        magnitudes, lost, squares = _sums(gradient, 0, full, magnitudes, lost, squares, TYPE, BLOCK, SQUARES, False)
    magnitudes, lost, squares = _sums(gradient, full, count, magnitudes, lost, squares, TYPE, BLOCK, SQUARES, True)
    # What an infinite sum lost is NaN, and nothing to it.
    lost = tl.where(magnitudes - magnitudes == 0, lost, 0.0)
    total = tl.sum(magnitudes.to(tl.float64) + lost.to(tl.float64), 0)
    place = tl.load(row + t.FIRST_CHUNK) + chunk
    tl.store(magnitude_sums + place, total)
    if SQUARES:
        tl.store(square_sums + place, tl.sum(squares, 0))


@triton.jit
def _divisor(correction, eps, scale):
    """Return what the root of an average of squares is multiplied by, and what is added to that, to divide by.

    That is (sqrt(v) correction + eps) / scale, so that the quotient is the step; for a scale of 0 it is infinite.
    """
    inverse = 1.0 / scale
    root = correction * inverse
    moves = root < 2.0**127
    return tl.where(moves, root, 1.0), tl.where(moves, eps * inverse, float("inf"))


@triton.jit
def _decide(
    block, rows, gradients, groups, groups_float, numbers, grad_scale, tensors,
    ADAN: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Write down what the rules of some tensors multiply by in this step; in float64, to be rounded once."""
    tensor = block * TENSORS + tl.arange(0, TENSORS)
    # The state of a tensor without a gradient may be anywhere by now.
    there = tl.load(gradients + tensor, mask=tensor < tensors, other=0) != 0
    row = rows + tensor * t.ROW
    group = tl.load(row + t.GROUP_INDEX, mask=there, other=0) * t.GROUP
    words, options = groups + group, groups_float + group

    # The step count, from 1: the tensor's own, its group's on the device, or its group's as the host knows it.
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
    out = numbers + tensor * t.NUMBERS
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
    tl.store(out + t.NUMBERS_SCALE, scale, mask=there)
    tl.store(out + t.NUMBERS_T, n, mask=there)


@triton.jit
def reduce_step(
    limits, rows, tasks, gradients, groups, groups_float, magnitude_sums, square_sums, numbers, grad_scale,
    ADAN: tl.constexpr, GRADIENT: tl.constexpr, TYPE: tl.constexpr, SQUARES: tl.constexpr,
    BLOCK: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Do the first launch of a step."""
    program = tl.program_id(0)
    tensors = tl.load(limits)
    deciding = (tensors + TENSORS - 1) // TENSORS
    if program < deciding:
        _decide(program, rows, gradients, groups, groups_float, numbers, grad_scale, tensors, ADAN, TENSORS)
    else:
        chunk_elements = tl.load(limits + 1)
        task = program - deciding
        _reduce(
            task, tasks, rows, gradients, magnitude_sums, square_sums, chunk_elements, GRADIENT, TYPE, BLOCK, SQUARES
        )
