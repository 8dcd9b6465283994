// The kernels for shards of the divergence KDK_DIVERGENCE.
#include "cuda/launch.h"
#include "cuda/shard_kernel.h"

namespace kdk {
namespace gpu {
namespace {

// As distill_kernel.
template <typename K>
__global__ void __launch_bounds__(kMaxThreads, 1)
    shard_kernel(const __grid_constant__ ShardTask task) {
  shard_rows<K>(task);
}

}  // namespace

template <Divergence kDivergence>
const void* kernel_of(const ShardTask& task) {
  return with_shard_kind<kDivergence>(
      task, [](auto kind) { return reinterpret_cast<const void*>(&shard_kernel<decltype(kind)>); });
}

template const void* kernel_of<Divergence::KDK_DIVERGENCE>(const ShardTask& task);

}  // namespace gpu
}  // namespace kdk
