// The CUDA executor of a plan: it makes the table that describes the plan in device memory, and launches steps.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan.h"
#include "../step.h"
#include "launcher.h"

namespace agr::cuda {

// The options of one parameter group in one step. Some of them may be in device memory.
struct DeviceGroup {
    Group group;
    const void* lr;  // a scalar in device memory that replaces the options' lr, or null
    Type lr_type;
    float* count;          // Adan's step count in device memory, starting at 0, which replaces the group's t; or null
    bool increment_count;  // whether this launch increments `count`
};

// The other arguments of one step; see Arguments.
struct Settings {
    double max_grad_norm = 0;  // 0 for no clipping in this launch
    double clip_eps = 0;
    const double* clip = nullptr;
    double* squares = nullptr;
    const float* grad_scale = nullptr;
    const float* found_inf = nullptr;
    double* sums = nullptr;
};

// Which of a plan's tasks a launch runs. One launch runs all of them, unless clipping needs the norm over several
// launches. Then every launch reduces first, the clipping factor is computed from the sum of their squares, and every
// launch updates with that factor in `Settings::clip`.
enum class Phase : std::uint8_t { all, reduce, update };

class Executor {
public:
    // `tensors` are in the order of the plan's. All of them must use the same kernel and be on the same device. Throws
    // std::invalid_argument if no kernel is compiled for their types.
    //
    // `prefetched_bytes` is how many bytes of parameters and state all blocks together prefetch for their updates.
    Executor(Plan plan, std::vector<Tensor> tensors, int groups, int device, int blocks, std::int64_t prefetched_bytes,
             Launcher& launcher, std::uint32_t tactics = all_tactics);

    // The initial content of the table. The caller copies it to device memory, at an address that is a multiple of 16,
    // and passes that address to attach(). The memory must stay allocated while launches are in progress.
    std::vector<unsigned char> table() const;
    void attach(void* address);

    // `gradients` has the address of each tensor's gradient. It is null for a tensor without a gradient in this step,
    // which the step then leaves unchanged.
    void launch(const void* const* gradients, const std::vector<DeviceGroup>& groups, const Settings& settings,
                Phase phase, void* stream);

    // Whether any launch was captured into a graph. From then on, a replay of the graph may write to the table at any
    // time.
    bool captured() const { return captured_; }

    // How many steps were launched, and how many uploads made.
    std::int64_t steps() const { return steps_; }
    std::int64_t uploads() const { return uploads_; }

private:
    // The offsets of the parts of the table, and its size.
    struct Layout {
        std::int64_t rows, tasks, progress, chunk_sums, segment_sums, segment_chunks_done, squared_norms, control,
            gradients, groups, bytes;
    };

    Plan plan_;
    std::vector<Tensor> tensors_;
    std::size_t groups_;
    int device_, blocks_;
    Launcher* launcher_;
    std::uint32_t tactics_;
    Kernel kernel_{};
    std::int64_t segments_ = 0;
    std::int32_t nonempty_tensors_ = 0;
    bool waits_ = false;               // some task waits for others
    bool counts_ = false;              // some tensor has a step count of its own
    bool counts_some_at_end_ = false;  // see CountsAtEnd
    std::int32_t parameters_ = 0;      // of the optimizer, up to the last one among the tensors
    Layout layout_{};
    unsigned char* address_ = nullptr;
    Arguments arguments_{};  // the members that are the same in every launch are set by the constructor and attach()
    // The gradient addresses and group arguments that were last uploaded to the table, because they did not fit into
    // the kernel parameters.
    std::vector<unsigned char> uploaded_gradients_, uploaded_groups_;
    bool captured_ = false;  // whether any launch was captured into a graph
    std::int64_t steps_ = 0, uploads_ = 0;

    // Whether REDUCE tasks of the plan add up the tensor's gradient.
    bool reduced(const Plan::Tensor& tensor) const {
        return plan_.limits.clip ? tensor.chunks > 0 : tensor.regularize && tensor.chunks > 1;
    }
    static std::int32_t segments_of(const Plan::Tensor& tensor) {
        return static_cast<std::int32_t>((tensor.chunks + segment_chunks - 1) / segment_chunks);
    }
    template <class Options>
    std::vector<unsigned char> group_arguments(const std::vector<DeviceGroup>& groups) const;
    void upload(std::int64_t offset, const unsigned char* bytes, std::int64_t count,
                std::vector<unsigned char>& uploaded, void* stream);
};

// The default chunk is 16 KB of a parameter, or of its master. Chunks are small so that blocks finish at nearly the
// same time, and so that all chunks in progress take only a fraction of the cache. The default window is an eighth of
// the cache, and the default lead is as many bytes as are in progress at once.
Plan::Limits default_limits(const Types& types, const Launcher::Device& device, int resident_blocks, bool clip);

// An eighth of the cache: more would take the place of gradients that updates are to find there.
std::int64_t default_prefetched_bytes(const Launcher::Device& device);

}  // namespace agr::cuda
