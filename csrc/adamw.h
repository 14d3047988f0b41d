// The AdamW update of one element (arXiv 1711.05101), and the coefficients of a step that it takes.
#pragma once

#include "numeric.h"

namespace agr {

// The options of a parameter group, in double precision.
struct AdamWOptions {
    double lr, beta1, beta2, eps, weight_decay;
};

// The coefficients of one step of one tensor, computed in double precision and rounded once.
template <class T>
struct AdamWCoefficients {
    T decay;  // 1 - lr wd
    // The weight of the linear interpolation between exp_avg and the gradient, as torch.lerp does it. With w = 1 - b1,
    // it is w where that is below 1/2, to start from exp_avg; otherwise it is w - 1, negative or -0, to start from the
    // gradient. The sign tells which.
    T lerp;
    T beta2;
    T one_minus_beta2;
    Denominator<T> denominator;  // its scale is lr / (1 - b1^t)
    T eps_squared;

    // `t` counts the steps of the parameter from 1.
    static AGR_INLINE AdamWCoefficients of(const AdamWOptions& o, double t) {
        const double correction = 1 / square_root(1 - power(o.beta2, t));
        return {static_cast<T>(1 - o.lr * o.weight_decay),
                static_cast<T>(o.beta1 > 0.5 ? 1 - o.beta1 : -(1 - (1 - o.beta1))),
                static_cast<T>(o.beta2),
                static_cast<T>(1 - o.beta2),
                Denominator<T>::of(correction, o.eps, o.lr / (1 - power(o.beta1, t))),
                static_cast<T>(o.eps * o.eps)};
    }
};

template <bool amsgrad>
struct AdamW {
    using Options = AdamWOptions;
    template <class T>
    using Coefficients = AdamWCoefficients<T>;

    // The state tensors: exp_avg, exp_avg_sq and, with AMSGrad, max_exp_avg_sq.
    static constexpr int states = amsgrad ? 3 : 2;

    template <class V, class T>
    static AGR_INLINE void apply(V& p, V g, V* state, const AdamWCoefficients<T>& c) {
        V& m = state[0];
        V& v = state[1];
        V& w = state[states - 1];  // in the denominator: max_exp_avg_sq with AMSGrad, otherwise v
        // Interpolates from the nearer end, as torch.lerp does: if b1 is small, m + (1 - b1) (g - m) loses a g that is
        // much smaller than m.
        m = multiply_add(g - m, c.lerp, select_by_sign(c.lerp, m, g));
        // g * g is not computed first, since it may overflow where the product of all three does not.
        v = multiply_add(g * c.one_minus_beta2, g, v * c.beta2);
        if constexpr (amsgrad) w = maximum(w, v);
        p = multiply_subtract(p, c.decay, m / c.denominator.at(w));
    }

    // Replaces averages that have faded to denormal numbers by 0 (see numeric.h). The CPU kernels do so every few
    // steps.
    template <class V, class T>
    static AGR_INLINE void sweep(V g, V* state, const AdamWCoefficients<T>& c) {
        const auto m_faded = faded<T>(state[0], g);
        state[0] = m_faded ? V{} : state[0];
        for (int k = 1; k < states; ++k)
            state[k] = m_faded & (state[k] < negligible_square(c.eps_squared)) ? V{} : state[k];
    }
};

}  // namespace agr
