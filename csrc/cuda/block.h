// The device code of a launch: what one block of the persistent grid does.
//
// A block draws a ticket with one atomic operation, runs the task with that number, and draws the next ticket. It does
// so until no tasks are left. A REDUCE task adds up a chunk's gradient, an UPDATE task waits for the abs-sum of the
// chunk's tensor and applies the update rule, and a WHOLE task does both for a tensor of one chunk.
//
// Forward progress. Tickets are handed out in the plan's order. In that order, all REDUCE tasks of a tensor come before
// its first UPDATE; with clipping, the REDUCE tasks of all tensors do. A block draws its next ticket while it runs the
// task before, but runs its tasks in ticket order, and finishes a REDUCE (accounts for its chunk) before it does
// anything in its next task that may wait. Consider the unfinished task with the smallest ticket. Its block has no
// earlier task to finish, so it is running this one. If the task is an UPDATE, everything it can wait for has a smaller
// ticket and is finished. So at least one block always makes progress, however few blocks the device runs at the same
// time. The kernel needs no cooperative launch, and other kernels may run beside it. (In a launch in which no task ever
// waits, tickets need no order: the first task of block i is task i.)
//
// Sums. The block that writes the last chunk sum of a segment adds the segment's chunk sums, and the block that
// completes the last segment of a tensor adds the tensor's segment sums, and publishes the inputs of the tensor's
// updates. A counter tells a block that it is the last; the sums that it then reads are words that carry the epoch
// (words.h), and where one is not visible yet, the block waits until it is: its thread has written it before it
// counted. Sums are added in a tree whose shape depends on sizes alone, so the result has the same bits whichever block
// is the last. There are no floating-point atomics.
//
// Memory order. Blocks exchange data in words alone, and all accesses to them and to counters are relaxed, so no order
// between two addresses is ever relied on. There are three exceptions.
//
// - The epoch is incremented by the block that draws the launch's last ticket, while others may not have read it yet,
//   as far as the order of these accesses is concerned. But every block reads it before it draws its first ticket, and
//   from which of two counters it draws depends on what it has read. If one read the incremented epoch, it would draw
//   from the other counter; then the first counter would not get all of its draws, nobody would draw the last ticket,
//   and the epoch would not be incremented. A value cannot depend on itself in this way (PTX ISA, axiom "No-Thin-Air").
// - Step counts that belong to several tasks, of which none can know that it is the last, are incremented by the last
//   block that runs out of tasks. It must not do so before all others have read them: blocks are counted with release
//   and acquire. Launches without such counts skip this, and have no fence at all.
// - Gradients that are regularized in place are overwritten by an UPDATE after REDUCEs of other blocks have read them,
//   with no release and acquire between. What is written depends on the abs-sum, and this on what they have read: a
//   read that saw the new value would depend on itself, as above.
//
// Launches. A launch sees everything that earlier launches in its stream wrote. Counters return to 0 by themselves; the
// epoch increases with every launch that publishes sums, so that a captured launch can be replayed, and no word of an
// earlier launch is mistaken for one of this.
#pragma once

#include <type_traits>

#include "../adamw.h"
#include "../adan.h"
#include "../agr.h"
#include "arguments.h"
#include "chunk.h"
#include "sum.h"
#include "words.h"

namespace agr::cuda {

// The update rules of one kernel. Groups with and without AMSGrad share a launch, so AdamW's kernel has both.
struct AdamWRules {
    using Options = AdamWOptions;
    template <class T>
    using Coefficients = AdamWCoefficients<T>;
};

struct AdanRules {
    using Options = AdanOptions;
    template <class T>
    using Coefficients = AdanCoefficients<T>;
};

struct RegularizeRules {
    using Options = RegularizeOptions;
    template <class T>
    using Coefficients = Regularize::Coefficients<T>;
};

// One block, for tensors of this Format.
template <class Rules, class Format>
class Block {
    using G = typename Format::G;
    using S = typename Format::S;
    using W = typename Format::W;
    using T = typename Format::T;
    using Coefficients = typename Rules::template Coefficients<T>;
    using Options = typename Rules::Options;
    using Inputs = cuda::Inputs<T, Coefficients, Format::stochastic>;
    // A code has no part in how many elements a thread processes at once, since it is the smallest.
    static constexpr int lanes = lanes_for<W, G, S>;
    static constexpr int stride = block_threads * lanes;
    static constexpr int unroll = 8;  // loads of a gradient that a thread has in flight
    static constexpr int warps = block_threads / warp_threads;
    static_assert(warps <= warp_threads, "a single warp adds the sums of all warps");
    static_assert(words_of<Inputs> <= max_input_words, "a tensor's inputs fit into its Progress");

    // The first warp draws tickets and waits for other blocks; the accounting warp, the second, adds up sums, publishes
    // them, and computes coefficients.
    static constexpr int accounting_warp = warps > 1 ? 1 : 0;

    // The coefficients that a thread computed last, with their group and step count: nearly always the next task can
    // use them too.
    struct Cache {
        Coefficients coefficients;
        double t;
        std::int32_t group;
    };

    struct Nothing {};

public:
    // The block's shared memory. The arrays of two are double buffers, used alternately from task to task: while one
    // thread still reads a buffer, another thread, at most one barrier ahead, may write the other buffer.
    struct Shared {
        DeviceTask task[2];
        Sums warp_sums[2][warps];
        Inputs inputs[2];
        std::uint32_t epoch;
        Cache caches[2];  // of the first thread, and of the accounting warp's first thread
        bool last_block;
        std::conditional_t<Format::coded, CodeTables, Nothing> tables;
    };

    AGR_DEVICE Block(const Arguments& args, Shared& shared) : args_(args), shared_(shared) {}

    AGR_DEVICE void run() {
        if (args_.found_inf != nullptr && *args_.found_inf != 0) return;
        if (first_thread()) {
            shared_.epoch = this_epoch(load_relaxed(&args_.control->epoch));
            if (args_.given_tickets)
                next_ticket_ = static_cast<std::uint32_t>(block_index());
            else
                draw_next_ticket();
            shared_.task[0] = next_task();
            shared_.caches[0].group = -1;
        }
        if (accounting_thread()) shared_.caches[1].group = -1;
        if constexpr (Format::coded) shared_.tables.fill();
        block_barrier();
        for (buffer_ = 0;; buffer_ ^= 1) {
            const DeviceTask task = shared_.task[buffer_];
            if (in_accounting_warp() && unaccounted_.tensor >= 0) {
                if (uses(defer_accounting)) prefetch_own_part(task);
                finish_accounting();
            }
            if (task.tensor < 0) break;
            if (!begin(task)) continue;
            if constexpr (std::is_same_v<Rules, AdanRules>)
                update<Adan>(task);
            else if constexpr (std::is_same_v<Rules, RegularizeRules>)
                update<Regularize>(task);
            else if (task.rule == Rule::adamw_amsgrad)
                update<AdamW<true>>(task);
            else
                update<AdamW<false>>(task);
        }
        if (args_.counts_at_end != CountsAtEnd::none || args_.group_counts) count_steps_at_end();
    }

private:
    const Arguments& args_;
    Shared& shared_;
    int buffer_ = 0;                 // which of the double buffers the current task uses
    std::uint32_t next_ticket_ = 0;  // the first thread's
    // The accounting warp's: the chunk that it has yet to account for, if its tensor is not -1, and, in the first lane,
    // how many chunks of its segment had been counted before.
    DeviceTask unaccounted_{TaskKind::reduce, Rule::adamw, false, false, -1, 0, 0};
    std::uint32_t counted_before_ = 0;

    AGR_DEVICE static bool first_thread() { return thread_index() == 0; }
    AGR_DEVICE static bool in_accounting_warp() { return thread_index() / warp_threads == accounting_warp; }
    AGR_DEVICE static bool accounting_thread() { return thread_index() == accounting_warp * warp_threads; }
    AGR_DEVICE static int lane() { return thread_index() % warp_threads; }

    AGR_DEVICE bool uses(Tactic tactic) const { return (args_.tactics & tactic) != 0; }

    // The epoch of this launch, after that of the launch before. An odd one follows the last even one, so that the
    // counter of tickets alternates.
    AGR_DEVICE std::uint32_t this_epoch(std::uint32_t previous) const {
        if (!args_.reduces) return previous;
        return previous + 1 != every_epoch ? previous + 1 : 1;
    }

    // What fences would cost: see Tactic.
    AGR_DEVICE void fence_if_asked_for() const {
        if (!uses(no_fences)) fence_acq_rel();
    }

    // Draws the ticket of the next task. Every task calls this after it has issued its first loads. The ticket is first
    // used before the task's last barrier, when the next task is written to shared memory.
    AGR_DEVICE void draw_next_ticket() {
        // Which counter it is depends on the epoch; see above. All blocks together draw one ticket for each task that
        // is not given to a block, and one each past the last. Then the counter is 0 again.
        if (!first_thread()) return;
        std::uint32_t* counter = &args_.control->next_ticket[shared_.epoch & 1];
        const std::uint32_t given = args_.given_tickets ? static_cast<std::uint32_t>(block_count()) : 0;
        next_ticket_ = given + count_relaxed(counter, last_ticket() - given);
    }

    AGR_DEVICE std::uint32_t last_ticket() const {
        return static_cast<std::uint32_t>(args_.end_task - args_.first_task + block_count() - 1);
    }

    // Called by the first thread: the task of the ticket. After the last task, its tensor is -1.
    AGR_DEVICE DeviceTask next_task() const {
        const std::int64_t index = args_.first_task + next_ticket_;
        if (index < args_.end_task) {
            // In about the time of a task, some block reads the task that lies this far ahead.
            if (uses(prefetch_tasks) && index + block_count() < args_.end_task)
                prefetch(args_.tasks + index + block_count());
            return args_.tasks[index];
        }
        if (next_ticket_ == last_ticket() && args_.reduces) store_relaxed(&args_.control->epoch, shared_.epoch);
        return {TaskKind::whole, Rule::adamw, false, false, -1, 0, 0};
    }

    // The address of a tensor's gradient, or null if it has none in this step.
    AGR_DEVICE const G* gradient_of(std::int32_t tensor) const {
        if (args_.gradients != nullptr) return static_cast<const G*>(args_.gradients[tensor]);
        return load_parameter<const G*>(args_.payload + args_.gradients_offset +
                                        tensor * static_cast<int>(sizeof(void*)));
    }

    // One of the arguments of a group.
    template <class Field>
    AGR_DEVICE Field of_group(std::int32_t group, Field GroupArguments<Options>::* field) const {
        if (args_.groups != nullptr) return static_cast<const GroupArguments<Options>*>(args_.groups)[group].*field;
        const auto* groups = reinterpret_cast<const GroupArguments<Options>*>(args_.payload + args_.groups_offset);
        return load_parameter<Field>(&(groups[group].*field));
    }

    // Runs a REDUCE task, or writes the inputs of another task's update to shared memory: those that the tensor's
    // REDUCE tasks have published, or its own. Meanwhile the chunk is prefetched. Draws the next ticket. Returns
    // whether there is something to update. All kinds of tasks share this code, since a third of a kernel would be
    // copies of the sums.
    AGR_DEVICE bool begin(const DeviceTask& task) {
        const bool reduces = task.kind == TaskKind::reduce;
        const G* gradient = gradient_of(task.tensor);
        // The chunks of a tensor without a gradient add 0 to the sums, but are counted like all others, since other
        // blocks wait for all chunks of a tensor and, for the norm, for all tensors.
        const int elements = gradient != nullptr ? task.elements : 0;
        const bool updates = !reduces && gradient != nullptr;
        gradient += task.chunk * args_.chunk_elements;
        const Row& row = args_.rows[task.tensor];
        const bool squares = reduces && args_.computes_norm;
        const bool sums_itself = updates && task.regularize && !task.reduced;
        const bool own_coefficients = updates && !task.reduced && uses(early_inputs) && accounting_thread();
        Inputs& inputs = shared_.inputs[buffer_];
        float count = 0;
        if (updates) {
            // What is prefetched takes the place of gradients that updates will read from the cache. A tensor of one
            // chunk has no such gradient.
            const int most = task.kind == TaskKind::whole ? most_prefetched : args_.prefetched_elements;
            const int prefetched = elements < most ? elements : most;
            // First what does not depend on the row: the gradient, if nothing has read it before.
            if (!task.reduced) prefetch_elements(gradient, prefetched);
            // Issued before the loads below, and first used after them.
            if (own_coefficients) count = step_count(row);
            prefetch_parameter(task, row, prefetched);
        }
        if (reduces || sums_itself)
            store_warp_sum(thread_sums(gradient, elements, squares), squares);
        else
            draw_next_ticket();
        if (own_coefficients) set_coefficients(inputs, row, count, shared_.caches[1]);
        if (sums_itself) block_barrier();
        if (updates && task.reduced && thread_index() < warp_threads)
            receive<Inputs>(&inputs, args_.progress[task.tensor].inputs, shared_.epoch);
        if (first_thread()) {
            // The load of the task overlaps with what follows. It is not issued earlier, since it needs the ticket.
            const DeviceTask next = next_task();
            if (updates) {
                if (!uses(early_inputs)) set_coefficients(inputs, row, step_count(row), shared_.caches[0]);
                complete_inputs(inputs, task, row, sums_itself);
            }
            shared_.task[buffer_ ^ 1] = next;
        }
        block_barrier();
        // Meanwhile the other warps proceed to the next task.
        if (reduces && in_accounting_warp()) account(task, squares);
        return updates;
    }

    // Sums.

    // The sums over this thread's elements of a chunk. Which elements these are, and the order of additions, do not
    // depend on the gradient's alignment. Draws the next ticket.
    AGR_DEVICE Sums thread_sums(const G* g, int n, bool squares) {
        ThreadSums<T, lanes> thread_sums(squares);
        const int first = thread_index() * lanes;
        int i = first;
        const bool aligned = Packed<G, lanes>::aligned(g);
        // The number of iterations is the same for all threads of the block, because all lanes of a warp must reach
        // scheduling_barrier().
        for (; aligned && i - first + unroll * stride <= n; i += unroll * stride) {
            Packed<G, lanes> packed[unroll];
#pragma unroll
            for (int k = 0; k < unroll; ++k) packed[k].template load<Eviction::evict_last>(g + i + k * stride);
            scheduling_barrier();
            // The ticket must not be drawn before the loads: ptxas tracks the ticket and the loads with the same
            // scoreboard, and would make the loads wait for the ticket. Nor must sums come first, for which loads wait.
            if (i == first) draw_next_ticket();
            scheduling_barrier();
#pragma unroll
            for (int k = 0; k < unroll; ++k) add(thread_sums, packed[k]);
        }
        if (i == first) draw_next_ticket();
        for (; aligned && i + lanes <= n; i += stride) {
            Packed<G, lanes> packed;
            packed.template load<Eviction::evict_last>(g + i);
            add(thread_sums, packed);
        }
        for (; i < n; i += stride) {
            T x[lanes];
#pragma unroll
            for (int k = 0; k < lanes; ++k) x[k] = i + k < n ? static_cast<T>(to_computed(g[i + k])) : T(0);
            thread_sums.add(x);
        }
        const Sums sums = thread_sums.value();
        if (thread_sums.out_of_range(sums)) return sums_in_float64(g, n);
        if (squares && !uses(squares_in_float32)) return {sums.abs_sum, sums_in_float64(g, n).squares};
        return sums;
    }

    AGR_DEVICE static void add(ThreadSums<T, lanes>& sums, const Packed<G, lanes>& packed) {
        T x[lanes];
#pragma unroll
        for (int k = 0; k < lanes; ++k) x[k] = static_cast<T>(packed.get(k));
        sums.add(x);
    }

    // The sums over this thread's elements of a chunk where float32 does not do.
    AGR_DEVICE static Sums sums_in_float64(const G* g, int n) {
        Sums sums;
#pragma unroll 1
        for (int i = thread_index() * lanes; i < n; i += stride)
#pragma unroll 1
            for (int k = i; k < i + lanes && k < n; ++k) {
                const auto x = static_cast<double>(to_computed(g[k]));
                sums.abs_sum += magnitude(x);
                sums.squares = multiply_add(x, x, sums.squares);
            }
        return sums;
    }

    // Adds the sums of each warp's threads, and writes the result to shared memory.
    AGR_DEVICE void store_warp_sum(Sums mine, bool squares) {
        const Sums sums = warp_reduce(mine, squares);
        if (lane() == 0) shared_.warp_sums[buffer_][thread_index() / warp_threads] = sums;
    }

    // Accounting, by the accounting warp.

    // Called after the chunk's warp sums are in shared memory: publishes the sum of the chunk, and counts it. What
    // follows from the count is left to finish_accounting(), since the count arrives later.
    AGR_DEVICE void account(const DeviceTask& task, bool squares) {
        const Row& row = args_.rows[task.tensor];
        const Sums sums = warp_reduce<warps>(lane() < warps ? shared_.warp_sums[buffer_][lane()] : Sums{}, squares);
        const int segment = task.chunk / segment_chunks;
        if (lane() == 0) {
            publish_sums(args_.chunk_sums, row.first_chunk + task.chunk, sums);
            fence_if_asked_for();
            counted_before_ =
                count_relaxed(&args_.segment_chunks_done[row.first_segment + segment], chunks_of(row, segment) - 1u);
        }
        unaccounted_ = task;
    }

    // If the chunk was the last of its segment to be finished, this publishes the sum of the segment; likewise for the
    // tensor, with the inputs of its updates, and, for clipping, the norm of all gradients.
    AGR_DEVICE void finish_accounting() {
        const DeviceTask task = unaccounted_;
        unaccounted_.tensor = -1;
        const Row& row = args_.rows[task.tensor];
        const int segment = task.chunk / segment_chunks;
        const int chunks = chunks_of(row, segment);
        if (!any_of_warp(lane() == 0 && counted_before_ == chunks - 1u)) return;
        fence_if_asked_for();
        Progress& progress = args_.progress[task.tensor];
        Sums sums;
        // First the chunks of the segment, then the segments of the tensor: one loop, for the size of the code.
#pragma unroll 1
        for (bool of_segments = false;; of_segments = true) {
            sums = sum_of(of_segments ? args_.segment_sums : args_.chunk_sums,
                          of_segments ? row.first_segment : row.first_chunk + segment * segment_chunks,
                          of_segments ? row.segments : chunks);
            if (of_segments || row.segments == 1) break;
            bool last = false;
            if (lane() == 0) {
                publish_sums(args_.segment_sums, row.first_segment + segment, sums);
                fence_if_asked_for();
                last = count_relaxed(&progress.segments_done, row.segments - 1u) == row.segments - 1u;
            }
            if (!any_of_warp(last)) return;
            fence_if_asked_for();
        }
        if (lane() == 0 && args_.sums != nullptr) {
            args_.sums[task.tensor] = sums.abs_sum;
            args_.sums[args_.tensors + task.tensor] = sums.squares;
        }
        // Updates of a tensor without a gradient do nothing, and wait for nothing.
        if (lane() == 0 && gradient_of(task.tensor) != nullptr) {
            Inputs inputs;
            set_coefficients(inputs, row, step_count(row), shared_.caches[1]);
            const double scale = scale_of(row.group);
            inputs.sum = AbsSum<T>::of(sums.abs_sum).for_scale(scale);
            inputs.scale = static_cast<T>(scale);
            fence_if_asked_for();
            publish(progress.inputs, inputs, shared_.epoch);
        }

        if (!args_.computes_norm) return;
        bool last = false;
        if (lane() == 0) {
            publish(args_.squared_norms + 2 * row.index, sums.squares, shared_.epoch);
            const std::uint32_t last_tensor = args_.nonempty_tensors - 1u;
            fence_if_asked_for();
            last = count_relaxed(&args_.control->tensors_reduced, last_tensor) == last_tensor;
        }
        if (!any_of_warp(last)) return;
        fence_if_asked_for();
        // The sum is over all parameters, so that its order does not depend on which of them have gradients in this
        // step, nor on which have had any.
        const double squares = sum_of_words(args_.squared_norms, 2, args_.parameters);
        if (lane() == 0) {
            const double unscaled = squares * inverse_grad_scale() * inverse_grad_scale();
            if (args_.squares != nullptr) *args_.squares = unscaled;
            fence_if_asked_for();
            publish(args_.control->clip, clip_coefficient(unscaled), shared_.epoch);
        }
    }

    AGR_DEVICE static int chunks_of(const Row& row, int segment) {
        const int rest = row.chunks - segment * segment_chunks;
        return rest < segment_chunks ? rest : segment_chunks;
    }

    // The words of the sums of a chunk or segment: one abs-sum and, with the norm, one sum of squares.
    AGR_DEVICE std::int64_t words_of_sums(std::int64_t index) const { return index * (args_.computes_norm ? 4 : 2); }

    AGR_DEVICE void publish_sums(Word* words, std::int64_t index, const Sums& sums) const {
        publish(words + words_of_sums(index), sums.abs_sum, shared_.epoch);
        if (args_.computes_norm) publish(words + words_of_sums(index) + 2, sums.squares, shared_.epoch);
    }

    // The sum of the `count` sums from `first` on. Only the first lane gets the result.
    AGR_DEVICE Sums sum_of(const Word* words, std::int64_t first, int count) const {
        Sums sums;
#pragma unroll 1
        for (bool squares = false;; squares = true) {
            const double sum = sum_of_words(words + words_of_sums(first) + (squares ? 2 : 0), words_of_sums(1), count);
            (squares ? sums.squares : sums.abs_sum) = sum;
            if (squares || !args_.computes_norm) return sums;
        }
    }

    // The sum of `count` numbers, whose words are `stride` words apart. Only the first lane gets the result.
    AGR_DEVICE double sum_of_words(const Word* words, std::int64_t stride, int count) const {
        Sums mine;
#pragma unroll 1
        for (int i = lane(); i < count; i += 2 * warp_threads) {
            // Two loads are in flight.
            const int next = i + warp_threads < count ? i + warp_threads : i;
            PublishedDouble one(words + i * stride), other(words + next * stride);
            mine.abs_sum += one.wait(shared_.epoch);
            if (next != i) mine.abs_sum += other.wait(shared_.epoch);
        }
        return warp_reduce(mine, false).abs_sum;
    }

    // min(1, max_grad_norm / (norm + eps)), or NaN if the norm is NaN, like clip_coefficient in agr_cuda/clipping.py.
    AGR_DEVICE double clip_coefficient(double squares) const {
        const double divisor = square_root(squares) + args_.clip_eps;
        if (divisor == 0) return 1;
        const double coefficient = args_.max_grad_norm / divisor;
        return coefficient > 1 ? 1 : coefficient;
    }

    AGR_DEVICE double inverse_grad_scale() const {
        return args_.grad_scale != nullptr ? 1 / static_cast<double>(*args_.grad_scale) : 1.0;
    }

    // The factor of a group's gradients, without clipping.
    AGR_DEVICE double scale_of(std::int32_t group) const {
        return of_group(group, &GroupArguments<Options>::sign) * inverse_grad_scale();
    }

    // The step count of a tensor in device memory, starting at 0; without meaning if the host has it.
    AGR_DEVICE float step_count(const Row& row) const {
        if constexpr (std::is_same_v<Rules, RegularizeRules>) return 0;
        const float* count = row.step != nullptr ? row.step : of_group(row.group, &GroupArguments<Options>::count);
        return count != nullptr ? load_first(count) : 0.0f;
    }

    // Sets the coefficients of this step of a tensor, by one thread; `count` is its step_count(). Increments the
    // tensor's own step count where that is this thread's to do: it is the only one that reads it in this launch.
    AGR_DEVICE void set_coefficients(Inputs& inputs, const Row& row, float count, Cache& cache) const {
        if constexpr (!std::is_same_v<Rules, RegularizeRules>) {
            double t = static_cast<double>(count) + 1;
            if (row.step != nullptr) {
                if (args_.updates && args_.counts_at_end != CountsAtEnd::all && counts_itself(row))
                    *row.step = static_cast<float>(t);
            } else if (of_group(row.group, &GroupArguments<Options>::count) == nullptr) {
                t = of_group(row.group, &GroupArguments<Options>::t);
            }
            if (cache.group != row.group || cache.t != t) {
                Options options = of_group(row.group, &GroupArguments<Options>::options);
                const void* lr = of_group(row.group, &GroupArguments<Options>::lr);
                if (lr != nullptr)
                    options.lr =
                        load_scalar(lr, static_cast<Type>(of_group(row.group, &GroupArguments<Options>::lr_type)));
                cache.coefficients = Coefficients::of(options, t);
                cache.group = row.group;
                cache.t = t;
            }
            if constexpr (Format::stochastic) inputs.step = static_cast<std::uint32_t>(t);
        }
        static_cast<Coefficients&>(inputs) = cache.coefficients;
    }

    // Whether a single thread of the launch reads the tensor's step count: for the one chunk, or for all.
    AGR_DEVICE static bool counts_itself(const Row& row) { return row.chunks == 1 || row.reduced; }

    AGR_DEVICE static double load_scalar(const void* address, Type type) {
        switch (type) {
            case Type::float64:
                return *static_cast<const double*>(address);
            case Type::bfloat16:
                return widened(*static_cast<const bfloat16*>(address));
            case Type::float16:
                return widened(*static_cast<const float16*>(address));
            default:
                return *static_cast<const float*>(address);
        }
    }

    // Updates.

    // Writes the scale and the abs-sum, if they are not the published ones.
    AGR_DEVICE void complete_inputs(Inputs& inputs, const DeviceTask& task, const Row& row, bool sums_itself) {
        const bool clips = args_.clip != nullptr || args_.computes_norm;
        const bool given = !args_.reduces && args_.sums != nullptr;
        if (task.reduced && !clips && !given) return;
        double scale = scale_of(row.group);
        if (clips) {
            scale *= args_.clip != nullptr ? *args_.clip : PublishedDouble(args_.control->clip).wait(shared_.epoch);
            fence_if_asked_for();
        }
        inputs.scale = static_cast<T>(scale);
        if (sums_itself) {
            double abs_sum = 0;
            for (int warp = 0; warp < warps; ++warp) abs_sum += shared_.warp_sums[buffer_][warp].abs_sum;
            inputs.sum = AbsSum<T>::of(abs_sum).for_scale(scale);
        } else if (given) {
            inputs.sum = AbsSum<T>::of(args_.sums[task.tensor]).for_scale(scale);
        } else if (task.regularize) {
            inputs.sum = inputs.sum.for_scale(scale);
        }
    }

    // Prefetches the chunk's first elements of parameter and state. These accesses overlap with the wait for the
    // abs-sum. They are prefetches into the cache and not loads into registers: a chunk does not fit there.
    AGR_DEVICE void prefetch_parameter(const DeviceTask& task, const Row& row, int elements) const {
        if constexpr (!std::is_same_v<Rules, RegularizeRules>) {
            const std::int64_t first = task.chunk * args_.chunk_elements;
            if constexpr (Format::master)
                prefetch_elements(row.master + first, elements);
            else
                prefetch_elements(static_cast<const W*>(row.parameter) + first, elements);
#pragma unroll
            for (int k = 0; k < max_states; ++k)
                if (k < states_of(task.rule)) prefetch_elements(static_cast<const S*>(row.state[k]) + first, elements);
        }
    }

    // By one thread for all, where there is an instruction for that, or by each thread for lines of its own.
    template <class Stored>
    AGR_DEVICE void prefetch_elements(const Stored* from, int elements) const {
        const auto* first = reinterpret_cast<const unsigned char*>(from);
        const int bytes = elements * static_cast<int>(sizeof(Stored));
        if (!uses(prefetch_chunk)) {
            if (thread_index() * lanes < elements) prefetch(from + thread_index() * lanes);
        } else if (prefetches_ranges && uses(prefetch_ranges) && Packed<std::uint32_t, 4>::aligned(from)) {
            // The first thread of the last warp has least else to do.
            if (thread_index() == block_threads - warp_threads && bytes >= 16) prefetch_range(from, bytes / 16 * 16);
        } else {
#pragma unroll 1
            for (int i = thread_index() * line_bytes; i < bytes; i += block_threads * line_bytes) prefetch(first + i);
        }
    }

    template <class R>
    AGR_DEVICE void update(const DeviceTask& task) {
        using Chunk = std::conditional_t<Format::coded, CodedChunk<R, Format>, cuda::Chunk<R, Format>>;
        const Row& row = args_.rows[task.tensor];
        RoundingKey key{};
        if constexpr (Format::stochastic)
            key = {of_group(row.group, &GroupArguments<Options>::seed), shared_.inputs[buffer_].step,
                   static_cast<std::uint32_t>(row.index)};
        const Chunk chunk(row, gradient_of(task.tensor), task.chunk * args_.chunk_elements, task.elements, key);
        const bool regularize = task.regularize;
        // Copied to registers: shared memory would be read again after every store.
        const Inputs inputs = shared_.inputs[buffer_];
        if constexpr (Format::coded) {
#pragma unroll 1
            for (int block = thread_index() / warp_threads; block * scale_block < chunk.elements; block += warps)
                chunk.update(block, regularize, inputs, shared_.tables);
            return;
        } else {
            using Batch = typename Chunk::Batch;
            int i = thread_index() * lanes;
            // Two batches of loads are in flight where there are enough registers. There are not for Adan's 16-bit
            // elements, of which a batch has many, nor for those that are rounded stochastically, nor for Adan's
            // float64: its elements take two registers each, and its arithmetic needs more registers.
            if constexpr (R::states * lanes * (sizeof(T) == 8 ? 4 : 1) <= 24 && !(Format::stochastic && lanes == 8)) {
                // The number of iterations is the same for all threads of the block, as in thread_sums().
                for (const int first = i; chunk.aligned && i - first + 2 * stride <= chunk.elements; i += 2 * stride) {
                    Batch one, other;
                    chunk.load(one, i);
                    chunk.load(other, i + stride);
                    scheduling_barrier();
                    chunk.update(one, i, regularize, inputs);
                    chunk.update(other, i + stride, regularize, inputs);
                }
            }
            for (; chunk.has_batch(i); i += stride) {
                Batch batch;
                chunk.load(batch, i);
                chunk.update(batch, i, regularize, inputs);
            }
            for (; i < chunk.elements; i += stride) chunk.update_scalar(i, regularize, inputs);
        }
    }

    // Called by the accounting warp before it finishes its accounting: prefetches the part of the gradient that its
    // lanes will read first in the task, as the other warps already do.
    AGR_DEVICE void prefetch_own_part(const DeviceTask& task) const {
        if (task.tensor < 0 || task.kind == TaskKind::update) return;
        const G* gradient = gradient_of(task.tensor);
        if (gradient == nullptr) return;
        const G* first = gradient + task.chunk * args_.chunk_elements;
        const int end = task.elements < unroll * stride ? task.elements : unroll * stride;
        // Not unrolled: the compiler would keep all offsets in registers from task to task.
#pragma unroll 1
        for (int i = thread_index() * lanes; i < end; i += stride) prefetch(first + i);
    }

    // Called when the block has no more tasks, in launches with step counts that several tasks read. The last block to
    // get here increments them.
    AGR_DEVICE void count_steps_at_end() {
        block_barrier();
        if (first_thread()) {
            const std::uint32_t last = block_count() - 1u;
            shared_.last_block = count_acq_rel(&args_.control->blocks_done, last) == last;
        }
        block_barrier();
        if (!shared_.last_block) return;
        if (args_.counts_at_end != CountsAtEnd::none)
            for (std::int32_t i = thread_index(); i < args_.tensors; i += block_threads) {
                const Row& row = args_.rows[i];
                const bool mine = args_.counts_at_end == CountsAtEnd::all || !counts_itself(row);
                if (mine && row.step != nullptr && gradient_of(i) != nullptr) *row.step += 1;
            }
        if (args_.group_counts)
            for (std::int32_t i = thread_index(); i < args_.group_count; i += block_threads)
                if (of_group(i, &GroupArguments<Options>::increment_count) != 0)
                    *of_group(i, &GroupArguments<Options>::count) += 1;
    }
};

}  // namespace agr::cuda
