// The threads of the CPU executor: kept from step to step, asleep between steps.
#pragma once

#include <functional>

namespace agr::cpu {

// Runs `work` on the calling thread and on up to `threads - 1` others at once, and returns when all have returned from
// it. All of them compute in the caller's floating-point mode. `work` must be such that one call alone completes the
// job: a thread that is not awake before the job is done never joins it. Calls from several threads take turns. Safe in
// a child after fork().
void run_on_threads(int threads, const std::function<void()>& work);

}  // namespace agr::cpu
