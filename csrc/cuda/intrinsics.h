// The device operations that the kernels use: thread indices, barriers, shuffles, atomics with their memory order, and
// wide loads and stores with cache hints.
//
// There are two implementations with the same interface: this one, in CUDA and PTX, and host_block.h, on host threads
// and atomics. Tests use the latter to run the kernels' own source under sanitizers. It is not part of an installation.
#pragma once

#include <cstdint>

#include "../numeric.h"
#include "../rounding.h"
#include "arguments.h"

#if defined(__CUDACC__)

#define AGR_DEVICE __device__ __forceinline__

namespace agr::cuda {

constexpr int warp_threads = 32;

AGR_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
AGR_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
AGR_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

AGR_DEVICE void block_barrier() { __syncthreads(); }
AGR_DEVICE void warp_barrier() { __syncwarp(); }

// The value of the lane `distance` above this one. The last `distance` lanes get a value without meaning.
AGR_DEVICE double shuffle_down(double value, int distance) { return __shfl_down_sync(0xffffffffu, value, distance); }
AGR_DEVICE std::uint32_t largest_of_warp(std::uint32_t mine) { return __reduce_max_sync(0xffffffffu, mine); }
AGR_DEVICE bool any_of_warp(bool mine) { return __any_sync(0xffffffffu, mine); }

// Counts to `last` and then back to 0, so that no counter has to be cleared: adds 1, or sets the counter to 0 if it has
// reached `last`. Returns the previous value. Relaxed order is enough where a number carries no data.
//
// Two choices keep the thread from waiting for the result before the work that should overlap with it:
//
// - Counters have 32 bits. ptxas splits a 64-bit result into its halves immediately, which waits for it.
// - The operation is an increment with a limit instead of an addition. ptxas combines the additions of the lanes of a
//   warp into one, even where only one lane adds, and waits for its result to distribute it.
AGR_DEVICE std::uint32_t count_relaxed(std::uint32_t* counter, std::uint32_t last) {
    std::uint32_t before;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last));
    return before;
}
// The same. The release half publishes what this thread wrote and what earlier barriers made visible to it. The acquire
// half makes everything published before visible to the thread that counts to `last`.
AGR_DEVICE std::uint32_t count_acq_rel(std::uint32_t* counter, std::uint32_t last) {
    std::uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
    return before;
}
AGR_DEVICE void fence_acq_rel() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

AGR_DEVICE std::uint32_t load_relaxed(const std::uint32_t* from) {
    std::uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}
AGR_DEVICE void store_relaxed(std::uint32_t* to, std::uint32_t value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value));
}
// A load that is issued here, in program order with the loads of elements, whenever its value is used.
AGR_DEVICE float load_first(const float* from) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
}
// One or two words of 8 bytes. Two, aligned to 16 bytes, are two accesses, in no order.
AGR_DEVICE std::uint64_t load_relaxed(const std::uint64_t* from) {
    std::uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from));
    return value;
}
AGR_DEVICE void load_relaxed(const std::uint64_t* from, std::uint64_t& first, std::uint64_t& second) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(from));
}
AGR_DEVICE void store_relaxed(std::uint64_t* to, std::uint64_t first, std::uint64_t second) {
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(first), "l"(second));
}

// Loads a value whose place among the kernel's parameters is computed, from constant memory. Written as an access to
// global memory or to parameters, whichever it is, the compiler would use generic loads, which take ten times as long.
template <class Value>
AGR_DEVICE Value load_parameter(const void* place) {
    const std::size_t address = __cvta_generic_to_grid_constant(place);
    Value value;
    if constexpr (sizeof(Value) % 8 == 0) {
        std::uint64_t words[sizeof(Value) / 8];
#pragma unroll
        for (std::size_t i = 0; i < sizeof(Value) / 8; ++i)
            asm("ld.param.u64 %0, [%1];" : "=l"(words[i]) : "l"(address + 8 * i));
        memcpy(&value, words, sizeof(Value));
    } else {
        static_assert(sizeof(Value) == 4, "a value has one word of 4 bytes, or some of 8");
        std::uint32_t word;
        asm("ld.param.u32 %0, [%1];" : "=r"(word) : "l"(address));
        memcpy(&value, &word, sizeof(Value));
    }
    return value;
}

// The same key, of which the compiler does not know that it is the same in every iteration of a loop: it would keep the
// keys of all ten rounds in registers.
AGR_DEVICE RoundingKey not_known(const RoundingKey& key) {
    auto low = static_cast<std::uint32_t>(key.seed), high = static_cast<std::uint32_t>(key.seed >> 32);
    asm volatile("" : "+r"(low), "+r"(high));
    return {low | static_cast<std::uint64_t>(high) << 32, key.step, key.index};
}

// Waits a moment between two reads of a word. The wait is short, since the awaited work is already in progress.
AGR_DEVICE void pause() { __nanosleep(40); }

// The eviction priority in the second-level cache of a line that is read or written: evict_first for data that is not
// used again, evict_last for data that is read again soon.
enum class Eviction { evict_first, normal, evict_last };

template <Eviction eviction>
AGR_DEVICE std::uint64_t cache_policy() {
    std::uint64_t policy;
    if constexpr (eviction == Eviction::evict_first)
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    else
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Loads and stores of 4, 8 or 16 bytes, aligned to their size. They are volatile so that the loads of a batch are
// issued in program order, before any instruction that waits.
template <Eviction eviction>
AGR_DEVICE void load_words(const void* from, std::uint32_t (&w)[4]) {
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(from), "l"(cache_policy<eviction>()));
}
template <Eviction eviction>
AGR_DEVICE void load_words(const void* from, std::uint32_t (&w)[2]) {
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                 : "=r"(w[0]), "=r"(w[1])
                 : "l"(from), "l"(cache_policy<eviction>()));
}
template <Eviction eviction>
AGR_DEVICE void load_words(const void* from, std::uint32_t (&w)[1]) {
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;"
                 : "=r"(w[0])
                 : "l"(from), "l"(cache_policy<eviction>()));
}
template <Eviction eviction>
AGR_DEVICE void store_words(void* to, const std::uint32_t (&w)[4]) {
    if constexpr (eviction == Eviction::normal)
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                     : "memory");
    else
        asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(w[0]), "r"(w[1]),
                     "r"(w[2]), "r"(w[3]), "l"(cache_policy<eviction>())
                     : "memory");
}
template <Eviction eviction>
AGR_DEVICE void store_words(void* to, const std::uint32_t (&w)[2]) {
    static_assert(eviction != Eviction::normal, "stores of 8 bytes have a policy");
    asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;" ::"l"(to), "r"(w[0]), "r"(w[1]),
                 "l"(cache_policy<eviction>())
                 : "memory");
}

template <Eviction eviction>
AGR_DEVICE void store_words(void* to, const std::uint32_t (&w)[1]) {
    static_assert(eviction != Eviction::normal, "stores of 4 bytes have a policy");
    asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(to), "r"(w[0]), "l"(cache_policy<eviction>())
                 : "memory");
}

// Prefetches a line of memory into the second-level cache.
constexpr int line_bytes = 128;
AGR_DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Prefetches a range of memory by one instruction of one thread, on GPUs that have one. The address and the number of
// bytes are multiples of 16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool prefetches_ranges = true;
AGR_DEVICE void prefetch_range(const void* from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}
#else
constexpr bool prefetches_ranges = false;
AGR_DEVICE void prefetch_range(const void*, int) {}
#endif

// A barrier for ptxas's instruction scheduler: all loads above it are issued before anything below uses one of them.
// Without it, ptxas delays some loads of a batch until it has computed with the first ones, to save registers. ptxas
// moves nothing across a warp barrier, which takes a few cycles and does not wait for loads. All lanes of a warp must
// call it.
AGR_DEVICE void scheduling_barrier() { __syncwarp(); }

// Rounds two values to 16-bit elements and packs them into a word, `low` in its low half.
AGR_DEVICE std::uint32_t rounded_pair(bfloat16, float low, float high) {
    std::uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
AGR_DEVICE std::uint32_t rounded_pair(float16, float low, float high) {
    std::uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
AGR_DEVICE float widened(bfloat16 x) { return widened_bfloat16<float>(static_cast<std::uint32_t>(x.bits)); }
AGR_DEVICE float widened(float16 x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

}  // namespace agr::cuda

#else

#include "host_block.h"

#endif
