#include "plan.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <stdexcept>
#include <string>

namespace agr {

Plan::Plan(std::vector<Tensor> given, Limits given_limits) : limits(given_limits), tensors(std::move(given)) {
    if (limits.chunk_elements < 1)
        throw std::invalid_argument("a chunk has at least 1 element, not " + std::to_string(limits.chunk_elements));
    if (limits.window_bytes < 0)
        throw std::invalid_argument("a window has at least 0 bytes, not " + std::to_string(limits.window_bytes));
    if (tensors.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
        throw std::invalid_argument("a plan takes at most 2^31 - 1 tensors, not " + std::to_string(tensors.size()));
    for (Tensor& tensor : tensors) {
        if (tensor.elements < 0)
            throw std::invalid_argument("a tensor has at least 0 elements, not " + std::to_string(tensor.elements));
        tensor.chunks = tensor.elements / limits.chunk_elements + (tensor.elements % limits.chunk_elements != 0);
        tensor.first_chunk = chunks;
        chunks += tensor.chunks;
    }

    // Tensors that are reduced and not yet updated, the oldest first, and how many bytes of gradient they have.
    std::deque<std::int32_t> ahead;
    std::int64_t ahead_bytes = 0;
    auto bytes = [&](std::int32_t i) { return tensors[i].elements * tensors[i].gradient_bytes; };
    auto update_oldest = [&] {
        push_update(ahead.front());
        ahead_bytes -= bytes(ahead.front());
        ahead.pop_front();
    };

    const auto count = static_cast<std::int32_t>(tensors.size());
    if (limits.clip) {
        for (std::int32_t i = 0; i < count; ++i) push_reduce(i);
        first_update = static_cast<std::int64_t>(tasks.size());
        for (std::int32_t i = count; i-- > 0;) push_update(i);
        return;
    }
    for (std::int32_t i = 0; i < count; ++i) {
        const Tensor& tensor = tensors[i];
        if (tensor.chunks == 1) {
            tasks.push_back({TaskKind::whole, i, 0});
        } else if (!tensor.regularize) {
            push_update(i);
        } else {
            while (!ahead.empty() && ahead_bytes + bytes(i) > limits.window_bytes) update_oldest();
            push_reduce(i);
            ahead.push_back(i);
            ahead_bytes += bytes(i);
        }
    }
    while (!ahead.empty()) update_oldest();
}

std::int64_t Plan::elements_of(const Tensor& tensor, std::int64_t chunk) const {
    return std::min(limits.chunk_elements, tensor.elements - chunk * limits.chunk_elements);
}

void Plan::push_reduce(std::int32_t i) {
    for (std::int64_t chunk = 0; chunk < tensors[i].chunks; ++chunk) tasks.push_back({TaskKind::reduce, i, chunk});
}

void Plan::push_update(std::int32_t i) {
    // The end first: of what was read once, a cache holds the end, however much or little it holds.
    for (std::int64_t chunk = tensors[i].chunks; chunk-- > 0;) tasks.push_back({TaskKind::update, i, chunk});
}

}  // namespace agr
