// The CUDA executor of a plan: keeps the plan's table for the device, and launches steps.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan.h"
#include "../step.h"
#include "launcher.h"

namespace agr::cuda {

// What a group says in one step, some of it in the device's memory.
struct DeviceGroup {
    Group group;
    const void* lr;  // in place of the options' lr; or null
    Type lr_type;
    float* count;  // Adan's step count, from 0, in place of the group's t; or null
    bool counts;   // whether this launch raises it
};

// What else one step is told; see Arguments.
struct Settings {
    double max_grad_norm = 0;  // 0: no clipping in this launch
    double clip_eps = 0;
    const double* clip = nullptr;
    double* squares = nullptr;
    const float* grad_scale = nullptr;
    const float* found_inf = nullptr;
};

// Which of a plan's tasks a launch does. One launch does all, unless the norm needs gradients of other launches: then
// they all reduce, and the sum of their squares comes back to them as `Settings::clip`.
enum class Phase : std::uint8_t { all, reduce, update };

class Executor {
public:
    // All `tensors`, in the order of the plan's, are of the same kernel and on the same device.
    // Throws std::invalid_argument where no kernel is compiled for their types.
    Executor(Plan plan, std::vector<Tensor> tensors, int groups, int device, int blocks, Launcher& launcher);

    // The table as it is to lie in the device's memory, aligned to 16 bytes, at an address that is then attached. It
    // has to stay there while launches are in progress.
    std::vector<unsigned char> table() const;
    void attach(void* address);

    // `gradients`: the address of each tensor's, null for one that has none in this step, which then does nothing to
    // it.
    void launch(const void* const* gradients, const std::vector<DeviceGroup>& groups, const Settings& settings,
                Phase phase, void* stream);

    // Whether a launch was captured into a graph, which may write to the table at any time from then on.
    bool captured() const { return captured_; }

private:
    // Where the parts of the table are, from its start.
    struct Layout {
        std::int64_t rows, tasks, progress, chunk_sums, stretch_sums, arrived, squares_of, control, gradients, groups,
            bytes;
    };

    Plan plan_;
    std::vector<Tensor> tensors_;
    std::size_t groups_;
    int device_, blocks_;
    Launcher* launcher_;
    Kernel kernel_{};
    std::int64_t stretches_ = 0;
    std::int32_t summed_ = 0;
    std::int32_t parameters_ = 0;  // of the optimizer, up to the last one that is among the tensors
    Layout layout_{};
    unsigned char* address_ = nullptr;
    Arguments arguments_{};  // what is the same in every launch is filled in
    // What the device's table holds of gradients and groups that did not fit into the arguments.
    std::vector<unsigned char> uploaded_gradients_, uploaded_groups_;
    bool captured_ = false;  // a step was captured in a graph

    template <class Options>
    std::vector<unsigned char> group_bytes(const std::vector<DeviceGroup>& groups) const;
    void upload(std::int64_t offset, const unsigned char* bytes, std::int64_t count,
                std::vector<unsigned char>& uploaded, void* stream);
};

// Chunks of 16 KB, so that few of them are in progress at the end while other blocks have nothing left to do, and all
// that are in progress take a share of the cache. A window of an eighth of the cache, and a lead of as much as is in
// progress at once.
Plan::Limits default_limits(const Types& types, const Launcher::Device& device, int resident_blocks, bool clip);

}  // namespace agr::cuda
