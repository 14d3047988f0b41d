// The state of a block's warps: registers, and where each lane is in the program.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "memory.h"
#include "program.h"

namespace ptx {

// Lanes of a warp that are at the same instruction.
struct Group {
    int at = 0;
    u32 mask = 0;
    enum Waits : u8 { for_nothing, for_warp, for_block } waits = for_nothing;
};

// A register of any width is kept in 64 bits, the upper ones 0; a predicate is 0 or 1.
struct Warp {
    struct Block* block = nullptr;
    int index = 0;
    u32 first_thread = 0;  // of lane 0, among the threads of the launch
    std::unique_ptr<u64[]> registers;
    std::vector<u32> written;  // per register, the lanes that have written it
    std::vector<Group> groups;
    u64 asleep_until = 0;
    bool at_barrier = false;

    Warp(const Program& program, struct Block* block, int index, u32 first_thread)
        : block(block),
          index(index),
          first_thread(first_thread),
          registers(new u64[program.widths.size() * lanes]),
          written(program.widths.size()),
          groups{{0, all_lanes, Group::for_nothing}} {}

    u64* values(int reg) { return registers.get() + std::size_t(reg) * lanes; }
    bool has_written(int reg, int lane) const { return written[std::size_t(reg)] >> lane & 1; }
    void set_written(int reg, u32 mask, u32 known) {
        u32& lanes_written = written[std::size_t(reg)];
        lanes_written = (lanes_written & ~mask) | (known & mask);
    }
    bool runnable() const {
        return std::any_of(groups.begin(), groups.end(), [](const Group& g) { return g.waits == Group::for_nothing; });
    }
};

struct Block {
    int index = 0;
    std::vector<u8> shared;
    std::vector<bool> shared_written;
    Region shared_region;
    std::vector<Warp> warps;
    int live_warps = 0;
};

template <class T>
T value_of(u64 bits) {
    if constexpr (std::is_same_v<T, bool>) {
        return bits & 1;
    } else {
        T value;
        std::memcpy(&value, &bits, sizeof(T));
        return value;
    }
}

template <class T>
u64 bits_of(T value) {
    u64 bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class F>
void for_each_lane(u32 mask, F f) {
    if (mask == all_lanes)
        for (int lane = 0; lane < lanes; ++lane) f(lane);
    else
        for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
}

}  // namespace ptx
