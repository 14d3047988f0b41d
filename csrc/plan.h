// The plan of a step: which tensors, cut into which chunks, in which order. It knows sizes and nothing of devices.
#pragma once

#include <cstdint>
#include <vector>

namespace agr {

// A chunk of a tensor.
struct Chunk {
    std::int32_t tensor = -1;  // -1: none
    std::int64_t index = 0;    // counted within the tensor

    explicit operator bool() const { return tensor >= 0; }
    bool operator==(const Chunk& other) const { return tensor == other.tensor && index == other.index; }
};

// What one ticket stands for: a chunk to REDUCE, which writes its partial abs-sum; a chunk to UPDATE, which waits for
// its tensor's abs-sum and applies the rule; or both together, which keeps reads and writes of the memory in balance.
// For a tensor of one chunk both are the same chunk: it is reduced and then updated while its gradient is at hand.
struct Task {
    Chunk reduce, update;

    bool whole() const { return reduce && reduce == update; }
};

struct Plan {
    struct Tensor {
        std::int64_t elements;
        std::int32_t gradient_bytes;  // of one element
        bool regularize;
        // Filled in by the plan:
        std::int64_t chunks = 0;
        std::int64_t first_chunk = 0;  // the index of its first chunk among those of all tensors
    };

    struct Limits {
        std::int64_t chunk_elements;
        // How many bytes of gradient REDUCE may run ahead of UPDATE: a share of the cache, in which UPDATE finds them
        // again.
        std::int64_t window_bytes;
        // Clip by the global norm: every gradient is reduced before the first update.
        bool clip;
    };

    Limits limits;
    std::vector<Tensor> tensors;
    std::int64_t chunks = 0;
    // In the order in which tickets hand them out. All of a tensor's REDUCE tasks stand before its first UPDATE, so
    // that an UPDATE only ever waits for tasks of smaller tickets, which somebody is doing already.
    std::vector<Task> tasks;
    // With clipping, tasks before this one reduce and tasks from it on update; without, 0.
    std::int64_t first_update = 0;

    // Throws std::invalid_argument where a size or a limit makes no sense.
    Plan(std::vector<Tensor> tensors, Limits limits);

    std::int64_t elements_of(const Tensor& tensor, std::int64_t chunk) const;
};

}  // namespace agr
