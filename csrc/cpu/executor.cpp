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

// A chunk is summed in blocks of this many elements, and a task that reduces one chunk and updates another goes from
// one to the other after each: few enough for what is fetched ahead to stay in the first two levels of the cache.
constexpr std::int64_t block_elements = 1 << 10;

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
    constexpr std::int64_t chunk_elements = 1 << 15;
    long last_level = -1;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    if (last_level <= 0) last_level = 16 << 20;
    return {chunk_elements, last_level / 4, clip};
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
    prepare(groups, clip);
    run(plan_.first_update, static_cast<std::int64_t>(plan_.tasks.size()), threads, gradients);
    for (Tensor& tensor : tensors_) {
        if (tensor.step != nullptr) *tensor.step += 1;
        tensor.fresh = false;
    }
}

void Executor::prepare(const std::vector<Group>& groups, double clip) {
    // Of each group, the numbers made last: nearly always all of its tensors have the same step count.
    std::vector<std::int32_t> latest(groups.size(), -1);
    numbers_.clear();
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        const Tensor& tensor = tensors_[i];
        const Group& group = groups.at(tensor.group);
        const double t = tensor.step != nullptr ? static_cast<double>(*tensor.step) + 1 : group.t;
        const bool first = tensor.fresh || t == 1;
        std::int32_t& index = latest[tensor.group];
        if (index < 0 || numbers_[index].t != t || numbers_[index].first != first) {
            index = static_cast<std::int32_t>(numbers_.size());
            Numbers numbers{tensor.group, t, first, group.sign * clip, {}, {}};
            if (tensor.rule == Rule::adan)
                numbers.adan = {AdanNumbers<float>::of(group.adan, t, first),
                                AdanNumbers<double>::of(group.adan, t, first)};
            else
                numbers.adamw = {AdamWNumbers<float>::of(group.adamw, t), AdamWNumbers<double>::of(group.adamw, t)};
            numbers_.push_back(numbers);
        }
        numbers_of_[i] = index;
    }
}

void Executor::run(std::int64_t first, std::int64_t last, int threads, const void* const* gradients) {
    std::int64_t elements = 0;
    for (const Tensor& tensor : tensors_) elements += tensor.span.elements;
    threads = static_cast<int>(std::max<std::int64_t>(
        1, std::min({std::int64_t{threads}, last - first, 1 + elements / elements_worth_a_thread})));
    // Relaxed: handing the job to the pool's threads orders this store before their additions.
    next_ticket_.store(first, std::memory_order_relaxed);
    run_on_threads(threads, [this, last, gradients] {
        for (;;) {
            // Relaxed: a ticket carries no data; what tasks tell each other goes through Progress.
            const std::int64_t ticket = next_ticket_.fetch_add(1, std::memory_order_relaxed);
            if (ticket >= last) return;
            run_task(plan_.tasks[ticket], gradients);
        }
    });
}

void Executor::run_task(const Task& task, const void* const* gradients) {
    if (task.whole()) {
        const Span span = span_of(task.update, gradients);
        return update_span(task.update, span, step_of(task.update, span, sums_of(task.reduce, span)));
    }
    if (task.reduce && task.update)
        return reduce_and_update(task.reduce, span_of(task.reduce, gradients), task.update,
                                 span_of(task.update, gradients));
    if (task.reduce) return write_partial(task.reduce, sums_of(task.reduce, span_of(task.reduce, gradients)));
    const Span span = span_of(task.update, gradients);
    update_span(task.update, span, step_of(task.update, span, wait_for_sums(task.update)));
}

Span Executor::span_of(const Chunk& chunk, const void* const* gradients) const {
    const Tensor& tensor = tensors_[chunk.tensor];
    Span whole = tensor.span;
    whole.gradient = gradients[chunk.tensor];
    return whole.part(tensor.types, states_of(tensor.rule), chunk.index * plan_.limits.chunk_elements,
                      plan_.elements_of(plan_.tensors[chunk.tensor], chunk.index));
}

Sums Executor::sums_of(const Chunk& chunk, const Span& span) const {
    const Tensor& tensor = tensors_[chunk.tensor];
    const Kernels& kernels = *kernels_[chunk.tensor];
    Sums sums;
    for (std::int64_t at = 0; at < span.elements; at += block_elements) {
        const Span block = span.part(tensor.types, 0, at, std::min(block_elements, span.elements - at));
        if (plan_.limits.clip) {
            const Sums both = kernels.magnitudes_and_squares(block.gradient, block.elements);
            sums.magnitudes += both.magnitudes;
            sums.squares += both.squares;
        } else {
            sums.magnitudes += kernels.magnitudes(block.gradient, block.elements);
        }
    }
    return sums;
}

void Executor::write_partial(const Chunk& chunk, const Sums& sums) {
    const Plan::Tensor& planned = plan_.tensors[chunk.tensor];
    Progress& progress = progress_[chunk.tensor];
    partial_[planned.first_chunk + chunk.index] = sums;
    // Release publishes this chunk's partial sum; acquire, by whoever comes last, sees all of them, since the additions
    // before it form a release sequence.
    const std::int64_t reduced = progress.reduced.fetch_add(1, std::memory_order_acq_rel) + 1;
    if (reduced < planned.chunks) return;
    Sums total;
    for (std::int64_t i = 0; i < planned.chunks; ++i) {
        total.magnitudes += partial_[planned.first_chunk + i].magnitudes;
        total.squares += partial_[planned.first_chunk + i].squares;
    }
    progress.sums = total;
    progress.reduced.store(0, std::memory_order_relaxed);  // for the next step, which the pool orders after this one
    progress.summed.store(epoch_, std::memory_order_release);
}

const Sums& Executor::wait_for_sums(const Chunk& chunk) {
    Progress& progress = progress_[chunk.tensor];
    if (plan_.tensors[chunk.tensor].regularize) {
        // Acquire pairs with the release above and sees `sums`.
        for (int tries = 0; progress.summed.load(std::memory_order_acquire) != epoch_; ++tries) relax(tries);
    }
    return progress.sums;
}

Step Executor::step_of(const Chunk& chunk, const Span& span, const Sums& sums) const {
    const Numbers& numbers = numbers_[numbers_of_[chunk.tensor]];
    const bool adan = tensors_[chunk.tensor].rule == Rule::adan;
    return {adan ? static_cast<const void*>(&numbers.adan) : &numbers.adamw,
            plan_.tensors[chunk.tensor].regularize ? &sums.magnitudes : nullptr, numbers.scale, span.gradient};
}

void Executor::update_span(const Chunk& chunk, const Span& span, const Step& step) const {
    kernels_[chunk.tensor]->update[static_cast<int>(tensors_[chunk.tensor].rule)](span, step);
}

// A core reads memory no faster when it only reads, so that a reduction by itself costs its full time. Between the
// blocks of an update, whose reads and writes go on side by side, a block that the update has fetched ahead is nearly
// free.
void Executor::reduce_and_update(const Chunk& reduced, const Span& read, const Chunk& updated, const Span& written) {
    const Tensor& source = tensors_[reduced.tensor];
    const Tensor& target = tensors_[updated.tensor];
    const Sums& sums_of_target = wait_for_sums(updated);
    // The kernel fetches as many bytes ahead as it reads of its own gradient.
    const bool same_bytes = bytes_of(source.types.gradient) == bytes_of(target.types.gradient);
    Sums sums;
    for (std::int64_t at = 0; at < std::max(read.elements, written.elements); at += block_elements) {
        const std::int64_t to_read = std::clamp<std::int64_t>(read.elements - at, 0, block_elements);
        const std::int64_t to_write = std::clamp<std::int64_t>(written.elements - at, 0, block_elements);
        const void* gradient = read.part(source.types, 0, at, to_read).gradient;
        if (to_write > 0) {
            const Span part = written.part(target.types, states_of(target.rule), at, to_write);
            Step step = step_of(updated, part, sums_of_target);
            if (same_bytes && to_read >= to_write) step.ahead = gradient;
            update_span(updated, part, step);
        }
        if (to_read > 0) sums.magnitudes += kernels_[reduced.tensor]->magnitudes(gradient, to_read);
    }
    write_partial(reduced, sums);
}

}  // namespace agr::cpu
