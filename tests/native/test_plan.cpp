// Tests of the properties that every plan must have, with random tensors and limits.
#include <algorithm>
#include <functional>
#include <set>
#include <stdexcept>

#include "check.h"

using namespace agr;

void test_plans() {
    for (int round = 0; round < 300; ++round) {
        const std::int64_t chunk = 1 + up_to(40);
        const Plan::Limits limits{chunk, up_to(20 * chunk), up_to(1) ? up_to(10 * chunk) : 0, up_to(3) == 0};
        const Plan plan(random_tensors(chunk), limits);
        const std::size_t count = plan.tensors.size();
        std::vector<std::set<std::int64_t>> reduced(count), updated(count);
        std::int64_t ahead = 0;
        for (std::size_t ticket = 0; ticket < plan.tasks.size(); ++ticket) {
            const Task& task = plan.tasks[ticket];
            const Plan::Tensor& tensor = plan.tensors[task.tensor];
            CHECK(task.chunk >= 0 && task.chunk < tensor.chunks, "chunk %d", task.chunk);
            if (task.kind == TaskKind::reduce) {
                CHECK(tensor.regularize || limits.clip, "a reduction for nothing");
                CHECK(reduced[task.tensor].insert(task.chunk).second, "reduced twice");
                CHECK(updated[task.tensor].empty(), "reduced after an update");
                CHECK(!limits.clip || static_cast<std::int64_t>(ticket) < plan.first_update, "a late reduction");
                ahead += plan.elements_of(tensor, task.chunk) * tensor.gradient_bytes;
            } else {
                CHECK(updated[task.tensor].insert(task.chunk).second, "updated twice");
                CHECK(!limits.clip || static_cast<std::int64_t>(ticket) >= plan.first_update, "an early update");
                if (task.kind == TaskKind::whole) {
                    CHECK(tensor.chunks == 1, "whole, of %" PRId64 " chunks", tensor.chunks);
                } else if (tensor.regularize || limits.clip) {
                    CHECK(static_cast<std::int64_t>(reduced[task.tensor].size()) == tensor.chunks, "not all reduced");
                    ahead -= plan.elements_of(tensor, task.chunk) * tensor.gradient_bytes;
                }
            }
            std::int64_t largest = 0;
            for (const auto& t : plan.tensors) largest = std::max(largest, t.elements * t.gradient_bytes);
            const std::int64_t most = limits.window_bytes + 2 * largest + limits.lead_bytes + 4 * chunk;
            CHECK(limits.clip || ahead <= most, "%" PRId64 " bytes ahead", ahead);
        }
        std::int64_t chunks = 0;
        for (std::size_t i = 0; i < count; ++i) {
            CHECK(plan.tensors[i].first_chunk == chunks, "chunks are counted over all tensors");
            chunks += plan.tensors[i].chunks;
            CHECK(static_cast<std::int64_t>(updated[i].size()) == plan.tensors[i].chunks, "every chunk is updated");
            std::int64_t elements = 0;
            for (std::int64_t c = 0; c < plan.tensors[i].chunks; ++c) elements += plan.elements_of(plan.tensors[i], c);
            CHECK(elements == plan.tensors[i].elements, "every element is in a chunk");
        }
        CHECK(plan.chunks == chunks, "chunks");
    }
    for (const auto& wrong :
         {std::function<void()>([] { Plan({}, {0, 0, 0, false}); }),
          std::function<void()>([] { Plan({}, {1, -1, 0, false}); }),
          std::function<void()>([] { Plan({{-1, 4, true}}, {1, 0, 0, false}); }), std::function<void()>([] {
              Plan({{std::int64_t{1} << 29, 4, true}, {(std::int64_t{1} << 29) + 1, 4, true}}, {1, 0, 0, false});
          })}) {
        bool refused = false;
        try {
            wrong();
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        CHECK(refused, "a plan that makes no sense");
    }
}
