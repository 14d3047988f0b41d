// The Adan update of one element (arXiv 2208.06677), and the coefficients of a step that it takes.
#pragma once

#include "numeric.h"

namespace agr {

// The options of a parameter group, in double precision. Betas follow the authors' code, not the paper: a beta is the
// weight of the old average, so 0.98 decays slowly.
struct AdanOptions {
    double lr, beta1, beta2, beta3, eps, weight_decay;
    double no_prox;  // 0 or 1
};

// The coefficients of one step of one tensor, computed in double precision and rounded once.
template <class T>
struct AdanCoefficients {
    T beta1, one_minus_beta1;
    T beta2, one_minus_beta2;
    T beta3, one_minus_beta3;
    // Both forms of weight decay have the form p = p decay - (m + u diff_weight) / denominator. The proximal form
    // divides everything by 1 + lr wd; with no_prox, p alone is multiplied by 1 - lr wd.
    T decay, diff_weight;
    Denominator<T> denominator;  // its scale is lr / (1 - b1^t), divided by 1 + lr wd in the proximal form
    T eps_squared;
    T first;  // 1 in the group's first step, in which a stored previous gradient is not used; otherwise 0

    // `t` counts the steps of the group from 1.
    static AGR_INLINE AdanCoefficients of(const AdanOptions& o, double t) {
        const double lr_wd = o.lr * o.weight_decay;
        const double decay = o.no_prox != 0 ? 1 - lr_wd : 1 / (1 + lr_wd);
        const double lr = o.no_prox != 0 ? o.lr : o.lr / (1 + lr_wd);
        const double correction1 = 1 - power(o.beta1, t);
        return {static_cast<T>(o.beta1),
                static_cast<T>(1 - o.beta1),
                static_cast<T>(o.beta2),
                static_cast<T>(1 - o.beta2),
                static_cast<T>(o.beta3),
                static_cast<T>(1 - o.beta3),
                static_cast<T>(decay),
                static_cast<T>(o.beta2 * correction1 / (1 - power(o.beta2, t))),
                Denominator<T>::of(1 / square_root(1 - power(o.beta3, t)), o.eps, lr / correction1),
                static_cast<T>(o.eps * o.eps),
                static_cast<T>(t == 1)};
    }
};

struct Adan {
    using Options = AdanOptions;
    template <class T>
    using Coefficients = AdanCoefficients<T>;

    // The state tensors: exp_avg, exp_avg_diff, exp_avg_sq and neg_pre_grad. The last is the negated previous gradient,
    // or NaN before the element's first step. In that step the difference of gradients is 0; it is computed as m - m,
    // which is 0 for a finite m. After a gradient of NaN, neg_pre_grad is NaN too, but so are m and the difference.
    static constexpr int states = 4;

    template <class V, class T>
    static AGR_INLINE void apply(V& p, V g, V* state, const AdanCoefficients<T>& c) {
        V& m = state[0];
        V& u = state[1];
        V& n = state[2];
        V& neg_previous = state[3];
        V d = neg_previous == neg_previous ? g + neg_previous : m - m;
        d = c.first != 0 ? V{} : d;
        V look_ahead = multiply_add(d, c.beta2, g);
        m = multiply_add(m, c.beta1, g * c.one_minus_beta1);
        u = multiply_add(u, c.beta2, d * c.one_minus_beta2);
        // The square is not computed first, since it may overflow where the product of all three does not.
        n = multiply_add(look_ahead * c.one_minus_beta3, look_ahead, n * c.beta3);
        neg_previous = -g;
        p = multiply_subtract(p, c.decay, multiply_add(u, c.diff_weight, m) / c.denominator.at(n));
    }

    // Replaces averages that have faded to denormal numbers by 0 (see numeric.h). The CPU kernels do so every few
    // steps.
    template <class V, class T>
    static AGR_INLINE void sweep(V g, V* state, const AdanCoefficients<T>& c) {
        const auto m_faded = faded<T>(state[0], g);
        const auto u_faded = faded<T>(state[1], g);
        state[0] = m_faded ? V{} : state[0];
        state[1] = u_faded ? V{} : state[1];
        state[2] = m_faded & u_faded & (state[2] < negligible_square(c.eps_squared)) ? V{} : state[2];
    }
};

}  // namespace agr
