"""The second launch of a step: psi and the update rule. Each program updates a chunk."""

import triton
import triton.language as tl

from . import tables as t
from .quantization import QUANTIZED, decoded, quantized
from .rounding import random_bits, rounded_stochastically
from .rules import adamw, adan, aligned, regularized


@triton.jit
def _count_step(row, coefficients):
    """Store the new step count of a tensor, if it has its own."""
    step = tl.load(row + t.STEP)
    if step != 0:
        tl.store(step.to(tl.pointer_type(tl.float32)), tl.load(coefficients + t.STEP_NUMBER).to(tl.float32))


@triton.jit
def _count_steps_of_groups(groups, count):
    """Increment the step counts of all groups, including those without tensors in this launch.

    No other program of this launch reads the counts.
    """
    for i in range(0, count):
        group = groups + i * t.GROUP
        counter = tl.load(group + t.COUNT)
        if (tl.load(group + t.COUNTS) != 0) & (counter != 0):
            at = counter.to(tl.pointer_type(tl.float32))
            tl.store(at, tl.load(at) + 1.0)


@triton.jit
def _abs_sum(row, sums, scale, TYPE: tl.constexpr, SUMS: tl.constexpr):
    """Return a tensor's abs-sum in the form that `regularized` takes, added up in an order that depends only on sizes.

    `scale` is the factor by which the gradient is multiplied afterwards, which is valid because psi(c g) = c psi(g).
    There is one exception: for a scale of 0 and an infinite sum, scaling first would give NaN, so the sum returned is
    NaN then.
    """
    first = tl.load(row + t.FIRST_CHUNK)
    chunks = tl.load(row + t.CHUNKS).to(tl.int32)
    lanes = tl.arange(0, SUMS)
    partial = tl.zeros((SUMS,), tl.float64)
    for start in range(0, chunks, SUMS):
        partial += tl.load(sums + first + start + lanes, mask=start + lanes < chunks, other=0.0)
    total = tl.sum(partial, 0)
    scaled = total * scale
    if total.dtype == TYPE:
        lift = tl.where(total < 2.0**-1000, 2.0**500, tl.where(total > 2.0**1000, 2.0**-500, 1.0))
    else:
        lift = tl.where(total < 2.0**-100, 2.0**60, tl.where(total > 2.0**100, 2.0**-60, 1.0))
    lifted = total * lift
    rounded = lifted.to(TYPE)
    # With an inverse of 1, S = 0 gives psi = 0, and an infinite S an infinite factor, which `regularized` limits to 1.
    ordinary = (rounded - rounded == 0.0) & (rounded != 0.0) & (scaled == scaled)
    rest = tl.where(ordinary, lifted - rounded.to(tl.float64), 0.0).to(TYPE)
    inverse = 1.0 / tl.where(ordinary, rounded, 1.0).to(TYPE)
    lift = tl.where(ordinary, lift, 1.0).to(TYPE)
    return tl.where(scaled == scaled, rounded, scaled.to(TYPE)), rest, inverse, lift


@triton.jit
def _load(address, offsets, mask, TYPE: tl.constexpr):
    # The elements are not read again in this step, so they are the first to leave the cache.
    return tl.load(address + offsets, mask=mask, eviction_policy="evict_first").to(TYPE)


@triton.jit
def _store(address, offsets, value, mask):
    tl.store(address + offsets, value.to(address.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _places(start, BLOCK: tl.constexpr, FOLDED: tl.constexpr):
    """Return the places of a block's elements, and of their scales if there are codes.

    Elements that share scales or random numbers are in three dimensions: blocks that share a scale, eights that share
    the words of a random number, elements. An eight is a thread's and a block a warp's, and every thread reads and
    writes the scale of its own, so that warps have nothing to exchange.
    """
    if FOLDED:
        blocks = tl.arange(0, BLOCK // QUANTIZED)[:, None, None] * QUANTIZED
        eights = start + (blocks + tl.arange(0, QUANTIZED // 8)[None, :, None] * 8)
        return eights + tl.arange(0, 8)[None, None, :], eights // QUANTIZED
    else:
        return start + tl.arange(0, BLOCK), start


@triton.jit
def _load_average(address, at, scales, scale_at, end, mask, SIGNED: tl.constexpr, TYPE: tl.constexpr):
    if address.dtype.element_ty == tl.uint8:
        codes = tl.load(address + at, mask=mask, eviction_policy="evict_first")
        return decoded(codes, SIGNED) * tl.load(scales + scale_at, mask=scale_at * QUANTIZED < end, other=0.0)
    else:
        return _load(address, at, mask, TYPE)


@triton.jit
def _store_average(
    address, at, scales, scale_at, end, mask, value, element, seed, step, array,
    SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store the new values of an average, as the type of its elements says, or of the parameter, which is array 0."""
    if address.dtype.element_ty == tl.uint8:
        if MASKED:
            value = tl.where(mask, value, 0.0)
        codes, scale = quantized(value, SIGNED)
        _store(address, at, codes, mask)
        tl.store(scales + scale_at, scale, mask=scale_at * QUANTIZED < end)
    elif STOCHASTIC and address.dtype.element_ty == tl.bfloat16:
        _store(address, at, rounded_stochastically(value, random_bits(element, seed, step, array, BLOCK)), mask)
    else:
        _store(address, at, value, mask)


@triton.jit
def _update_elements(
    begin, end, first, p_at, copy_at, g_at, s0_at, s1_at, s2_at, s3_at, q0_at, q1_at, q2_at, q3_at, seed, step, array,
    amsgrad, regularize, scale, total, rest, inverse, lift, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10,
    ADAN: tl.constexpr, TYPE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = STOCHASTIC
    for start in range(begin, end, BLOCK):
        at, q = _places(start, BLOCK, FOLDED)
        mask = at < end if MASKED else None
        element = first + start
        g = _load(g_at, at, mask, TYPE)
        p = _load(p_at, at, mask, TYPE)
        g = tl.where(regularize, regularized(g, total, rest, inverse, lift), g) * scale
        s0 = _load_average(s0_at, at, q0_at, q, end, mask, True, TYPE)
        s1 = _load_average(s1_at, at, q1_at, q, end, mask, ADAN, TYPE)
        if ADAN:
            s2 = _load_average(s2_at, at, q2_at, q, end, mask, False, TYPE)
            s3 = _load_average(s3_at, at, q3_at, q, end, mask, True, TYPE)
            p, s0, s1, s2, s3 = adan(p, g, s0, s1, s2, s3, c10 != 0, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9)
        elif FOLDED:
            # What a tensor without AMSGrad need not compute here and below is worth a branch.
            s2 = tl.zeros(at.shape, TYPE)
            if amsgrad != 0:
                s2 = _load_average(s2_at, at, q2_at, q, end, mask, False, TYPE)
            p, s0, s1, s2 = adamw(p, g, s0, s1, s2, amsgrad != 0, c0, c1, c2, c3, c4, c5)
        else:
            # A tensor without AMSGrad has no third state tensor; the mask then excludes all elements.
            third = at < amsgrad * end if MASKED else tl.broadcast_to(amsgrad, (BLOCK,)) != 0
            s2 = tl.load(s2_at + at, mask=third, other=0.0, eviction_policy="evict_first").to(TYPE)
            p, s0, s1, s2 = adamw(p, g, s0, s1, s2, amsgrad != 0, c0, c1, c2, c3, c4, c5)
            _store(s2_at, at, s2, third)
        _store_average(p_at, at, q0_at, q, end, mask, p, element, seed, step, array, True, R, BLOCK, MASKED)
        if MASTER:
            _store(copy_at, at, p, mask)
        _store_average(s0_at, at, q0_at, q, end, mask, s0, element, seed, step, array + 1, True, R, BLOCK, MASKED)
        _store_average(s1_at, at, q1_at, q, end, mask, s1, element, seed, step, array + 2, ADAN, R, BLOCK, MASKED)
        if ADAN:
            _store_average(s2_at, at, q2_at, q, end, mask, s2, element, seed, step, array + 3, False, R, BLOCK, MASKED)
            _store_average(s3_at, at, q3_at, q, end, mask, s3, element, seed, step, array + 4, True, R, BLOCK, MASKED)
        elif FOLDED:
            if amsgrad != 0:
                _store_average(
                    s2_at, at, q2_at, q, end, mask, s2, element, seed, step, array + 3, False, R, BLOCK, MASKED
                )


@triton.jit
def _task(limits, rows, tasks, gradients, skipped):
    """Return the program's tensor and chunk, the tensor's row, the chunk's place in it, and the gradient's address.

    The chunk has no elements if the step is skipped, or if the tensor has no gradient in this step.
    """
    tensor = tl.load(tasks + 2 * tl.program_id(0))
    chunk = tl.load(tasks + 2 * tl.program_id(0) + 1)
    row = rows + tensor * t.ROW
    chunk_elements = tl.load(limits + 1)
    first = chunk * chunk_elements
    count = tl.minimum(tl.load(row + t.ELEMENTS) - first, chunk_elements).to(tl.int32)
    address = tl.load(gradients + tensor)
    return tensor, chunk, row, first, tl.where((skipped != 0) | (address == 0), 0, count), address


@triton.jit
def update_step(
    limits, rows, tasks, gradients, groups, sums, coefficients, clip, found_inf,
    ADAN: tl.constexpr, PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, TYPE: tl.constexpr,
    STATE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Update every chunk and count the step, or do nothing if `found_inf` is nonzero."""
    skipped = (tl.load(found_inf) != 0.0).to(tl.int32)
    tensor, chunk, row, first, count, address = _task(limits, rows, tasks, gradients, skipped)

    coefficients += tensor * t.COEFFICIENTS
    scale = tl.load(coefficients + t.GRADIENT_SCALE) * tl.load(clip)
    regularize = tl.load(row + t.REGULARIZE) != 0
    amsgrad = tl.load(row + t.AMSGRAD).to(tl.int32)
    total, rest, inverse, lift = _abs_sum(row, sums, scale, TYPE, SUMS)
    scale = scale.to(TYPE)
    c0 = tl.load(coefficients + 0).to(TYPE)
    c1 = tl.load(coefficients + 1).to(TYPE)
    c2 = tl.load(coefficients + 2).to(TYPE)
    c3 = tl.load(coefficients + 3).to(TYPE)
    c4 = tl.load(coefficients + 4).to(TYPE)
    c5 = tl.load(coefficients + 5).to(TYPE)
    c6 = tl.load(coefficients + 6).to(TYPE) if ADAN else c5
    c7 = tl.load(coefficients + 7).to(TYPE) if ADAN else c5
    c8 = tl.load(coefficients + 8).to(TYPE) if ADAN else c5
    c9 = tl.load(coefficients + 9).to(TYPE) if ADAN else c5
    c10 = tl.load(coefficients + 10).to(TYPE) if ADAN else c5

    copy = tl.load(row + t.PARAMETER).to(tl.pointer_type(PARAMETER)) + first
    # What is read and updated; the parameter is then a copy of it.
    p = tl.load(row + t.MASTER).to(tl.pointer_type(tl.float32)) + first if MASTER else copy
    g = address.to(tl.pointer_type(GRADIENT)) + first
    s0 = tl.load(row + t.STATE + 0).to(tl.pointer_type(STATE)) + first
    s1 = tl.load(row + t.STATE + 1).to(tl.pointer_type(STATE)) + first
    s2 = tl.load(row + t.STATE + 2).to(tl.pointer_type(STATE)) + first
    s3 = tl.load(row + t.STATE + 3).to(tl.pointer_type(STATE)) + first
    q0 = tl.load(row + t.SCALES + 0).to(tl.pointer_type(tl.float32)) + first // QUANTIZED
    q1 = tl.load(row + t.SCALES + 1).to(tl.pointer_type(tl.float32)) + first // QUANTIZED
    q2 = tl.load(row + t.SCALES + 2).to(tl.pointer_type(tl.float32)) + first // QUANTIZED
    q3 = tl.load(row + t.SCALES + 3).to(tl.pointer_type(tl.float32)) + first // QUANTIZED
    seed = tl.load(groups + tl.load(row + t.GROUP_INDEX) * t.GROUP + t.SEED)
    step = tl.load(coefficients + t.STEP_NUMBER).to(tl.int64)
    array = tl.load(row + t.INDEX) * 8
    FOLDED: tl.constexpr = STOCHASTIC or s0.dtype.element_ty == tl.uint8
    # The first loop updates full blocks of aligned tensors with 16-byte accesses. The second, masked loop updates the
    # rest: unaligned tensors and remainders. Its blocks are smaller because every element needs its own address in
    # registers.
    together = p.to(tl.int64) | g.to(tl.int64) | s0.to(tl.int64) | s1.to(tl.int64) | s2.to(tl.int64) | s3.to(tl.int64)
    if MASTER:
        together |= copy.to(tl.int64)
    full = tl.where(together % 16 == 0, count // BLOCK * BLOCK, 0)
    _update_elements(
        0, full, first, aligned(p), aligned(copy), aligned(g), aligned(s0), aligned(s1), aligned(s2), aligned(s3),
        q0, q1, q2, q3, seed, step, array, amsgrad, regularize, scale, total, rest, inverse, lift,
        c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, ADAN, TYPE, MASTER, STOCHASTIC, FOLDED, BLOCK, False,
    )  # fmt: skip
    _update_elements(
        full, count, first, p, copy, g, s0, s1, s2, s3, q0, q1, q2, q3, seed, step, array,
        amsgrad, regularize, scale, total, rest, inverse, lift,
        c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, ADAN, TYPE, MASTER, STOCHASTIC, FOLDED, REST, True,
    )  # fmt: skip
    if skipped == 0:
        if (chunk == 0) & (address != 0):
            _count_step(row, coefficients)
        if tl.program_id(0) == 0:
            _count_steps_of_groups(groups, tl.load(limits + 2).to(tl.int32))
