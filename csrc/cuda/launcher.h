// What the executor asks of the device: the CUDA runtime, or something in its place that runs kernels on the host, or
// runs nothing and counts.
#pragma once

#include "arguments.h"
#include "kernels.h"

namespace agr::cuda {

class Launcher {
public:
    virtual ~Launcher() = default;

    struct Device {
        int multiprocessors;
        std::int64_t cache_bytes;  // of the second-level cache
    };
    virtual Device device(int index) = 0;

    // How many blocks of a kernel a multiprocessor runs at once.
    virtual int resident_blocks(const Kernel& kernel, int device) = 0;

    // Work on a stream (a cudaStream_t) of a device, in the order of the calls. All throw std::runtime_error that names
    // the CUDA error and what was being done.
    virtual void step(const Kernel& kernel, const Arguments& arguments, int blocks, int device, void* stream) = 0;
    // Whether the stream's work is being captured into a graph instead of done.
    virtual bool captures(void* stream) = 0;
    virtual void upload(const Upload& upload, int device, void* stream) = 0;
};

// The CUDA runtime's, or null in a build without nvcc.
Launcher* cuda_launcher();

}  // namespace agr::cuda
