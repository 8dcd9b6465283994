// A row with a dense teacher of which only some columns are here: its statistics, and what it
// computes from those of the whole row (common/args.h: Phase).
//
// The sweeps are those of dense.h. From memory come student and teacher, once in each phase, and
// the gradient goes there once. For divergences whose gradient holds a sum over the row, φ is found
// again: a row of floats in cache.
#pragma once

#include "cpu/dense.h"

namespace kdk {
namespace KDK_ISA {
namespace {

struct ShardTerms {
  double value, mass, slope;  // D, Σ q and Σ q φ
};

void find(const Task& task, ShardStatistics& found) {
  const Statistics sums = statistics(task);
  found.max_s = sums.max_s;
  found.z_s = sums.z_s;
  found.z_rest = sums.z_rest;
  found.label = task.label < 0 ? -kInfinity : task.student.logit(task.label);
  found.offset = sums.offset;
  found.max_t = task.distill ? sums.max_t : -kInfinity;
  found.z_t = sums.z_t;
  // Without a probability on either side there is no ratio.
  if (!task.distill || !(sums.z_s > 0 && sums.z_t > 0)) return;
  const NormaliserRatio ratio = normaliser_ratio(task, sums);
  found.log_ratio = ratio.log;
  if (task.divergence == Divergence::kForwardKL) {
    found.kl = divergence(task, sums, ratio, nullptr);
  }
}

// As if the sweeps had seen the whole row.
Statistics statistics_from(const ShardStatistics& merged) {
  Statistics sums;
  sums.max_s = static_cast<float>(merged.max_s);
  sums.max_t = static_cast<float>(merged.max_t);
  sums.z_s = merged.z_s;
  sums.z_t = merged.z_t;
  sums.z_rest = merged.z_rest;
  sums.x_label = merged.label - anchor(sums.max_s);
  sums.normal = false;  // nobody has asked
  return sums;
}

ShardTerms shard_terms(const Task& task, const ShardStatistics& merged, bool) {
  const RowFrame row = make_frame(task, statistics_from(merged), merged.log_ratio);
  const DivergenceSums sums = by_divergence(task.divergence, [&](auto of) {
    return value_sweep<decltype(of)::value>(task, row, nullptr);
  });
  return {sums.value, sums.mass, sums.slope};
}

void shard_gradient(const Task& task, const ShardStatistics& merged, double mean_slope,
                    const GradientTask& grad) {
  const Statistics sums = statistics_from(merged);
  // A NaN or +inf among the logits, or nothing but −inf, leaves no positive sum; where D is
  // infinite the mean slope is not finite.
  const bool distill_ok =
      !task.distill || (sums.z_s > 0 && sums.z_t > 0 && std::isfinite(mean_slope));
  const bool hard_ok = !task.hard || sums.z_hard() > 0;
  if (!distill_ok || !hard_ok) {
    fill(kNaN, grad.dtype, 0, task.columns, grad.row);
  } else if (!task.distill) {
    hard_gradient(task, sums, grad);
  } else if (task.divergence == Divergence::kForwardKL) {
    forward_gradient(task, sums, {merged.log_ratio, merged.kl}, grad);
  } else {
    const RowFrame row = make_frame(task, sums, merged.log_ratio);
    float* slopes = row_of_floats(task.columns);
    by_divergence(task.divergence, [&](auto of) {
      constexpr Divergence kDivergence = decltype(of)::value;
      value_sweep<kDivergence>(task, row, slopes);
      gradient_sweep<kDivergence, true, Care::kNear, false>(task, sums, row, mean_slope, grad,
                                                            slopes, false);
    });
  }
}

}  // namespace
}  // namespace KDK_ISA
}  // namespace kdk
