// A kernel's PTX after decoding: instructions whose operands are numbers of registers.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

constexpr int lanes = 32;
constexpr u32 all_lanes = 0xffffffff;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

struct Instruction;
struct Warp;

// Computes the results of an instruction for the lanes of a mask.
using Compute = void (*)(Warp&, const Instruction&, u32 mask);

enum class Operation : u8 {
    compute,  // from registers to registers
    load,
    store,
    atomic,
    fence,
    prefetch,
    branch,
    exit,
    block_barrier,
    warp_barrier,
    shuffle,
    vote,
    sleep,
};

enum class Space : u8 { generic, global, shared, param };
enum class Order : u8 { weak, relaxed, acquire, release, acq_rel };
inline bool acquires(Order order) { return order == Order::acquire || order == Order::acq_rel; }
inline bool releases(Order order) { return order == Order::release || order == Order::acq_rel; }

enum class Atomic : u8 { none, add, inc };
enum class Shuffle : u8 { none, up, down, bfly, idx };
enum class Vote : u8 { none, any, all, max };

struct Type {
    char kind = 0;  // b, u, s or f as in .b32, and p for .pred
    int bits = 0;
};

struct Instruction {
    Operation operation = Operation::compute;
    Type type;
    // Registers. A store has its values in `results`, as a load has, and both have the address in operands[0].
    int results[4] = {-1, -1, -1, -1};
    int operands[4] = {-1, -1, -1, -1};
    int guard = -1;  // the predicate after @, or -1
    bool guard_inverted = false;

    Compute compute = nullptr;
    // Whether the result counts as written if any operand is: of instructions that put a word together from parts.
    bool gathers = false;

    Space space = Space::generic;
    Order order = Order::weak;
    int vector = 1;     // the elements of a load or store
    i64 offset = 0;     // of the address
    int policy = -1;    // the register with the cache policy, or -1
    int alignment = 1;  // that a prefetch asks for

    Atomic atomic = Atomic::none;
    Shuffle shuffle = Shuffle::none;
    Vote vote = Vote::none;
    int target = -1;          // of a branch
    bool has_label = false;   // whether branches may come here
    std::string text;         // as it was written
    std::string source;       // file and line that it was compiled from
    std::uint64_t count = 0;  // how often a warp has executed it
};

struct Program {
    std::string name;  // demangled
    std::vector<Instruction> code;
    std::vector<int> widths;                            // of registers, in bits
    std::vector<std::pair<int, u64>> constants;         // registers with a fixed value
    std::vector<std::pair<int, std::string>> specials;  // registers that tell a thread its place, such as %tid.x
    int threads = 0, shared_bytes = 0, parameter_bytes = 0;
};

// Where cvta.param puts the parameters among generic addresses.
constexpr u64 parameter_window = 0xff00000000000000;

// The values that createpolicy gives.
enum class Policy : u64 { none, evict_first, evict_last };
constexpr int policies = 3;

}  // namespace ptx
