// Keeps tensors alive without Python objects: references of PyTorch's own, through its C interface for compiled models
// (torch/csrc/inductor/aoti_torch/c/shim.h), whose binary form it keeps stable.
#pragma once

#include <vector>

namespace agr::python {

class Handles {
public:
    Handles() = default;
    ~Handles() { release(); }
    Handles(const Handles&) = delete;
    Handles& operator=(const Handles&) = delete;

    // Whether this PyTorch has the functions. torch is imported already.
    static bool work();

    // Keeps what `handle`, an at::Tensor, refers to; false if PyTorch refuses.
    bool hold(const void* handle);
    void release();

private:
    std::vector<void*> held_;
};

}  // namespace agr::python
