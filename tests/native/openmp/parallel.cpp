// An OpenMP runtime of one function, for a program that exports it: what it may do to its regions, it does. Its threads
// begin before the caller, who may find that it is too late to join, and every third region has no threads but the
// caller.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

struct Count {
    std::atomic<int> regions{0};
    ~Count() { std::printf("OpenMP: %d regions\n", regions.load()); }
} count;

}  // namespace

extern "C" void GOMP_parallel(void (*region)(void*), void* argument, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    if (++count.regions % 3 != 0)
        for (unsigned i = 1; i < threads; ++i) others.emplace_back(region, argument);
    region(argument);
    for (std::thread& other : others) other.join();
}
