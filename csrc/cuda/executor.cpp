#include "executor.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace agr::cuda {
namespace {

const AdamWOptions& options_of(const Group& group, AdamWOptions*) { return group.adamw; }
const AdanOptions& options_of(const Group& group, AdanOptions*) { return group.adan; }

}  // namespace

Plan::Limits default_limits(const Types& types, const Launcher::Device& device, int resident_blocks, bool clip) {
    const std::int64_t chunk_elements = (16 << 10) / bytes_of(types.parameter);
    const std::int64_t in_progress =
        chunk_elements * bytes_of(types.gradient) * device.multiprocessors * resident_blocks;
    return {chunk_elements, device.cache_bytes / 8, in_progress, clip};
}

Executor::Executor(Plan plan, std::vector<Tensor> tensors, int groups, int device, int blocks, Launcher& launcher)
    : plan_(std::move(plan)),
      tensors_(std::move(tensors)),
      groups_(static_cast<std::size_t>(groups)),
      device_(device),
      launcher_(&launcher) {
    if (tensors_.size() != plan_.tensors.size() || tensors_.empty())
        throw std::invalid_argument("the plan is for " + std::to_string(plan_.tensors.size()) + " tensors, not " +
                                    std::to_string(tensors_.size()));
    kernel_ = {family_of(tensors_[0].rule), tensors_[0].types};
    // In-chunk indices are int, and run past the end by a few strides.
    if (plan_.limits.chunk_elements > 1 << 30)
        throw std::invalid_argument("a chunk has at most 2^30 elements on a GPU, not " +
                                    std::to_string(plan_.limits.chunk_elements));
    if (!is_compiled(kernel_.types)) throw std::invalid_argument("no kernel is compiled for these types");
    for (const Tensor& tensor : tensors_)
        if (!(Kernel{family_of(tensor.rule), tensor.types} == kernel_))
            throw std::invalid_argument("the tensors of one launch have the same types");
    for (const Plan::Tensor& tensor : plan_.tensors) {
        stretches_ += (tensor.chunks + stretch_chunks - 1) / stretch_chunks;
        summed_ += tensor.chunks > 0;
    }
    for (const Tensor& tensor : tensors_) parameters_ = std::max(parameters_, tensor.index + 1);
    blocks_ = static_cast<int>(
        std::max<std::int64_t>(1, std::min<std::int64_t>(blocks, static_cast<std::int64_t>(plan_.tasks.size()))));

    std::int64_t end = 0;
    auto place = [&end](std::size_t count, std::size_t size) {
        const std::int64_t at = end;
        end += static_cast<std::int64_t>((count * size + 255) / 256 * 256);
        return at;
    };
    const std::size_t count = tensors_.size();
    layout_.rows = place(count, sizeof(Row));
    layout_.tasks = place(plan_.tasks.size(), sizeof(Task));
    layout_.progress = place(count, sizeof(Progress));
    layout_.chunk_sums = place(static_cast<std::size_t>(plan_.chunks), sizeof(Sums));
    layout_.stretch_sums = place(static_cast<std::size_t>(stretches_), sizeof(Sums));
    layout_.arrived = place(static_cast<std::size_t>(stretches_), sizeof(std::uint32_t));
    layout_.squares_of = place(static_cast<std::size_t>(parameters_), sizeof(double));
    layout_.control = place(1, sizeof(Control));
    layout_.gradients = place(count, sizeof(void*));
    layout_.groups = place(groups_, std::max(sizeof(GroupOf<AdamWOptions>), sizeof(GroupOf<AdanOptions>)));
    layout_.bytes = end;
}

std::vector<unsigned char> Executor::table() const {
    std::vector<unsigned char> bytes(static_cast<std::size_t>(layout_.bytes));
    auto put = [&bytes](std::int64_t at, const auto& value) { std::memcpy(bytes.data() + at, &value, sizeof(value)); };
    std::int64_t stretch = 0;
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        const Tensor& tensor = tensors_[i];
        const Plan::Tensor& planned = plan_.tensors[i];
        Row row{};
        row.parameter = tensor.span.parameter;
        std::copy(std::begin(tensor.span.state), std::end(tensor.span.state), row.state);
        row.elements = planned.elements;
        row.step = tensor.step;
        row.first_chunk = planned.first_chunk;
        row.chunks = planned.chunks;
        row.first_stretch = stretch;
        row.stretches = (planned.chunks + stretch_chunks - 1) / stretch_chunks;
        row.group = tensor.group;
        row.index = tensor.index;
        row.rule = tensor.rule;
        row.regularize = planned.regularize;
        stretch += row.stretches;
        put(layout_.rows + static_cast<std::int64_t>(i * sizeof(Row)), row);
    }
    if (!plan_.tasks.empty())
        std::memcpy(bytes.data() + layout_.tasks, plan_.tasks.data(), plan_.tasks.size() * sizeof(Task));
    return bytes;
}

void Executor::attach(void* address) {
    address_ = static_cast<unsigned char*>(address);
    auto at = [this](std::int64_t offset) { return address_ + offset; };
    Arguments& a = arguments_;
    a.rows = reinterpret_cast<const Row*>(at(layout_.rows));
    a.tasks = reinterpret_cast<const Task*>(at(layout_.tasks));
    a.progress = reinterpret_cast<Progress*>(at(layout_.progress));
    a.chunk_sums = reinterpret_cast<Sums*>(at(layout_.chunk_sums));
    a.stretch_sums = reinterpret_cast<Sums*>(at(layout_.stretch_sums));
    a.arrived = reinterpret_cast<std::uint32_t*>(at(layout_.arrived));
    a.squares_of = reinterpret_cast<double*>(at(layout_.squares_of));
    a.control = reinterpret_cast<Control*>(at(layout_.control));
    a.chunk_elements = plan_.limits.chunk_elements;
    a.tensors = static_cast<std::int32_t>(tensors_.size());
    a.parameters = parameters_;
    a.group_count = static_cast<std::int32_t>(groups_);
    a.summed = summed_;
    uploaded_gradients_.clear();
    uploaded_groups_.clear();
}

template <class Options>
std::vector<unsigned char> Executor::group_bytes(const std::vector<DeviceGroup>& groups) const {
    std::vector<unsigned char> bytes(groups.size() * sizeof(GroupOf<Options>));
    for (std::size_t i = 0; i < groups.size(); ++i) {
        const DeviceGroup& from = groups[i];
        const GroupOf<Options> group{options_of(from.group, static_cast<Options*>(nullptr)),
                                     from.group.sign,
                                     from.group.t,
                                     from.count,
                                     from.lr,
                                     from.lr_type,
                                     from.count != nullptr && from.counts};
        std::memcpy(bytes.data() + i * sizeof(group), &group, sizeof(group));
    }
    return bytes;
}

void Executor::upload(std::int64_t offset, const unsigned char* bytes, std::int64_t count,
                      std::vector<unsigned char>& uploaded, void* stream) {
    const bool unchanged =
        static_cast<std::int64_t>(uploaded.size()) == count && std::equal(uploaded.begin(), uploaded.end(), bytes);
    // A captured launch repeats its uploads whenever its graph is replayed. After the first capture the host therefore
    // no longer knows what the table contains.
    if (unchanged && !captured_) return;
    uploaded.clear();  // in case one of several uploads fails
    for (std::int64_t from = 0; from < count; from += Upload::capacity) {
        Upload part;
        part.destination = address_ + offset + from;
        part.bytes = std::min(Upload::capacity, count - from);
        std::memcpy(part.data, bytes + from, static_cast<std::size_t>(part.bytes));
        launcher_->upload(part, device_, stream);
    }
    uploaded.assign(bytes, bytes + count);
}

void Executor::launch(const void* const* gradients, const std::vector<DeviceGroup>& groups, const Settings& settings,
                      Phase phase, void* stream) {
    if (address_ == nullptr) throw std::logic_error("the executor's table is not on the device");
    if (groups.size() < groups_) throw std::invalid_argument("numbers are missing for some groups");
    const auto of_groups =
        kernel_.family == Family::adan ? group_bytes<AdanOptions>(groups) : group_bytes<AdamWOptions>(groups);
    const auto group_count = static_cast<std::int64_t>(of_groups.size());
    const auto gradient_count = static_cast<std::int64_t>(tensors_.size() * sizeof(void*));
    const auto* of_gradients = reinterpret_cast<const unsigned char*>(gradients);

    captured_ = captured_ || launcher_->captures(stream);

    Arguments& a = arguments_;
    // Groups first: their numbers change in every step with a schedule, addresses seldom.
    std::int64_t used = 0;
    auto carry = [&](const unsigned char* bytes, std::int64_t count, std::int64_t offset, std::int32_t& at,
                     std::vector<unsigned char>& uploaded) -> unsigned char* {
        if (used + count > payload_bytes) {
            upload(offset, bytes, count, uploaded, stream);
            return address_ + offset;
        }
        std::memcpy(a.payload + used, bytes, static_cast<std::size_t>(count));
        at = static_cast<std::int32_t>(used);
        used += (count + 15) / 16 * 16;
        return nullptr;
    };
    a.groups = carry(of_groups.data(), group_count, layout_.groups, a.groups_at, uploaded_groups_);
    a.gradients = reinterpret_cast<const void* const*>(
        carry(of_gradients, gradient_count, layout_.gradients, a.gradients_at, uploaded_gradients_));

    a.first_task = phase == Phase::update ? plan_.first_update : 0;
    a.end_task = phase == Phase::reduce ? plan_.first_update : static_cast<std::int64_t>(plan_.tasks.size());
    a.clips = plan_.limits.clip && phase != Phase::update;
    a.ends = phase != Phase::reduce;
    a.squares = settings.squares;
    a.max_grad_norm = settings.max_grad_norm;
    a.clip_eps = settings.clip_eps;
    a.clip = settings.clip;
    a.grad_scale = settings.grad_scale;
    a.found_inf = settings.found_inf;
    launcher_->step(kernel_, a, blocks_, device_, stream);
}

}  // namespace agr::cuda
