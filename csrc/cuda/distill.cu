// The kernels of the divergence KDK_DIVERGENCE.
#include "cuda/dispatch.h"
#include "cuda/distill_kernel.h"
#include "cuda/launch.h"

namespace kdk {
namespace gpu {
namespace {

// 512 threads of 128 registers, or two blocks of 256, fill a multiprocessor.
template <typename K>
__global__ void __launch_bounds__(kMaxThreads, 1)
    distill_kernel(const __grid_constant__ RowTask task) {
  distill_rows<K>(task);
}

}  // namespace

template <Divergence kDivergence>
const void* kernel_of(const RowTask& task) {
  return with_kind<kDivergence>(task, [](auto kind) {
    return reinterpret_cast<const void*>(&distill_kernel<decltype(kind)>);
  });
}

template const void* kernel_of<Divergence::KDK_DIVERGENCE>(const RowTask& task);

}  // namespace gpu
}  // namespace kdk
