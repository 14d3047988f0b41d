// Writes a parcel, which came as a kernel's parameter, to where it belongs in the device's memory.
#include "arguments.h"
#include "intrinsics.h"

namespace agr::cuda {
namespace {

__global__ void __launch_bounds__(block_threads) agr_send(const __grid_constant__ Parcel parcel) {
    for (std::int64_t i = thread_index(); i < parcel.bytes / 8; i += block_threads)
        static_cast<std::uint64_t*>(parcel.to)[i] = parcel.content[i];
}

}  // namespace

const void* send_kernel() { return reinterpret_cast<const void*>(&agr_send); }

}  // namespace agr::cuda
