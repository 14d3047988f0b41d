// Values that one thread publishes to other blocks, in words that say themselves in which step they were written.
//
// A word has 8 bytes: the step's epoch in its upper half, 4 bytes of the value in its lower half. It is written and
// read as a whole (PTX ISA, "Memory Consistency Model": a vector access is a set of scalar accesses, in no order). So
// a reader that finds this step's epoch in a word has found this step's data, whatever else it sees or does not see
// yet: there is no flag whose order with the data would have to be kept, and so no release, which would wait until all
// earlier writes of its thread are visible, and no acquire, which would empty the multiprocessor's first-level cache.
// NCCL's low-latency protocol (LL) sends data between GPUs in the same way.
//
// All accesses are relaxed and thus strong: two of them are no data race. A word that a thread has written becomes
// visible to others after some time without any further action, so a reader that waits for one does not wait forever.
#pragma once

#include <cstring>

#include "intrinsics.h"

namespace agr::cuda {

using Word = std::uint64_t;

// The epoch of a word that is valid in every step.
constexpr std::uint32_t every_epoch = 0xffffffffu;

template <class Value>
constexpr int words_of = static_cast<int>(sizeof(Value) / 4);

AGR_DEVICE constexpr Word word_of(std::uint32_t epoch, std::uint32_t data) {
    return static_cast<Word>(epoch) << 32 | data;
}
AGR_DEVICE std::uint32_t epoch_of(Word word) { return static_cast<std::uint32_t>(word >> 32); }
AGR_DEVICE std::uint32_t data_of(Word word) { return static_cast<std::uint32_t>(word); }

// Publishes a value, whose type has no padding, from one thread. `to` is aligned to 16 bytes, and has room for an even
// number of words.
template <class Value>
AGR_DEVICE void publish(Word* to, const Value& value, std::uint32_t epoch) {
    static_assert(sizeof(Value) % 4 == 0, "words carry 4 bytes each");
    std::uint32_t data[words_of<Value> + 1] = {};
    std::memcpy(data, &value, sizeof(Value));
#pragma unroll
    for (int i = 0; i < words_of<Value>; i += 2)
        store_relaxed(to + i, word_of(epoch, data[i]), word_of(epoch, data[i + 1]));
}

// A double that is being read: `ready` says whether it is complete. Several can be loaded before the first is waited
// for.
struct PublishedDouble {
    const Word* from;
    Word low, high;

    AGR_DEVICE explicit PublishedDouble(const Word* address) : from(address) { load_relaxed(from, low, high); }

    AGR_DEVICE double wait(std::uint32_t epoch) {
        while (!valid(low, epoch) || !valid(high, epoch)) {
            pause();
            load_relaxed(from, low, high);
        }
        return bit_cast<double>(static_cast<std::uint64_t>(data_of(high)) << 32 | data_of(low));
    }

private:
    AGR_DEVICE static bool valid(Word word, std::uint32_t epoch) {
        return epoch_of(word) == epoch || epoch_of(word) == every_epoch;
    }
};

// Receives a value in a warp, all of whose lanes call this: lane i reads the words i, i + warp_threads, ... of it, and
// writes them to `to`, which is in shared memory.
template <class Value>
AGR_DEVICE void receive(void* to, const Word* from, std::uint32_t epoch) {
    constexpr int each = (words_of<Value> + warp_threads - 1) / warp_threads;
    const int lane = thread_index() % warp_threads;
    Word words[each];
    while (true) {
        bool missing = false;
#pragma unroll
        for (int k = 0; k < each; ++k) {
            const int i = lane + k * warp_threads;
            if (i < words_of<Value>) {
                words[k] = load_relaxed(from + i);
                missing = missing || epoch_of(words[k]) != epoch;
            }
        }
        if (!any_of_warp(missing)) break;
        pause();
    }
#pragma unroll
    for (int k = 0; k < each; ++k) {
        const int i = lane + k * warp_threads;
        const std::uint32_t data = data_of(words[k]);
        if (i < words_of<Value>) std::memcpy(static_cast<unsigned char*>(to) + 4 * i, &data, 4);
    }
    warp_barrier();
}

}  // namespace agr::cuda
