// The interface through which the executor uses a device. It is implemented by the CUDA runtime and, in tests and
// measurements, by launchers that run kernels on the host or launch nothing.
#pragma once

#include "arguments.h"
#include "kernels.h"

namespace agr::cuda {

class Launcher {
public:
    virtual ~Launcher() = default;

    struct Device {
        int multiprocessors;
        std::int64_t cache_bytes;  // the size of the second-level cache
    };
    virtual Device device(int index) = 0;

    // The number of blocks of a kernel that a multiprocessor runs at the same time.
    virtual int resident_blocks(const Kernel& kernel, int device) = 0;

    // The functions below put work on a stream (a cudaStream_t) of a device, in the order of the calls. They throw a
    // std::runtime_error that names the CUDA error and the failed operation.
    virtual void step(const Kernel& kernel, const Arguments& arguments, int blocks, int device, void* stream) = 0;
    // Whether the stream is being captured into a graph.
    virtual bool captures(void* stream) = 0;
    virtual void upload(const Upload& upload, int device, void* stream) = 0;
};

// The launcher that uses the CUDA runtime. Only builds with nvcc have it.
Launcher* cuda_launcher();

// Launches nothing, so that the cost of a step on the host can be measured without a GPU. Its device is an H200.
class Rehearsal : public Launcher {
public:
    Device device(int) override { return {132, 50 << 20}; }
    int resident_blocks(const Kernel&, int) override { return 4; }
    bool captures(void*) override { return false; }
    void step(const Kernel&, const Arguments&, int, int, void*) override {}
    void upload(const Upload&, int, void*) override {}
};

}  // namespace agr::cuda
