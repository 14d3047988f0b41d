// The plan of a step: how tensors are cut into chunks, and the order in which the chunks' tasks are handed out. It
// depends on sizes alone, and not on the device.
#pragma once

#include <cstdint>
#include <vector>

namespace agr {

// A REDUCE task writes the partial abs-sum of a chunk. An UPDATE task waits for the abs-sum of its tensor and applies
// the update rule to a chunk. A WHOLE task does both for a tensor of one chunk, or only the update if the tensor's
// gradient is not regularized.
enum class TaskKind : std::uint8_t { reduce, update, whole };

struct Task {
    TaskKind kind;
    std::int32_t tensor;
    std::int32_t chunk;     // index within the tensor
    std::int32_t elements;  // number of elements of the chunk
};

struct Plan {
    struct Tensor {
        std::int64_t elements;
        std::int32_t gradient_bytes;  // of one element
        bool regularize;
        // Computed by the constructor of Plan:
        std::int64_t chunks = 0;
        std::int64_t first_chunk = 0;  // the index of its first chunk among those of all tensors
    };

    struct Limits {
        std::int64_t chunk_elements;
        // How many bytes of fully reduced gradients may wait for their UPDATE: a fraction of the cache, so that UPDATE
        // finds them there. They are also the work that is left to do while the abs-sum of the next tensor is
        // completed.
        std::int64_t window_bytes;
        // How many bytes of gradient other tasks process between the last REDUCE of a tensor and its first UPDATE,
        // where there are other tasks. With at least as much as is in progress at once, the thread or block that draws
        // the UPDATE does not have to wait for the abs-sum.
        std::int64_t lead_bytes;
        // Clip by the global norm: all gradients are reduced before the first update.
        bool clip;
        // Reductions and updates are separate launches: every UPDATE comes after the last REDUCE.
        bool apart = false;
    };

    Limits limits;
    std::vector<Tensor> tensors;
    std::int64_t chunks = 0;
    // The tasks in ticket order. All REDUCE tasks of a tensor come before its first UPDATE, and REDUCE tasks wait for
    // nothing. So an UPDATE only ever waits for tasks that are already running.
    std::vector<Task> tasks;
    // With `clip` or `apart`: the index of the first task that updates; all tasks before it reduce. Otherwise 0.
    std::int64_t first_update = 0;

    // Throws std::invalid_argument if a size or a limit is out of range, or if there would be more than 2^31 tasks.
    Plan(std::vector<Tensor> tensors, Limits limits);

    std::int64_t elements_of(const Tensor& tensor, std::int64_t chunk) const;

private:
    void push(TaskKind kind, std::int32_t tensor, std::int64_t chunk);
    void order_in_a_window();
    void order_apart();
};

}  // namespace agr
