// AdamW's rule for one element (arXiv 1711.05101), and the numbers of a step that it takes.
#pragma once

#include "numeric.h"

namespace agr {

// What a parameter group says, in double precision.
struct AdamWOptions {
    double lr, beta1, beta2, eps, weight_decay;
};

// What one step of one tensor multiplies by.
template <class T>
struct AdamWNumbers {
    T decay;  // 1 - lr wd
    // Of exp_avg: from itself to the gradient by w = 1 - b1 if that is below 1/2; else from the gradient by w - 1, or
    // -0.
    T lerp;
    T beta2;             // b2
    T square;            // 1 - b2
    Divisor<T> divisor;  // with the scale lr / (1 - b1^t)
    T eps_squared;

    // `t` counts the steps of the parameter from 1.
    static AGR_INLINE AdamWNumbers of(const AdamWOptions& o, double t) {
        const double correction = 1 / square_root(1 - power(o.beta2, t));
        return {static_cast<T>(1 - o.lr * o.weight_decay),
                static_cast<T>(o.beta1 > 0.5 ? 1 - o.beta1 : -(1 - (1 - o.beta1))),
                static_cast<T>(o.beta2),
                static_cast<T>(1 - o.beta2),
                Divisor<T>::of(correction, o.eps, o.lr / (1 - power(o.beta1, t))),
                static_cast<T>(o.eps * o.eps)};
    }
};

template <bool amsgrad>
struct AdamW {
    using Options = AdamWOptions;
    template <class T>
    using Numbers = AdamWNumbers<T>;

    // exp_avg, exp_avg_sq and, for AMSGrad, max_exp_avg_sq.
    static constexpr int states = amsgrad ? 3 : 2;

    template <class V, class T>
    static AGR_INLINE void apply(V& p, V g, V* state, const AdamWNumbers<T>& c) {
        V& m = state[0];
        V& v = state[1];
        V& w = state[states - 1];  // what divides: without AMSGrad, v
        // From the nearer end, as torch.lerp: m + (1 - b1) (g - m) loses a g that is small beside m where b1 is small.
        m = by_sign(c.lerp, m, g) + (g - m) * c.lerp;
        // Not g * g first, which may be infinite where the product of all three is not.
        v = v * c.beta2 + g * c.square * g;
        if constexpr (amsgrad) w = larger(w, v);
        p = p * c.decay - m / (square_root(w) * c.divisor.root + c.divisor.eps);
    }

    // Puts 0 in the place of averages that have faded (numeric.h). What a CPU does after some steps.
    template <class V, class T>
    static AGR_INLINE void sweep(V g, V* state, const AdamWNumbers<T>& c) {
        const auto gone = faded<T>(state[0], g);
        state[0] = gone ? V{} : state[0];
        for (int k = 1; k < states; ++k)
            state[k] = gone & (state[k] < negligible_square(c.eps_squared)) ? V{} : state[k];
    }
};

}  // namespace agr
