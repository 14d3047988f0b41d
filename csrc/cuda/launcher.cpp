// The launcher that uses the CUDA runtime.
#include "launcher.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace agr::cuda {

const void* upload_kernel();

namespace {

void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, which is reported here, so that no later call reports it again
    throw std::runtime_error(std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ") while " +
                             what);
}

std::string on(int device) { return " on cuda:" + std::to_string(device); }

// Makes a device the current one, and restores the previous one at the end of the scope.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "asking for the current device");
        if (device != previous_) {
            check(cudaSetDevice(device), "making cuda:" + std::to_string(device) + " the current device");
            changed_ = true;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool changed_ = false;
};

template <Family family, class... Units>
const void* find(const Types& types, UnitList<Units...>) {
    const void* found = nullptr;
    ((found = found != nullptr ? found : kernel_of<family, Units>(types)), ...);
    return found;
}

const void* kernel_function(const Kernel& kernel) {
    switch (kernel.family) {
        case Family::adamw:
            return find<Family::adamw>(kernel.types, OptimizerUnits{});
        case Family::adan:
            return find<Family::adan>(kernel.types, OptimizerUnits{});
        case Family::regularize:
            return find<Family::regularize>(kernel.types, GradientUnits{});
    }
    return nullptr;
}

class CudaLauncher : public Launcher {
public:
    Device device(int index) override {
        int multiprocessors = 0, cache_bytes = 0;
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index),
              "asking for the multiprocessors of cuda:" + std::to_string(index));
        check(cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, index),
              "asking for the cache of cuda:" + std::to_string(index));
        return {multiprocessors, cache_bytes};
    }

    int resident_blocks(const Kernel& kernel, int device) override {
        const DeviceGuard guard(device);
        int blocks = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_function(kernel), block_threads, 0),
              "loading the update kernel" + on(device));
        return blocks;
    }

    void step(const Kernel& kernel, const Arguments& arguments, int blocks, int device, void* stream) override {
        const DeviceGuard guard(device);
        void* parameters[] = {const_cast<Arguments*>(&arguments)};
        launch(kernel_function(kernel), blocks, parameters, stream, "launching an optimizer step" + on(device));
    }

    bool captures(void* stream) override {
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "asking whether a graph is captured");
        return status != cudaStreamCaptureStatusNone;
    }

    void upload(const Upload& upload, int device, void* stream) override {
        const DeviceGuard guard(device);
        void* parameters[] = {const_cast<Upload*>(&upload)};
        launch(upload_kernel(), 1, parameters, stream, "uploading an optimizer step's arguments" + on(device));
    }

private:
    static void launch(const void* function, int blocks, void** parameters, void* stream, const std::string& what) {
        check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(block_threads), parameters, 0,
                               static_cast<cudaStream_t>(stream)),
              what);
    }
};

}  // namespace

Launcher* cuda_launcher() {
    static CudaLauncher only;
    return &only;
}

}  // namespace agr::cuda
