// The CUDA executor: the layout and content of its table, and the arguments of a launch.
#include "executor.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../agr.h"

namespace agr::cuda {
namespace {

const AdamWOptions& options_of(const Group& group, AdamWOptions*) { return group.adamw; }
const AdanOptions& options_of(const Group& group, AdanOptions*) { return group.adan; }
RegularizeOptions options_of(const Group&, RegularizeOptions*) { return {}; }

// Of an element of what is updated: the master, or the parameter.
int bytes_updated(const Types& types) { return types.master ? 4 : bytes_of(types.parameter); }

}  // namespace

Plan::Limits default_limits(const Types& types, const Launcher::Device& device, int resident_blocks, bool clip) {
    const std::int64_t chunk_elements = (16 << 10) / bytes_updated(types);
    const std::int64_t in_progress =
        chunk_elements * bytes_of(types.gradient) * device.multiprocessors * resident_blocks;
    return {chunk_elements, device.cache_bytes / 8, in_progress, clip};
}

std::int64_t default_prefetched_bytes(const Launcher::Device& device) { return device.cache_bytes / 8; }

Executor::Executor(Plan plan, std::vector<Tensor> tensors, int groups, int device, int blocks,
                   std::int64_t prefetched_bytes, Launcher& launcher, std::uint32_t tactics)
    : plan_(std::move(plan)),
      tensors_(std::move(tensors)),
      groups_(static_cast<std::size_t>(groups)),
      device_(device),
      launcher_(&launcher),
      tactics_(tactics) {
    if (tensors_.size() != plan_.tensors.size() || tensors_.empty())
        throw std::invalid_argument("the plan is for " + std::to_string(plan_.tensors.size()) + " tensors, not " +
                                    std::to_string(tensors_.size()));
    kernel_ = {family_of(tensors_[0].rule), tensors_[0].types};
    // Indices within a chunk are int, and the kernels count a few strides past the end.
    if (plan_.limits.chunk_elements > 1 << 30)
        throw std::invalid_argument("a chunk has at most 2^30 elements on a GPU, not " +
                                    std::to_string(plan_.limits.chunk_elements));
    if (kernel_.types.state == Type::code8 && plan_.limits.chunk_elements % scale_block != 0)
        throw std::invalid_argument("a chunk of codes has whole blocks of " + std::to_string(scale_block) +
                                    " elements, not " + std::to_string(plan_.limits.chunk_elements));
    if (plan_.limits.apart) throw std::invalid_argument("a CUDA launch both reduces and updates");
    if (!is_compiled(kernel_)) throw std::invalid_argument("no kernel is compiled for these types");
    for (const Tensor& tensor : tensors_)
        if (!(Kernel{family_of(tensor.rule), tensor.types} == kernel_))
            throw std::invalid_argument("the tensors of one launch have the same types");
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        const Plan::Tensor& tensor = plan_.tensors[i];
        segments_ += segments_of(tensor);
        nonempty_tensors_ += tensor.chunks > 0;
        waits_ = waits_ || reduced(tensor);
        counts_ = counts_ || tensors_[i].step != nullptr;
        // Nobody but the last block knows that all chunks of the tensor are updated, or that it has none.
        counts_some_at_end_ =
            counts_some_at_end_ || (tensors_[i].step != nullptr && tensor.chunks != 1 && !reduced(tensor));
    }
    for (const Tensor& tensor : tensors_) parameters_ = std::max(parameters_, tensor.index + 1);
    blocks_ = static_cast<int>(
        std::max<std::int64_t>(1, std::min<std::int64_t>(blocks, static_cast<std::int64_t>(plan_.tasks.size()))));

    std::int64_t bytes_of_element = 0;  // of parameter and state
    for (const Tensor& tensor : tensors_)
        bytes_of_element = std::max<std::int64_t>(
            bytes_of_element, bytes_updated(tensor.types) + states_of(tensor.rule) * bytes_of(tensor.types.state));
    arguments_.prefetched_elements = static_cast<std::int32_t>(
        std::min<std::int64_t>(most_prefetched, prefetched_bytes / blocks_ / bytes_of_element));

    std::int64_t end = 0;
    // Reserves space in the table, aligned to 256 bytes, and returns its offset.
    auto reserve = [&end](std::size_t count, std::size_t size) {
        const std::int64_t offset = end;
        end += static_cast<std::int64_t>((count * size + 255) / 256 * 256);
        return offset;
    };
    const std::size_t count = tensors_.size();
    layout_.rows = reserve(count, sizeof(Row));
    layout_.tasks = reserve(plan_.tasks.size(), sizeof(DeviceTask));
    layout_.progress = reserve(count, sizeof(Progress));
    const std::size_t sums = (plan_.limits.clip ? 2 : 1) * 2 * sizeof(std::uint64_t);  // of a chunk or a segment
    layout_.chunk_sums = reserve(static_cast<std::size_t>(plan_.chunks), sums);
    layout_.segment_sums = reserve(static_cast<std::size_t>(segments_), sums);
    layout_.segment_chunks_done = reserve(static_cast<std::size_t>(segments_), sizeof(std::uint32_t));
    layout_.squared_norms = reserve(static_cast<std::size_t>(parameters_), 2 * sizeof(std::uint64_t));
    layout_.control = reserve(1, sizeof(Control));
    layout_.gradients = reserve(count, sizeof(void*));
    layout_.groups =
        reserve(groups_, std::max(sizeof(GroupArguments<AdamWOptions>), sizeof(GroupArguments<AdanOptions>)));
    layout_.bytes = end;
}

std::vector<unsigned char> Executor::table() const {
    std::vector<unsigned char> bytes(static_cast<std::size_t>(layout_.bytes));
    // The words of parameters that are not in this launch, or have no elements, are 0 in every epoch.
    constexpr std::uint64_t zero = std::uint64_t{0xffffffff} << 32;
    auto* norms = reinterpret_cast<std::uint64_t*>(bytes.data() + layout_.squared_norms);
    std::fill_n(norms, 2 * parameters_, zero);
    std::int32_t first_segment = 0;
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        const Tensor& tensor = tensors_[i];
        const Plan::Tensor& planned = plan_.tensors[i];
        Row row{};
        row.parameter = tensor.span.parameter;
        std::copy(std::begin(tensor.span.state), std::end(tensor.span.state), row.state);
        row.elements = planned.elements;
        row.step = tensor.step;
        row.first_chunk = static_cast<std::int32_t>(planned.first_chunk);
        row.chunks = static_cast<std::int32_t>(planned.chunks);
        row.first_segment = first_segment;
        row.segments = segments_of(planned);
        row.group = tensor.group;
        row.index = tensor.index;
        row.rule = tensor.rule;
        row.reduced = reduced(planned);
        row.master = tensor.span.master;
        std::copy(std::begin(tensor.span.scales), std::end(tensor.span.scales), row.scales);
        first_segment += row.segments;
        if (row.chunks > 0) norms[2 * row.index] = norms[2 * row.index + 1] = 0;
        std::memcpy(bytes.data() + layout_.rows + i * sizeof(Row), &row, sizeof(row));
    }
    auto* tasks = reinterpret_cast<DeviceTask*>(bytes.data() + layout_.tasks);
    for (const Task& task : plan_.tasks) {
        const Plan::Tensor& planned = plan_.tensors[static_cast<std::size_t>(task.tensor)];
        *tasks++ = {task.kind,          tensors_[static_cast<std::size_t>(task.tensor)].rule,
                    planned.regularize, reduced(planned),
                    task.tensor,        task.chunk,
                    task.elements};
    }
    return bytes;
}

void Executor::attach(void* address) {
    address_ = static_cast<unsigned char*>(address);
    auto at = [this](std::int64_t offset) { return address_ + offset; };
    Arguments& args = arguments_;
    args.rows = reinterpret_cast<const Row*>(at(layout_.rows));
    args.tasks = reinterpret_cast<const DeviceTask*>(at(layout_.tasks));
    args.progress = reinterpret_cast<Progress*>(at(layout_.progress));
    args.chunk_sums = reinterpret_cast<std::uint64_t*>(at(layout_.chunk_sums));
    args.segment_sums = reinterpret_cast<std::uint64_t*>(at(layout_.segment_sums));
    args.segment_chunks_done = reinterpret_cast<std::uint32_t*>(at(layout_.segment_chunks_done));
    args.squared_norms = reinterpret_cast<std::uint64_t*>(at(layout_.squared_norms));
    args.control = reinterpret_cast<Control*>(at(layout_.control));
    args.chunk_elements = plan_.limits.chunk_elements;
    args.tensors = static_cast<std::int32_t>(tensors_.size());
    args.parameters = parameters_;
    args.group_count = static_cast<std::int32_t>(groups_);
    args.nonempty_tensors = nonempty_tensors_;
    uploaded_gradients_.clear();
    uploaded_groups_.clear();
}

template <class Options>
std::vector<unsigned char> Executor::group_arguments(const std::vector<DeviceGroup>& groups) const {
    std::vector<unsigned char> bytes(groups.size() * sizeof(GroupArguments<Options>));
    for (std::size_t i = 0; i < groups.size(); ++i) {
        const DeviceGroup& from = groups[i];
        const GroupArguments<Options> group{options_of(from.group, static_cast<Options*>(nullptr)),
                                            from.group.sign,
                                            from.group.t,
                                            from.count,
                                            from.lr,
                                            static_cast<std::int32_t>(from.lr_type),
                                            from.count != nullptr && from.increment_count,
                                            from.group.seed};
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
        ++uploads_;
    }
    uploaded.assign(bytes, bytes + count);
}

void Executor::launch(const void* const* gradients, const std::vector<DeviceGroup>& groups, const Settings& settings,
                      Phase phase, void* stream) {
    if (address_ == nullptr) throw std::logic_error("the executor's table is not on the device");
    if (groups.size() < groups_) throw std::invalid_argument("numbers are missing for some groups");
    const auto packed_groups = kernel_.family == Family::adan    ? group_arguments<AdanOptions>(groups)
                               : kernel_.family == Family::adamw ? group_arguments<AdamWOptions>(groups)
                                                                 : group_arguments<RegularizeOptions>(groups);
    const auto group_bytes = static_cast<std::int64_t>(packed_groups.size());
    const auto gradient_bytes = static_cast<std::int64_t>(tensors_.size() * sizeof(void*));
    const auto* addresses = reinterpret_cast<const unsigned char*>(gradients);

    captured_ = captured_ || launcher_->captures(stream);

    Arguments& args = arguments_;
    // Puts bytes into the payload of the kernel parameters and sets their offset there, or, if they do not fit, uploads
    // them to the table. Returns their device address, or null if they are in the payload.
    std::int64_t used = 0;
    auto pass = [&](const unsigned char* bytes, std::int64_t count, std::int64_t offset, std::int32_t& payload_offset,
                    std::vector<unsigned char>& uploaded) -> unsigned char* {
        if (used + count > payload_bytes) {
            upload(offset, bytes, count, uploaded, stream);
            return address_ + offset;
        }
        std::memcpy(args.payload + used, bytes, static_cast<std::size_t>(count));
        payload_offset = static_cast<std::int32_t>(used);
        used += (count + 15) / 16 * 16;
        return nullptr;
    };
    // Groups have precedence, since a schedule changes their options in every step, and addresses change rarely.
    args.groups = pass(packed_groups.data(), group_bytes, layout_.groups, args.groups_offset, uploaded_groups_);
    args.gradients = reinterpret_cast<const void* const*>(
        pass(addresses, gradient_bytes, layout_.gradients, args.gradients_offset, uploaded_gradients_));

    args.first_task = phase == Phase::update ? plan_.first_update : 0;
    args.end_task = phase == Phase::reduce ? plan_.first_update : static_cast<std::int64_t>(plan_.tasks.size());
    args.computes_norm = plan_.limits.clip && phase != Phase::update;
    args.reduces = phase != Phase::update;
    args.updates = phase != Phase::reduce;
    args.given_tickets = !waits_ && (tactics_ & given_tickets) != 0 && args.end_task - args.first_task >= blocks_;
    args.tactics = tactics_;
    args.counts_at_end = CountsAtEnd::none;
    args.group_counts = false;
    if (args.updates) {
        // What an earlier launch has published, it did not count, since it did not know that there would be an update.
        constexpr std::uint32_t needed = own_counts | early_inputs;
        const bool all = counts_ && (phase == Phase::update || (tactics_ & needed) != needed);
        args.counts_at_end = all ? CountsAtEnd::all : counts_some_at_end_ ? CountsAtEnd::some : CountsAtEnd::none;
        for (const DeviceGroup& group : groups)
            args.group_counts = args.group_counts || (group.count != nullptr && group.increment_count);
    }
    args.squares = settings.squares;
    args.max_grad_norm = settings.max_grad_norm;
    args.clip_eps = settings.clip_eps;
    args.clip = settings.clip;
    args.grad_scale = settings.grad_scale;
    args.found_inf = settings.found_inf;
    args.sums = settings.sums;
    launcher_->step(kernel_, args, blocks_, device_, stream);
    ++steps_;
}

}  // namespace agr::cuda
