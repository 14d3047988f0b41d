// Every operation of the kernels that C++ has no word for: who a thread is, barriers, shuffles, atomics with their
// memory order, and wide loads and stores with their place in the cache.
//
// It stands here twice: for the device in CUDA and PTX, and for the host on std::thread and std::atomic. The second is
// what tests run the very source of the kernels with, under sanitizers; nothing of it is part of an installation.
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

// The value of the lane `distance` further on, for sums of a warp; meaningless for the last lanes.
AGR_DEVICE double shuffle_down(double value, int distance) { return __shfl_down_sync(0xffffffffu, value, distance); }
AGR_DEVICE bool any_of_warp(bool mine) { return __any_sync(0xffffffffu, mine); }

// Relaxed: a ticket carries no data. Of 32 bits, since ptxas splits a result of 64 into its halves at once, and so
// waits for it before all that was to go on meanwhile.
//
// An increment up to a limit that no ticket passes, since ptxas makes the additions of a warp's lanes one, even where
// one lane alone adds, and waits for the result to share it out.
AGR_DEVICE std::uint32_t draw(std::uint32_t* counter) { return atomicInc(counter, 0xfffffffeu); }

// Release, for what this thread wrote and what the barriers before this made visible to it; acquire, for whoever finds
// itself to be the last.
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

// Between two looks at a flag. Short, since what is waited for is in progress already.
AGR_DEVICE void pause() { __nanosleep(40); }

// How long a line that is read or written should stay in the second-level cache.
enum class Stay { briefly, long_enough };

template <Stay stay>
AGR_DEVICE std::uint64_t cache_policy() {
    std::uint64_t policy;
    if constexpr (stay == Stay::briefly)
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    else
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 8 or 16 bytes, aligned to their size. Volatile, so that the loads of a batch go out in their order, before whatever
// waits.
template <Stay stay>
AGR_DEVICE void load_words(const void* from, std::uint32_t (&w)[4]) {
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(from), "l"(cache_policy<stay>()));
}
template <Stay stay>
AGR_DEVICE void load_words(const void* from, std::uint32_t (&w)[2]) {
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                 : "=r"(w[0]), "=r"(w[1])
                 : "l"(from), "l"(cache_policy<stay>()));
}
AGR_DEVICE void store_words(void* to, const std::uint32_t (&w)[4]) {
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3]), "l"(cache_policy<Stay::briefly>())
                 : "memory");
}
AGR_DEVICE void store_words(void* to, const std::uint32_t (&w)[2]) {
    asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;" ::"l"(to), "r"(w[0]), "r"(w[1]),
                 "l"(cache_policy<Stay::briefly>())
                 : "memory");
}

// Asks for a line of memory to come into the second-level cache.
AGR_DEVICE void fetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Of a whole warp: all loads above are under way before anything below uses one of them. Without it, ptxas puts some of
// a batch's loads off until it has computed with the first, to save registers. It moves nothing past a warp's barrier,
// which takes a few cycles and waits for no load.
AGR_DEVICE void loads_first() { __syncwarp(); }

// Two 16-bit elements in a word, the first in its low half.
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
