// The device code of a step: what one block of the persistent grid does, for AdamW and for Adan.
//
// A block draws a ticket with one atomic addition, runs the task with that number, and draws the next ticket. It does
// so until no tasks are left. A REDUCE task adds up a chunk's gradient, an UPDATE task waits for the abs-sum of the
// chunk's tensor and applies the update rule, and a WHOLE task does both for a tensor of one chunk.
//
// Forward progress. Tickets are handed out in the plan's order. In that order, all REDUCE tasks of a tensor come before
// its first UPDATE; with clipping, the REDUCE tasks of all tensors do. A block draws its next ticket while it runs the
// task before, but runs its tasks in ticket order. Consider the unfinished task with the smallest ticket. Its block has
// no earlier task to finish, so it is running this one. If the task is an UPDATE, everything it can wait for has a
// smaller ticket and is finished. So at least one block always makes progress, however few blocks the device runs at
// the same time. The kernel needs no cooperative launch, and other kernels may run beside it.
//
// Sums. The block that writes the last chunk sum of a segment adds the segment's chunk sums, and the block that
// completes the last segment of a tensor adds the tensor's segment sums. `arrive` is the atomic that tells a block that
// it is the last: it releases what this block wrote before, and acquires what all other blocks released. Sums are added
// in a tree whose shape depends on sizes alone, so the result has the same bits whichever block is the last. There are
// no floating-point atomics.
//
// Epochs. The tensor's sums are published by a release store of the current epoch, which UPDATE acquires. The epoch is
// a step count in device memory, so that a captured launch can be replayed; the last block to finish increments it.
// Every counter is reset to 0 once it has reached its final value, so nothing has to be cleared between launches.
#pragma once

#include <type_traits>

#include "../adamw.h"
#include "../adan.h"
#include "../agr.h"
#include "arguments.h"
#include "packed.h"
#include "sum.h"

namespace agr::cuda {

// The update rules of one kernel. Groups with and without AMSGrad share a launch, so AdamW's kernel has both.
struct AdamWRules {
    using Options = AdamWOptions;
    template <class T>
    using Coefficients = AdamWCoefficients<T>;

    template <class T>
    AGR_DEVICE static AdamWCoefficients<T> coefficients(const AdamWOptions& options, double t) {
        return AdamWCoefficients<T>::of(options, t);
    }
};

struct AdanRules {
    using Options = AdanOptions;
    template <class T>
    using Coefficients = AdanCoefficients<T>;

    template <class T>
    AGR_DEVICE static AdanCoefficients<T> coefficients(const AdanOptions& options, double t) {
        return AdanCoefficients<T>::of(options, t);
    }
};

// One block, for elements of types P (parameter), G (gradient) and S (state).
template <class Rules, class P, class G, class S>
class Block {
    using T = computed_in<P>;
    using Coefficients = typename Rules::template Coefficients<T>;
    using Options = typename Rules::Options;
    static constexpr int lanes = lanes_for<P, G, S>;
    static constexpr int stride = block_threads * lanes;
    static constexpr int warps = block_threads / warp_threads;
    static_assert(warps <= warp_threads, "a single warp adds the sums of all warps");

    // The inputs of an update that are the same for all elements of a chunk.
    struct UpdateInputs {
        AbsSum<T> sum;
        T scale;
        Coefficients coefficients;
    };

public:
    // The block's shared memory. The arrays of two are double buffers, used alternately from task to task: while one
    // thread still reads a buffer, another thread, at most one barrier ahead, may write the other buffer.
    struct Shared {
        Task task[2];
        Sums warp_sums[2][warps];
        UpdateInputs inputs[2];
        // The members below, except `last_block`, are used by the first thread only. They are the epoch of this step,
        // and the coefficients that it computed last, with their group and step count: nearly always the next task can
        // use them too.
        std::uint32_t epoch;
        Coefficients coefficients;
        double coefficients_t;
        std::int32_t coefficients_group;
        bool last_block;
    };

    AGR_DEVICE Block(const Arguments& args, Shared& shared) : args_(args), shared_(shared) {}

    AGR_DEVICE void run() {
        if (args_.found_inf != nullptr && *args_.found_inf != 0) return;
        if (first_thread()) {
            shared_.epoch = args_.control->epoch + 1;
            shared_.coefficients_group = -1;
            shared_.task[0] = task_of(draw_ticket(&args_.control->next_ticket));
        }
        block_barrier();
        for (buffer_ = 0;; buffer_ ^= 1) {
            const Task task = shared_.task[buffer_];
            if (task.tensor < 0) break;
            if (task.kind == TaskKind::reduce) {
                if (args_.computes_norm)
                    reduce<true>(task);
                else
                    reduce<false>(task);
            } else if constexpr (std::is_same_v<Rules, AdanRules>) {
                update<Adan>(task);
            } else {
                if (args_.rows[task.tensor].rule == Rule::adamw_amsgrad)
                    update<AdamW<true>>(task);
                else
                    update<AdamW<false>>(task);
            }
        }
        finish();
    }

private:
    const Arguments& args_;
    Shared& shared_;
    int buffer_ = 0;                 // which of the double buffers the current task uses
    std::uint32_t next_ticket_ = 0;  // valid in the first thread only

    AGR_DEVICE static bool first_thread() { return thread_index() == 0; }

    // Draws the ticket of the next task. Every task calls this after it has issued its first loads. The ticket is first
    // used before the task's last barrier, when the next task is written to shared memory.
    AGR_DEVICE void draw_next_ticket() {
        if (first_thread()) next_ticket_ = draw_ticket(&args_.control->next_ticket);
    }

    // The task of a ticket. After the last task, its tensor is -1.
    AGR_DEVICE Task task_of(std::uint32_t ticket) const {
        const std::int64_t index = args_.first_task + ticket;
        return index < args_.end_task ? args_.tasks[index] : Task{TaskKind::whole, -1, 0, 0};
    }

    // The address of a tensor's gradient, or null if it has none in this step.
    AGR_DEVICE const G* gradient_of(std::int32_t tensor) const {
        if (args_.gradients != nullptr) return static_cast<const G*>(args_.gradients[tensor]);
        return static_cast<const G*>(
            reinterpret_cast<const void* const*>(args_.payload + args_.gradients_offset)[tensor]);
    }

    AGR_DEVICE const GroupArguments<Options>& group(std::int32_t index) const {
        const void* groups = args_.groups != nullptr ? args_.groups : args_.payload + args_.groups_offset;
        return static_cast<const GroupArguments<Options>*>(groups)[index];
    }

    // REDUCE tasks.

    template <bool squares>
    AGR_DEVICE void reduce(const Task& task) {
        const G* g = gradient_of(task.tensor);
        // The chunks of a tensor without a gradient add 0 to the sums, but are counted like all others, since other
        // blocks wait for all chunks of a tensor and, for the norm, for all tensors.
        const int elements = g != nullptr ? task.elements : 0;
        store_warp_sum(thread_sums<squares>(g + task.chunk * args_.chunk_elements, elements), squares);
        if (first_thread()) shared_.task[buffer_ ^ 1] = task_of(next_ticket_);
        block_barrier();
        // Meanwhile the other warps proceed to the next task.
        if (thread_index() < warp_threads) finish_chunk(task, squares);
    }

    // The sums over this thread's elements of a chunk. Which elements these are, and the order of additions, do not
    // depend on the gradient's alignment. Draws the next ticket.
    template <bool squares>
    AGR_DEVICE Sums thread_sums(const G* g, int n) {
        constexpr int unroll = 8;  // loads in flight per thread
        LaneSums<T, lanes, squares> sums;
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
            // scoreboard, and would make the loads wait for the ticket.
            if (i == first) draw_next_ticket();
#pragma unroll
            for (int k = 0; k < unroll; ++k) add(sums, packed[k]);
        }
        if (i == first) draw_next_ticket();
        for (; aligned && i + lanes <= n; i += stride) {
            Packed<G, lanes> packed;
            packed.template load<Eviction::evict_last>(g + i);
            add(sums, packed);
        }
        for (; i < n; i += stride) {
#pragma unroll
            for (int lane = 0; lane < lanes; ++lane)
                if (i + lane < n) sums.add(lane, static_cast<T>(to_computed(g[i + lane])));
        }
        return sums.value();
    }

    template <bool squares>
    AGR_DEVICE static void add(LaneSums<T, lanes, squares>& sums, const Packed<G, lanes>& packed) {
#pragma unroll
        for (int lane = 0; lane < lanes; ++lane) sums.add(lane, static_cast<T>(packed.get(lane)));
    }

    // Adds the sums of each warp's threads, and writes the result to shared memory.
    AGR_DEVICE void store_warp_sum(Sums mine, bool squares) {
        const Sums sums = warp_reduce(mine, squares);
        if (thread_index() % warp_threads == 0) shared_.warp_sums[buffer_][thread_index() / warp_threads] = sums;
    }

    // Called by the first warp after the chunk's warp sums are in shared memory: writes the sum of the chunk. If the
    // chunk is the last of its segment to be finished, this also writes the sum of the segment; likewise for the tensor
    // and, for clipping, the norm of all gradients.
    AGR_DEVICE void finish_chunk(const Task& task, bool squares) {
        const Row& row = args_.rows[task.tensor];
        const int lane = thread_index();
        Sums sums = warp_reduce(lane < warps ? shared_.warp_sums[buffer_][lane] : Sums{}, squares);
        const std::int64_t segment = task.chunk / segment_chunks;
        const std::int64_t first_chunk = segment * segment_chunks;
        const std::int64_t chunks =
            row.chunks - first_chunk < segment_chunks ? row.chunks - first_chunk : segment_chunks;
        Sums* chunk_sums = args_.chunk_sums + row.first_chunk + first_chunk;
        if (lane == 0) chunk_sums[task.chunk - first_chunk] = sums;
        if (!last_to_arrive(&args_.segment_chunks_done[row.first_segment + segment], chunks)) return;
        sums = warp_sum_of(chunks, squares, [&](std::int64_t i) { return chunk_sums[i]; });

        Progress* progress = args_.progress + task.tensor;
        if (row.segments > 1) {
            Sums* segment_sums = args_.segment_sums + row.first_segment;
            if (lane == 0) segment_sums[segment] = sums;
            if (!last_to_arrive(&progress->segments_done, row.segments)) return;
            sums = warp_sum_of(row.segments, squares, [&](std::int64_t i) { return segment_sums[i]; });
        }
        if (lane == 0) {
            progress->sums = sums;
            if (squares) args_.squared_norms[row.index] = sums.squares;
            store_release(&progress->sums_epoch, shared_.epoch);
        }

        if (!squares || !last_to_arrive(&args_.control->tensors_reduced, args_.nonempty_tensors)) return;
        // The sum is over all parameters, so that its order does not depend on which of them have gradients in this
        // step, nor on which have had any.
        sums = warp_sum_of(args_.parameters, true, [&](std::int64_t i) { return Sums{0, args_.squared_norms[i]}; });
        if (lane == 0) {
            const double unscaled = sums.squares * inverse_grad_scale() * inverse_grad_scale();
            if (args_.squares != nullptr) *args_.squares = unscaled;
            args_.control->clip = clip_coefficient(unscaled);
            store_release(&args_.control->clip_epoch, shared_.epoch);
        }
    }

    // Called by the first warp after its first lane has written its part: counts the part, and returns whether all
    // `count` parts are written now. If so, all lanes see all parts, and the counter is 0 again for the next step.
    AGR_DEVICE static bool last_to_arrive(std::uint32_t* arrived, std::int64_t count) {
        bool last = false;
        if (thread_index() == 0) {
            last = arrive(arrived) + 1 == static_cast<std::uint32_t>(count);
            if (last) *arrived = 0;
        }
        last = any_of_warp(last);
        // Makes what the first lane acquired visible to the other lanes.
        warp_barrier();
        return last;
    }

    // The sum of at(0) to at(count - 1), computed by a warp. Only the first lane gets the result.
    template <class At>
    AGR_DEVICE static Sums warp_sum_of(std::int64_t count, bool squares, const At& at) {
        Sums mine;
#pragma unroll 4
        for (std::int64_t i = thread_index(); i < count; i += warp_threads) {
            const Sums sums = at(i);
            mine.abs_sum += sums.abs_sum;
            mine.squares += sums.squares;
        }
        return warp_reduce(mine, squares);
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

    // UPDATE tasks, and WHOLE tasks, which compute the abs-sum first.

    // The elements that a thread loads together: `lanes` neighbouring elements of each tensor.
    template <class R>
    struct Batch {
        Packed<P, lanes> parameter;
        Packed<G, lanes> gradient;
        Packed<S, lanes> state[R::states];
    };

    // The elements of a chunk in the parameter, the gradient and the state tensors.
    template <class R>
    struct Chunk {
        P* parameter;
        const G* gradient;
        S* state[R::states];
        int elements;
        bool aligned;

        // Whether `lanes` elements from i on exist and can be loaded as a batch.
        AGR_DEVICE bool has_batch(int i) const { return aligned && i + lanes <= elements; }

        AGR_DEVICE void prefetch(int i) const {
            cuda::prefetch(parameter + i);
#pragma unroll
            for (int k = 0; k < R::states; ++k) cuda::prefetch(state[k] + i);
        }

        AGR_DEVICE void load(Batch<R>& batch, int i) const {
            batch.parameter.template load<Eviction::evict_first>(parameter + i);
#pragma unroll
            for (int k = 0; k < R::states; ++k) batch.state[k].template load<Eviction::evict_first>(state[k] + i);
            // This is the last use of the gradient.
            batch.gradient.template load<Eviction::evict_first>(gradient + i);
        }

        AGR_DEVICE void update(Batch<R>& batch, int i, bool regularize, const UpdateInputs& inputs) const {
            T p[lanes], s[R::states][lanes];
#pragma unroll
            for (int lane = 0; lane < lanes; ++lane) {
                p[lane] = batch.parameter.get(lane);
                T states[R::states];
#pragma unroll
                for (int k = 0; k < R::states; ++k) states[k] = batch.state[k].get(lane);
                apply<R>(p[lane], static_cast<T>(batch.gradient.get(lane)), states, regularize, inputs);
#pragma unroll
                for (int k = 0; k < R::states; ++k) s[k][lane] = states[k];
            }
            batch.parameter.set(p);
            batch.parameter.store(parameter + i);
#pragma unroll
            for (int k = 0; k < R::states; ++k) {
                batch.state[k].set(s[k]);
                batch.state[k].store(state[k] + i);
            }
        }

        // Updates the elements from i on, at most `lanes` of them, one at a time: for elements that are not aligned,
        // and for the end of a chunk.
        AGR_DEVICE void update_scalar(int i, bool regularize, const UpdateInputs& inputs) const {
            const int end = i + lanes < elements ? i + lanes : elements;
#pragma unroll 1
            for (; i < end; ++i) {
                T p = to_computed(parameter[i]);
                T states[R::states];
#pragma unroll
                for (int k = 0; k < R::states; ++k) states[k] = to_computed(state[k][i]);
                apply<R>(p, static_cast<T>(to_computed(gradient[i])), states, regularize, inputs);
                parameter[i] = to_stored<P>(p);
#pragma unroll
                for (int k = 0; k < R::states; ++k) state[k][i] = to_stored<S>(states[k]);
            }
        }
    };

    template <class R>
    AGR_DEVICE static void apply(T& p, T g, T* states, bool regularize, const UpdateInputs& inputs) {
        if (regularize) g = regularized(g, inputs.sum);
        R::apply(p, g * inputs.scale, states, inputs.coefficients);
    }

    template <class R>
    AGR_DEVICE Chunk<R> chunk_of(const Task& task, const Row& row, const G* gradient) const {
        const std::int64_t first = task.chunk * args_.chunk_elements;
        Chunk<R> chunk;
        chunk.parameter = static_cast<P*>(row.parameter) + first;
        chunk.gradient = gradient + first;
        chunk.elements = task.elements;
        chunk.aligned = Packed<P, lanes>::aligned(chunk.parameter) && Packed<G, lanes>::aligned(chunk.gradient);
#pragma unroll
        for (int k = 0; k < R::states; ++k) {
            chunk.state[k] = static_cast<S*>(row.state[k]) + first;
            chunk.aligned = chunk.aligned && Packed<S, lanes>::aligned(chunk.state[k]);
        }
        return chunk;
    }

    template <class R>
    AGR_DEVICE void update(const Task& task) {
        const G* gradient = gradient_of(task.tensor);
        if (gradient == nullptr) {
            draw_next_ticket();
            if (first_thread()) shared_.task[buffer_ ^ 1] = task_of(next_ticket_);
            block_barrier();
            return;
        }
        const Row& row = args_.rows[task.tensor];
        const Chunk<R> chunk = chunk_of<R>(task, row, gradient);
        const bool regularize = row.regularize;
        int i = thread_index() * lanes;
        // The first accesses overlap with the wait for the abs-sum. They are prefetches into the cache and not loads
        // into registers, since prepare_update() needs many registers.
        if (chunk.has_batch(i)) chunk.prefetch(i);
        const bool whole = task.kind == TaskKind::whole;
        if (whole && regularize) {
            store_warp_sum(thread_sums<false>(chunk.gradient, chunk.elements), false);
            block_barrier();
        } else {
            draw_next_ticket();
        }
        if (first_thread()) prepare_update(task, row, whole, regularize);
        block_barrier();
        // Copied to registers: shared memory would be read again after every store.
        const UpdateInputs inputs = shared_.inputs[buffer_];
        // Two batches of loads are in flight where there are enough registers. There are not for Adan's 16-bit
        // elements, of which a batch has many, nor for Adan's float64: its elements take two registers each, and its
        // arithmetic needs more registers.
        if constexpr (R::states * lanes * (sizeof(T) == 8 ? 4 : 1) <= 24) {
            // The number of iterations is the same for all threads of the block, as in thread_sums().
            for (const int first = i; chunk.aligned && i - first + 2 * stride <= chunk.elements; i += 2 * stride) {
                Batch<R> one, other;
                chunk.load(one, i);
                chunk.load(other, i + stride);
                scheduling_barrier();
                chunk.update(one, i, regularize, inputs);
                chunk.update(other, i + stride, regularize, inputs);
            }
        }
        for (; chunk.has_batch(i); i += stride) {
            Batch<R> batch;
            chunk.load(batch, i);
            chunk.update(batch, i, regularize, inputs);
        }
        for (; i < chunk.elements; i += stride) chunk.update_scalar(i, regularize, inputs);
    }

    // Called by the first thread: waits for the sums that the update depends on, and writes the inputs of the update
    // and the next task to shared memory, for all threads.
    AGR_DEVICE void prepare_update(const Task& task, const Row& row, bool whole, bool regularize) {
        const GroupArguments<Options>& group_args = group(row.group);
        const double t = row.step != nullptr           ? static_cast<double>(*row.step) + 1
                         : group_args.count != nullptr ? static_cast<double>(*group_args.count) + 1
                                                       : group_args.t;
        if (shared_.coefficients_group != row.group || shared_.coefficients_t != t) {
            Options options = group_args.options;
            if (group_args.lr != nullptr) options.lr = load_scalar(group_args.lr, group_args.lr_type);
            shared_.coefficients = Rules::template coefficients<T>(options, t);
            shared_.coefficients_group = row.group;
            shared_.coefficients_t = t;
        }
        UpdateInputs inputs;
        inputs.coefficients = shared_.coefficients;
        const Progress* progress = args_.progress + task.tensor;

        double scale = group_args.sign * inverse_grad_scale();
        // This load overlaps with the waits below. It is not issued earlier, since it needs the ticket.
        const Task next = task_of(next_ticket_);
        if (args_.clip != nullptr) {
            scale *= *args_.clip;
        } else if (args_.computes_norm) {
            wait_for(&args_.control->clip_epoch);
            scale *= args_.control->clip;
        }
        double abs_sum = 0;
        if (regularize && whole) {
            for (int warp = 0; warp < warps; ++warp) abs_sum += shared_.warp_sums[buffer_][warp].abs_sum;
        } else if (regularize) {
            wait_for(&progress->sums_epoch);
            abs_sum = progress->sums.abs_sum;
        }
        inputs.sum = AbsSum<T>::of(abs_sum, scale);
        inputs.scale = static_cast<T>(scale);
        shared_.inputs[buffer_] = inputs;
        shared_.task[buffer_ ^ 1] = next;
    }

    // Waits until `flag` is the epoch of this step. What was written before the release of that value is then visible.
    AGR_DEVICE void wait_for(const std::uint32_t* flag) const {
        // Usually the first read finds the value, so it has to be an acquire. The repeated reads are relaxed, since
        // every acquire invalidates the first-level cache. After they find the value, the outer loop reads it once more
        // with an acquire. That read returns the value that the last relaxed read returned or a later one, and no later
        // value is written in this step. So it reads the value that the release stored, and synchronizes with it.
        while (load_acquire(flag) != shared_.epoch) {
            do {
                pause();
            } while (load_relaxed(flag) != shared_.epoch);
        }
    }

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

    // Called when the block has no more tasks. The last block to get here resets the counters for the next launch. If
    // the launch updates, it also increments the step counts and the epoch.
    AGR_DEVICE void finish() {
        if (first_thread())
            shared_.last_block = arrive(&args_.control->blocks_done) + 1 == static_cast<std::uint32_t>(block_count());
        block_barrier();
        if (!shared_.last_block) return;
        if (args_.updates) {
            for (std::int32_t i = thread_index(); i < args_.tensors; i += block_threads)
                if (args_.rows[i].step != nullptr && gradient_of(i) != nullptr) *args_.rows[i].step += 1;
            for (std::int32_t i = thread_index(); i < args_.group_count; i += block_threads)
                if (group(i).increment_count) *group(i).count += 1;
        }
        if (first_thread()) {
            args_.control->next_ticket = 0;
            args_.control->blocks_done = 0;
            if (args_.updates) args_.control->epoch = shared_.epoch;
        }
    }
};

}  // namespace agr::cuda
