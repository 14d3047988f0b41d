// What one block does in a step: it draws tickets, and reduces and updates the chunks that they stand for.
//
// The grid is persistent. A block draws the next ticket with one atomic addition and does that task, and then the next.
// The protocol and why it ends:
//
// - Tickets are handed out in the plan's order, in which all REDUCE tasks of a tensor stand before its first UPDATE
// (with
//   clipping, those of all tensors), and a block does its tasks in the order of their tickets. It draws the next ticket
//   while it does the task before. Take the smallest ticket that is not done: its block has nothing smaller to do, so
//   it is doing it. If it is an UPDATE, all it could wait for has smaller tickets, and is done. So there is always a
//   block that makes progress, however few blocks the device runs at once: no cooperative launch, and nothing to fear
//   from other kernels beside this one.
// - Whoever writes the last sum of a stretch of chunks adds them, whoever completes the last stretch of a tensor adds
//   those: `arrive` releases what was written before, and acquires what all others had written. Sums are added in a
//   tree whose shape depends on sizes alone, so that the result has the same bits whoever comes last.
// - The tensor's sums are published by a release of the step's epoch, which UPDATE acquires. The epoch is counted in
// the
//   device's memory, so that a captured launch can be replayed; the last block out raises it and leaves every counter
//   as it found it, so that nothing has to be cleared between launches.
#pragma once

#include <type_traits>

#include "../adamw.h"
#include "../adan.h"
#include "../agr.h"
#include "arguments.h"
#include "packed.h"
#include "sum.h"

namespace agr::cuda {

// The rules that one kernel takes: groups with and without AMSGrad share a launch.
struct AdamWRules {
    using Options = AdamWOptions;
    template <class T>
    using Numbers = AdamWCoefficients<T>;

    template <class T>
    AGR_DEVICE static AdamWCoefficients<T> numbers(const AdamWOptions& options, double t) {
        return AdamWCoefficients<T>::of(options, t);
    }
};

struct AdanRules {
    using Options = AdanOptions;
    template <class T>
    using Numbers = AdanCoefficients<T>;

    template <class T>
    AGR_DEVICE static AdanCoefficients<T> numbers(const AdanOptions& options, double t) {
        return AdanCoefficients<T>::of(options, t);
    }
};

template <class Rules, class P, class G, class S>
class Block {
    using T = computed_in<P>;
    using Numbers = typename Rules::template Numbers<T>;
    using Options = typename Rules::Options;
    static constexpr int lanes = lanes_for<P, G, S>;
    static constexpr int stride = block_threads * lanes;
    static constexpr int warps = block_threads / warp_threads;
    static_assert(warps <= warp_threads, "a warp adds the sums of all warps");

    // What the threads of an update have to know.
    struct Decided {
        AbsSum<T> sum;
        T scale;
        Numbers numbers;
    };

public:
    // The block's own memory. What is there twice takes turns from task to task: a thread may still read one while
    // another, at most one barrier ahead, writes the other.
    struct Shared {
        Task task[2];
        Sums warp_sums[2][warps];
        Decided decided[2];
        // Of the first thread alone: this step's epoch, and the numbers it made last, which nearly always serve for the
        // next task too.
        std::uint32_t epoch;
        Numbers numbers;
        double numbers_t;
        std::int32_t numbers_group;
        bool last_out;
    };

    AGR_DEVICE Block(const Arguments& arguments, Shared& shared) : a(arguments), shared_(shared) {}

    AGR_DEVICE void run() {
        if (a.found_inf != nullptr && *a.found_inf != 0) return;
        if (first_thread()) {
            shared_.epoch = a.control->epoch + 1;
            shared_.numbers_group = -1;
            shared_.task[0] = task_of(draw(&a.control->ticket));
        }
        block_barrier();
        for (turn_ = 0;; turn_ ^= 1) {
            const Task task = shared_.task[turn_];
            if (task.tensor < 0) break;
            if (task.kind == TaskKind::reduce) {
                if (a.clips)
                    reduce<true>(task);
                else
                    reduce<false>(task);
            } else if constexpr (std::is_same_v<Rules, AdanRules>) {
                update<Adan>(task);
            } else {
                if (a.rows[task.tensor].rule == Rule::adamw_amsgrad)
                    update<AdamW<true>>(task);
                else
                    update<AdamW<false>>(task);
            }
        }
        leave();
    }

private:
    const Arguments& a;
    Shared& shared_;
    int turn_ = 0;
    // Of the first thread alone.
    std::uint32_t ticket_ = 0;

    AGR_DEVICE static bool first_thread() { return thread_index() == 0; }

    // In every task, after its first loads are under way; looked at before its last barrier, when the next task is
    // written down for all.
    AGR_DEVICE void draw_next() {
        if (first_thread()) ticket_ = draw(&a.control->ticket);
    }

    AGR_DEVICE Task task_of(std::uint32_t ticket) const {
        const std::int64_t index = a.first_task + ticket;
        return index < a.end_task ? a.tasks[index] : Task{TaskKind::whole, -1, 0, 0};
    }

    // Null for a tensor that has none in this step.
    AGR_DEVICE const G* gradient_of(std::int32_t tensor) const {
        if (a.gradients != nullptr) return static_cast<const G*>(a.gradients[tensor]);
        return static_cast<const G*>(reinterpret_cast<const void* const*>(a.payload + a.gradients_at)[tensor]);
    }

    AGR_DEVICE const GroupOf<Options>& group(std::int32_t index) const {
        const void* groups = a.groups != nullptr ? a.groups : a.payload + a.groups_at;
        return static_cast<const GroupOf<Options>*>(groups)[index];
    }

    // REDUCE.

    template <bool squares>
    AGR_DEVICE void reduce(const Task& task) {
        const G* g = gradient_of(task.tensor);
        // What has no gradient adds nothing, but is counted: others wait for all of a tensor's chunks and all tensors.
        const int elements = g != nullptr ? task.elements : 0;
        share(sums_of<squares>(g + task.chunk * a.chunk_elements, elements), squares);
        if (first_thread()) shared_.task[turn_ ^ 1] = task_of(ticket_);
        block_barrier();
        // The other warps go on with the next task meanwhile.
        if (thread_index() < warp_threads) account(task, squares);
    }

    // This thread's part of a chunk's sums: of the same elements, in the same order, however they are aligned. Draws
    // the next ticket on the way.
    template <bool squares>
    AGR_DEVICE Sums sums_of(const G* g, int n) {
        constexpr int ways = 8;  // loads of a thread in flight
        LaneSums<T, lanes, squares> sums;
        const int first = thread_index() * lanes;
        int i = first;
        const bool aligned = Packed<G, lanes>::aligned(g);
        // As often in every thread of the block: all lanes of a warp have to come to loads_first.
        for (; aligned && i - first + ways * stride <= n; i += ways * stride) {
            Packed<G, lanes> packed[ways];
#pragma unroll
            for (int way = 0; way < ways; ++way) packed[way].template load<Stay::long_enough>(g + i + way * stride);
            loads_first();
            // Not before them: ptxas counts ticket and loads with one scoreboard, and has these wait for that.
            if (i == first) draw_next();
#pragma unroll
            for (int way = 0; way < ways; ++way) add(sums, packed[way]);
        }
        if (i == first) draw_next();
        for (; aligned && i + lanes <= n; i += stride) {
            Packed<G, lanes> packed;
            packed.template load<Stay::long_enough>(g + i);
            add(sums, packed);
        }
        for (; i < n; i += stride) {
#pragma unroll
            for (int lane = 0; lane < lanes; ++lane)
                if (i + lane < n) sums.add(lane, static_cast<T>(stored(g[i + lane])));
        }
        return sums.value();
    }

    template <bool squares>
    AGR_DEVICE static void add(LaneSums<T, lanes, squares>& sums, const Packed<G, lanes>& packed) {
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) sums.add(lane, static_cast<T>(packed.get(lane)));
    }

    AGR_DEVICE void share(Sums mine, bool squares) {
        const Sums sums = sum_of_warp(mine, squares);
        if (thread_index() % warp_threads == 0) shared_.warp_sums[turn_][thread_index() / warp_threads] = sums;
    }

    // Of the first warp: adds up the chunk, and whatever it was the last missing part of.
    AGR_DEVICE void account(const Task& task, bool squares) {
        const Row& row = a.rows[task.tensor];
        const int lane = thread_index();
        Sums sums = sum_of_warp(lane < warps ? shared_.warp_sums[turn_][lane] : Sums{}, squares);
        const std::int64_t stretch = task.chunk / stretch_chunks;
        const std::int64_t first_chunk = stretch * stretch_chunks;
        const std::int64_t chunks =
            row.chunks - first_chunk < stretch_chunks ? row.chunks - first_chunk : stretch_chunks;
        Sums* of_chunks = a.chunk_sums + row.first_chunk + first_chunk;
        if (lane == 0) of_chunks[task.chunk - first_chunk] = sums;
        if (!last_to_arrive(&a.arrived[row.first_stretch + stretch], chunks)) return;
        sums = sum_of(chunks, squares, [&](std::int64_t i) { return of_chunks[i]; });

        Progress* progress = a.progress + task.tensor;
        if (row.stretches > 1) {
            Sums* of_stretches = a.stretch_sums + row.first_stretch;
            if (lane == 0) of_stretches[stretch] = sums;
            if (!last_to_arrive(&progress->arrived, row.stretches)) return;
            sums = sum_of(row.stretches, squares, [&](std::int64_t i) { return of_stretches[i]; });
        }
        if (lane == 0) {
            progress->sums = sums;
            if (squares) a.squares_of[row.index] = sums.squares;
            store_release(&progress->summed, shared_.epoch);
        }

        if (!squares || !last_to_arrive(&a.control->arrived, a.summed)) return;
        // In an order that does not depend on which parameters have gradients, nor on which have had any.
        sums = sum_of(a.parameters, true, [&](std::int64_t i) { return Sums{0, a.squares_of[i]}; });
        if (lane == 0) {
            const double unscaled = sums.squares * unscaling() * unscaling();
            if (a.squares != nullptr) *a.squares = unscaled;
            a.control->clip = clip_of(unscaled);
            store_release(&a.control->known, shared_.epoch);
        }
    }

    // Of a warp, whose first lane has written its part: whether all `count` parts are there. Whoever comes last sees
    // them all, in every lane, and leaves the counter at zero for the next step.
    AGR_DEVICE static bool last_to_arrive(std::uint32_t* arrived, std::int64_t count) {
        bool last = false;
        if (thread_index() == 0) {
            last = arrive(arrived) + 1 == static_cast<std::uint32_t>(count);
            if (last) *arrived = 0;
        }
        last = any_of_warp(last);
        // What the first lane acquired, the others have after this.
        warp_barrier();
        return last;
    }

    template <class At>
    AGR_DEVICE static Sums sum_of(std::int64_t count, bool squares, const At& at) {
        Sums mine;
#pragma unroll 4
        for (std::int64_t i = thread_index(); i < count; i += warp_threads) {
            const Sums sums = at(i);
            mine.abs_sum += sums.abs_sum;
            mine.squares += sums.squares;
        }
        return sum_of_warp(mine, squares);
    }

    // min(1, max_grad_norm / (norm + eps)); NaN for a norm of NaN. As clip_coefficient in agr_cuda/clipping.py.
    AGR_DEVICE double clip_of(double squares) const {
        const double divisor = square_root(squares) + a.clip_eps;
        if (divisor == 0) return 1;
        const double coefficient = a.max_grad_norm / divisor;
        return coefficient > 1 ? 1 : coefficient;
    }

    AGR_DEVICE double unscaling() const {
        return a.grad_scale != nullptr ? 1 / static_cast<double>(*a.grad_scale) : 1.0;
    }

    // UPDATE, and WHOLE, which sums up first.

    template <class R>
    struct Batch {
        Packed<P, lanes> parameter;
        Packed<G, lanes> gradient;
        Packed<S, lanes> state[R::states];
    };

    // A chunk's elements in all tensors.
    template <class R>
    struct Part {
        P* parameter;
        const G* gradient;
        S* state[R::states];
        int elements;
        bool aligned;

        // Whether all lanes from i on are there, and can be loaded together.
        AGR_DEVICE bool wide(int i) const { return aligned && i + lanes <= elements; }

        AGR_DEVICE void fetch(int i) const {
            cuda::fetch(parameter + i);
#pragma unroll
            for (int k = 0; k < R::states; ++k) cuda::fetch(state[k] + i);
        }

        AGR_DEVICE void load(Batch<R>& batch, int i) const {
            batch.parameter.template load<Stay::briefly>(parameter + i);
#pragma unroll
            for (int k = 0; k < R::states; ++k) batch.state[k].template load<Stay::briefly>(state[k] + i);
            // The gradient is not wanted again after this.
            batch.gradient.template load<Stay::briefly>(gradient + i);
        }

        AGR_DEVICE void update(Batch<R>& batch, int i, bool regularize, const Decided& decided) const {
            T p[lanes], s[R::states][lanes];
#pragma unroll
            for (int lane = 0; lane < lanes; ++lane) {
                p[lane] = batch.parameter.get(lane);
                T now[R::states];
#pragma unroll
                for (int k = 0; k < R::states; ++k) now[k] = batch.state[k].get(lane);
                apply<R>(p[lane], static_cast<T>(batch.gradient.get(lane)), now, regularize, decided);
#pragma unroll
                for (int k = 0; k < R::states; ++k) s[k][lane] = now[k];
            }
            batch.parameter.set(p);
            batch.parameter.store(parameter + i);
#pragma unroll
            for (int k = 0; k < R::states; ++k) {
                batch.state[k].set(s[k]);
                batch.state[k].store(state[k] + i);
            }
        }

        // Elements that cannot be loaded together.
        AGR_DEVICE void update_singly(int i, bool regularize, const Decided& decided) const {
            const int end = i + lanes < elements ? i + lanes : elements;
#pragma unroll 1
            for (; i < end; ++i) {
                T p = stored(parameter[i]);
                T now[R::states];
#pragma unroll
                for (int k = 0; k < R::states; ++k) now[k] = stored(state[k][i]);
                apply<R>(p, static_cast<T>(stored(gradient[i])), now, regularize, decided);
                parameter[i] = rounded<P>(p);
#pragma unroll
                for (int k = 0; k < R::states; ++k) state[k][i] = rounded<S>(now[k]);
            }
        }
    };

    template <class R>
    AGR_DEVICE static void apply(T& p, T g, T* states, bool regularize, const Decided& decided) {
        if (regularize) g = regularized(g, decided.sum);
        R::apply(p, g * decided.scale, states, decided.numbers);
    }

    template <class R>
    AGR_DEVICE Part<R> part_of(const Task& task, const Row& row, const G* gradient) const {
        const std::int64_t first = task.chunk * a.chunk_elements;
        Part<R> part;
        part.parameter = static_cast<P*>(row.parameter) + first;
        part.gradient = gradient + first;
        part.elements = task.elements;
        part.aligned = Packed<P, lanes>::aligned(part.parameter) && Packed<G, lanes>::aligned(part.gradient);
#pragma unroll
        for (int k = 0; k < R::states; ++k) {
            part.state[k] = static_cast<S*>(row.state[k]) + first;
            part.aligned = part.aligned && Packed<S, lanes>::aligned(part.state[k]);
        }
        return part;
    }

    template <class R>
    AGR_DEVICE void update(const Task& task) {
        const G* gradient = gradient_of(task.tensor);
        if (gradient == nullptr) {
            draw_next();
            if (first_thread()) shared_.task[turn_ ^ 1] = task_of(ticket_);
            block_barrier();
            return;
        }
        const Row& row = a.rows[task.tensor];
        const Part<R> part = part_of<R>(task, row, gradient);
        const bool regularize = row.regularize;
        int i = thread_index() * lanes;
        // Under way before anything waits; and in the cache, not in registers, of which the decision takes many.
        if (part.wide(i)) part.fetch(i);
        const bool whole = task.kind == TaskKind::whole;
        if (whole && regularize) {
            share(sums_of<false>(part.gradient, part.elements), false);
            block_barrier();
        } else {
            draw_next();
        }
        if (first_thread()) decide(task, row, whole, regularize);
        block_barrier();
        // A copy, since what stands in memory would be read again after every store.
        const Decided decided = shared_.decided[turn_];
        // Two batches of loads under way where registers suffice: not for Adan's 16-bit elements, which are many and
        // wide, nor its float64, each of which takes two registers, and its arithmetic more.
        if constexpr (R::states * lanes * (sizeof(T) == 8 ? 4 : 1) <= 24) {
            // As often in every thread of the block, as in sums_of.
            for (const int first = i; part.aligned && i - first + 2 * stride <= part.elements; i += 2 * stride) {
                Batch<R> one, other;
                part.load(one, i);
                part.load(other, i + stride);
                loads_first();
                part.update(one, i, regularize, decided);
                part.update(other, i + stride, regularize, decided);
            }
        }
        for (; part.wide(i); i += stride) {
            Batch<R> batch;
            part.load(batch, i);
            part.update(batch, i, regularize, decided);
        }
        for (; i < part.elements; i += stride) part.update_singly(i, regularize, decided);
    }

    // Of the first thread: waits for what the update depends on, and writes it down for all, and the next task.
    AGR_DEVICE void decide(const Task& task, const Row& row, bool whole, bool regularize) {
        const GroupOf<Options>& options = group(row.group);
        const double t = row.step != nullptr        ? static_cast<double>(*row.step) + 1
                         : options.count != nullptr ? static_cast<double>(*options.count) + 1
                                                    : options.t;
        if (shared_.numbers_group != row.group || shared_.numbers_t != t) {
            Options now = options.options;
            if (options.lr != nullptr) now.lr = number(options.lr, options.lr_type);
            shared_.numbers = Rules::template numbers<T>(now, t);
            shared_.numbers_group = row.group;
            shared_.numbers_t = t;
        }
        Decided decided;
        decided.numbers = shared_.numbers;
        const Progress* progress = a.progress + task.tensor;

        double scale = options.sign * unscaling();
        // On its way while the rest is waited for; not sooner, since it waits for the ticket.
        const Task next = task_of(ticket_);
        if (a.clip != nullptr) {
            scale *= *a.clip;
        } else if (a.clips) {
            wait_for(&a.control->known);
            scale *= a.control->clip;
        }
        double abs_sum = 0;
        if (regularize && whole) {
            for (int warp = 0; warp < warps; ++warp) abs_sum += shared_.warp_sums[turn_][warp].abs_sum;
        } else if (regularize) {
            wait_for(&progress->summed);
            abs_sum = progress->sums.abs_sum;
        }
        decided.sum = AbsSum<T>::of(abs_sum, scale);
        decided.scale = static_cast<T>(scale);
        shared_.decided[turn_] = decided;
        shared_.task[turn_ ^ 1] = next;
    }

    AGR_DEVICE void wait_for(const std::uint32_t* flag) const {
        // It is mostly there at the first look, which has to be an acquire. The looks after that are relaxed, since
        // every acquire empties the first-level cache, and the loop's own acquires once more what they found: it reads
        // what the last of them read or something later, and nothing later is written in this step, so that it reads
        // from the release, and what was written before that is visible.
        while (load_acquire(flag) != shared_.epoch) {
            do {
                pause();
            } while (load_relaxed(flag) != shared_.epoch);
        }
    }

    AGR_DEVICE static double number(const void* address, Type type) {
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

    // The last block out notes the step, and leaves the counters for the next launch.
    AGR_DEVICE void leave() {
        if (first_thread())
            shared_.last_out = arrive(&a.control->left) + 1 == static_cast<std::uint32_t>(block_count());
        block_barrier();
        if (!shared_.last_out) return;
        if (a.ends) {
            for (std::int32_t i = thread_index(); i < a.tensors; i += block_threads)
                if (a.rows[i].step != nullptr && gradient_of(i) != nullptr) *a.rows[i].step += 1;
            for (std::int32_t i = thread_index(); i < a.group_count; i += block_threads)
                if (group(i).counts) *group(i).count += 1;
        }
        if (first_thread()) {
            a.control->ticket = 0;
            a.control->left = 0;
            if (a.ends) a.control->epoch = shared_.epoch;
        }
    }
};

}  // namespace agr::cuda
