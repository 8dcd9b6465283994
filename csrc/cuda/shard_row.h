// A row of which this device has some columns only: the three operators for shards, whose results
// kdkernels/parallel adds up over the devices (backends/eager_shards.py defines them).
//
//   statistics   max_s, Σ e^{(s − max_s)/T}, Σ_{j≠y} e^{s_j − max_s}, s_y, Σ (s − max_s), max_t,
//                Σ e^{(t − max_t)/T}, and log(z_s / z_t) and the forward KL of these columns alone
//   terms        merged statistics -> D, Σ q and Σ q φ over these columns
//   gradient     merged statistics, mean slope -> weight / num_items · ∂(row loss)/∂s
//
// All that lies between two of them is a handful of sums over the row, as in row.h, and sums may be
// added up in parts: one pass becomes two, or three where a gradient holds a sum that takes both
// normalisers. Traffic: 2 · N · V elements for the statistics, 2 · N · V for the terms (never those
// of the forward KL), 3 · N · V for the gradient. KL(p‖q) is that of the shards' masses plus
// Σ mass · (KL within a shard), so what a near row needs by small differences it needs of its own
// columns, which are then still in shared memory.
#pragma once

#include "cuda/distill_kernel.h"
#include "cuda/shard_task.h"

namespace kdk {
namespace gpu {

// A Kind of rows in one of the phases.
template <Phase kPhase_, typename K>
struct ShardKind : K {
  static constexpr Phase kPhase = kPhase_;
};

KDK_DEVICE Wanted wanted_of(const ShardTask& task, const Mean& mean, std::int64_t row) {
  Wanted wanted{};
  wanted.label = task.labels == nullptr ? kElsewhere : task.labels[row];
  wanted.weight = task.weights == nullptr ? 1.0f : task.weights[row];
  wanted.counts = task.labels == nullptr || wanted.label != task.ignore_index;
  wanted.bad_label = wanted.counts && (wanted.label < kElsewhere || wanted.label >= task.columns);
  if (wanted.bad_label) wanted.label = kElsewhere;
  wanted.main = task.main && wanted.counts && wanted.weight != 0 && !mean.empty;
  wanted.read = !wanted.bad_label && (wanted.main || (wanted.counts && task.want_terms));
  return wanted;
}

template <int kFields>
KDK_DEVICE void store_fields(const ShardTask& task, const Row& row, const Team& team,
                             const double (&fields)[kFields]) {
  if (!leads(team)) return;
  KDK_UNROLL
  for (int i = 0; i < kFields; ++i) task.out[i * task.rows + row.index] = fields[i];
}

KDK_DEVICE double wide(TwoFloats x) { return static_cast<double>(x.hi) + x.lo; }

// ---- Statistics -------------------------------------------------------------------------------

// Of NaN and +inf, which make a row NaN.
KDK_DEVICE bool is_no_logit(float x) { return !(x < kInfinity); }

// Whether the forward KL is as exact as divergence() has it from the sums.
template <typename K>
KDK_DEVICE bool is_far(float kl, TwoFloats log_ratio) {
  const float from = static_cast<float>(kFarFrom<K::kDivergence>) * (1 + absolute(log_ratio.hi));
  return kl >= from && kl < kInfinity;
}

struct ShardKL {
  TwoFloats log_ratio;  // log(z_s / z_t)
  float kl;
};

// As divergence() has them.
template <typename K>
KDK_DEVICE ShardKL shard_kl(const ShardTask& task, const Row& row, const Sums& sums, Team& team) {
  // Where a side has no probability here, only what the student rules out shows in the row.
  if (!(sums.z_s > 0 && sums.z_t > 0)) return {{0, 0}, sums.z_t > 0 ? kInfinity : 0.0f};
  TwoFloats log = log_ratio(sums.z_s, sums.z_t);
  const float kl = (log.hi - sums.gap / (task.temperature.hi * sums.z_t)) + log.lo;
  if (kl < static_cast<float>(kNearKL)) {
    log = {log1p_of(normaliser_difference<K>(task, row, sums, team) / sums.z_t), 0};
  }
  if (!task.wants_kl) return {log, 0};
  if (is_far<K>(kl, log)) return {log, kl};
  return {log, mean_slope<K>(task, row, make_frame(task, sums, log), team).value};
}

template <typename K>
KDK_DEVICE void shard_statistics(const ShardTask& task, const Row& row, Team& team) {
  Sums sums = statistics<K>(task, row, team);
  ShardKL of{{0, 0}, 0};
  float offset = 0;
  if constexpr (K::kDistill) of = shard_kl<K>(task, row, sums, team);
  if constexpr (K::kHard) {
    if (task.label_smoothing != 0) {
      Sums from = sums;
      from.max_s = anchor(sums.max_s);
      offset = sum_of_offsets<K>(row, from, team);
    }
    if (is_no_logit(row.s_label)) sums.z_rest = kNaN;
  }
  store_fields(task, row, team,
               {sums.max_s, sums.z_s, sums.z_rest, K::kHard ? row.s_label : 0.0f, offset,
                K::kDistill ? sums.max_t : -kInfinity, sums.z_t, wide(of.log_ratio), of.kl});
}

// ---- Merged -----------------------------------------------------------------------------------

// ShardStatistics of the whole row, and the mean slope.
struct MergedRow {
  TwoFloats max_s, z_s, z_rest, label, offset, max_t, z_t, log_ratio, kl, mean_slope;
};

KDK_DEVICE MergedRow merged_row(const ShardTask& task, const Row& row) {
  const double* field = task.merged + row.index;
  const auto next = [&] {
    const TwoFloats value = pair_from_double(field);
    field += task.rows;
    return value;
  };
  if (task.kept.count > 0) {  // KeptShardStatistics, for the cross-entropy alone
    const TwoFloats others = next();
    next();
    const TwoFloats z_hard = next(), label = next();
    next();
    const TwoFloats highest = next();
    next();
    const TwoFloats kept = next();
    const TwoFloats drop = two_diff(others.hi, highest.hi);
    const TwoFloats factor{exp_of<true>(drop.hi, drop.lo, kUnitRate), 0};
    MergedRow whole{};
    whole.max_s = highest;
    whole.z_rest = add(kept, multiply(z_hard, factor));
    whole.label = label;
    return whole;
  }
  return {next(), next(), next(), next(), next(), next(), next(), next(), next(), next()};
}

KDK_DEVICE Sums sums_of(const MergedRow& whole) {
  return {whole.max_s.hi, whole.max_t.hi, whole.z_s.hi, whole.z_t.hi, 0, whole.z_rest.hi};
}

// ---- Terms ------------------------------------------------------------------------------------

template <typename K>
KDK_DEVICE void shard_terms(const ShardTask& task, const Row& row, Team& team) {
  const MergedRow whole = merged_row(task, row);
  const Sums sums = sums_of(whole);
  Slope of{kNaN, {}, {kNaN, 0}, {kNaN, 0}};
  if (sums.z_s > 0 && sums.z_t > 0) {
    of = mean_slope<K>(task, row, make_frame(task, sums, whole.log_ratio), team);
  }
  store_fields(task, row, team, {of.value, wide(of.mass), wide(of.total)});
}

// ---- The gradient -----------------------------------------------------------------------------

template <typename K>
KDK_DEVICE void write_shard_gradient(const ShardTask& task, Row& row, const Pass& pass,
                                     Team& team) {
  const MergedRow whole = merged_row(task, row);
  const Sums sums = sums_of(whole);
  row.s_label = whole.label.hi;
  const bool distill_ok = !K::kDistill || (sums.z_s > 0 && sums.z_t > 0);
  const bool hard_ok = !K::kHard || hard_normaliser(row, sums) > 0;
  if (!distill_ok || !hard_ok || !(absolute(whole.mean_slope.hi) < kInfinity)) {
    fill_row<K>(row, kNaN);
    return;
  }
  const RowFrame frame = make_frame(task, sums, whole.log_ratio);
  if constexpr (K::kDivergence == Divergence::kForwardKL) {
    const float kl = whole.kl.hi;
    const bool far = !K::kDistill || is_far<K>(kl, whole.log_ratio);
    if (far && task.student.dtype != DType::kFloat16) {
      write_gradient<K, Care::kFar>(task, row, sums, frame, {0, 0}, pass, team);
      return;
    }
  }
  write_gradient<K, Care::kNear>(task, row, sums, frame, whole.mean_slope, pass, team);
}

}  // namespace gpu
}  // namespace kdk
