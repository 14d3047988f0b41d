// The CPU kernels, compiled once for each instruction set. AGR_KERNELS names the function that gives them out.
#include "kernels.h"

#include "vector.h"

namespace agr::cpu {
namespace {

constexpr int double_lanes = AGR_VECTOR_BYTES / 8;

template <class T>
constexpr int lanes_of = AGR_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class Stored>
AGR_INLINE vector<double, double_lanes> load_double(const Stored* from) {
    return __builtin_convertvector(load<double_lanes>(from), vector<double, double_lanes>);
}

// Sums are taken in double precision, which costs nothing where memory is the limit: the abs-sum is then exact enough
// for the small difference S - |g| of a tensor that one element dominates. Always in the same order: lane by lane, then
// the lanes.
template <bool squares, class Stored>
AGR_INLINE Sums sums_of(const Stored* g, std::int64_t n) {
    using V = vector<double, double_lanes>;
    constexpr int ways = 4;  // independent additions in flight
    V magnitudes[ways] = {}, square_sums[ways] = {};
    auto add = [&](int way, V x) {
        magnitudes[way] += magnitude(x);
        if constexpr (squares) square_sums[way] += x * x;
    };
    std::int64_t i = 0;
    for (; i + ways * double_lanes <= n; i += ways * double_lanes)
        for (int way = 0; way < ways; ++way) add(way, load_double(g + i + way * double_lanes));
    for (; i + double_lanes <= n; i += double_lanes) add(0, load_double(g + i));
    if (i < n) {
        Stored rest[double_lanes] = {};
        std::memcpy(rest, g + i, (n - i) * sizeof(Stored));
        add(0, load_double(rest));
    }
    V all_magnitudes = (magnitudes[0] + magnitudes[1]) + (magnitudes[2] + magnitudes[3]);
    V all_squares = (square_sums[0] + square_sums[1]) + (square_sums[2] + square_sums[3]);
    Sums sums;
    for (int lane = 0; lane < double_lanes; ++lane) {
        sums.magnitudes += all_magnitudes[lane];
        sums.squares += all_squares[lane];
    }
    return sums;
}

template <class G>
double magnitudes(const void* gradient, std::int64_t n) {
    return sums_of<false>(static_cast<const G*>(gradient), n).magnitudes;
}

template <class G>
Sums magnitudes_and_squares(const void* gradient, std::int64_t n) {
    return sums_of<true>(static_cast<const G*>(gradient), n);
}

template <class T, class Single, class Twice>
AGR_INLINE auto& in_type(const Single& single, const Twice& twice) {
    if constexpr (sizeof(T) == sizeof(float))
        return single;
    else
        return twice;
}

// One vector of elements: load, regularize, apply the rule, store.
template <class R, bool regularize, class T, class P, class G, class S, class Numbers>
AGR_INLINE void update_vector(P* p, const G* g, S* const* state, const Numbers& numbers, const AbsSum<T>& sum,
                              T scale) {
    constexpr int lanes = lanes_of<T>;
    using V = vector<T, lanes>;
    V parameter = load<lanes>(p);
    V gradient = load<lanes>(g);
    V states[most_states];
    for (int k = 0; k < R::states; ++k) states[k] = load<lanes>(state[k]);
    if constexpr (regularize) gradient = regularized(gradient, sum);
    R::apply(parameter, gradient * scale, states, numbers);
    store(p, parameter);
    for (int k = 0; k < R::states; ++k) store(state[k], states[k]);
}

template <class R, bool regularize, class P, class G, class S>
AGR_INLINE void update_span(const Span& span, const NumbersOf<R>& both, double abs_sum, double scale_in_double) {
    using T = computed_in<P>;
    constexpr int lanes = lanes_of<T>;
    const auto numbers = in_type<T>(both.single, both.twice);
    const auto sum = AbsSum<T>::of(abs_sum, scale_in_double);
    const T scale = static_cast<T>(scale_in_double);
    P* p = static_cast<P*>(span.parameter);
    const G* g = static_cast<const G*>(span.gradient);
    S* state[most_states];
    for (int k = 0; k < R::states; ++k) state[k] = static_cast<S*>(span.state[k]);

    std::int64_t n = span.elements;
    for (; n >= lanes; n -= lanes) {
        update_vector<R, regularize, T>(p, g, state, numbers, sum, scale);
        p += lanes;
        g += lanes;
        for (int k = 0; k < R::states; ++k) state[k] += lanes;
    }
    if (n > 0) {
        // The last elements take the same way through vectors that are filled up with zeros.
        P p_rest[lanes] = {};
        G g_rest[lanes] = {};
        S rest[most_states][lanes] = {};
        S* state_rest[most_states];
        std::memcpy(p_rest, p, n * sizeof(P));
        std::memcpy(g_rest, g, n * sizeof(G));
        for (int k = 0; k < R::states; ++k) {
            std::memcpy(rest[k], state[k], n * sizeof(S));
            state_rest[k] = rest[k];
        }
        update_vector<R, regularize, T>(p_rest, g_rest, state_rest, numbers, sum, scale);
        std::memcpy(p, p_rest, n * sizeof(P));
        for (int k = 0; k < R::states; ++k) std::memcpy(state[k], rest[k], n * sizeof(S));
    }
}

template <class R, class P, class G, class S>
void update(const Span& span, const void* numbers, const double* sum, double scale) {
    const auto& both = *static_cast<const NumbersOf<R>*>(numbers);
    if (sum != nullptr)
        update_span<R, true, P, G, S>(span, both, *sum, scale);
    else
        update_span<R, false, P, G, S>(span, both, 0, scale);
}

template <class P, class G, class S>
constexpr Kernels table = {
    magnitudes<G>,
    magnitudes_and_squares<G>,
    {update<AdamW<false>, P, G, S>, update<AdamW<true>, P, G, S>, update<Adan, P, G, S>, update<Regularize, P, G, S>}};

template <class P>
const Kernels* with_gradient(Type parameter, const Types& types) {
    if (types.state != parameter) return nullptr;
    if (types.gradient == parameter) return &table<P, P, P>;
    if constexpr (sizeof(P) == 2) {
        if (types.gradient == Type::float32) return &table<P, float, P>;
    }
    return nullptr;
}

}  // namespace

const Kernels* AGR_KERNELS(const Types& types) {
    switch (types.parameter) {
        case Type::float32:
            return with_gradient<float>(Type::float32, types);
        case Type::bfloat16:
            return with_gradient<bfloat16>(Type::bfloat16, types);
        case Type::float16:
            return with_gradient<float16>(Type::float16, types);
        case Type::float64:
            return with_gradient<double>(Type::float64, types);
    }
    return nullptr;
}

}  // namespace agr::cpu
