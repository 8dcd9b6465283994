// A row whose teacher knows some classes only, and of which only some columns are here: as shard.h
// is for a dense one.
//
// The classes computed one by one are the kept ones of this shard, and the label if it is here.
// From memory comes the student, once for the statistics and once for the gradient, which goes
// there once.
#pragma once

#include "cpu/kept.h"
#include "cpu/shard.h"

namespace kdk {
namespace KDK_ISA {
namespace {

void find(const Task& task, KeptShardStatistics& found) {
  std::vector<Single> singles = singles_of(task);
  const Others others = sum_others(task, singles, -kInfinity);
  const double highest = highest_of(others, singles);
  const double from = anchor(static_cast<float>(highest));
  const KeptSums sums = sums_of(task, others, from, singles);
  found.others = others.max;
  found.z = others.z;
  found.z_hard = others.z_hard;
  found.label = sums.has_label ? task.student.logit(task.label) : -kInfinity;
  found.offset = task.hard && task.label_smoothing > 0 ? sum_of_offsets(task, from) : 0;
  found.highest = highest;
  found.kept_z = sums.kept_z;
  found.kept_z_hard = sums.kept_z_hard;
  found.apart = sums.apart;
  for (const Single& single : singles) {
    if (!single.kept) continue;
    const double p = std::exp(single.log_p);
    found.share += p;
    if (p != 0) found.cross += p * (single.log_p - (single.s - from) / task.temperature);
  }
}

// As if this were the whole row.
KeptSums sums_from(const KeptShardStatistics& merged, double highest) {
  return {merged.others - highest, merged.z, merged.z_hard,     merged.kept_z,
          merged.kept_z_hard,      true,     merged.apart != 0, merged.label - highest};
}

ShardTerms shard_terms(const Task& task, const KeptShardStatistics& merged, bool leads) {
  std::vector<Single> singles = singles_of(task);
  for (Single& single : singles) single.s = task.student.logit(single.column);
  const double highest = anchor(static_cast<float>(merged.highest));
  const DistillShares shares = distill_shares(task, sums_from(merged, highest), highest, singles);
  const KeptShare all = total(leads ? shares.rest : KeptShare{}, shares);
  const KeptFrame& frame = shares.frame;
  double mass = leads ? std::exp(frame.log_q_rest) : 0;
  for (const Single& single : singles) {
    if (single.kept) mass += std::exp((single.s - highest) * frame.rate - frame.log_z);
  }
  return {all.term, mass, all.push};
}

void shard_gradient(const Task& task, const KeptShardStatistics& merged, double mean_slope,
                    const GradientTask& grad) {
  std::vector<Single> singles = singles_of(task);
  const double highest = anchor(static_cast<float>(merged.highest));
  const KeptSums sums = sums_from(merged, highest);
  // Only its exponentials are wanted, which those at T = 1 are not among.
  Task distill = task;
  distill.hard = false;
  const Others others = sum_others(distill, singles, static_cast<float>(merged.others));
  OtherShares shares;
  bool ok = true;
  if (task.distill) {
    const DistillShares of = distill_shares(task, sums, highest, singles);
    distill_parts(of, sums, highest, mean_slope, grad.distill, singles, shares);
    ok &= std::isfinite(of.frame.log_z) && std::isfinite(mean_slope) && shares.rest == shares.rest;
    ok &= merged.cross == merged.cross;
  }
  if (task.hard) {
    const KeptHard hard = kept_hard(sums);
    hard_parts(task, hard, sums, highest, grad.hard, singles, shares);
    ok &= std::isfinite(log_of(hard.all));
  }
  if (ok) {
    write_scaled(task, others, singles, shares, grad);
  } else {
    fill(kNaN, grad.dtype, 0, task.columns, grad.row);
  }
}

}  // namespace
}  // namespace KDK_ISA
}  // namespace kdk
