// The division of tensors into chunks, and the order of the tasks.
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
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    if (limits.chunk_elements > most)
        throw std::invalid_argument("a chunk has at most 2^31 - 1 elements, not " +
                                    std::to_string(limits.chunk_elements));
    if (limits.window_bytes < 0)
        throw std::invalid_argument("a window has at least 0 bytes, not " + std::to_string(limits.window_bytes));
    if (limits.lead_bytes < 0)
        throw std::invalid_argument("a lead has at least 0 bytes, not " + std::to_string(limits.lead_bytes));
    if (tensors.size() > static_cast<std::size_t>(most))
        throw std::invalid_argument("a plan takes at most 2^31 - 1 tensors, not " + std::to_string(tensors.size()));
    // A chunk has at most two tasks, so the tickets of a GPU fit into 32 bits.
    constexpr std::int64_t most_chunks = 1 << 30;
    for (Tensor& tensor : tensors) {
        if (tensor.elements < 0)
            throw std::invalid_argument("a tensor has at least 0 elements, not " + std::to_string(tensor.elements));
        tensor.chunks = tensor.elements / limits.chunk_elements + (tensor.elements % limits.chunk_elements != 0);
        if (tensor.chunks > most)
            throw std::invalid_argument("a tensor has at most 2^31 - 1 chunks, not " + std::to_string(tensor.chunks));
        tensor.first_chunk = chunks;
        chunks += tensor.chunks;
        if (chunks > most_chunks)
            throw std::invalid_argument("a plan has at most 2^30 chunks, not " + std::to_string(chunks));
    }

    if (limits.clip || limits.apart)
        order_apart();
    else
        order_in_a_window();
}

void Plan::order_in_a_window() {
    // Tensors that are reduced and not yet fully updated, oldest first.
    struct Reduced {
        std::int32_t tensor;
        std::int64_t at;      // the value of `passed` when its last REDUCE was pushed
        std::int64_t chunks;  // that remain to be updated; they are updated from the last to the first
    };
    std::deque<Reduced> reduced;
    std::int64_t passed = 0;  // bytes of gradient of all tasks so far
    std::int64_t ahead = 0;   // bytes of gradient that wait for their update, of fully reduced tensors
    auto bytes = [&](std::int32_t i, std::int64_t chunk) {
        return elements_of(tensors[i], chunk) * tensors[i].gradient_bytes;
    };
    auto update_oldest = [&] {
        Reduced& oldest = reduced.front();
        // Starts at the end of the tensor: of a gradient that was read once, a cache holds the end, however large the
        // cache is.
        const std::int64_t chunk = --oldest.chunks;
        push(TaskKind::update, oldest.tensor, chunk);
        passed += bytes(oldest.tensor, chunk);
        ahead -= bytes(oldest.tensor, chunk);
        if (oldest.chunks == 0) reduced.pop_front();
    };

    for (std::int32_t i = 0; i < static_cast<std::int32_t>(tensors.size()); ++i) {
        const Tensor& tensor = tensors[i];
        if (tensor.chunks == 1) {
            push(TaskKind::whole, i, 0);
            passed += bytes(i, 0);
        } else if (!tensor.regularize) {
            for (std::int64_t chunk = tensor.chunks; chunk-- > 0;) push(TaskKind::update, i, chunk);
            passed += tensor.elements * tensor.gradient_bytes;
        } else {
            for (std::int64_t chunk = 0; chunk < tensor.chunks; ++chunk) {
                push(TaskKind::reduce, i, chunk);
                passed += bytes(i, chunk);
                if (chunk + 1 == tensor.chunks) {
                    reduced.push_back({i, passed, tensor.chunks});
                    ahead += tensor.elements * tensor.gradient_bytes;
                }
                while (ahead > limits.window_bytes && !reduced.empty() &&
                       passed - reduced.front().at >= limits.lead_bytes)
                    update_oldest();
            }
        }
    }
    while (!reduced.empty()) update_oldest();
}

void Plan::order_apart() {
    const auto count = static_cast<std::int32_t>(tensors.size());
    for (std::int32_t i = 0; i < count; ++i)
        if (limits.clip || tensors[i].regularize)
            for (std::int64_t chunk = 0; chunk < tensors[i].chunks; ++chunk) push(TaskKind::reduce, i, chunk);
    first_update = static_cast<std::int64_t>(tasks.size());
    for (std::int32_t i = count; i-- > 0;)
        for (std::int64_t chunk = tensors[i].chunks; chunk-- > 0;) push(TaskKind::update, i, chunk);
}

void Plan::push(TaskKind kind, std::int32_t tensor, std::int64_t chunk) {
    const std::int64_t elements = elements_of(tensors[tensor], chunk);
    tasks.push_back({kind, tensor, static_cast<std::int32_t>(chunk), static_cast<std::int32_t>(elements)});
}

std::int64_t Plan::elements_of(const Tensor& tensor, std::int64_t chunk) const {
    return std::min(limits.chunk_elements, tensor.elements - chunk * limits.chunk_elements);
}

}  // namespace agr
