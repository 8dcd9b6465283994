// The kernels of the divergence KDK_DIVERGENCE.
#include "tests/cuda_on_cpu/kernels.h"

#include "cuda/dispatch.h"
#include "cuda/distill_kernel.h"
#include "cuda/shard_kernel.h"

namespace kdk::gpu {

// Teams that meet in memory run side by side too, in what the machine calls a cluster.
static Launch shape_of(const Plan& plan) {
  const auto shared_bytes = static_cast<std::size_t>(plan.shared_bytes);
  return {plan.teams, plan.team_blocks, plan.threads, shared_bytes};
}

template <Divergence kDivergence>
void run_rows(const RowTask& task) {
  with_kind<kDivergence>(task, [&](auto kind) {
    launch(shape_of(task.plan), [&] { distill_rows<decltype(kind)>(task); });
  });
}

template <Divergence kDivergence>
void run_shard_rows(const ShardTask& task) {
  with_shard_kind<kDivergence>(task, [&](auto kind) {
    launch(shape_of(task.plan), [&] { shard_rows<decltype(kind)>(task); });
  });
}

template void run_rows<Divergence::KDK_DIVERGENCE>(const RowTask& task);
template void run_shard_rows<Divergence::KDK_DIVERGENCE>(const ShardTask& task);

}  // namespace kdk::gpu
