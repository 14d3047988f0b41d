// The device operations that the kernels use: thread indices, barriers, shuffles, atomics with their memory order, and
// wide loads and stores with cache hints.
//
// There are two implementations with the same interface: this one, in CUDA and PTX, and host_block.h, on host threads
// and atomics. Tests use the latter to run the kernels' own source under sanitizers. It is not part of an installation.
#pragma once

#include <cstdint>

#include "../numeric.h"
#include "arguments.h"

#if defined(__CUDACC__)

#define AGR_DEVICE __device__ __forceinline__

namespace agr::cuda {

constexpr int warp_threads = 32;

AGR_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
AGR_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

AGR_DEVICE void block_barrier() { __syncthreads(); }
AGR_DEVICE void warp_barrier() { __syncwarp(); }

// The value of the lane `distance` above this one. The last `distance` lanes get a value without meaning.
AGR_DEVICE double shuffle_down(double value, int distance) { return __shfl_down_sync(0xffffffffu, value, distance); }
AGR_DEVICE bool any_of_warp(bool mine) { return __any_sync(0xffffffffu, mine); }

// Draws a ticket: increments the counter and returns its previous value. Relaxed order is enough, since a ticket
// carries no data. Two choices keep the thread from waiting for the result before the work that should overlap with it:
//
// - Tickets have 32 bits. ptxas splits a 64-bit result into its halves immediately, which waits for it.
// - The operation is atomicInc, with a limit that no ticket reaches, instead of atomicAdd. ptxas combines the additions
//   of the lanes of a warp into one, even where only one lane adds, and waits for its result to distribute it.
AGR_DEVICE std::uint32_t draw_ticket(std::uint32_t* counter) { return atomicInc(counter, 0xfffffffeu); }

// Counts an arrival and returns the previous count. The release half publishes what this thread wrote and what earlier
// barriers made visible to it. The acquire half makes everything published before visible to the thread that arrives
// last.
AGR_DEVICE std::uint32_t arrive(std::uint32_t* counter) {
    std::uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
AGR_DEVICE void store_release(std::uint32_t* flag, std::uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
AGR_DEVICE std::uint32_t load_acquire(const std::uint32_t* flag) {
    std::uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
AGR_DEVICE std::uint32_t load_relaxed(const std::uint32_t* flag) {
    std::uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag));
    return value;
}

// Waits a moment between two reads of a flag. The wait is short, since the awaited work is already in progress.
AGR_DEVICE void pause() { __nanosleep(40); }

// The eviction priority in the second-level cache of a line that is read or written: evict_first for data that is not
// used again, evict_last for data that is read again soon.
enum class Eviction { evict_first, evict_last };

template <Eviction eviction>
AGR_DEVICE std::uint64_t cache_policy() {
    std::uint64_t policy;
    if constexpr (eviction == Eviction::evict_first)
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    else
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Loads and stores of 8 or 16 bytes, aligned to their size. They are volatile so that the loads of a batch are issued
// in program order, before any instruction that waits.
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
AGR_DEVICE void store_words(void* to, const std::uint32_t (&w)[4]) {
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3]), "l"(cache_policy<Eviction::evict_first>())
                 : "memory");
}
AGR_DEVICE void store_words(void* to, const std::uint32_t (&w)[2]) {
    asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;" ::"l"(to), "r"(w[0]), "r"(w[1]),
                 "l"(cache_policy<Eviction::evict_first>())
                 : "memory");
}

// Prefetches a line of memory into the second-level cache.
AGR_DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

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
