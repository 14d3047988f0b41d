// The arguments of a launch, and the data that blocks and launches share in device memory: plain structs.
#pragma once

#include <cstdint>

#include "../plan.h"
#include "../step.h"

namespace agr::cuda {

#if !defined(AGR_BLOCK_THREADS)
#define AGR_BLOCK_THREADS 128
#endif
constexpr int block_threads = AGR_BLOCK_THREADS;

// The description of one tensor. The table of all of them is written once and does not change while the plan is in use.
struct Row {
    void* parameter;
    void* state[max_states];
    std::int64_t elements;
    float* step;  // the tensor's own step count, or null if its group has one
    std::int64_t first_chunk, chunks;
    std::int64_t first_segment, segments;
    std::int32_t group;
    std::int32_t index;  // of the parameter among all parameters of the optimizer
    Rule rule;
    bool regularize;
};

// A segment is a run of this many neighbouring chunks of a tensor; the last segment of a tensor may be shorter. Sums
// are added in two levels, chunks to segments and segments to tensors. Otherwise a single warp would add the sums of
// thousands of chunks, one after the other, while all other blocks wait for the result.
constexpr std::int64_t segment_chunks = 64;

// The synchronization between the tasks of one tensor.
struct Progress {
    Sums sums;                    // of the whole gradient; written before `sums_epoch`
    std::uint32_t sums_epoch;     // the epoch in which `sums` was last written
    std::uint32_t segments_done;  // segments whose sums are written
};

// The synchronization between the blocks of a launch. The launch resets every counter to 0 at its end. Only the two
// epochs and `clip` keep their values.
struct Control {
    // Every block draws one ticket past the last task. There are no more blocks than tasks, so the counter cannot
    // overflow.
    std::uint32_t next_ticket;
    std::uint32_t blocks_done;      // blocks that have no more tasks
    std::uint32_t tensors_reduced;  // tensors whose sums are written; counted for the norm
    std::uint32_t epoch;            // the number of steps so far
    std::uint32_t clip_epoch;       // the epoch in which `clip` was last written
    double clip;                    // the factor by which clipping by the norm multiplies every gradient
};

// The options of one parameter group in this step.
template <class Options>
struct GroupArguments {
    Options options;
    double sign;     // -1 for maximize, otherwise 1
    double t;        // Adan's step count, starting at 1; not used if `count` is not null
    float* count;    // Adan's step count in device memory, starting at 0, or null
    const void* lr;  // a scalar in device memory that replaces the options' lr, or null
    Type lr_type;
    bool increment_count;  // whether this launch increments `count`
};

// Gradient addresses and group arguments are passed as kernel parameters if they fit into this many bytes, so that an
// ordinary step copies nothing to the device.
constexpr std::int64_t payload_bytes = 3840;

struct Arguments {
    const Row* rows;
    const Task* tasks;
    Progress* progress;                  // one per tensor
    Sums* chunk_sums;                    // one per chunk
    Sums* segment_sums;                  // one per segment
    std::uint32_t* segment_chunks_done;  // per segment, the number of chunks whose sums are written
    // One per parameter of the optimizer: the sum of squares of its gradient, or 0 if it has none.
    double* squared_norms;
    Control* control;
    // The address of each tensor's gradient, null for a tensor without a gradient in this step, and the arguments of
    // each group. These pointers are to device memory, or null if the data is in the payload, at the offsets below.
    const void* const* gradients;
    const void* groups;
    std::int32_t gradients_offset, groups_offset;
    std::int64_t first_task, end_task;
    std::int64_t chunk_elements;
    std::int32_t tensors, parameters, group_count;
    std::int32_t nonempty_tensors;  // tensors that have elements
    // This launch computes the norm of all gradients, for clipping: everything is reduced before the first update.
    bool computes_norm;
    bool updates;          // the tasks include updates; otherwise the launch computes `squares` for later launches
    double* squares;       // where to write the sum of squares of all unscaled gradients, or null
    double max_grad_norm;  // used with the squares of this launch alone
    double clip_eps;       // the eps of the first group
    const double* clip;    // the clipping factor if it is already computed, or null
    // For mixed precision: the factor by which every gradient must be divided, and whether to skip the step (if not 0).
    // Null without mixed precision.
    const float* grad_scale;
    const float* found_inf;
    alignas(16) unsigned char payload[payload_bytes];
};
static_assert(sizeof(GroupArguments<AdamWOptions>) % 8 == 0 && sizeof(GroupArguments<AdanOptions>) % 8 == 0,
              "see Upload");
static_assert(sizeof(Arguments) <= 4096, "the size of kernel parameters that every GPU and driver accepts");

// A small upload to device memory, passed by value as a kernel parameter. It needs no copy from the host and no pinned
// memory that would have to stay unchanged until the copy is done. The data is in words of 8 bytes: gradient addresses
// and GroupArguments consist of whole words.
struct Upload {
    static constexpr std::int64_t capacity = 4000;  // bytes
    void* destination;
    std::int64_t bytes;
    std::uint64_t data[capacity / 8];
};

}  // namespace agr::cuda
