// The host implementation of the operations in intrinsics.h, which alone includes this file: each thread of a block is
// a std::thread.
//
// With `HostBlock::stalls`, threads stall at random around operations that other threads can observe. This gives
// interleavings that would be rare on a machine with few cores.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define AGR_DEVICE inline

#if !defined(AGR_WARP_THREADS)
#define AGR_WARP_THREADS 4
#endif

namespace agr::cuda {

constexpr int warp_threads = AGR_WARP_THREADS;

class HostBarrier {
public:
    explicit HostBarrier(int threads) { pthread_barrier_init(&barrier_, nullptr, static_cast<unsigned>(threads)); }
    ~HostBarrier() { pthread_barrier_destroy(&barrier_); }
    HostBarrier(const HostBarrier&) = delete;
    HostBarrier& operator=(const HostBarrier&) = delete;

    void wait() { pthread_barrier_wait(&barrier_); }

private:
    pthread_barrier_t barrier_;
};

struct HostBlock {
    struct Warp {
        HostBarrier barrier{warp_threads};
        double values[warp_threads];
        bool flags[warp_threads];
        std::uint32_t words[warp_threads];
    };
    HostBarrier barrier{block_threads};
    Warp warps[block_threads / warp_threads];

    static inline std::atomic<bool> stalls{false};  // whether threads stall at random
};

struct HostThread {
    int index = 0, block_index = 0, blocks = 1;
    HostBlock* block = nullptr;
    std::minstd_rand random;
};
inline thread_local HostThread host_thread;

inline void stall() {
    if (!HostBlock::stalls.load(std::memory_order_relaxed)) return;
    const auto chance = host_thread.random() % 16;
    if (chance == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(host_thread.random() % 300));
    else if (chance < 4)
        std::this_thread::yield();
}

// Runs `work` on every thread of `blocks` blocks, and returns when all of them have returned from it. `Shared` is the
// type of a block's shared memory. As on the device, it is not initialized: it is filled with an arbitrary byte.
template <class Shared, class Work>
void run_blocks(int blocks, unsigned seed, const Work& work) {
    std::vector<std::thread> threads;
    std::vector<std::unique_ptr<HostBlock>> host_blocks;
    std::vector<std::unique_ptr<Shared>> shared_memories;
    for (int block = 0; block < blocks; ++block) {
        host_blocks.push_back(std::make_unique<HostBlock>());
        shared_memories.emplace_back(new Shared);
        std::memset(static_cast<void*>(shared_memories.back().get()), 0xa5, sizeof(Shared));
    }
    for (int block = 0; block < blocks; ++block)
        for (int thread = 0; thread < block_threads; ++thread)
            threads.emplace_back([&, block, thread] {
                host_thread = {thread, block, blocks, host_blocks[block].get(),
                               std::minstd_rand(seed + 977u * static_cast<unsigned>(block * block_threads + thread))};
                work(*shared_memories[block]);
            });
    for (std::thread& thread : threads) thread.join();
}

inline int thread_index() { return host_thread.index; }
inline int block_index() { return host_thread.block_index; }
inline int block_count() { return host_thread.blocks; }

inline void block_barrier() {
    stall();
    if (block_threads > 1) host_thread.block->barrier.wait();
}

inline HostBlock::Warp& this_warp() { return host_thread.block->warps[host_thread.index / warp_threads]; }

inline void warp_barrier() {
    if (warp_threads > 1) this_warp().barrier.wait();
}

inline double shuffle_down(double value, int distance) {
    const int lane = host_thread.index % warp_threads;
    this_warp().values[lane] = value;
    warp_barrier();
    const double result = lane + distance < warp_threads ? this_warp().values[lane + distance] : value;
    warp_barrier();
    return result;
}

inline std::uint32_t largest_of_warp(std::uint32_t mine) {
    this_warp().words[host_thread.index % warp_threads] = mine;
    warp_barrier();
    std::uint32_t largest = 0;
    for (const std::uint32_t word : this_warp().words) largest = std::max(largest, word);
    warp_barrier();
    return largest;
}

inline bool any_of_warp(bool mine) {
    this_warp().flags[host_thread.index % warp_threads] = mine;
    warp_barrier();
    bool any = false;
    for (bool flag : this_warp().flags) any |= flag;
    warp_barrier();
    return any;
}

template <int order>
std::uint32_t count(std::uint32_t* counter, std::uint32_t last) {
    stall();
    std::uint32_t before = __atomic_load_n(counter, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(counter, &before, before >= last ? 0 : before + 1, true, order,
                                        __ATOMIC_RELAXED)) {
    }
    stall();
    return before;
}
inline std::uint32_t count_relaxed(std::uint32_t* counter, std::uint32_t last) {
    return count<__ATOMIC_RELAXED>(counter, last);
}
inline std::uint32_t count_acq_rel(std::uint32_t* counter, std::uint32_t last) {
    return count<__ATOMIC_ACQ_REL>(counter, last);
}
inline void fence_acq_rel() { stall(); }

inline float load_first(const float* from) { return *from; }
template <class Number>
inline Number load_relaxed(const Number* from) {
    stall();
    return __atomic_load_n(from, __ATOMIC_RELAXED);
}
inline void load_relaxed(const std::uint64_t* from, std::uint64_t& first, std::uint64_t& second) {
    second = load_relaxed(from + 1);
    first = load_relaxed(from);
}
inline void store_relaxed(std::uint32_t* to, std::uint32_t value) {
    stall();
    __atomic_store_n(to, value, __ATOMIC_RELAXED);
}
inline void store_relaxed(std::uint64_t* to, std::uint64_t first, std::uint64_t second) {
    stall();
    __atomic_store_n(to, first, __ATOMIC_RELAXED);
    stall();
    __atomic_store_n(to + 1, second, __ATOMIC_RELAXED);
}

template <class Value>
inline Value load_parameter(const void* place) {
    Value value;
    std::memcpy(&value, place, sizeof(Value));
    return value;
}

inline RoundingKey not_known(const RoundingKey& key) { return key; }

inline void pause() { std::this_thread::yield(); }

enum class Eviction { evict_first, normal, evict_last };

template <Eviction, int words>
inline void load_words(const void* from, std::uint32_t (&w)[words]) {
    std::memcpy(w, __builtin_assume_aligned(from, sizeof(w)), sizeof(w));
}
template <Eviction, int words>
inline void store_words(void* to, const std::uint32_t (&w)[words]) {
    std::memcpy(__builtin_assume_aligned(to, sizeof(w)), w, sizeof(w));
}

constexpr int line_bytes = 128;
inline void prefetch(const void*) {}
constexpr bool prefetches_ranges = true;
inline void prefetch_range(const void*, int) {}

inline void scheduling_barrier() {}

inline std::uint32_t rounded_pair(bfloat16, float low, float high) {
    return rounded_bfloat16<std::uint32_t>(low) | rounded_bfloat16<std::uint32_t>(high) << 16;
}
inline std::uint32_t rounded_pair(float16, float low, float high) {
    return rounded_float16<std::uint32_t>(low) | rounded_float16<std::uint32_t>(high) << 16;
}
inline float widened(bfloat16 x) { return widened_bfloat16<float>(std::uint32_t{x.bits}); }
inline float widened(float16 x) { return widened_float16<float>(std::uint32_t{x.bits}); }

}  // namespace agr::cuda
