// The upload kernel: writes bytes that arrive as a kernel parameter to device memory.
#include "arguments.h"
#include "intrinsics.h"

namespace agr::cuda {
namespace {

__global__ void __launch_bounds__(block_threads) agr_upload(const __grid_constant__ Upload upload) {
    for (std::int64_t i = thread_index(); i < upload.bytes / 8; i += block_threads)
        static_cast<std::uint64_t*>(upload.destination)[i] = upload.data[i];
}

}  // namespace

const void* upload_kernel() { return reinterpret_cast<const void*>(&agr_upload); }

}  // namespace agr::cuda
