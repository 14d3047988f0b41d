"""The equations for blocks of elements: psi (arXiv 2407.16944), AdamW (arXiv 1711.05101) and Adan (arXiv 2208.06677).

Everything is a float32 here, or a float64 for float64 parameters. Products and sums are fused where that is said, and
nowhere else (the launches forbid it), so that results do not depend on what a compiler makes of them.
"""

import triton
import triton.language as tl


@triton.jit
def regularized(g, total, rest, inverse, lift):
    """Return psi of gradients `g`: g (1 - |g| / S), the share evaluated as ((S - |g|) + rest) * (1 / S).

    Args:
        g: elements of a gradient.
        total: S, the abs-sum of its tensor, rounded.
        rest: what the rounding lost. The subtraction is exact where it cancels, so that a tensor of one element gives
            exactly 0, and one that is dominated by one element keeps the accuracy of the small difference.
        inverse: 1 / S.
        lift: a power of two by which the first two are multiplied (and |g| is here) where 1 / S would overflow, S being
            denormal, or be denormal itself; else 1.
    """
    kept = ((total - tl.abs(g) * lift) + rest) * inverse
    # Written so that NaN stays: an infinite element of an infinite sum is inf (1 - inf / inf).
    return g * tl.where(kept > 1.0, 1.0, kept)


@triton.jit
def aligned(address):
    """Return an address that is a multiple of 16, so that the compiler knows it and makes accesses of 16 bytes.

    It is rounded down, which changes nothing, but makes it another value: the hint holds of the very value that it is
    given, wherever that is used, and would promise the same of addresses that are not aligned.
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
        w: max_exp_avg_sq, which counts where `amsgrad` is.
        amsgrad: whether to divide by the largest exp_avg_sq so far.
        decay: 1 - lr wd.
        lerp: of exp_avg from itself to the gradient, w = 1 - b1 if that is below 1/2; else from the gradient, w - 1.
        beta2: b2.
        square: 1 - b2.
        root: what the root of exp_avg_sq is multiplied by, (1 - b1^t) / (lr sqrt(1 - b2^t)).
        eps: what is added to that, eps (1 - b1^t) / lr. Divided by all at once, since lr m may be denormal and m / D
            infinite where the step is neither.
    """
    # From the nearer end, as torch.lerp: m + (1 - b1) (g - m) loses a g that is small beside m where b1 is small.
    m = tl.fma(g - m, lerp, tl.where(lerp > 0.0, m, g))
    # Not g * g first, which may be infinite where the product of all three is not.
    v = tl.fma(v, beta2, g * square * g)
    w = tl.where((w > v) | (w != w), w, v)  # NaN if either is, as torch.maximum gives
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
        neg_previous: neg_pre_grad, the previous gradient negated, or NaN before an element's first step.
        first: whether this is the group's first step, where no gradient counts as a previous one.
        beta1: b1.
        gradient: 1 - b1.
        beta2: b2.
        difference: 1 - b2.
        beta3: b3.
        square: 1 - b3.
        root: what the root of exp_avg_sq is multiplied by, (1 - b1^t) / (lr sqrt(1 - b3^t)); without no_prox, that
            times 1 + lr wd.
        eps: what is added to that: eps times as much.
        kept: what of the parameter weight decay keeps: 1 / (1 + lr wd), with no_prox 1 - lr wd.
        difference_weight: b2 (1 - b1^t) / (1 - b2^t), what exp_avg_diff counts beside exp_avg.
    """
    # Without a previous gradient the difference to it is 0; after one that was NaN, exp_avg is NaN too.
    d = tl.where(neg_previous == neg_previous, g + neg_previous, m - m)
    d = tl.where(first, 0.0, d)
    look_ahead = tl.fma(d, beta2, g)
    m = tl.fma(m, beta1, g * gradient)
    u = tl.fma(u, beta2, d * difference)
    # Not its square first, which may be infinite where the product of all three is not.
    n = tl.fma(n, beta3, look_ahead * square * look_ahead)
    p = tl.fma(p, kept, -(tl.fma(u, difference_weight, m) / tl.fma(square_root(n), root, eps)))
    return p, m, u, n, -g


@triton.jit
def power(x, count):
    """Return x to the power of whole numbers `count`, by squaring: a few roundings of float64."""
    result = tl.full(x.shape, 1.0, tl.float64)
    left = count.to(tl.int64)
    while tl.max(left, 0) > 0:
        result = tl.where((left & 1) != 0, result * x, result)
        x = x * x
        left = left >> 1
    return result
