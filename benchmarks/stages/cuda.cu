// The stages of gpu_stages.h as kernels, launched as the product launches its own: this file
// includes the product's entry points, and of them all but the kernels is theirs.
#include "gpu_stages.h"
//
#include "cuda/operators.cu"

namespace kdk {
namespace gpu {
namespace {

// Of the call that is being made: the entry points ask for a kernel by the task alone.
Variant asked_for;

// As in distill.cu.
template <typename K>
__global__ void __launch_bounds__(kMaxThreads, 1)
    stage_kernel(const __grid_constant__ RowTask task) {
  distill_rows<K>(task);
}

}  // namespace

template <Divergence kDivergence>
const void* kernel_of(const RowTask& task) {
  if constexpr (kDivergence != Divergence::KDK_DIVERGENCE) {
    return nullptr;  // another library's
  } else {
    return with_stage(asked_for, task, [](auto kind) {
      return reinterpret_cast<const void*>(&stage_kernel<decltype(kind)>);
    });
  }
}

}  // namespace gpu
}  // namespace kdk

// Null, or CUDA's own words for what is wrong.
KDK_EXPORT const char* run_stage(const kdk::StageCall* call) {
  kdk::gpu::asked_for = call->variant;
  return kdk::distill_rows_cuda(kdk::args_of(*call), {static_cast<int>(call->device), call->stream,
                                                      call->scratch, call->bad_label});
}

KDK_EXPORT std::size_t scratch_bytes() { return kdk::cuda_scratch_bytes(); }
