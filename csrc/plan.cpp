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

    const auto count = static_cast<std::int32_t>(tensors.size());
    auto bytes = [&](Chunk chunk) {
        return elements_of(tensors[chunk.tensor], chunk.index) * tensors[chunk.tensor].gradient_bytes;
    };
    if (limits.clip) {
        for (std::int32_t i = 0; i < count; ++i)
            for (std::int64_t k = 0; k < tensors[i].chunks; ++k) tasks.push_back({{i, k}, {}});
        first_update = static_cast<std::int64_t>(tasks.size());
        // The gradients read last are the ones that a cache still holds.
        for (std::int64_t k = first_update; k-- > 0;) tasks.push_back({{}, tasks[k].reduce});
        return;
    }

    // Chunks of tensors that are reduced, in the order in which they shall be updated; and how many bytes of gradient
    // have been reduced and not yet updated.
    std::deque<Chunk> ready;
    std::int64_t ahead = 0;
    auto take_ready = [&] {
        const Chunk chunk = ready.front();
        ready.pop_front();
        ahead -= bytes(chunk);
        return chunk;
    };
    for (std::int32_t i = 0; i < count; ++i) {
        const Tensor& tensor = tensors[i];
        if (!tensor.regularize || tensor.chunks == 1) {
            for (std::int64_t k = 0; k < tensor.chunks; ++k)
                tasks.push_back({tensor.regularize ? Chunk{i, k} : Chunk{}, {i, k}});
            continue;
        }
        for (std::int64_t k = 0; k < tensor.chunks; ++k) {
            const Chunk reduced{i, k};
            // Make room in the window; the update that makes enough of it is done together with the reduction.
            Chunk updated;
            while (!ready.empty() && ahead + bytes(reduced) > limits.window_bytes) {
                if (updated) tasks.push_back({{}, updated});
                updated = take_ready();
            }
            tasks.push_back({reduced, updated});
            ahead += bytes(reduced);
        }
        // Of a tensor larger than the window a cache holds the end, so that the update begins there.
        const bool last_first = tensor.elements * tensor.gradient_bytes > limits.window_bytes;
        for (std::int64_t k = 0; k < tensor.chunks; ++k) ready.push_back({i, last_first ? tensor.chunks - 1 - k : k});
    }
    while (!ready.empty()) tasks.push_back({{}, take_ready()});
}

std::int64_t Plan::elements_of(const Tensor& tensor, std::int64_t chunk) const {
    return std::min(limits.chunk_elements, tensor.elements - chunk * limits.chunk_elements);
}

}  // namespace agr
