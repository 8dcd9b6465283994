// The stages of a pass over dense rows on a GPU: the product's kernel, which brings the rows to
// shared memory and the gradient from there, with another evaluate() in the middle. `full` and
// `loss` have the product's own.
#pragma once

#ifdef KDK_NO_EXPONENTIALS
#include "no_exponentials.h"
#endif

#include "call.h"
#include "cuda/dispatch.h"

namespace kdk {
namespace gpu {

template <Variant kVariant_, bool kWhole>
struct StageKind : Kind<Divergence::KDK_DIVERGENCE, true, true, kWhole> {
  static constexpr Variant kVariant = kVariant_;
};

template <int kCount>
KDK_DEVICE void keep_sums(const RowTask& task, const Row& row, const Team& team,
                          const float (&sums)[kCount]) {
  float* out = sums_of_row(task.row_losses, task.rows, row.index);
  if (!leads(team)) return;
  KDK_UNROLL
  for (int i = 0; i < kCount; ++i) out[i] = sums[i];
}

template <typename K>
KDK_DEVICE void load_row(const RowTask& task, const Row& row, Team& team) {
  float sums[2] = {0, 0};
  for_each_logits<K>(row, [&](int, int n, const auto& s, const auto& t) {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      sums[0] += i < n ? s[i] : 0.0f;
      sums[1] += i < n ? t[i] : 0.0f;
    }
  });
  team_sum(sums, team);
  keep_sums(task, row, team, sums);
}

// The gradient is student + teacher.
template <typename K>
KDK_DEVICE void copy_row(const Row& row) {
  for_each_logits<K>(row, [&](int column, int n, const auto& s, const auto& t) {
    float both[kChunk];
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) both[i] = s[i] + t[i];
    store_chunk<K::kWhole>(row.grad, column, n, both);
  });
}

template <typename K, typename Loaded>
KDK_DEVICE RowLoss evaluate_stage(const RowTask& task, const Row& row, const Pass& pass, Team& team,
                                  const Loaded& loaded) {
  if constexpr (K::kVariant == Variant::kFull) {
    return evaluate<K>(task, row, pass, team, loaded);
  } else if constexpr (K::kVariant == Variant::kStatistics) {
    const Sums sums = statistics<K>(task, row, team);
    loaded();
    keep_sums(task, row, team, {sums.max_s, sums.max_t, sums.z_s, sums.z_t, sums.gap, sums.z_rest});
  } else {
    loaded();  // at once: these are to show what memory allows
    if constexpr (K::kVariant == Variant::kLoads) load_row<K>(task, row, team);
    if constexpr (K::kVariant == Variant::kCopy) copy_row<K>(row);
  }
  return {0, 0};
}

}  // namespace gpu
}  // namespace kdk

// distill_rows() of this header alone calls evaluate_stage() where it says evaluate().
#define evaluate evaluate_stage
#include "cuda/distill_kernel.h"
#undef evaluate

namespace kdk {
namespace gpu {

// call(kind) with the StageKind of the task. Without exponentials there is but the whole pass.
template <bool kWhole, typename Call>
auto with_stage([[maybe_unused]] Variant variant, const Call& call) {
#ifndef KDK_NO_EXPONENTIALS
  switch (variant) {
    case Variant::kLoads:
      return call(StageKind<Variant::kLoads, kWhole>{});
    case Variant::kCopy:
      return call(StageKind<Variant::kCopy, kWhole>{});
    case Variant::kStatistics:
      return call(StageKind<Variant::kStatistics, kWhole>{});
    default:
      break;
  }
#endif
  return call(StageKind<Variant::kFull, kWhole>{});
}

template <typename Call>
auto with_stage(Variant variant, const RowTask& task, const Call& call) {
  return is_whole(task) ? with_stage<true>(variant, call) : with_stage<false>(variant, call);
}

}  // namespace gpu
}  // namespace kdk
