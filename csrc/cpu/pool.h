// The threads of the CPU executor: those of PyTorch's own parallel regions, if these are OpenMP's, or a pool, whose
// threads sleep between steps.
#pragma once

#include <functional>

namespace agr::cpu {

// Runs `work` on up to `threads` threads at the same time, of which the calling one may be one, and returns when all of
// them have returned from it. `most` is the number of threads that PyTorch's own parallel regions have now. They all
// compute in the caller's floating-point mode. A single call of `work` must be able to complete the job, since there
// may be fewer threads, and one that wakes up after the job is done does not join it. The function may be called by
// several threads, and in a child process after fork().
void run_on_threads(int threads, int most, const std::function<void()>& work);

}  // namespace agr::cpu
