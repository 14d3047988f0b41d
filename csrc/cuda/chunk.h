// A chunk of a tensor, as the threads of a block load, update and store it.
#pragma once

#include "../agr.h"
#include "../quantization.h"
#include "packed.h"

namespace agr::cuda {

// The number of the step, for those kernels whose rounding depends on it.
template <bool stochastic>
struct StepNumber {};
template <>
struct StepNumber<true> {
    std::uint32_t step;
};

// The inputs of an update that are the same for all elements of a chunk. They have no padding, since they are published
// in words.
template <class T, class Coefficients, bool stochastic>
struct Inputs : Coefficients, StepNumber<stochastic> {
    AbsSum<T> sum;
    T scale;
};

// The elements of a chunk, for the rule R: what its threads load, update and store.
template <class R, class Format>
struct Chunk {
    using P = typename Format::P;
    using G = typename Format::G;
    using S = typename Format::S;
    using W = typename Format::W;
    using T = typename Format::T;
    using Inputs = cuda::Inputs<T, typename R::template Coefficients<T>, Format::stochastic>;
    static constexpr int lanes = lanes_for<W, G, S>;
    static constexpr int stride = block_threads * lanes;
    // A rule without state replaces the gradient.
    static constexpr bool in_place = R::states == 0;
    static constexpr int arrays = in_place ? 1 : R::states;  // C++ has no arrays without elements

    // The elements that a thread loads together: `lanes` neighbouring elements of each tensor.
    struct Batch {
        Packed<W, lanes> weight;
        Packed<G, lanes> gradient;
        Packed<S, lanes> state[arrays];
    };

    W* weight;     // what is updated: the master, or the parameter
    P* parameter;  // the rounded copy of a master
    const G* gradient;
    S* state[arrays];
    std::int64_t first;  // the index of the first element in its tensor
    int elements;
    bool aligned;
    RoundingKey key;  // where rounding is stochastic

    AGR_DEVICE Chunk(const Row& row, const G* of_tensor, std::int64_t first_element, int count,
                     const RoundingKey& rounding)
        : first(first_element), elements(count), key(rounding) {
        gradient = of_tensor + first;
        aligned = Packed<G, lanes>::aligned(gradient);
        if constexpr (in_place) {
            weight = const_cast<P*>(gradient);
        } else {
            if constexpr (Format::master) {
                weight = row.master + first;
                parameter = static_cast<P*>(row.parameter) + first;
                aligned = aligned && Packed<P, lanes>::aligned(parameter);
            } else {
                weight = static_cast<W*>(row.parameter) + first;
            }
            aligned = aligned && Packed<W, lanes>::aligned(weight);
        }
#pragma unroll
        for (int k = 0; k < R::states; ++k) {
            state[k] = static_cast<S*>(row.state[k]) + first;
            aligned = aligned && Packed<S, lanes>::aligned(state[k]);
        }
        if constexpr (Format::stochastic) {
            // The elements of a batch share a counter.
            aligned = aligned && first % lanes == 0;
        }
    }

    // Whether `lanes` elements from i on exist and can be loaded as a batch.
    AGR_DEVICE bool has_batch(int i) const { return aligned && i + lanes <= elements; }

    AGR_DEVICE void load(Batch& batch, int i) const {
        if constexpr (!in_place) batch.weight.template load<Eviction::evict_first>(weight + i);
#pragma unroll
        for (int k = 0; k < R::states; ++k) batch.state[k].template load<Eviction::evict_first>(state[k] + i);
        // This is the last use of the gradient.
        batch.gradient.template load<Eviction::evict_first>(gradient + i);
    }

    AGR_DEVICE void update(Batch& batch, int i, bool regularize, const Inputs& inputs) const {
        T p[lanes], s[arrays][lanes];
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) {
            p[lane] = in_place ? T(0) : batch.weight.get(lane);
            T states[arrays];
#pragma unroll
            for (int k = 0; k < R::states; ++k) states[k] = batch.state[k].get(lane);
            apply(p[lane], static_cast<T>(batch.gradient.get(lane)), states, regularize, inputs);
#pragma unroll
            for (int k = 0; k < R::states; ++k) s[k][lane] = states[k];
        }
        pack<!Format::master>(batch.weight, p, 0, i);
        // A regularized gradient is read soon, by an optimizer; parameters and state are not.
        batch.weight.template store<in_place ? Eviction::normal : Eviction::evict_first>(weight + i);
        if constexpr (Format::master) {
            Packed<P, lanes> rounded;
            rounded.set(p);
            rounded.template store<Eviction::evict_first>(parameter + i);
        }
#pragma unroll
        for (int k = 0; k < R::states; ++k) {
            pack<true>(batch.state[k], s[k], static_cast<std::uint32_t>(k) + 1, i);
            batch.state[k].template store<Eviction::evict_first>(state[k] + i);
        }
    }

    // Updates the elements from i on, at most `lanes` of them, one at a time: for elements that are not aligned, and
    // for the end of a chunk.
    AGR_DEVICE void update_scalar(int i, bool regularize, const Inputs& inputs) const {
        const int end = i + lanes < elements ? i + lanes : elements;
#pragma unroll 1
        for (; i < end; ++i) {
            T p = in_place ? T(0) : to_computed(weight[i]);
            T states[arrays];
#pragma unroll
            for (int k = 0; k < R::states; ++k) states[k] = to_computed(state[k][i]);
            apply(p, static_cast<T>(to_computed(gradient[i])), states, regularize, inputs);
            weight[i] = rounded<W, !Format::master>(p, 0, i);
            if constexpr (Format::master) parameter[i] = to_stored<P>(p);
#pragma unroll
            for (int k = 0; k < R::states; ++k)
                state[k][i] = rounded<S, true>(states[k], static_cast<std::uint32_t>(k) + 1, i);
        }
    }

    AGR_DEVICE static void apply(T& p, T g, T* states, bool regularize, const Inputs& inputs) {
        if (regularize) g = regularized(g, inputs.sum);
        R::apply(p, g * inputs.scale, states, inputs);
    }

private:
    template <class Stored>
    static constexpr bool rounds = Format::stochastic && std::is_same_v<Stored, bfloat16>;

    // Packs values of the elements from i on. `own`: they are stored nowhere else.
    template <bool own, class Stored>
    AGR_DEVICE void pack(Packed<Stored, lanes>& packed, const T (&values)[lanes], std::uint32_t array, int i) const {
        if constexpr (own && rounds<Stored>)
            packed.set_stochastically(values, key, array, first + i);
        else
            packed.set(values);
    }

    template <class Stored, bool own>
    AGR_DEVICE Stored rounded(T value, std::uint32_t array, int i) const {
        if constexpr (own && rounds<Stored>)
            return to_stored_stochastically(value, key, array, first + i);
        else
            return to_stored<Stored>(value);
    }
};

// The value of every code, for unsigned and for signed ones, in shared memory.
struct CodeTables {
    float value[2][codes];

    AGR_DEVICE void fill() {
#pragma unroll 1
        for (int i = thread_index(); i < codes; i += block_threads) {
            value[0][i] = code_value<false>(i);
            value[1][i] = code_value<true>(i);
        }
    }
};

// The same where the state consists of codes. A warp updates a block of elements that share a scale: it keeps their new
// states in registers until it knows the largest of them.
template <class R, class Format>
struct CodedChunk {
    using P = typename Format::P;
    using G = typename Format::G;
    using W = typename Format::W;
    using Plain = Chunk<R, cuda::Format<P, G, float, Format::master, Format::stochastic>>;
    using Inputs = typename Plain::Inputs;
    static constexpr int lanes = lanes_for<W, G>;
    static constexpr int warp_lanes = warp_threads * lanes;  // elements that a warp loads together
    static constexpr int batches = scale_block / warp_lanes;
    static_assert(batches * warp_lanes == scale_block, "a block is a whole number of batches");
    static constexpr Rule rule = R::states == 4 ? Rule::adan : R::states == 3 ? Rule::adamw_amsgrad : Rule::adamw;

    W* weight;
    P* parameter;
    const G* gradient;
    code8* state[R::states];
    float* scales[R::states];
    std::int64_t first;
    int elements;
    bool aligned;
    RoundingKey key;

    AGR_DEVICE CodedChunk(const Row& row, const G* of_tensor, std::int64_t first_element, int count,
                          const RoundingKey& rounding)
        : first(first_element), elements(count), key(rounding) {
        gradient = of_tensor + first;
        parameter = static_cast<P*>(row.parameter) + first;
        aligned = Packed<G, lanes>::aligned(gradient) && Packed<P, lanes>::aligned(parameter);
        if constexpr (Format::master) {
            weight = row.master + first;
            aligned = aligned && Packed<W, lanes>::aligned(weight);
        } else {
            weight = parameter;
        }
#pragma unroll
        for (int k = 0; k < R::states; ++k) {
            state[k] = static_cast<code8*>(row.state[k]) + first;
            scales[k] = row.scales[k] + first / scale_block;
            aligned = aligned && Packed<code8, lanes>::aligned(state[k]);
        }
    }

    // Updates the block of elements at `block`, a number within the chunk. All lanes of a warp call it.
    AGR_DEVICE void update(int block, bool regularize, const Inputs& inputs, const CodeTables& tables) const {
        const int begin = block * scale_block + thread_index() % warp_threads * lanes;
        const int end = (block + 1) * scale_block < elements ? (block + 1) * scale_block : elements;
        Packed<W, lanes> weights[batches];
        Packed<G, lanes> gradients[batches];
        Packed<code8, lanes> coded[batches][R::states];
        const bool whole = aligned && end == (block + 1) * scale_block;
#pragma unroll
        for (int b = 0; b < batches; ++b) {
            const int i = begin + b * warp_lanes;
            if (whole) {
                weights[b].template load<Eviction::evict_first>(weight + i);
#pragma unroll
                for (int k = 0; k < R::states; ++k) coded[b][k].template load<Eviction::evict_first>(state[k] + i);
                gradients[b].template load<Eviction::evict_first>(gradient + i);
            } else {
                weights[b].load_some(weight + i, end - i);
#pragma unroll
                for (int k = 0; k < R::states; ++k) coded[b][k].load_some(state[k] + i, end - i);
                gradients[b].load_some(gradient + i, end - i);
            }
        }
        float old_scales[R::states];
#pragma unroll
        for (int k = 0; k < R::states; ++k) old_scales[k] = scales[k][block];

        float s[R::states][batches][lanes];
        std::uint32_t largest[R::states] = {};  // the bits of magnitudes, in whose order NaN comes last
#pragma unroll
        for (int b = 0; b < batches; ++b) {
            const int i = begin + b * warp_lanes;
            float p[lanes];
#pragma unroll
            for (int lane = 0; lane < lanes; ++lane) {
                float states[R::states];
#pragma unroll
                for (int k = 0; k < R::states; ++k)
                    states[k] = tables.value[is_signed_state(rule, k)][coded[b][k].code(lane)] * old_scales[k];
                p[lane] = weights[b].get(lane);
                Plain::apply(p[lane], gradients[b].get(lane), states, regularize, inputs);
#pragma unroll
                for (int k = 0; k < R::states; ++k) {
                    s[k][b][lane] = states[k];
                    const std::uint32_t bits = bit_cast<std::uint32_t>(states[k]) & 0x7fffffffu;
                    // Elements past the end have no part in the scale.
                    if (bits > largest[k] && (whole || i + lane < end)) largest[k] = bits;
                }
            }
            if constexpr (Format::stochastic)
                weights[b].set_stochastically(p, key, 0, first + i);
            else
                weights[b].set(p);
            Packed<P, lanes> rounded;
            if constexpr (Format::master) rounded.set(p);
            if (whole) {
                weights[b].template store<Eviction::evict_first>(weight + i);
                if constexpr (Format::master) rounded.template store<Eviction::evict_first>(parameter + i);
            } else {
                weights[b].store_some(weight + i, end - i);
                if constexpr (Format::master) rounded.store_some(parameter + i, end - i);
            }
        }
        // All lanes have read the old scales before one writes the new ones.
        warp_barrier();
#pragma unroll
        for (int k = 0; k < R::states; ++k) {
            const BlockScale scale = BlockScale::of(bit_cast<float>(largest_of_warp(largest[k])));
            if (thread_index() % warp_threads == 0) scales[k][block] = scale.stored;
#pragma unroll
            for (int b = 0; b < batches; ++b) {
                const int i = begin + b * warp_lanes;
#pragma unroll
                for (int lane = 0; lane < lanes; ++lane)
                    coded[b][k].set_code(lane, code(k, s[k][b][lane], scale.inverse));
                if (whole)
                    coded[b][k].template store<Eviction::evict_first>(state[k] + i);
                else
                    coded[b][k].store_some(state[k] + i, end - i);
            }
        }
    }

private:
    // Both are compiled into one once k is known.
    AGR_DEVICE static std::uint32_t code(int k, float x, float inverse) {
        return is_signed_state(rule, k) ? code_of<true, std::uint32_t>(x, inverse)
                                        : code_of<false, std::uint32_t>(x, inverse);
    }
};

}  // namespace agr::cuda
