// The rows of a shard, a phase at a time, and which kernel computes them.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/shard_kept_row.h"

namespace kdk {
namespace gpu {

// Statistics or terms.
template <typename K>
KDK_DEVICE void look_at_shard(const ShardTask& task, const Row& row, Team& team) {
  if constexpr (K::kDivergence == Divergence::kKept) {
    if constexpr (K::kPhase == Phase::kStatistics) kept_shard_statistics<K>(task, row, team);
    if constexpr (K::kPhase == Phase::kTerms) kept_shard_terms<K>(task, row, team);
  } else {
    if constexpr (K::kPhase == Phase::kStatistics) shard_statistics<K>(task, row, team);
    if constexpr (K::kPhase == Phase::kTerms) shard_terms<K>(task, row, team);
  }
}

// Instead of them, of a row that is not read.
template <typename K>
KDK_DEVICE void store_nothing(const ShardTask& task, const Row& row, const Wanted& wanted,
                              const Team& team) {
  constexpr bool kKept = K::kDivergence == Divergence::kKept;
  constexpr auto kBytes = kKept ? sizeof(KeptShardStatistics) : sizeof(ShardStatistics);
  constexpr int kFields = K::kPhase == Phase::kTerms ? 3 : kBytes / sizeof(double);
  if (!leads(team)) return;
  const double value = wanted.bad_label ? kNaN : 0;
  KDK_UNROLL
  for (int i = 0; i < kFields; ++i) task.out[i * task.rows + row.index] = value;
  if (wanted.bad_label) *task.bad_label = row.index + 1;
}

template <typename K>
KDK_DEVICE void write_gradient_of_shard(const ShardTask& task, Row& row, const Wanted& wanted,
                                        const Mean& mean, Team& team) {
  const bool per_row = task.student.dtype == DType::kFloat16;
  if (leads(team) && (per_row || row.index == 0)) {
    task.unscale[row.index] = mean.empty ? 0.0f : 1.0f;
  }
  if (!wanted.read) return;
  const Pass pass{true, multiply({wanted.weight, 0}, mean.inverse)};
  if constexpr (K::kDivergence == Divergence::kKept) {
    write_kept_shard_gradient<K>(task, row, pass, team);
  } else {
    write_shard_gradient<K>(task, row, pass, team);
  }
}

template <typename K>
KDK_DEVICE void shard_rows(const ShardTask& task) {
  for_each_row<K>(
      task, [&](Row row, const Wanted& wanted, const Mean& mean, Team& team, const auto& loaded) {
        loaded();
        if (wanted.label < 0) row.s_label = row.t_label = -kInfinity;
        if constexpr (K::kPhase == Phase::kGradient) {
          write_gradient_of_shard<K>(task, row, wanted, mean, team);
        } else if (wanted.read) {
          look_at_shard<K>(task, row, team);
        } else {
          store_nothing<K>(task, row, wanted, team);
        }
      });
}

// ---- Which kernel -----------------------------------------------------------------------------

// launch(kind) with the ShardKind of the task. Few are compiled: statistics, whatever the
// divergence, are those of the forward KL, which has no terms; and rows that lie in shared memory,
// aligned, have kernels of their own for it alone.
template <Divergence kDivergence, typename Launch>
auto with_shard_kind(const ShardTask& task, const Launch& launch) {
  constexpr bool kForward = kDivergence == Divergence::kForwardKL;
  constexpr bool kKept = kDivergence == Divergence::kKept;
  const auto with = [&](auto phase, auto whole) {
    return with_kind<kDivergence, whole()>(task, [&](auto kind) {
      using K = decltype(kind);
      constexpr bool kWhole = K::kWhole && K::kDistill;
      return launch(ShardKind<phase(), Kind<kDivergence, K::kDistill, K::kHard, kWhole>>{});
    });
  };
  constexpr std::integral_constant<Phase, Phase::kStatistics> kStatistics{};
  constexpr std::integral_constant<Phase, Phase::kGradient> kGradient{};
  if constexpr (kForward) {
    if (is_whole(task)) {
      if (task.phase == Phase::kStatistics) return with(kStatistics, std::true_type{});
      return with(kGradient, std::true_type{});
    }
  }
  if constexpr (kForward || kKept) {
    if (task.phase == Phase::kStatistics) return with(kStatistics, std::false_type{});
  }
  if constexpr (!kForward) {
    if (task.phase == Phase::kTerms) {
      return launch(ShardKind<Phase::kTerms, Kind<kDivergence, !kKept, kKept, false>>{});
    }
  }
  return with(kGradient, std::false_type{});
}

}  // namespace gpu
}  // namespace kdk
