// The CPU kernels. This file is compiled once for each instruction set; the macro AGR_KERNELS is the name of the
// function that returns the kernels of that set.
#include "kernels.h"

#include <type_traits>

#include "converted.h"
#include "vector.h"

namespace agr::cpu {
namespace {

constexpr int double_lanes = AGR_VECTOR_BYTES / 8;

template <class Stored>
AGR_INLINE vector<double, double_lanes> load_double(const Stored* from) {
    return __builtin_convertvector(load<double_lanes>(from), vector<double, double_lanes>);
}

// The sums in double precision, element by element. The order of additions depends on n alone: first within each lane,
// then over the lanes.
template <bool squares, class Stored>
AGR_INLINE Sums precise_sums(const Stored* g, std::int64_t n) {
    using V = vector<double, double_lanes>;
    constexpr int accumulators = 4;  // independent sums, so that additions do not wait for each other
    V abs_sums[accumulators] = {}, square_sums[accumulators] = {};
    auto add = [&](int k, V x) {
        abs_sums[k] += magnitude(x);
        if constexpr (squares) square_sums[k] += x * x;
    };
    std::int64_t i = 0;
    for (; i + accumulators * double_lanes <= n; i += accumulators * double_lanes)
        for (int k = 0; k < accumulators; ++k) add(k, load_double(g + i + k * double_lanes));
    for (; i + double_lanes <= n; i += double_lanes) add(0, load_double(g + i));
    if (i < n) {
        Stored rest[double_lanes] = {};
        std::memcpy(rest, g + i, (n - i) * sizeof(Stored));
        add(0, load_double(rest));
    }
    const V all_abs_sums = (abs_sums[0] + abs_sums[1]) + (abs_sums[2] + abs_sums[3]);
    const V all_squares = (square_sums[0] + square_sums[1]) + (square_sums[2] + square_sums[3]);
    Sums sums;
    for (int lane = 0; lane < double_lanes; ++lane) {
        sums.abs_sum += all_abs_sums[lane];
        sums.squares += all_squares[lane];
    }
    return sums;
}

// The abs-sum at the speed of the cache: eight vectors at a time are added in float32, in a tree, and the results are
// added in float64. The error is at most three roundings of float32. That is enough unless one element outweighs all
// others together: psi of that element is proportional to the sum of the others, which is small and must be accurate.
// In that case one of the float32 sums is at least half of the total, and everything is added again in double
// precision. It is enough to check each chunk by itself: an element that outweighs the rest of its tensor outweighs the
// rest of its chunk, and the error of every other chunk is at most three roundings of that chunk's own sum.
template <class Stored>
AGR_INLINE double fast_abs_sum(const Stored* g, std::int64_t n) {
    constexpr int lanes = lanes_of<float>;
    using V = vector<float, lanes>;
    using Half = vector<float, double_lanes>;
    using D = vector<double, double_lanes>;
    constexpr std::int64_t block = 8 * lanes;
    constexpr std::int64_t ahead = 2048 / sizeof(Stored);  // elements
    D low = {}, high = {};
    V largest = {};
    std::int64_t i = 0;
    for (; i + block <= n; i += block) {
        // Processors prefetch a single stream too slowly by themselves, and not past a page.
        if (i + ahead + block <= n)
            for (int line = 0; line < static_cast<int>(block * sizeof(Stored)) / 64; ++line)
                __builtin_prefetch(reinterpret_cast<const char*>(g + i + ahead) + line * 64);
        V x[8];
        constexpr int parts = parts_of<Stored>;
        for (int k = 0; k < 8; k += parts) {
            const auto loaded = load_parts<float, parts>(g + i + k * lanes);
            for (int part = 0; part < parts; ++part) x[k + part] = magnitude(loaded.part[part]);
        }
        const V sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        largest = sum > largest ? sum : largest;
        Half halves[2];
        std::memcpy(halves, &sum, sizeof(sum));
        low += __builtin_convertvector(halves[0], D);
        high += __builtin_convertvector(halves[1], D);
    }
    double sum = precise_sums<false>(g + i, n - i).abs_sum;
    float outweighing = 0;
    for (int lane = 0; lane < double_lanes; ++lane) sum += low[lane] + high[lane];
    for (int lane = 0; lane < lanes; ++lane) outweighing = largest[lane] > outweighing ? largest[lane] : outweighing;
    return 2.0 * outweighing < sum ? sum : precise_sums<false>(g, n).abs_sum;
}

template <class G>
double abs_sum(const void* gradient, std::int64_t n) {
    if constexpr (std::is_same_v<computed_in<G>, float>)
        return fast_abs_sum(static_cast<const G*>(gradient), n);
    else
        return precise_sums<false>(static_cast<const G*>(gradient), n).abs_sum;
}

template <class G>
Sums abs_sum_and_squares(const void* gradient, std::int64_t n) {
    return precise_sums<true>(static_cast<const G*>(gradient), n);
}

template <class T, class R>
AGR_INLINE const auto& in_type(const CoefficientsOf<R>& coefficients) {
    if constexpr (sizeof(T) == sizeof(float))
        return coefficients.in_float32;
    else
        return coefficients.in_float64;
}

// How many vectors an iteration updates: bfloat16 numbers come in pairs of vectors (see vector.h).
template <class P, class G, class S>
constexpr int vectors_of = parts_of<P> == 2 && parts_of<G> == 2 && parts_of<S> == 2 ? 2 : 1;

// The gradient of one iteration, regularized and scaled.
template <bool regularize, int vectors, class T, class G>
AGR_INLINE Parts<T, vectors> gradient_from(const G* g, const AbsSum<T>& sum, T scale) {
    auto gradient = load_parts<T, vectors>(g);
    for (auto& part : gradient.part) {
        if constexpr (regularize) part = regularized(part, sum);
        part = part * scale;
    }
    return gradient;
}

// The rest of an iteration: load, apply the rule, sweep, store.
template <class R, class T, int vectors, class P, class S, class Coefficients>
AGR_INLINE void update_parts(P* p, const Parts<T, vectors>& gradient, S* const* state, const Coefficients& coefficients,
                             bool sweeps) {
    auto parameter = load_parts<T, vectors>(p);
    Parts<T, vectors> states[max_states];
    for (int k = 0; k < R::states; ++k) states[k] = load_parts<T, vectors>(state[k]);
    for (int i = 0; i < vectors; ++i) {
        vector<T, lanes_of<T>> of_part[max_states];
        for (int k = 0; k < R::states; ++k) of_part[k] = states[k].part[i];
        R::apply(parameter.part[i], gradient.part[i], of_part, coefficients);
        if constexpr (R::states > 0) {
            if (sweeps) R::sweep(gradient.part[i], of_part, coefficients);
        }
        for (int k = 0; k < R::states; ++k) states[k].part[i] = of_part[k];
    }
    store_parts(p, parameter);
    for (int k = 0; k < R::states; ++k) store_parts(state[k], states[k]);
}

template <class R, bool regularize, class P, class G, class S>
AGR_INLINE void update_span(const Span& span, const CoefficientsOf<R>& both_types, double abs_sum,
                            double scale_in_double, bool sweeps) {
    using T = computed_in<P>;
    constexpr int vectors = vectors_of<P, G, S>;
    constexpr int elements = vectors * lanes_of<T>;
    const auto coefficients = in_type<T>(both_types);
    const auto sum = AbsSum<T>::of(abs_sum).for_scale(scale_in_double);
    const T scale = static_cast<T>(scale_in_double);
    P* p = static_cast<P*>(span.parameter);
    const G* g = static_cast<const G*>(span.gradient);
    S* state[max_states];
    for (int k = 0; k < R::states; ++k) state[k] = static_cast<S*>(span.state[k]);

    std::int64_t n = span.elements;
    if (n >= elements) {
        // Gradients are regularized one iteration ahead: otherwise an iteration is one long chain of operations, of
        // which a processor's window holds too few to keep its divider busy.
        auto ahead = gradient_from<regularize, vectors>(g, sum, scale);
        for (; n >= elements; n -= elements) {
            const auto gradient = ahead;
            g += elements;
            // After the last gradient, it is read once more.
            ahead = gradient_from<regularize, vectors>(n >= 2 * elements ? g : g - elements, sum, scale);
            update_parts<R>(p, gradient, state, coefficients, sweeps);
            p += elements;
            for (int k = 0; k < R::states; ++k) state[k] += elements;
        }
    }
    if (n > 0) {
        // The last elements are copied to vectors that are padded with zeros, and updated in the same way.
        P p_rest[elements] = {};
        G g_rest[elements] = {};
        S rest[max_states][elements] = {};
        S* state_rest[max_states];
        std::memcpy(p_rest, p, n * sizeof(P));
        std::memcpy(g_rest, g, n * sizeof(G));
        for (int k = 0; k < R::states; ++k) {
            std::memcpy(rest[k], state[k], n * sizeof(S));
            state_rest[k] = rest[k];
        }
        update_parts<R>(p_rest, gradient_from<regularize, vectors>(g_rest, sum, scale), state_rest, coefficients,
                        sweeps);
        std::memcpy(p, p_rest, n * sizeof(P));
        for (int k = 0; k < R::states; ++k) std::memcpy(state[k], rest[k], n * sizeof(S));
    }
}

template <class R, class P, class G, class S>
void update(const Span& span, const Inputs& inputs) {
    const auto& both_types = *static_cast<const CoefficientsOf<R>*>(inputs.coefficients);
    if (inputs.sum != nullptr)
        update_span<R, true, P, G, S>(span, both_types, *inputs.sum, inputs.scale, inputs.sweeps);
    else
        update_span<R, false, P, G, S>(span, both_types, 0, inputs.scale, inputs.sweeps);
}

// The update of float32 parameters and states with gradients of the given type.
template <class R>
auto update_in_float32(Type gradient) {
    return gradient == Type::float32    ? update<R, float, float, float>
           : gradient == Type::bfloat16 ? update<R, float, bfloat16, float>
                                        : update<R, float, float16, float>;
}

// The update for all other combinations of types: in float32, of a block of elements at a time.
template <class R>
void update_converted(const Span& span, const Inputs& inputs) {
    constexpr Rule rule = R::states == 4 ? Rule::adan : R::states == 3 ? Rule::adamw_amsgrad : Rule::adamw;
    const Types& types = inputs.types;
    const auto update_block = update_in_float32<R>(types.gradient);
    // A block of codes has one scale.
    const int most = types.state == Type::code8 ? scale_block : converted_elements;
    alignas(64) float parameter[converted_elements];
    alignas(64) float state[R::states][converted_elements];
    Span block{};
    for (std::int64_t first = 0; first < span.elements; first += most) {
        const std::int64_t left = span.elements - first;
        const int n = left < most ? static_cast<int>(left) : most;
        const Span stored = span.part(types, R::states, first, n);
        block.elements = n;
        // What is in float32 already is updated where it is.
        float* const weight = types.master                       ? stored.master
                              : types.parameter == Type::float32 ? static_cast<float*>(stored.parameter)
                                                                 : parameter;
        block.parameter = weight;
        if (weight == parameter) widen(types.parameter, stored.parameter, n, parameter);
        block.gradient = stored.gradient;
        for (int k = 0; k < R::states; ++k) {
            block.state[k] = types.state == Type::float32 ? stored.state[k] : state[k];
            if (types.state == Type::code8)
                dequantize(is_signed_state(rule, k), stored.state[k], *stored.scales[k], n, state[k]);
            else if (block.state[k] == state[k])
                widen(types.state, stored.state[k], n, state[k]);
        }

        update_block(block, inputs);

        auto narrow_as_asked = [&](Type type, std::uint32_t array, const float* from, void* to) {
            if (types.stochastic && type == Type::bfloat16)
                narrow_stochastically(inputs.rounding, array, inputs.first + first, from, n, to);
            else
                narrow(type, from, n, to);
        };
        if (types.master)
            narrow(types.parameter, weight, n, stored.parameter);
        else if (weight == parameter)
            narrow_as_asked(types.parameter, 0, parameter, stored.parameter);
        for (int k = 0; k < R::states; ++k)
            if (types.state == Type::code8)
                quantize(is_signed_state(rule, k), state[k], n, stored.state[k], stored.scales[k]);
            else if (block.state[k] == state[k])
                narrow_as_asked(types.state, k + 1, state[k], stored.state[k]);
    }
}

template <class P, class G, class S>
constexpr Kernels table = {
    abs_sum<G>,
    abs_sum_and_squares<G>,
    {update<AdamW<false>, P, G, S>, update<AdamW<true>, P, G, S>, update<Adan, P, G, S>, update<Regularize, P, G, S>}};

template <class G>
constexpr Kernels converted_table = {
    abs_sum<G>,
    abs_sum_and_squares<G>,
    {update_converted<AdamW<false>>, update_converted<AdamW<true>>, update_converted<Adan>, nullptr}};

// The kernels that convert nothing in memory, for the parameter type P.
template <class P>
const Kernels* direct(Type parameter, const Types& types) {
    if (types.gradient == parameter) return &table<P, P, P>;
    if constexpr (sizeof(P) == 2) {
        if (types.gradient == Type::float32) return &table<P, float, P>;
    }
    return nullptr;
}

const Kernels* converted(const Types& types) {
    if (types.parameter == Type::float64 || types.state == Type::float64) return nullptr;
    switch (types.gradient) {
        case Type::float32:
            return &converted_table<float>;
        case Type::bfloat16:
            return &converted_table<bfloat16>;
        case Type::float16:
            return &converted_table<float16>;
        default:
            return nullptr;
    }
}

}  // namespace

const Kernels* AGR_KERNELS(const Types& types) {
    const Kernels* kernels = nullptr;
    if (types.state == types.parameter && !types.master && !types.stochastic) {
        if (types.parameter == Type::float32) kernels = direct<float>(Type::float32, types);
        if (types.parameter == Type::bfloat16) kernels = direct<bfloat16>(Type::bfloat16, types);
        if (types.parameter == Type::float16) kernels = direct<float16>(Type::float16, types);
        if (types.parameter == Type::float64) kernels = direct<double>(Type::float64, types);
    }
    return kernels != nullptr ? kernels : converted(types);
}

}  // namespace agr::cpu
