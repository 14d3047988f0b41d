// The threads: OpenMP's, or a pool with a mutex and condition variables.
#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

namespace agr::cpu {
namespace {

class Pool {
public:
    void run(int threads, const std::function<void()>& work) {
        std::lock_guard<std::mutex> one_job_at_a_time(job_mutex);
        {
            std::lock_guard<std::mutex> lock(mutex);
            start_workers(threads - 1);
            job = &work;
            std::fegetenv(&mode);
            openings = threads - 1 < workers ? threads - 1 : workers;
        }
        for (int i = 0; i < threads - 1; ++i) wake.notify_one();
        work();
        std::unique_lock<std::mutex> lock(mutex);
        openings = 0;  // a thread that has not joined by now would find nothing left to do
        done.wait(lock, [&] { return active == 0; });
        job = nullptr;
    }

private:
    std::mutex job_mutex;

    std::mutex mutex;  // guards the members below
    std::condition_variable wake, done;
    const std::function<void()>* job = nullptr;
    std::fenv_t mode;  // the caller's rounding mode, and whether it flushes denormals (torch.set_flush_denormal)
    int workers = 0;
    int openings = 0;  // how many threads may still join the job
    int active = 0;    // how many threads have joined and not finished

    void start_workers(int wanted) {
        try {
            for (; workers < wanted; ++workers) std::thread([this] { run_worker(); }).detach();
        } catch (const std::system_error&) {
            // The system allows no more threads. The existing ones do the job.
        }
    }

    void run_worker() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return openings > 0; });
            --openings;
            ++active;
            const std::function<void()>& work = *job;
            std::fesetenv(&mode);
            lock.unlock();
            work();
            lock.lock();
            if (--active == 0) done.notify_one();
        }
    }
};

// The function by which compilers start a parallel region, of the OpenMP runtime to which PyTorch's own regions are
// bound (libgomp, or LLVM's or Intel's, which have it for programs compiled by GCC): the first one in the process's
// global scope. Null where there is none.
using Parallel = void (*)(void (*region)(void*), void* argument, unsigned threads, unsigned flags);

#if defined(__linux__)
// A child of fork() that has not executed another program has none of its parent's threads. Libgomp does not notice and
// would wait for them for ever, if the parent had any. Whether it had is not known.
bool is_forked() {
    constexpr unsigned long forked_without_exec = 0x40;  // PF_FORKNOEXEC of Linux
    std::ifstream stat("/proc/self/stat");
    std::string line;
    std::getline(stat, line);
    // The ninth field. The second one is a name in parentheses, which may have anything in it.
    const auto name_end = line.rfind(')');
    unsigned long flags = 0;
    const bool told = name_end != std::string::npos &&
                      std::sscanf(line.c_str() + name_end + 1, " %*c %*d %*d %*d %*d %*d %lu", &flags) == 1;
    return !told || (flags & forked_without_exec) != 0;
}

Parallel find_openmp() {
    return is_forked() ? nullptr : reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}
#else
Parallel find_openmp() { return nullptr; }  // not tried
#endif

// All this happens when the library is loaded, after PyTorch. A child of fork() has a new pool, since a mutex of the
// old one may never be unlocked in it. No pool is ever destroyed: its threads sleep in it until the process ends.
Parallel openmp = find_openmp();
Pool* pool = new Pool;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
    openmp = nullptr;
    pool = new Pool;
});

// By default its threads spin for some milliseconds after each region, for the next one of the same caller. After a
// backward pass, threads of a pool of our own would be late, and then share the cores with these.
void run_on_openmp(int threads, int most, const std::function<void()>& work) {
    struct Region {
        const std::function<void()>& work;
        std::fenv_t mode;
        std::atomic<int> openings;
    };
    Region region{work, {}, {threads}};
    std::fegetenv(&region.mode);
    constexpr auto enter = [](void* argument) noexcept {
        auto& entered = *static_cast<Region*>(argument);
        // Relaxed is enough: the region's ends order the caller's accesses and those of its threads.
        if (entered.openings.fetch_sub(1, std::memory_order_relaxed) <= 0) return;
        // The threads are others' as well.
        std::fenv_t theirs;
        std::fegetenv(&theirs);
        std::fesetenv(&entered.mode);
        entered.work();
        std::fesetenv(&theirs);
    };
    // As many as PyTorch's own regions have, since libgomp ends threads that a smaller region leaves out.
    openmp(enter, &region, static_cast<unsigned>(most), 0);
}

}  // namespace

void run_on_threads(int threads, int most, const std::function<void()>& work) {
    if (threads <= 1)
        work();
    else if (openmp != nullptr)
        run_on_openmp(threads, most, work);
    else
        pool->run(threads, work);
}

}  // namespace agr::cpu
