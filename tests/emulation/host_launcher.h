// A launcher that runs the kernels' own source on host threads.
#pragma once

#include <cstdint>

#include "../../csrc/cuda/launcher.h"

namespace agr::cuda {

class HostLauncher : public Launcher {
public:
    // The properties of the emulated device.
    Device properties{3, 1 << 20};
    int blocks_each = 1;
    bool capturing = false;
    // How often step() and upload() were called.
    std::int64_t steps = 0, uploads = 0;
    unsigned seed = 1;  // of the random stalls

    Device device(int) override { return properties; }
    int resident_blocks(const Kernel&, int) override { return blocks_each; }
    bool captures(void*) override { return capturing; }
    void step(const Kernel& kernel, const Arguments& arguments, int blocks, int device, void* stream) override;
    void upload(const Upload& upload, int device, void* stream) override;
};

}  // namespace agr::cuda
