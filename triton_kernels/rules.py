"""The equations for blocks of elements: psi (arXiv 2407.16944), AdamW (arXiv 1711.05101) and Adan (arXiv 2208.06677).

All values are float32, or float64 for float64 parameters. A product and a sum are fused only where tl.fma is written
(the compilation options forbid other fusing), so that results do not depend on the compiler's choices.
"""

import triton
import triton.language as tl


@triton.jit
def regularized(g, total, rest, inverse, lift):
    """Return psi of gradients `g`: g (1 - |g| / S), with the factor evaluated as ((S - |g|) + rest) * (1 / S).

    Args:
        g: elements of a gradient.
        total: S, the abs-sum of its tensor, rounded and multiplied by `lift`.
        rest: the rounding error of `total`. The subtraction is exact where it cancels, so a tensor of one element gives
            exactly 0, and a tensor dominated by one element keeps the accuracy of the small difference.
        inverse: the inverse of `total`.
        lift: a power of two, so that 1 / S neither overflows for a denormal S nor becomes denormal itself; 1 if neither
            would happen. |g| is multiplied by it here.
    """
    kept = ((total - tl.abs(g) * lift) + rest) * inverse
    # This comparison keeps NaN: an infinite element of an infinite sum gives inf (1 - inf / inf).
    return g * tl.where(kept > 1.0, 1.0, kept)


@triton.jit
def aligned(address):
    """Return an aligned address with a hint that it is a multiple of 16, so that the compiler uses 16-byte accesses.

    The hint applies to the value that it is given, wherever that is used, and must not reach uses with unaligned
    addresses. Rounding the address down makes a new value; it does not change an aligned address.
    """
    return tl.multiple_of((address.to(tl.int64) // 16 * 16).to(address.dtype), 16)


@triton.jit
def square_root(x):
    """Return the square root, rounded to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def adamw(p, g, m, v, w, amsgrad, decay, lerp, beta2, square, root, eps):
    """Return the parameter, exp_avg, exp_avg_sq and max_exp_avg_sq after AdamW's step.

    Args:
        p: the parameter.
        g: its gradient, scaled and regularized.
        m: exp_avg.
        v: exp_avg_sq.
        w: max_exp_avg_sq, used if `amsgrad`.
        amsgrad: whether to divide by the largest exp_avg_sq so far.
        decay: 1 - lr wd.
        lerp: the weight w = 1 - b1 of the gradient in exp_avg if w is less than 1/2; otherwise w - 1, for an
            interpolation that starts from the gradient.
        beta2: b2.
        square: 1 - b2.
        root: the factor of the root of exp_avg_sq, (1 - b1^t) / (lr sqrt(1 - b2^t)).
        eps: the number added to that product, eps (1 - b1^t) / lr. exp_avg is divided by the sum, which includes the
            learning rate, because lr m may be denormal and m / D infinite although the step is neither.
    """
    # Interpolated from the nearer end, as by torch.lerp: for a small b1, m + (1 - b1) (g - m) loses a g that is small
    # beside m.
    m = tl.fma(g - m, lerp, tl.where(lerp > 0.0, m, g))
    # Multiplied in this order because g * g may be infinite although the whole product is finite.
    v = tl.fma(v, beta2, g * square * g)
    w = tl.where((w > v) | (w != w), w, v)  # NaN if either is NaN, as with torch.maximum
    largest = tl.where(amsgrad, w, v)
    p = tl.fma(p, decay, -(m / tl.fma(square_root(largest), root, eps)))
    return p, m, v, w


@triton.jit
def adan(
    p, g, m, u, n, neg_previous, first,
    beta1, gradient, beta2, difference, beta3, square, root, eps, kept, difference_weight,
):  # fmt: skip
    """Return the parameter, exp_avg, exp_avg_diff, exp_avg_sq and neg_pre_grad after Adan's step.

    Args:
        p: the parameter.
        g: its gradient, scaled and regularized.
        m: exp_avg.
        u: exp_avg_diff.
        n: exp_avg_sq.
        neg_previous: neg_pre_grad, the negated previous gradient, or NaN before an element's first step.
        first: whether this is the group's first step, in which no gradient counts as the previous one.
        beta1: b1.
        gradient: 1 - b1.
        beta2: b2.
        difference: 1 - b2.
        beta3: b3.
        square: 1 - b3.
        root: the factor of the root of exp_avg_sq, (1 - b1^t) / (lr sqrt(1 - b3^t)); without no_prox, that times
            1 + lr wd.
        eps: the number added to that product, eps (1 - b1^t) / lr; without no_prox, that times 1 + lr wd.
        kept: the factor of weight decay, 1 / (1 + lr wd), or 1 - lr wd with no_prox.
        difference_weight: the weight of exp_avg_diff relative to exp_avg, b2 (1 - b1^t) / (1 - b2^t).
    """
    # Without a previous gradient, the difference is 0. After a gradient of NaN, exp_avg is NaN too, and m - m keeps it.
    d = tl.where(neg_previous == neg_previous, g + neg_previous, m - m)
    d = tl.where(first, 0.0, d)
    look_ahead = tl.fma(d, beta2, g)
    m = tl.fma(m, beta1, g * gradient)
    u = tl.fma(u, beta2, d * difference)
    # Multiplied in this order because the square may be infinite although the whole product is finite.
    n = tl.fma(n, beta3, look_ahead * square * look_ahead)
    p = tl.fma(p, kept, -(tl.fma(u, difference_weight, m) / tl.fma(square_root(n), root, eps)))
    return p, m, u, n, -g


@triton.jit
def power(x, count):
    """Return x to the power of the whole numbers `count`, by repeated squaring in float64."""
    result = tl.full(x.shape, 1.0, tl.float64)
    left = count.to(tl.int64)
    while tl.max(left, 0) > 0:
        result = tl.where((left & 1) != 0, result * x, result)
        x = x * x
        left = left >> 1
    return result
