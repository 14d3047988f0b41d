// The plan of a step: which tensors, cut into which chunks, in which order. It knows sizes and nothing of devices.
#pragma once

#include <cstdint>
#include <vector>

namespace agr {

// REDUCE writes a chunk's partial abs-sum, UPDATE waits for its tensor's abs-sum and applies the rule to a chunk, WHOLE
// does both for a tensor of one chunk (or the update alone where the tensor's gradient is not regularized).
enum class TaskKind : std::uint8_t { reduce, update, whole };

struct Task {
    TaskKind kind;
    std::int32_t tensor;
    std::int32_t chunk;     // counted within the tensor
    std::int32_t elements;  // of the chunk
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
        // How many bytes of gradient, of tensors of which all is reduced, wait for their UPDATE: a share of the cache,
        // in which it finds them again. They are what is left to do while the sum of the next tensor comes together.
        std::int64_t window_bytes;
        // How many bytes of gradient other tasks have, where there are any, between a tensor's last REDUCE and its
        // first UPDATE: at least what is in progress at once, so that nobody who draws that UPDATE has to wait for the
        // abs-sum.
        std::int64_t lead_bytes;
        // Clip by the global norm: every gradient is reduced before the first update.
        bool clip;
        // Reductions and updates are launches of their own: every UPDATE stands after the last REDUCE.
        bool apart = false;
    };

    Limits limits;
    std::vector<Tensor> tensors;
    std::int64_t chunks = 0;
    // In the order in which tickets hand them out. A tensor's REDUCE tasks all stand before its first UPDATE and REDUCE
    // tasks wait for nothing, so that whoever holds an UPDATE only ever waits for tasks that are already running.
    std::vector<Task> tasks;
    // With clipping, and where they are apart, tasks before this one reduce and tasks from it on update; else 0.
    std::int64_t first_update = 0;

    // Throws std::invalid_argument where a size or a limit makes no sense, or tasks would be more than 2^31.
    Plan(std::vector<Tensor> tensors, Limits limits);

    std::int64_t elements_of(const Tensor& tensor, std::int64_t chunk) const;

private:
    void push(TaskKind kind, std::int32_t tensor, std::int64_t chunk);
    void order_in_a_window();
    void order_apart();
};

}  // namespace agr
