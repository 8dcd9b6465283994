// The kernels of the divergence KDK_DIVERGENCE.
#include "tests/cuda_on_cpu/kernels.h"

#include "cuda/dispatch.h"
#include "cuda/distill_kernel.h"

namespace kdk::gpu {

// Teams that meet in memory run side by side too, in what the machine calls a cluster.
template <Divergence kDivergence>
void run_rows(const RowTask& task) {
  const Plan& plan = task.plan;
  with_kind<kDivergence>(task, [&](auto kind) {
    const auto shared_bytes = static_cast<std::size_t>(plan.shared_bytes);
    launch({plan.teams, plan.team_blocks, plan.threads, shared_bytes},
           [&] { distill_rows<decltype(kind)>(task); });
  });
}

template void run_rows<Divergence::KDK_DIVERGENCE>(const RowTask& task);

}  // namespace kdk::gpu
