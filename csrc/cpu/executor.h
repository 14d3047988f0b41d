// The CPU executor of a plan: threads draw tickets and do the tasks that the tickets stand for.
//
// The protocol is the CUDA backend's, on std::atomic. A thread draws the next ticket with one atomic addition and does
// that task. Tickets are drawn in the plan's order and REDUCE waits for nothing, so that an UPDATE only ever waits for
// REDUCE tasks that other threads are doing at this moment: there is no deadlock, however few threads there are and
// wherever they are interrupted. Partial sums are added in the order of the chunks by whoever finishes a tensor's last
// REDUCE, so that the result has the same bits with any number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "../plan.h"
#include "../step.h"
#include "kernels.h"

namespace agr::cpu {

class Executor {
public:
    // `tensors` in the order of the plan's. Throws std::invalid_argument where no kernel is compiled for a tensor's
    // types.
    Executor(Plan plan, std::vector<Tensor> tensors);

    // `gradients`: the address of each tensor's, null for one that has none in this step, which then does nothing to
    // it.

    // The sum of the squares of all elements of all gradients; also leaves the abs-sums that update() needs. Only for a
    // plan with clipping.
    double reduce(const void* const* gradients, int threads);

    // The whole step; after reduce(), the rest of it. The gradient is multiplied by `clip`, and negated for maximize.
    void update(const void* const* gradients, const std::vector<Group>& groups, double clip, int threads);

    const Plan& plan() const { return plan_; }

private:
    // What REDUCE and UPDATE tell each other about one tensor, on a cache line of its own.
    struct alignas(64) Progress {
        std::atomic<std::int64_t> reduced{0};  // chunks whose partial sum is written
        std::atomic<std::uint64_t> summed{0};  // the epoch in which `sums` was last written
        Sums sums;
    };

    // The numbers of one step, which tensors of the same group and step count share.
    struct Numbers {
        std::int32_t group;
        double t;
        double scale;
        bool sweeps;
        NumbersOf<AdamW<false>> adamw;  // for either form of AdamW
        NumbersOf<Adan> adan;
    };

    Plan plan_;
    std::vector<Tensor> tensors_;
    std::vector<const Kernels*> kernels_;   // of every tensor
    std::unique_ptr<Progress[]> progress_;  // of every tensor
    std::vector<Sums> partial_;             // of every chunk
    std::vector<Numbers> numbers_;
    std::vector<std::int32_t> numbers_of_;  // of every tensor, its index in numbers_
    std::atomic<std::int64_t> next_ticket_{0};
    std::uint64_t epoch_ = 0;  // counts the steps

    void run(std::int64_t first, std::int64_t last, int threads, const void* const* gradients);
    void run_task(const Task& task, const void* gradient);
    Sums sums_of(const Task& task, const Span& chunk) const;
    void update_chunk(const Task& task, const Span& chunk, const Sums& sums) const;
    void prepare(const void* const* gradients, const std::vector<Group>& groups, double clip);
};

// A chunk size for which all that a chunk's update touches fits in a core's second-level cache, and a window of the
// size of a share of the last-level cache.
Plan::Limits default_limits(bool clip);

}  // namespace agr::cpu
