// psi, the adaptive gradient regularization of one element (arXiv 2407.16944): g (1 - |g| / S), where S is the abs-sum
// of all elements of the element's tensor.
#pragma once

#include "numeric.h"

namespace agr {

// The abs-sum of one tensor in the form that psi needs.
//
// 1 - |g| / S is evaluated as ((S - |g|) + rest) * (1 / S), with S rounded to the compute type and `rest` what the
// rounding lost. The subtraction is exact where it cancels (Sterbenz), so that a tensor of one element gives exactly 0,
// and a tensor that one element dominates keeps the accuracy of the small difference: an adaptive optimizer would scale
// an error there back up to a full step.
template <class T>
struct AbsSum {
    T sum;
    T rest;
    T inverse;
    // A power of two that sum, rest and |g| are multiplied by where 1 / S would overflow, S being denormal, or be
    // denormal itself; else 1.
    T lift;

    // `sum` of the gradient as it is stored; `scale` what every element of it is multiplied by afterwards (clipping,
    // the sign of `maximize`): psi(c g) = c psi(g), so that the scale need not be known when the sum is taken. The one
    // thing that scaling first would have changed: 0 times an infinite sum is NaN, and shall be.
    static AGR_INLINE AbsSum of(double sum, double scale) {
        const double scaled = sum * scale;
        if (scaled != scaled) return {static_cast<T>(scaled), T(0), T(1), T(1)};
        constexpr bool single = sizeof(T) == sizeof(float);
        constexpr double small = single ? 0x1p-100 : 0x1p-1000, raised = single ? 0x1p60 : 0x1p500;
        const T lift = static_cast<T>(sum < small ? raised : sum > 1 / small ? 1 / raised : 1.0);
        sum *= static_cast<double>(lift);
        const T rounded = static_cast<T>(sum);
        // With an inverse of 1, S = 0 gives psi = 0, and an infinite S a share of infinity, which is clamped to 1
        // below.
        const bool finite = rounded - rounded == T(0);
        if (!finite || rounded == T(0)) return {rounded, T(0), T(1), T(1)};
        return {rounded, static_cast<T>(sum - static_cast<double>(rounded)), T(1) / rounded, lift};
    }
};

template <class V, class T>
AGR_INLINE V regularized(V g, const AbsSum<T>& s) {
    const V kept = ((s.sum - magnitude(g) * s.lift) + s.rest) * s.inverse;
    // Written so that NaN stays: an infinite element of an infinite sum is inf (1 - inf / inf).
    return g * (kept > T(1) ? V{} + T(1) : kept);
}

// The rule of no optimizer: what is updated becomes the regularized gradient. With the gradient itself as the
// "parameter", this regularizes it in place.
struct Regularize {
    template <class T>
    struct Numbers {};

    static constexpr int states = 0;

    template <class V, class T>
    static AGR_INLINE void apply(V& p, V g, V*, const Numbers<T>&) {
        p = g;
    }
};

}  // namespace agr
