// The CPU executor of a plan: threads draw tickets and run the corresponding tasks.
//
// The protocol is that of the CUDA backend, with std::atomic. A thread draws the next ticket with one atomic addition
// and runs that task. Tickets are drawn in the plan's order and REDUCE tasks wait for nothing. So an UPDATE only ever
// waits for REDUCE tasks that other threads are running at that moment, and there is no deadlock, however few threads
// there are and wherever they are preempted. The thread that finishes the last REDUCE of a tensor adds the tensor's
// partial sums in the order of the chunks, so the result has the same bits with any number of threads.
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
    // `tensors` are in the order of the plan's. Throws std::invalid_argument if no kernel is compiled for the types of
    // a tensor.
    Executor(Plan plan, std::vector<Tensor> tensors);

    // In both functions, `gradients` has the address of each tensor's gradient. It is null for a tensor without a
    // gradient in this step, which the step then leaves unchanged.

    // Returns the sum of squares of all elements of all gradients, and stores the abs-sums that update() needs. Only
    // for a plan with clipping.
    double reduce(const void* const* gradients, int threads);

    // After reduce(): writes the abs-sum and the sum of squares of each tensor's gradient.
    void sums(double* abs_sums, double* squares) const;
    // After reduce(): replaces the abs-sums by those of tensors of which these are parts.
    void set_abs_sums(const double* abs_sums);

    // Does the whole step or, after reduce(), the rest of it. Gradients are multiplied by `clip`, and negated for
    // maximize.
    void update(const void* const* gradients, const std::vector<Group>& groups, double clip, int threads);

private:
    // The synchronization between the REDUCE and UPDATE tasks of one tensor. Each has its own cache line, to avoid
    // false sharing.
    struct alignas(64) Progress {
        std::atomic<std::int64_t> chunks_done{0};  // chunks whose partial sums are written
        std::atomic<std::uint64_t> sums_epoch{0};  // the epoch in which `sums` was last written
        Sums sums;
    };

    // The coefficients of one step, shared by tensors of the same group and step count.
    struct Coefficients {
        std::int32_t group;
        double t;
        double scale;
        bool sweeps;
        std::uint64_t seed;                  // of stochastic rounding
        CoefficientsOf<AdamW<false>> adamw;  // with and without AMSGrad
        CoefficientsOf<Adan> adan;
    };

    Plan plan_;
    std::vector<Tensor> tensors_;
    std::vector<const Kernels*> kernels_;   // one per tensor
    std::unique_ptr<Progress[]> progress_;  // one per tensor
    std::vector<Sums> chunk_sums_;          // one per chunk
    std::vector<Coefficients> coefficients_;
    std::vector<std::int32_t> coefficients_index_;  // of every tensor, into coefficients_
    std::atomic<std::int64_t> next_ticket_{0};
    std::uint64_t epoch_ = 0;  // the number of the step; it tells this step's sums from those of earlier steps

    void run(std::int64_t first, std::int64_t last, int threads, const void* const* gradients);
    void run_task(const Task& task, const void* gradient);
    Sums sums_of(const Task& task, const Span& chunk) const;
    void update_chunk(const Task& task, const Span& chunk, const Sums& sums) const;
    void compute_coefficients(const void* const* gradients, const std::vector<Group>& groups, double clip);
};

// The default chunk size is such that all memory that a chunk's update accesses fits into a core's second-level cache.
// The default window is a fraction of the last-level cache.
Plan::Limits default_limits(bool clip);

}  // namespace agr::cpu
