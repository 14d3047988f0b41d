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
struct alignas(16) Row {
    void* parameter;
    void* state[max_states];
    float* step;  // the tensor's own step count, or null if its group has one
    std::int32_t first_chunk, chunks;
    std::int32_t first_segment, segments;
    std::int32_t group;
    std::int32_t index;  // of the parameter among all parameters of the optimizer
    std::int64_t elements;
    Rule rule;
    bool reduced;               // by REDUCE tasks
    float* master;              // the float32 copy of the parameter, or null
    float* scales[max_states];  // of the state's codes, or null
};

// A task of the plan, with what its block must know before it has read the tensor's row.
struct alignas(16) DeviceTask {
    TaskKind kind;
    Rule rule;
    bool regularize;
    bool reduced;  // REDUCE tasks of the tensor publish the inputs of its updates
    std::int32_t tensor;
    std::int32_t chunk;
    std::int32_t elements;
};
static_assert(sizeof(DeviceTask) == 16, "tasks are read in one access");

// A segment is a run of this many neighbouring chunks of a tensor; the last segment of a tensor may be shorter. Sums
// are added in two levels, chunks to segments and segments to tensors. Otherwise a single warp would add the sums of
// thousands of chunks, one after the other, while all other blocks wait for the result.
constexpr std::int64_t segment_chunks = 64;

// Elements of a chunk that are prefetched at most.
constexpr int most_prefetched = 1 << 16;

// The number of words (see words.h) in which the inputs of a tensor's updates are published: those of Adan in float64.
constexpr int max_input_words = 36;

// The synchronization between the tasks of one tensor.
struct alignas(16) Progress {
    std::uint64_t inputs[max_input_words];
    std::uint32_t segments_done;  // segments whose sums are written
};

// The synchronization between the blocks of a launch. Every counter is 0 again when it has reached its last value, so
// that nothing has to be cleared between launches.
struct alignas(16) Control {
    std::uint64_t clip[2];  // the words of the factor by which clipping by the norm multiplies every gradient
    // The number of launches that have reduced gradients: it tells this launch's words from those of earlier launches.
    std::uint32_t epoch;
    // The next ticket, in launches of even and of odd epochs. Every block draws one ticket past the last task.
    std::uint32_t next_ticket[2];
    std::uint32_t blocks_done;      // blocks that have no more tasks; counted where step counts are raised at the end
    std::uint32_t tensors_reduced;  // tensors whose sums are written; counted for the norm
};

// What the kernel does to hide latency, and could do without. No GPU has judged it yet: each tactic can be left out of
// a launch, so that it can be timed. docs/design.md describes them.
enum Tactic : std::uint32_t {
    prefetch_chunk = 1,        // an update prefetches more of its chunk before it waits than what it loads first
    prefetch_ranges = 2,       // and by one instruction a tensor where there is one, and not by one a line
    prefetch_tasks = 4,        // the line of a task that is run later is prefetched
    defer_accounting = 8,      // while a chunk is accounted for, the next task's gradient is on its way
    no_fences = 16,            // sums are published without fences
    early_inputs = 32,         // coefficients are published with the abs-sum, or computed behind a gradient's loads
    own_counts = 64,           // step counts are raised by the block that updates or publishes, and not by the last one
    squares_in_float32 = 128,  // squares are added in float32
    given_tickets = 256,       // a block's first ticket is its own number, in launches in which no task waits
};
constexpr struct {
    const char* name;
    Tactic tactic;
} tactics[] = {{"prefetch_chunk", prefetch_chunk}, {"prefetch_ranges", prefetch_ranges},
               {"prefetch_tasks", prefetch_tasks}, {"defer_accounting", defer_accounting},
               {"no_fences", no_fences},           {"early_inputs", early_inputs},
               {"own_counts", own_counts},         {"squares_in_float32", squares_in_float32},
               {"given_tickets", given_tickets}};
constexpr std::uint32_t all_tactics = 511;

// Which step counts of tensors the last block of a launch raises: those that nobody else could raise, or all.
enum class CountsAtEnd : std::uint8_t { none, some, all };

// The options of one parameter group in this step.
template <class Options>
struct GroupArguments {
    Options options;
    double sign;                   // -1 for maximize, otherwise 1
    double t;                      // Adan's step count, starting at 1; not used if `count` is not null
    float* count;                  // Adan's step count in device memory, starting at 0, or null
    const void* lr;                // a scalar in device memory that replaces the options' lr, or null
    std::int32_t lr_type;          // a Type
    std::int32_t increment_count;  // whether this launch increments `count`
    std::uint64_t seed;            // of stochastic rounding
};

// Gradient addresses and group arguments are passed as kernel parameters if they fit into this many bytes, so that an
// ordinary step copies nothing to the device.
constexpr std::int64_t payload_bytes = 3840;

struct Arguments {
    const Row* rows;
    const DeviceTask* tasks;
    Progress* progress;  // one per tensor
    // The words of one abs-sum and, if the launch computes the norm, one sum of squares per chunk and per segment.
    std::uint64_t* chunk_sums;
    std::uint64_t* segment_sums;
    std::uint32_t* segment_chunks_done;  // per segment, the number of chunks whose sums are written
    // The words of one number per parameter of the optimizer: the sum of squares of its gradient, or 0 if it has none.
    std::uint64_t* squared_norms;
    Control* control;
    // The address of each tensor's gradient, null for a tensor without a gradient in this step, and the arguments of
    // each group. These pointers are to device memory, or null if the data is in the payload, at the offsets below.
    const void* const* gradients;
    const void* groups;
    std::int32_t gradients_offset, groups_offset;
    std::int64_t first_task, end_task;
    std::int64_t chunk_elements;
    std::int32_t prefetched_elements;  // of an UPDATE's chunk
    std::int32_t tensors, parameters, group_count;
    std::int32_t nonempty_tensors;  // tensors that have elements
    // This launch computes the norm of all gradients, for clipping: everything is reduced before the first update.
    bool computes_norm;
    bool reduces;        // the tasks include those that reduce; otherwise an earlier launch has published the inputs
    bool given_tickets;  // block i runs task i first, and draws only later tickets
    bool updates;        // the tasks include updates; otherwise the launch computes `squares` for later launches
    CountsAtEnd counts_at_end;
    bool group_counts;      // some group's step count is incremented
    std::uint32_t tactics;  // a combination of Tactic
    double* squares;        // where to write the sum of squares of all unscaled gradients, or null
    // Null, or the abs-sums of all tensors and then their sums of squares: a launch that reduces writes those of its
    // gradients, and one that only updates takes the abs-sums from here, of tensors of which these are parts.
    double* sums;
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
