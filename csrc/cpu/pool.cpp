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
        std::lock_guard<std::mutex> one_job_at_a_time(turn);
        {
            std::lock_guard<std::mutex> lock(mutex);
            grow(threads - 1);
            job = &work;
            std::fegetenv(&mode);
            invited = threads - 1 < workers ? threads - 1 : workers;
        }
        for (int i = 0; i < threads - 1; ++i) wake.notify_one();
        work();
        std::unique_lock<std::mutex> lock(mutex);
        invited = 0;  // whoever has not come by now would find nothing left to do
        done.wait(lock, [&] { return active == 0; });
        job = nullptr;
    }

private:
    std::mutex turn;

    std::mutex mutex;  // guards what follows
    std::condition_variable wake, done;
    const std::function<void()>* job = nullptr;
    std::fenv_t mode;  // the caller's rounding, and whether it flushes denormals (torch.set_flush_denormal)
    int workers = 0;
    int invited = 0;  // how many may still join the job
    int active = 0;   // how many have joined and not finished

    void grow(int wanted) {
        try {
            for (; workers < wanted; ++workers) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // No more threads to be had (a limit of the system): the job is done by those there are.
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return invited > 0; });
            --invited;
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

// Never destroyed: its threads sleep in it until the process ends. A child of fork() has none of them, and perhaps a
// mutex that is locked for good, so that it starts with a new pool.
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
