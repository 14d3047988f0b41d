// The CPU executor: computes the coefficients of a step and runs the tasks on threads.
#include "executor.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <thread>

#include "pool.h"

namespace agr::cpu {
namespace {

// Waking a thread of the pool takes as long as updating this many elements.
constexpr std::int64_t elements_worth_a_thread = 1 << 16;

// Averages that have faded to denormal numbers are replaced by 0 once in this many steps (see docs/design.md). The
// check makes an update of data in the cache take 1.4 times as long, and an average costs at most this many slow steps.
constexpr std::uint64_t steps_between_sweeps = 25;

// How many of the most recently computed coefficients are searched for those of the next tensor.
constexpr std::ptrdiff_t search_depth = 16;

// Waits a moment between two reads of a flag. `tries` is how often the flag has been read.
void backoff(int tries) {
    // After some time, give up the core: the thread that is waited for may have been preempted by this one.
    if (tries > 64) {
        std::this_thread::yield();
    } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
}

}  // namespace

Plan::Limits default_limits(bool clip) {
    constexpr std::int64_t chunk_elements = 1 << 16;
    long last_level = -1;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    if (last_level <= 0) last_level = 16 << 20;
    return {chunk_elements, last_level / 16, 0, clip};
}

Executor::Executor(Plan plan, std::vector<Tensor> tensors)
    : plan_(std::move(plan)),
      tensors_(std::move(tensors)),
      progress_(new Progress[tensors_.size()]),
      chunk_sums_(plan_.chunks),
      coefficients_index_(tensors_.size()) {
    if (tensors_.size() != plan_.tensors.size())
        throw std::invalid_argument("the plan is for " + std::to_string(plan_.tensors.size()) + " tensors, not " +
                                    std::to_string(tensors_.size()));
    for (const Tensor& tensor : tensors_) {
        const Kernels* kernels = instruction_set().kernels(tensor.types);
        if (kernels == nullptr) throw std::invalid_argument("there is no kernel for these types");
        kernels_.push_back(kernels);
        if (tensor.types.state == Type::code8 && plan_.limits.chunk_elements % scale_block != 0)
            throw std::invalid_argument("a chunk of codes has whole blocks of " + std::to_string(scale_block) +
                                        " elements, not " + std::to_string(plan_.limits.chunk_elements));
    }
}

double Executor::reduce(const void* const* gradients, int threads) {
    ++epoch_;
    run(0, plan_.first_update, threads, gradients);
    double squares = 0;
    for (const Sums& sums : chunk_sums_) squares += sums.squares;
    return squares;
}

void Executor::sums(double* abs_sums, double* squares) const {
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        // Nothing has reduced a tensor without chunks.
        const Sums sums = plan_.tensors[i].chunks == 0 ? Sums{} : progress_[i].sums;
        abs_sums[i] = sums.abs_sum;
        squares[i] = sums.squares;
    }
}

void Executor::set_abs_sums(const double* abs_sums) {
    for (std::size_t i = 0; i < tensors_.size(); ++i) progress_[i].sums.abs_sum = abs_sums[i];
}

void Executor::update(const void* const* gradients, const std::vector<Group>& groups, double clip, int threads) {
    if (!plan_.limits.clip) ++epoch_;
    compute_coefficients(gradients, groups, clip);
    run(plan_.first_update, static_cast<std::int64_t>(plan_.tasks.size()), threads, gradients);
    for (std::size_t i = 0; i < tensors_.size(); ++i)
        if (gradients[i] != nullptr && tensors_[i].step != nullptr) *tensors_[i].step += 1;
}

void Executor::compute_coefficients(const void* const* gradients, const std::vector<Group>& groups, double clip) {
    coefficients_.clear();
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        if (gradients[i] == nullptr) continue;
        const Tensor& tensor = tensors_[i];
        const Group& group = groups.at(tensor.group);
        const double t = tensor.step != nullptr ? static_cast<double>(*tensor.step) + 1 : group.t;
        // Nearly always all tensors of a group have the same step count, and their coefficients were computed recently.
        auto same = [&](const Coefficients& c) { return c.group == tensor.group && c.t == t; };
        const auto end = coefficients_.rbegin() + std::min<std::ptrdiff_t>(coefficients_.size(), search_depth);
        const auto found = std::find_if(coefficients_.rbegin(), end, same);
        auto index = static_cast<std::int32_t>(coefficients_.rend() - found) - 1;
        if (found == end) {
            index = static_cast<std::int32_t>(coefficients_.size());
            const bool sweeps = static_cast<std::uint64_t>(t) % steps_between_sweeps == 0;
            Coefficients coefficients{tensor.group, t, group.sign * clip, sweeps, group.seed, {}, {}};
            if (tensor.rule == Rule::adan)
                coefficients.adan = {AdanCoefficients<float>::of(group.adan, t),
                                     AdanCoefficients<double>::of(group.adan, t)};
            else if (tensor.rule != Rule::regularize)
                coefficients.adamw = {AdamWCoefficients<float>::of(group.adamw, t),
                                      AdamWCoefficients<double>::of(group.adamw, t)};
            coefficients_.push_back(coefficients);
        }
        coefficients_index_[i] = index;
    }
}

void Executor::run(std::int64_t first, std::int64_t last, int threads, const void* const* gradients) {
    std::int64_t elements = 0;
    for (std::size_t i = 0; i < tensors_.size(); ++i)
        if (gradients[i] != nullptr) elements += tensors_[i].span.elements;
    const int worth = static_cast<int>(std::max<std::int64_t>(
        1, std::min({std::int64_t{threads}, last - first, 1 + elements / elements_worth_a_thread})));
    // Relaxed is enough: handing the job to threads orders this store before their additions.
    next_ticket_.store(first, std::memory_order_relaxed);
    run_on_threads(worth, threads, [this, last, gradients] {
        for (;;) {
            // Relaxed is enough: a ticket carries no data. Tasks exchange data through Progress.
            const std::int64_t ticket = next_ticket_.fetch_add(1, std::memory_order_relaxed);
            if (ticket >= last) return;
            const Task& task = plan_.tasks[ticket];
            run_task(task, gradients[task.tensor]);
        }
    });
}

void Executor::run_task(const Task& task, const void* gradient) {
    const Tensor& tensor = tensors_[task.tensor];
    const Plan::Tensor& planned = plan_.tensors[task.tensor];
    Progress& progress = progress_[task.tensor];
    // A tensor without a gradient in this step adds nothing to the norm and is not changed.
    const bool missing = gradient == nullptr;
    if (missing && task.kind != TaskKind::reduce) return;
    Span whole = tensor.span;
    whole.gradient = gradient;
    if (tensor.rule == Rule::regularize) whole.parameter = const_cast<void*>(gradient);  // changed in place
    const std::int64_t elements = missing ? 0 : task.elements;
    const Span chunk =
        whole.part(tensor.types, states_of(tensor.rule), task.chunk * plan_.limits.chunk_elements, elements);
    switch (task.kind) {
        case TaskKind::reduce: {
            Sums* const chunk_sums = &chunk_sums_[planned.first_chunk];
            chunk_sums[task.chunk] = sums_of(task, chunk);
            // The release half publishes this chunk's sums. The acquire half of the last addition makes the sums of all
            // chunks visible, because the additions before it form a release sequence.
            const std::int64_t done = progress.chunks_done.fetch_add(1, std::memory_order_acq_rel) + 1;
            if (done < planned.chunks) return;
            Sums sums;
            for (std::int64_t i = 0; i < planned.chunks; ++i) {
                sums.abs_sum += chunk_sums[i].abs_sum;
                sums.squares += chunk_sums[i].squares;
            }
            progress.sums = sums;
            // For the next step. Relaxed is enough, since this step's threads are done before that one's begin.
            progress.chunks_done.store(0, std::memory_order_relaxed);
            progress.sums_epoch.store(epoch_, std::memory_order_release);
            return;
        }
        case TaskKind::update:
            if (planned.regularize) {
                // The acquire pairs with the release of the last REDUCE and makes `sums` visible.
                for (int tries = 0; progress.sums_epoch.load(std::memory_order_acquire) != epoch_; ++tries)
                    backoff(tries);
            }
            return update_chunk(task, chunk, progress.sums);
        case TaskKind::whole:
            return update_chunk(task, chunk, planned.regularize ? sums_of(task, chunk) : Sums{});
    }
}

Sums Executor::sums_of(const Task& task, const Span& chunk) const {
    const Kernels& kernels = *kernels_[task.tensor];
    if (plan_.limits.clip) return kernels.abs_sum_and_squares(chunk.gradient, chunk.elements);
    return {kernels.abs_sum(chunk.gradient, chunk.elements), 0};
}

void Executor::update_chunk(const Task& task, const Span& chunk, const Sums& sums) const {
    const Rule rule = tensors_[task.tensor].rule;
    const Coefficients& coefficients = coefficients_[coefficients_index_[task.tensor]];
    const void* of_rule = rule == Rule::adan ? static_cast<const void*>(&coefficients.adan) : &coefficients.adamw;
    const Tensor& tensor = tensors_[task.tensor];
    const RoundingKey rounding{coefficients.seed, static_cast<std::uint32_t>(coefficients.t),
                               static_cast<std::uint32_t>(tensor.index)};
    kernels_[task.tensor]->update[static_cast<int>(rule)](
        chunk, {of_rule, plan_.tensors[task.tensor].regularize ? &sums.abs_sum : nullptr, coefficients.scale,
                coefficients.sweeps, tensor.types, rounding, task.chunk * plan_.limits.chunk_elements});
}

}  // namespace agr::cpu
