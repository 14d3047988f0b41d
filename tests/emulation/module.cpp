// A Python module with the host launcher, which can be passed to agr_cuda._C.use_launcher.
#include <pybind11/pybind11.h>

#include "host_launcher.h"

PYBIND11_MODULE(host_launcher, m) {
    static auto* only = new agr::cuda::HostLauncher;
    m.attr("launcher") = pybind11::capsule(static_cast<agr::cuda::Launcher*>(only), "agr_cuda.Launcher", [](void*) {});
}
