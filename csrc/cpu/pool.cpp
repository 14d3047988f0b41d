// The thread pool, with a mutex and condition variables.
#include "pool.h"

#include <pthread.h>

#include <cfenv>
#include <condition_variable>
#include <mutex>
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

// The pool is never destroyed: its threads sleep in it until the process ends. A child process after fork() has none of
// the threads, and possibly a mutex that will never be unlocked, so it starts with a new pool.
Pool* pool = nullptr;

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    });
    return *pool;
}

}  // namespace

void run_on_threads(int threads, const std::function<void()>& work) {
    if (threads <= 1)
        work();
    else
        the_pool().run(threads, work);
}

}  // namespace agr::cpu
