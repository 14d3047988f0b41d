// Adan's rule for one element (arXiv 2208.06677), and the numbers of a step that it takes.
#pragma once

#include "numeric.h"

namespace agr {

// What a parameter group says, in double precision. Betas are in the convention of the authors' code: 0.98 decays
// slowly.
struct AdanOptions {
    double lr, beta1, beta2, beta3, eps, weight_decay;
    double no_prox;  // 0 or 1
};

// What one step of one tensor multiplies by.
template <class T>
struct AdanNumbers {
    T beta1, gradient;    // b1, 1 - b1
    T beta2, difference;  // b2, 1 - b2
    T beta3, square;      // b3, 1 - b3
    // Both forms of weight decay are p = p kept - (m + u difference_weight) / divisor: the proximal one divides
    // everything by 1 + lr wd, no_prox multiplies p alone by 1 - lr wd.
    T kept, difference_weight;
    Divisor<T> divisor;  // with the scale lr / (1 - b1^t)
    T eps_squared;
    bool first;  // the group's first step, where no gradient counts as a previous one

    // `t` counts the steps of the group from 1.
    static AGR_INLINE AdanNumbers of(const AdanOptions& o, double t) {
        const double decay = o.lr * o.weight_decay;
        const double kept = o.no_prox != 0 ? 1 - decay : 1 / (1 + decay);
        const double lr = o.no_prox != 0 ? o.lr : o.lr / (1 + decay);
        const double correction1 = 1 - power(o.beta1, t);
        return {static_cast<T>(o.beta1),
                static_cast<T>(1 - o.beta1),
                static_cast<T>(o.beta2),
                static_cast<T>(1 - o.beta2),
                static_cast<T>(o.beta3),
                static_cast<T>(1 - o.beta3),
                static_cast<T>(kept),
                static_cast<T>(o.beta2 * correction1 / (1 - power(o.beta2, t))),
                Divisor<T>::of(1 / square_root(1 - power(o.beta3, t)), o.eps, lr / correction1),
                static_cast<T>(o.eps * o.eps),
                t == 1};
    }
};

struct Adan {
    using Options = AdanOptions;
    template <class T>
    using Numbers = AdanNumbers<T>;

    // exp_avg, exp_avg_diff, exp_avg_sq and neg_pre_grad, which holds the previous gradient negated, or NaN before an
    // element's first step. The difference to it is 0 then: exp_avg is finite, which it is not after a gradient of NaN.
    static constexpr int states = 4;

    template <class V, class T>
    static AGR_INLINE void apply(V& p, V g, V* state, const AdanNumbers<T>& c) {
        V& m = state[0];
        V& u = state[1];
        V& n = state[2];
        V& neg_previous = state[3];
        V d = neg_previous == neg_previous ? g + neg_previous : m - m;
        d = c.first ? V{} : d;
        V look_ahead = g + d * c.beta2;
        m = m * c.beta1 + g * c.gradient;
        u = u * c.beta2 + d * c.difference;
        // Not its square first, which may be infinite where the product of all three is not.
        n = n * c.beta3 + look_ahead * c.square * look_ahead;
        neg_previous = -g;
        p = p * c.kept - (m + u * c.difference_weight) / (square_root(n) * c.divisor.root + c.divisor.eps);
    }

    // Puts 0 in the place of averages that have faded (numeric.h). What a CPU does after some steps.
    template <class V, class T>
    static AGR_INLINE void sweep(V g, V* state, const AdanNumbers<T>& c) {
        const auto m_gone = faded<T>(state[0], g);
        const auto u_gone = faded<T>(state[1], g);
        state[0] = m_gone ? V{} : state[0];
        state[1] = u_gone ? V{} : state[1];
        state[2] = m_gone & u_gone & (state[2] < negligible_square(c.eps_squared)) ? V{} : state[2];
    }
};

}  // namespace agr
