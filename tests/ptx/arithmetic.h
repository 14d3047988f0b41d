// What instructions compute from registers, by their full names, after the PTX ISA's descriptions.
#pragma once

#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>

#include "warp.h"

namespace ptx {

using Table = std::map<std::string, Compute>;

// `operation(f)` computes f for every lane: the types of f's parameters and result say what the registers hold. The
// result counts as written if all operands are.
template <class F, class R, class... A, std::size_t... n>
void compute_lanes(const F& f, R (F::*)(A...) const, std::index_sequence<n...>, Warp& warp, const Instruction& i,
                   u32 mask) {
    u64* const to = warp.values(i.results[0]);
    const u64* const from[] = {warp.values(i.operands[n])...};
    for_each_lane(mask, [&](int lane) { to[lane] = bits_of<R>(f(value_of<A>(from[n][lane])...)); });
    const u32 all = (warp.written[std::size_t(i.operands[n])] & ...);
    const u32 any = (warp.written[std::size_t(i.operands[n])] | ...);
    warp.set_written(i.results[0], mask, i.gathers ? any : all);
}
template <class R, class F, class... A>
constexpr std::size_t arity(R (F::*)(A...) const) {
    return sizeof...(A);
}
template <class F>
Compute operation(F f) {
    static const F function = f;
    return [](Warp& warp, const Instruction& i, u32 mask) {
        constexpr auto call = &F::operator();
        compute_lanes(function, call, std::make_index_sequence<arity(call)>(), warp, i, mask);
    };
}

// `or` and `and` of predicates. The result is known where one operand decides it, whatever the other is: `decisive` is
// the value that does.
template <bool decisive>
void logic(Warp& warp, const Instruction& i, u32 mask) {
    const int a = i.operands[0], b = i.operands[1];
    u32 known = 0;
    u64* to = warp.values(i.results[0]);
    for_each_lane(mask, [&](int lane) {
        const bool x = warp.values(a)[lane], y = warp.values(b)[lane];
        const bool knows_x = warp.has_written(a, lane), knows_y = warp.has_written(b, lane);
        to[lane] = decisive ? x || y : x && y;
        known |= u32((knows_x && knows_y) || (knows_x && x == decisive) || (knows_y && y == decisive)) << lane;
    });
    warp.set_written(i.results[0], mask, known);
}

// mov.b64 {low, high}, word: a part that is not wanted is _.
inline void unpack(Warp& warp, const Instruction& i, u32 mask) {
    const int bits = i.type.bits / 2;
    for (int part = 0; part < 2; ++part) {
        const int to = i.results[part];
        if (to < 0) continue;
        for_each_lane(mask, [&](int lane) {
            warp.values(to)[lane] = warp.values(i.operands[0])[lane] >> (bits * part) & ((u64(1) << bits) - 1);
        });
        warp.set_written(to, mask, warp.written[std::size_t(i.operands[0])]);
    }
}

// Conversions of 16-bit floating point, by definition.

inline float from_half(u16 h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                       : exponent != 0 ? std::ldexp(1 + fraction / 1024.0f, exponent - 15)
                                       : std::ldexp(fraction / 1024.0f, -14);
    return std::copysign(size, h >> 15 != 0 ? -1.0f : 1.0f);
}

inline float from_bfloat(u16 h) { return value_of<float>(u64(h) << 16); }

// To nearest, ties to even, of a type with `digits` binary digits after the first, whose smallest normal number is
// 2^least. Every NaN becomes 0x7fff (PTX ISA, cvt).
inline u16 narrowed(float x, int digits, int least) {
    if (x != x) return 0x7fff;
    const u16 sign = std::signbit(x) ? 0x8000 : 0, infinity = u16(0x7fff >> digits << digits);
    const double size = std::fabs(double(x));
    if (std::isinf(size)) return sign | infinity;
    const int exponent = size == 0 ? least : std::max(std::ilogb(size), least);
    // In units of the last place. Bits of neighboring numbers are neighboring integers, and so a carry does right.
    const double units = std::nearbyint(std::ldexp(size, digits - exponent));
    return u16(sign | std::min(int(infinity), ((exponent - least) << digits) + int(units)));
}
inline u16 to_half(float x) { return narrowed(x, 10, -14); }
inline u16 to_bfloat(float x) { return narrowed(x, 7, -126); }

// The result of an approximation: rounded correctly, or, to show that nobody relies on that, off by up to
// `approximation_error` units in the last place and at most by what PTX allows, in a way that depends on the operands.
inline int approximation_error = 0;
inline float approximated(double exact, float a, float b, int allowed) {
    const float x = float(exact);
    const int most = std::min(approximation_error, allowed);
    if (most == 0 || x == 0 || !std::isfinite(x)) return x;
    const u64 mixed = (bits_of(a) * 0x9e3779b97f4a7c15 ^ bits_of(b) * 0xc2b2ae3d27d4eb4f) * 0xff51afd7ed558ccd >> 40;
    const float moved = value_of<float>(bits_of(x) + mixed % u64(2 * most + 1) - u64(most));
    return std::isfinite(moved) && std::signbit(moved) == std::signbit(x) ? moved : x;
}

// The smaller number, or the larger one where `larger`. A NaN gives the other operand, and -0 is less than 0.
template <class T>
T extreme(T a, T b, bool larger) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) != larger ? a : b;
    return (a < b) != larger ? a : b;
}

// prmt: four bytes out of the eight of b and a. With its top bit set, a selector spreads its byte's sign.
inline u32 permuted(u32 a, u32 b, u32 selectors) {
    const u64 both = u64(b) << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
        const u32 selector = selectors >> (4 * k);
        u32 byte = u8(both >> (8 * (selector & 7)));
        if (selector & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * k);
    }
    return result;
}

template <class T>
void add_integers(Table& t, const std::string& type) {
    using U = std::make_unsigned_t<T>;
    constexpr u32 bits = sizeof(T) * 8;
    t["mov." + type] = operation([](T a) { return a; });
    t["selp." + type] = operation([](T a, T b, bool p) { return p ? a : b; });
    t["add." + type] = operation([](T a, T b) { return T(U(a) + U(b)); });
    t["sub." + type] = operation([](T a, T b) { return T(U(a) - U(b)); });
    t["mul.lo." + type] = operation([](T a, T b) { return T(u64(a) * u64(b)); });
    t["mad.lo." + type] = operation([](T a, T b, T c) { return T(u64(a) * u64(b) + u64(c)); });
    t["neg." + type] = operation([](T a) { return T(U(0) - U(a)); });
    t["min." + type] = operation([](T a, T b) { return std::min(a, b); });
    t["max." + type] = operation([](T a, T b) { return std::max(a, b); });
    t["not." + type] = operation([](T a) { return T(~a); });
    t["and." + type] = operation([](T a, T b) { return T(a & b); });
    t["or." + type] = operation([](T a, T b) { return T(a | b); });
    t["xor." + type] = operation([](T a, T b) { return T(a ^ b); });
    // Shifts by more than all bits are shifts by all of them.
    t["shl." + type] = operation([](T a, u32 n) { return T(n >= bits ? 0 : U(a) << n); });
    t["shr." + type] = operation([](T a, u32 n) { return T(n >= bits ? (a < 0 ? -1 : 0) : a >> n); });
    t["setp.eq." + type] = operation([](T a, T b) { return a == b; });
    t["setp.ne." + type] = operation([](T a, T b) { return a != b; });
    t["setp.lt." + type] = operation([](T a, T b) { return a < b; });
    t["setp.le." + type] = operation([](T a, T b) { return a <= b; });
    t["setp.gt." + type] = operation([](T a, T b) { return a > b; });
    t["setp.ge." + type] = operation([](T a, T b) { return a >= b; });
}

template <class T>
void add_floats(Table& t, const std::string& type) {
    t["mov." + type] = operation([](T a) { return a; });
    t["selp." + type] = operation([](T a, T b, bool p) { return p ? a : b; });
    t["add." + type] = t["add.rn." + type] = operation([](T a, T b) { return a + b; });
    t["sub." + type] = t["sub.rn." + type] = operation([](T a, T b) { return a - b; });
    t["mul." + type] = t["mul.rn." + type] = operation([](T a, T b) { return a * b; });
    t["fma.rn." + type] = operation([](T a, T b, T c) { return std::fma(a, b, c); });
    t["div.rn." + type] = operation([](T a, T b) { return a / b; });
    t["rcp.rn." + type] = operation([](T a) { return 1 / a; });
    t["sqrt.rn." + type] = operation([](T a) { return std::sqrt(a); });
    t["abs." + type] = operation([](T a) { return std::fabs(a); });
    t["neg." + type] = operation([](T a) { return -a; });
    t["min." + type] = operation([](T a, T b) { return extreme(a, b, false); });
    t["max." + type] = operation([](T a, T b) { return extreme(a, b, true); });
    // Ordered comparisons are false where an operand is NaN, those with a u are true.
    t["setp.eq." + type] = operation([](T a, T b) { return a == b; });
    t["setp.ne." + type] = operation([](T a, T b) { return a < b || a > b; });
    t["setp.lt." + type] = operation([](T a, T b) { return a < b; });
    t["setp.le." + type] = operation([](T a, T b) { return a <= b; });
    t["setp.gt." + type] = operation([](T a, T b) { return a > b; });
    t["setp.ge." + type] = operation([](T a, T b) { return a >= b; });
    t["setp.equ." + type] = operation([](T a, T b) { return !(a < b || a > b); });
    t["setp.neu." + type] = operation([](T a, T b) { return a != b; });
    t["setp.ltu." + type] = operation([](T a, T b) { return !(a >= b); });
    t["setp.leu." + type] = operation([](T a, T b) { return !(a > b); });
    t["setp.gtu." + type] = operation([](T a, T b) { return !(a <= b); });
    t["setp.geu." + type] = operation([](T a, T b) { return !(a < b); });
    t["setp.num." + type] = operation([](T a, T b) { return a == a && b == b; });
    t["setp.nan." + type] = operation([](T a, T b) { return a != a || b != b; });
}

inline Table arithmetic_table() {
    Table t;
    add_integers<u16>(t, "b16");
    add_integers<u16>(t, "u16");
    add_integers<i16>(t, "s16");
    add_integers<u32>(t, "b32");
    add_integers<u32>(t, "u32");
    add_integers<i32>(t, "s32");
    add_integers<u64>(t, "b64");
    add_integers<u64>(t, "u64");
    add_integers<i64>(t, "s64");
    add_floats<float>(t, "f32");
    add_floats<double>(t, "f64");

    t["mul.wide.u32"] = operation([](u32 a, u32 b) { return u64(a) * b; });
    t["mul.wide.u16"] = operation([](u16 a, u16 b) { return u32(a) * b; });
    t["mul.wide.s16"] = operation([](i16 a, i16 b) { return i32(a) * b; });
    t["mul.hi.u32"] = operation([](u32 a, u32 b) { return u32(u64(a) * b >> 32); });
    t["mad.wide.u32"] = operation([](u32 a, u32 b, u64 c) { return u64(a) * b + c; });
    t["mul.wide.s32"] = operation([](i32 a, i32 b) { return i64(a) * b; });
    t["prmt.b32"] = operation([](u32 a, u32 b, u32 selectors) { return permuted(a, b, selectors); });
    t["bfe.u32"] = operation([](u32 a, u32 from, u32 count) {
        from &= 255, count &= 255;
        return from >= 32 ? 0 : u32(u64(a) >> from & ((u64(1) << std::min(count, 32u)) - 1));
    });
    t["bfi.b64"] = operation([](u64 field, u64 into, u32 from, u32 count) {
        from &= 255, count &= 255;
        if (from >= 64) return into;
        const u64 ones = (count >= 64 ? ~u64(0) : (u64(1) << count) - 1) << from;
        return (into & ~ones) | (field << from & ones);
    });
    t["bfi.b32"] = operation([](u32 field, u32 into, u32 from, u32 count) {
        from &= 255, count &= 255;
        if (from >= 32) return into;
        const u32 ones = (count >= 32 ? ~u32(0) : (u32(1) << count) - 1) << from;
        return (into & ~ones) | (field << from & ones);
    });

    t["mov.pred"] = operation([](bool a) { return a; });
    t["not.pred"] = operation([](bool a) { return !a; });
    t["xor.pred"] = operation([](bool a, bool b) { return a != b; });
    t["or.pred"] = logic<true>;
    t["and.pred"] = logic<false>;

    // Of the PTX ISA's bounds: div.full 2 units in the last place, rcp.approx 1, sqrt.approx 2^-23, 1 unit or less.
    t["div.full.f32"] = operation([](float a, float b) { return approximated(double(a) / double(b), a, b, 2); });
    t["sqrt.approx.f32"] = operation([](float a) { return approximated(std::sqrt(double(a)), a, 1, 1); });
    t["rcp.approx.f32"] = operation([](float a) { return approximated(1 / double(a), a, 2, 1); });

    t["cvt.u16.u32"] = operation([](u32 x) { return u16(x); });
    t["cvt.u16.u64"] = operation([](u64 x) { return u16(x); });
    t["cvt.u32.u16"] = operation([](u16 x) { return u32(x); });
    t["cvt.u32.u64"] = operation([](u64 x) { return u32(x); });
    t["cvt.u64.u16"] = operation([](u16 x) { return u64(x); });
    t["cvt.u64.u32"] = operation([](u32 x) { return u64(x); });
    t["cvt.s16.s8"] = operation([](i16 x) { return i16(std::int8_t(x)); });
    t["cvt.s32.s16"] = operation([](i16 x) { return i32(x); });
    t["cvt.s64.s32"] = operation([](i32 x) { return i64(x); });
    t["cvt.f64.f32"] = operation([](float x) { return double(x); });
    t["cvt.rn.f32.f64"] = operation([](double x) { return float(x); });
    t["cvt.rn.f32.s32"] = operation([](i32 x) { return float(x); });
    t["cvt.rn.f32.u32"] = operation([](u32 x) { return float(x); });
    t["cvt.rn.f64.s32"] = operation([](i32 x) { return double(x); });
    t["cvt.rn.f64.u32"] = operation([](u32 x) { return double(x); });
    t["cvt.rn.f64.s64"] = operation([](i64 x) { return double(x); });
    t["cvt.rn.f64.u64"] = operation([](u64 x) { return double(x); });
    // What is out of range becomes the nearest number in it, and NaN becomes 0.
    t["cvt.rzi.u64.f64"] = operation([](double x) { return !(x > 0) ? 0 : x >= 0x1p64 ? ~u64(0) : u64(x); });
    t["cvt.rzi.u32.f64"] = operation([](double x) { return !(x > 0) ? 0 : x >= 0x1p32 ? ~u32(0) : u32(x); });
    t["cvt.rzi.u32.f32"] = operation([](float x) { return !(x > 0) ? 0 : x >= 0x1p32f ? ~u32(0) : u32(x); });
    t["cvt.f32.f16"] = operation([](u16 h) { return from_half(h); });
    t["cvt.f32.bf16"] = operation([](u16 h) { return from_bfloat(h); });
    t["cvt.rn.f16.f32"] = operation([](float x) { return to_half(x); });
    t["cvt.rn.bf16.f32"] = operation([](float x) { return to_bfloat(x); });
    t["cvt.rn.f16x2.f32"] = operation([](float high, float low) { return u32(to_half(high)) << 16 | to_half(low); });
    t["cvt.rn.bf16x2.f32"] =
        operation([](float high, float low) { return u32(to_bfloat(high)) << 16 | to_bfloat(low); });

    // Two halves put together: mov.b32 word, {low, high}.
    t["pack.b32"] = operation([](u16 low, u16 high) { return u32(high) << 16 | low; });
    t["pack.b64"] = operation([](u32 low, u32 high) { return u64(high) << 32 | low; });

    // Addresses in global memory are generic ones, and cache policies are numbers of our own.
    t["cvta.to.global.u64"] = operation([](u64 a) { return a; });
    t["cvta.global.u64"] = operation([](u64 a) { return a; });
    t["cvta.param.u64"] = operation([](u64 a) { return a + parameter_window; });
    t["cvta.to.param.u64"] = operation([](u64 a) { return a - parameter_window; });
    t["createpolicy.fractional.L2::evict_first.b64"] = operation([](u64) { return u64(Policy::evict_first); });
    t["createpolicy.fractional.L2::evict_last.b64"] = operation([](u64) { return u64(Policy::evict_last); });
    return t;
}

// What puts a word together from parts, some of which may be padding that nobody has written.
inline bool gathers(const std::string& name) {
    return name.rfind("or.b", 0) == 0 || name.rfind("bfi.", 0) == 0 || name.rfind("prmt.", 0) == 0 ||
           name.rfind("pack.", 0) == 0;
}

}  // namespace ptx
