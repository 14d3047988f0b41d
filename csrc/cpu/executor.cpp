#include "executor.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <thread>

#include "pool.h"

namespace agr::cpu {
namespace {

// Waking a thread costs as much as updating this many elements.
constexpr std::int64_t elements_worth_a_thread = 1 << 16;

// Averages that have faded are swept away in every so many steps (docs/design.md): looking for them makes an update of
// what the cache has take 1.4 times as long, and so many steps with denormals come once.
constexpr std::uint64_t steps_between_sweeps = 25;

// How many of the numbers made last are looked through for those of the next tensor.
constexpr std::ptrdiff_t recent_numbers = 16;

void relax(int tries) {
    // Whoever holds the ticket that is waited for may have lost its core to us.
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
      partial_(plan_.chunks),
      numbers_of_(tensors_.size()) {
    if (tensors_.size() != plan_.tensors.size())
        throw std::invalid_argument("the plan is for " + std::to_string(plan_.tensors.size()) + " tensors, not " +
                                    std::to_string(tensors_.size()));
    for (const Tensor& tensor : tensors_) {
        const Kernels* kernels = instruction_set().kernels(tensor.types);
        if (kernels == nullptr) throw std::invalid_argument("no kernel is compiled for these types");
        kernels_.push_back(kernels);
    }
}

double Executor::reduce(const void* const* gradients, int threads) {
    ++epoch_;
    run(0, plan_.first_update, threads, gradients);
    double squares = 0;
    for (const Sums& sums : partial_) squares += sums.squares;
    return squares;
}

void Executor::update(const void* const* gradients, const std::vector<Group>& groups, double clip, int threads) {
    if (!plan_.limits.clip) ++epoch_;
    prepare(gradients, groups, clip);
    run(plan_.first_update, static_cast<std::int64_t>(plan_.tasks.size()), threads, gradients);
    for (std::size_t i = 0; i < tensors_.size(); ++i)
        if (gradients[i] != nullptr && tensors_[i].step != nullptr) *tensors_[i].step += 1;
}

void Executor::prepare(const void* const* gradients, const std::vector<Group>& groups, double clip) {
    numbers_.clear();
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        if (gradients[i] == nullptr) continue;
        const Tensor& tensor = tensors_[i];
        const Group& group = groups.at(tensor.group);
        const double t = tensor.step != nullptr ? static_cast<double>(*tensor.step) + 1 : group.t;
        // Nearly always all tensors of a group have the same step count, so that its numbers were made a moment ago.
        auto same = [&](const Numbers& numbers) { return numbers.group == tensor.group && numbers.t == t; };
        const auto recent = numbers_.rbegin() + std::min<std::ptrdiff_t>(numbers_.size(), recent_numbers);
        const auto found = std::find_if(numbers_.rbegin(), recent, same);
        auto index = static_cast<std::int32_t>(numbers_.rend() - found) - 1;
        if (found == recent) {
            index = static_cast<std::int32_t>(numbers_.size());
            const bool sweeps = static_cast<std::uint64_t>(t) % steps_between_sweeps == 0;
            Numbers numbers{tensor.group, t, group.sign * clip, sweeps, {}, {}};
            if (tensor.rule == Rule::adan)
                numbers.adan = {AdanNumbers<float>::of(group.adan, t), AdanNumbers<double>::of(group.adan, t)};
            else
                numbers.adamw = {AdamWNumbers<float>::of(group.adamw, t), AdamWNumbers<double>::of(group.adamw, t)};
            numbers_.push_back(numbers);
        }
        numbers_of_[i] = index;
    }
}

void Executor::run(std::int64_t first, std::int64_t last, int threads, const void* const* gradients) {
    std::int64_t elements = 0;
    for (std::size_t i = 0; i < tensors_.size(); ++i)
        if (gradients[i] != nullptr) elements += tensors_[i].span.elements;
    threads = static_cast<int>(std::max<std::int64_t>(
        1, std::min({std::int64_t{threads}, last - first, 1 + elements / elements_worth_a_thread})));
    // Relaxed: handing the job to the pool's threads orders this store before their additions.
    next_ticket_.store(first, std::memory_order_relaxed);
    run_on_threads(threads, [this, last, gradients] {
        for (;;) {
            // Relaxed: a ticket carries no data; what tasks tell each other goes through Progress.
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
    // A tensor without a gradient in this step adds nothing to the norm, and stays as it is.
    const bool missing = gradient == nullptr;
    if (missing && task.kind != TaskKind::reduce) return;
    Span whole = tensor.span;
    whole.gradient = gradient;
    const std::int64_t elements = missing ? 0 : task.elements;
    const Span chunk =
        whole.part(tensor.types, states_of(tensor.rule), task.chunk * plan_.limits.chunk_elements, elements);
    switch (task.kind) {
        case TaskKind::reduce: {
            const Sums* partial = &partial_[planned.first_chunk];
            partial_[planned.first_chunk + task.chunk] = sums_of(task, chunk);
            // Release publishes this chunk's partial sum; acquire, by whoever comes last, sees all of them, since the
            // additions before it form a release sequence.
            const std::int64_t reduced = progress.reduced.fetch_add(1, std::memory_order_acq_rel) + 1;
            if (reduced < planned.chunks) return;
            Sums sums;
            for (std::int64_t i = 0; i < planned.chunks; ++i) {
                sums.magnitudes += partial[i].magnitudes;
                sums.squares += partial[i].squares;
            }
            progress.sums = sums;
            progress.reduced.store(
                0, std::memory_order_relaxed);  // for the next step, which the pool orders after this one
            progress.summed.store(epoch_, std::memory_order_release);
            return;
        }
        case TaskKind::update:
            if (planned.regularize) {
                // Acquire pairs with the release above and sees `sums`.
                for (int tries = 0; progress.summed.load(std::memory_order_acquire) != epoch_; ++tries) relax(tries);
            }
            return update_chunk(task, chunk, progress.sums);
        case TaskKind::whole:
            return update_chunk(task, chunk, planned.regularize ? sums_of(task, chunk) : Sums{});
    }
}

Sums Executor::sums_of(const Task& task, const Span& chunk) const {
    const Kernels& kernels = *kernels_[task.tensor];
    if (plan_.limits.clip) return kernels.magnitudes_and_squares(chunk.gradient, chunk.elements);
    return {kernels.magnitudes(chunk.gradient, chunk.elements), 0};
}

void Executor::update_chunk(const Task& task, const Span& chunk, const Sums& sums) const {
    const Rule rule = tensors_[task.tensor].rule;
    const Numbers& numbers = numbers_[numbers_of_[task.tensor]];
    const void* of_rule = rule == Rule::adan ? static_cast<const void*>(&numbers.adan) : &numbers.adamw;
    kernels_[task.tensor]->update[static_cast<int>(rule)](
        chunk, of_rule, plan_.tensors[task.tensor].regularize ? &sums.magnitudes : nullptr, numbers.scale,
        numbers.sweeps);
}

}  // namespace agr::cpu
