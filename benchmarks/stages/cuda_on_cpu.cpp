// The stages of gpu_stages.h on the emulated GPU of csrc/tests, for tests: what they compute and
// that they use a GPU's primitives as one may, nothing about time.
#include <string>

#include "gpu_stages.h"
//
#include "tests/cuda_on_cpu/operators.cpp"

namespace kdk::gpu {
namespace {

// Blocks so small that short rows take several of them: two rows in shared memory at a time, one or
// none, by the number of columns.
constexpr Limits kDevice = {8192, 4096, 4, 8, 65536};

Variant asked_for;

}  // namespace

template <Divergence kDivergence>
void run_rows(const RowTask& task) {
  if constexpr (kDivergence == Divergence::KDK_DIVERGENCE) {
    const Plan& plan = task.plan;
    with_stage(asked_for, task, [&](auto kind) {
      const auto shared_bytes = static_cast<std::size_t>(plan.shared_bytes);
      launch({plan.teams, plan.team_blocks, plan.threads, shared_bytes},
             [&] { distill_rows<decltype(kind)>(task); });
    });
  }
}

}  // namespace kdk::gpu

// Null, or how the primitives were misused. `device` is the seed of the schedule: see runtime.h.
KDK_EXPORT const char* run_stage(const kdk::StageCall* call) {
  static std::string message;
  kdk::gpu::asked_for = call->variant;
  try {
    const auto seed = static_cast<std::uint64_t>(call->device);
    kdk::gpu::distill_rows_on_cpu(kdk::args_of(*call), kdk::gpu::kDevice, seed);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
