// Adaptive gradient regularization (arXiv 2407.16944) of one element: psi(g) = g (1 - |g| / S), where the abs-sum S is
// the sum of |g| over all elements of the tensor.
#pragma once

#include "numeric.h"

namespace agr {

// The abs-sum of one tensor, in the form that psi needs.
//
// 1 - |g| / S is evaluated as ((S - |g|) + rest) * (1 / S), where S is rounded to the compute type and `rest` is the
// rounding error. Where the subtraction cancels it is exact (Sterbenz's lemma). So a tensor of one element gives
// exactly 0, and the difference is accurate where one element outweighs all others. It has to be: an adaptive optimizer
// divides by the gradient's size, and would amplify an error in the small difference to a full step.
template <class T>
struct AbsSum {
    T sum;
    T rest;
    T inverse;
    // A power of two by which sum, rest and |g| are multiplied. It is 1 unless 1 / S would overflow (S is denormal) or
    // would be denormal (S is very large).
    T prescale;

    // `sum` is the abs-sum of the gradient as it is stored.
    static AGR_INLINE AbsSum of(double sum) {
        constexpr bool single = sizeof(T) == sizeof(float);
        constexpr double small = single ? 0x1p-100 : 0x1p-1000, raised = single ? 0x1p60 : 0x1p500;
        const T prescale = static_cast<T>(sum < small ? raised : sum > 1 / small ? 1 / raised : 1.0);
        sum *= static_cast<double>(prescale);
        const T rounded = static_cast<T>(sum);
        // With an inverse of 1, S = 0 gives psi = 0. An infinite S gives an infinite factor, which regularized() limits
        // to 1.
        const bool finite = rounded - rounded == T(0);
        if (!finite || rounded == T(0)) return {rounded, T(0), T(1), T(1)};
        return {rounded, static_cast<T>(sum - static_cast<double>(rounded)), reciprocal(rounded), prescale};
    }

    // `scale` is the factor that every element is multiplied by after psi (clipping, the sign of `maximize`):
    // psi(c g) = c psi(g), so the factor need not be known when the sum is taken. The order matters in one case only: a
    // scale of 0 and an infinite sum must give NaN, as they would if the gradient were scaled first.
    AGR_INLINE AbsSum for_scale(double scale) const {
        const double scaled = static_cast<double>(sum) * scale;
        return scaled == scaled ? *this : AbsSum{static_cast<T>(scaled), T(0), T(1), T(1)};
    }
};

template <class V, class T>
AGR_INLINE V regularized(V g, const AbsSum<T>& s) {
    const V factor = (subtract_product(s.sum, magnitude(g), s.prescale) + s.rest) * s.inverse;
    // The comparison is written such that a NaN factor is kept: an infinite element of an infinite sum gives
    // inf (1 - inf / inf) = NaN.
    const V one = V{} + T(1);
    return g * (one < factor ? one : factor);
}

// The options of a group of gradients that are regularized in place: there are none.
struct RegularizeOptions {};

// An update rule that stores the regularized gradient in the parameter and has no state. Executors take the gradient
// itself for its parameter, so that it regularizes the gradient in place.
struct Regularize {
    using Options = RegularizeOptions;
    template <class T>
    struct Coefficients {};

    static constexpr int states = 0;

    template <class V, class T>
    static AGR_INLINE void apply(V& p, V g, V*, const Coefficients<T>&) {
        p = g;
    }
};

}  // namespace agr
