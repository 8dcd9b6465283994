// Which kernel computes a task.
#pragma once

#include "cuda/kept_row.h"

namespace kdk {
namespace gpu {

// Every row of a tensor begins at a multiple of 16 bytes.
inline bool is_aligned(const Rows& rows) {
  const std::int64_t unit = 16 / size_of(rows.dtype);
  return reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0 && rows.stride_b % unit == 0 &&
         rows.stride_l % unit == 0;
}

inline bool is_whole(const RowTask& task) {
  const bool logits = !changes(task.student_cap) && !(task.distill && changes(task.teacher_cap));
  const bool dense = task.kept.count == 0;
  return logits && task.plan.stages > 0 && is_aligned(task.student) &&
         (!dense || is_aligned(task.teacher)) &&
         (task.grad.data == nullptr || is_aligned(task.grad));
}

template <Divergence kDivergence, bool kWhole, typename Launch>
auto with_kind(const RowTask& task, const Launch& launch) {
  if constexpr (kDivergence == Divergence::kKept) {  // no teacher's row to bring
    return launch(Kind<kDivergence, false, true, kWhole>{});
  } else {
    if constexpr (kDivergence == Divergence::kForwardKL) {
      if (!task.distill) return launch(Kind<kDivergence, false, true, kWhole>{});
    }
    if (!task.hard) return launch(Kind<kDivergence, true, false, kWhole>{});
    return launch(Kind<kDivergence, true, true, kWhole>{});
  }
}

// launch(kind) with the Kind of the task.
template <Divergence kDivergence, typename Launch>
auto with_kind(const RowTask& task, const Launch& launch) {
  return is_whole(task) ? with_kind<kDivergence, true>(task, launch)
                        : with_kind<kDivergence, false>(task, launch);
}

}  // namespace gpu
}  // namespace kdk
