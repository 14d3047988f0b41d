#include "handles.h"

#include <dlfcn.h>

#include <utility>

namespace agr::python {
namespace {

struct Interface {
    int (*new_handle)(void* of, void** made) = nullptr;
    int (*delete_handle)(void* handle) = nullptr;

    Interface() {
#if defined(__APPLE__)
        const char* const name = "libtorch_cpu.dylib";
#else
        const char* const name = "libtorch_cpu.so";
#endif
        void* const library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
        if (library == nullptr) return;
        new_handle = reinterpret_cast<decltype(new_handle)>(dlsym(library, "aoti_torch_new_tensor_handle"));
        delete_handle = reinterpret_cast<decltype(delete_handle)>(dlsym(library, "aoti_torch_delete_tensor_object"));
    }
};

const Interface& interface() {
    static const Interface only;
    return only;
}

}  // namespace

bool Handles::work() { return interface().new_handle != nullptr && interface().delete_handle != nullptr; }

bool Handles::hold(const void* handle) {
    void* made = nullptr;
    if (interface().new_handle(const_cast<void*>(handle), &made) != 0) return false;
    held_.push_back(made);
    return true;
}

void Handles::release() {
    // Taken first: what a tensor's end sets off may come back here. What deleting answers is of no use.
    const std::vector<void*> held = std::move(held_);
    held_.clear();
    for (void* handle : held) static_cast<void>(interface().delete_handle(handle));
}

}  // namespace agr::python
