// What the elements of a kernel's tensors are stored as, and the list of all kernels.
#pragma once

#include <type_traits>

#include "../step.h"

namespace agr::cuda {

// An element of state that has a meaning together with the scale of its block (see quantization.h).
struct code8 {
    std::uint8_t bits;
};

template <class Stored>
constexpr Type type_of = std::is_same_v<Stored, float>      ? Type::float32
                         : std::is_same_v<Stored, bfloat16> ? Type::bfloat16
                         : std::is_same_v<Stored, float16>  ? Type::float16
                         : std::is_same_v<Stored, double>   ? Type::float64
                                                            : Type::code8;

// The types of parameter, gradient and state, and the two flags of Types.
template <class P_, class G_, class S_, bool master_ = false, bool stochastic_ = false>
struct Format {
    using P = P_;
    using G = G_;
    using S = S_;
    using T = computed_in<P>;
    // What an update reads and changes: the master where there is one, otherwise the parameter.
    using W = std::conditional_t<master_, float, P>;
    static constexpr bool master = master_, stochastic = stochastic_;
    static constexpr bool coded = std::is_same_v<S, code8>;
    static constexpr Types types{type_of<P>, type_of<G>, type_of<S>, master, stochastic};
};

template <class... Formats>
struct FormatList {};

// The kernels of each optimizer, by the unit in which they are compiled: setup.py reads the units' names here. The
// product of all types would take several times as long to compile, so that these are the combinations with a use.
// State of another type than a 16-bit parameter's goes with stochastic rounding or a master, since without either,
// small updates are lost. What is not here, the Triton backend does.
namespace units {
using float32 = FormatList<Format<float, float, float>, Format<float, bfloat16, float>>;
using float32_small_state = FormatList<Format<float, float, bfloat16>, Format<float, float, code8>>;
using bfloat16 = FormatList<Format<agr::bfloat16, agr::bfloat16, agr::bfloat16>,
                            Format<agr::bfloat16, float, agr::bfloat16>, Format<agr::bfloat16, agr::bfloat16, float>>;
using bfloat16_stochastic = FormatList<Format<agr::bfloat16, agr::bfloat16, agr::bfloat16, false, true>,
                                       Format<agr::bfloat16, float, agr::bfloat16, false, true>,
                                       Format<agr::bfloat16, agr::bfloat16, float, false, true>,
                                       Format<agr::bfloat16, agr::bfloat16, code8, false, true>>;
using bfloat16_master =
    FormatList<Format<agr::bfloat16, agr::bfloat16, float, true>, Format<agr::bfloat16, float, float, true>,
               Format<agr::bfloat16, agr::bfloat16, code8, true>>;
using float16 = FormatList<Format<agr::float16, agr::float16, agr::float16>>;
using float16_master =
    FormatList<Format<agr::float16, agr::float16, float, true>, Format<agr::float16, float, float, true>>;
using float64 = FormatList<Format<double, double, double>>;

// Those that regularize a gradient in place, which has the types of all three.
using gradients = FormatList<Format<float, float, float>, Format<agr::bfloat16, agr::bfloat16, agr::bfloat16>,
                             Format<agr::float16, agr::float16, agr::float16>, Format<double, double, double>>;
}  // namespace units

template <class... Units>
struct UnitList {};
using OptimizerUnits = UnitList<units::float32, units::float32_small_state, units::bfloat16, units::bfloat16_stochastic,
                                units::bfloat16_master, units::float16, units::float16_master, units::float64>;
using GradientUnits = UnitList<units::gradients>;

template <class... Formats>
constexpr bool has_format(const Types& types, FormatList<Formats...>) {
    return ((types == Formats::types) || ...);
}
template <class... Units>
constexpr bool has_format(const Types& types, UnitList<Units...>) {
    return (has_format(types, Units{}) || ...);
}

}  // namespace agr::cuda
