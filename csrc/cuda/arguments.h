// What a launch is told, and what launches leave for each other in the device's memory: plain structs.
#pragma once

#include <cstdint>

#include "../plan.h"
#include "../step.h"

namespace agr::cuda {

#if !defined(AGR_BLOCK_THREADS)
#define AGR_BLOCK_THREADS 128
#endif
constexpr int block_threads = AGR_BLOCK_THREADS;

// One tensor, in a table that stays as it is while the plan lasts.
struct Row {
    void* parameter;
    void* state[max_states];
    std::int64_t elements;
    float* step;  // its own step count, or null where its group has it
    std::int64_t first_chunk, chunks;
    std::int64_t first_stretch, stretches;
    std::int32_t group;
    std::int32_t index;  // of the parameter among all of the optimizer's
    Rule rule;
    bool regularize;
};

// The sums of up to this many neighbouring chunks are added before those of the stretches are, so that no warp has to
// add thousands of them one after the other while everybody waits for the result.
constexpr std::int64_t stretch_chunks = 64;

// What tasks tell each other about one tensor.
struct Progress {
    Sums sums;              // of the whole gradient; written before `summed`
    std::uint32_t summed;   // the epoch in which `sums` was last written
    std::uint32_t arrived;  // stretches whose sums are written
};

// What blocks tell each other about the launch. It leaves everything as it found it, but for the epoch.
struct Control {
    // The next. Every block draws one past the end, and there are no more blocks than tasks: it cannot wrap.
    std::uint32_t ticket;
    std::uint32_t left;     // blocks that have no more to do
    std::uint32_t arrived;  // tensors whose sums are written, for the norm
    std::uint32_t epoch;    // counts the steps
    std::uint32_t known;    // the epoch in which `clip` was last written
    double clip;            // what the norm makes every gradient be multiplied by
};

// What a group says in this step.
template <class Options>
struct GroupOf {
    Options options;
    double sign;     // -1 for maximize, else 1
    double t;        // Adan's step count from 1, unless `count` has it
    float* count;    // Adan's step count on the device, from 0, or null
    const void* lr;  // instead of the options' lr, a number on the device, or null
    Type lr_type;
    bool counts;  // this launch raises `count`
};

// Addresses of gradients and groups travel with the launch where they fit, so that an ordinary step copies nothing.
constexpr std::int64_t payload_bytes = 3840;

struct Arguments {
    const Row* rows;
    const Task* tasks;
    Progress* progress;      // of every tensor
    Sums* chunk_sums;        // of every chunk
    Sums* stretch_sums;      // of every stretch
    std::uint32_t* arrived;  // of every stretch, chunks whose sums are written
    double* squares_of;      // of every parameter of the optimizer, the sum of its gradient's squares; 0 without one
    Control* control;
    // Of every tensor, the address of its gradient, or null if it has none in this step; of every group, what it says.
    // On the device, or null if they are in the payload, at the offset beside them.
    const void* const* gradients;
    const void* groups;
    std::int32_t gradients_at, groups_at;
    std::int64_t first_task, end_task;
    std::int64_t chunk_elements;
    std::int32_t tensors, parameters, group_count;
    std::int32_t summed;  // tensors that have elements
    // Clipping by the norm: everything is reduced before the first update.
    bool clips;
    bool ends;             // updates are among the tasks; else the launch leaves `squares` for those that follow
    double* squares;       // where the sum of all squares goes, of unscaled gradients; or null
    double max_grad_norm;  // with the squares of this launch alone; eps is the first group's
    double clip_eps;
    const double* clip;  // what every gradient is multiplied by, known already; or null
    // Of mixed precision: what every gradient is divided by, and whether to do nothing; or null.
    const float* grad_scale;
    const float* found_inf;
    alignas(16) unsigned char payload[payload_bytes];
};
static_assert(sizeof(GroupOf<AdamWOptions>) % 8 == 0 && sizeof(GroupOf<AdanOptions>) % 8 == 0, "see Upload");
static_assert(sizeof(Arguments) <= 4096, "what every GPU and driver takes as the parameters of a kernel");

// A small upload to device memory, passed by value as a kernel parameter. It needs no copy from the host and no pinned
// memory that would have to stay unchanged until the copy is done. The data is in words of 8 bytes: gradient addresses
// and GroupOf consist of whole words.
struct Upload {
    static constexpr std::int64_t capacity = 4000;  // bytes
    void* destination;
    std::int64_t bytes;
    std::uint64_t data[capacity / 8];
};

}  // namespace agr::cuda
