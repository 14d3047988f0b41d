// A chunk of a tensor, as the threads of a block load, update and store it.
#pragma once

#include "../agr.h"
#include "packed.h"

namespace agr::cuda {

// The inputs of an update that are the same for all elements of a chunk. They have no padding, since they are published
// in words.
template <class T, class Coefficients>
struct Inputs : Coefficients {
    AbsSum<T> sum;
    T scale;
};

// The elements of a chunk in the parameter, the gradient and the state tensors of types P, G and S, for the rule R.
template <class R, class P, class G, class S>
struct Chunk {
    using T = computed_in<P>;
    using Inputs = cuda::Inputs<T, typename R::template Coefficients<T>>;
    static constexpr int lanes = lanes_for<P, G, S>;
    static constexpr int stride = block_threads * lanes;
    // A rule without state replaces the gradient.
    static constexpr bool in_place = R::states == 0;
    static constexpr int arrays = in_place ? 1 : R::states;  // C++ has no arrays without elements

    // The elements that a thread loads together: `lanes` neighbouring elements of each tensor.
    struct Batch {
        Packed<P, lanes> parameter;
        Packed<G, lanes> gradient;
        Packed<S, lanes> state[arrays];
    };

    P* parameter;
    const G* gradient;
    S* state[arrays];
    int elements;
    bool aligned;

    AGR_DEVICE Chunk(const Row& row, const G* of_tensor, std::int64_t first, int count) : elements(count) {
        gradient = of_tensor + first;
        aligned = Packed<G, lanes>::aligned(gradient);
        if constexpr (in_place) {
            parameter = const_cast<P*>(gradient);
        } else {
            parameter = static_cast<P*>(row.parameter) + first;
            aligned = aligned && Packed<P, lanes>::aligned(parameter);
        }
#pragma unroll
        for (int k = 0; k < R::states; ++k) {
            state[k] = static_cast<S*>(row.state[k]) + first;
            aligned = aligned && Packed<S, lanes>::aligned(state[k]);
        }
    }

    // Whether `lanes` elements from i on exist and can be loaded as a batch.
    AGR_DEVICE bool has_batch(int i) const { return aligned && i + lanes <= elements; }

    AGR_DEVICE void load(Batch& batch, int i) const {
        if constexpr (!in_place) batch.parameter.template load<Eviction::evict_first>(parameter + i);
#pragma unroll
        for (int k = 0; k < R::states; ++k) batch.state[k].template load<Eviction::evict_first>(state[k] + i);
        // This is the last use of the gradient.
        batch.gradient.template load<Eviction::evict_first>(gradient + i);
    }

    AGR_DEVICE void update(Batch& batch, int i, bool regularize, const Inputs& inputs) const {
        T p[lanes], s[arrays][lanes];
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            p[lane] = in_place ? T(0) : batch.parameter.get(lane);
            T states[arrays];
#pragma unroll
            for (int k = 0; k < R::states; ++k) states[k] = batch.state[k].get(lane);
            apply(p[lane], static_cast<T>(batch.gradient.get(lane)), states, regularize, inputs);
#pragma unroll
            for (int k = 0; k < R::states; ++k) s[k][lane] = states[k];
        }
        batch.parameter.set(p);
        // A regularized gradient is read soon, by an optimizer; parameters and state are not.
        batch.parameter.template store<in_place ? Eviction::normal : Eviction::evict_first>(parameter + i);
#pragma unroll
        for (int k = 0; k < R::states; ++k) {
            batch.state[k].set(s[k]);
            batch.state[k].template store<Eviction::evict_first>(state[k] + i);
        }
    }

    // Updates the elements from i on, at most `lanes` of them, one at a time: for elements that are not aligned, and
    // for the end of a chunk.
    AGR_DEVICE void update_scalar(int i, bool regularize, const Inputs& inputs) const {
        const int end = i + lanes < elements ? i + lanes : elements;
#pragma unroll 1
        for (; i < end; ++i) {
            T p = in_place ? T(0) : to_computed(parameter[i]);
            T states[arrays];
#pragma unroll
            for (int k = 0; k < R::states; ++k) states[k] = to_computed(state[k][i]);
            apply(p, static_cast<T>(to_computed(gradient[i])), states, regularize, inputs);
            parameter[i] = to_stored<P>(p);
#pragma unroll
            for (int k = 0; k < R::states; ++k) state[k][i] = to_stored<S>(states[k]);
        }
    }

private:
    AGR_DEVICE static void apply(T& p, T g, T* states, bool regularize, const Inputs& inputs) {
        if (regularize) g = regularized(g, inputs.sum);
        R::apply(p, g * inputs.scale, states, inputs);
    }
};

}  // namespace agr::cuda
