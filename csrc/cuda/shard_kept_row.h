// A row in shards whose teacher knows some classes only: the three operators of shard_row.h, with
// the sums of kept_row.h. The teacher's classes are those of this shard, with their probabilities
// among all; the rest is nobody's, and has its share of what the leading shard adds.
//
// Elements read or written: N · V for the statistics, the kept ones alone for the terms, 2 · N · V
// for the gradient.
#pragma once

#include "cuda/shard_row.h"

namespace kdk {
namespace gpu {

// KeptShardStatistics of the whole row, and the mean slope.
struct MergedKeptRow {
  KeptShardStatistics of;
  double mean_slope;
};

KDK_DEVICE MergedKeptRow merged_kept_row(const ShardTask& task, const Row& row) {
  const double* field = task.merged + row.index;
  const auto next = [&] {
    const double value = *field;
    field += task.rows;
    return value;
  };
  return {{next(), next(), next(), next(), next(), next(), next(), next(), next(), next(), next()},
          next()};
}

template <typename K>
KDK_DEVICE void kept_shard_statistics(const ShardTask& task, const Row& row, Team& team) {
  const Singles singles = singles_of(task, row);
  mark_singles(task, row, singles);
  const Others others = sum_others<K>(task, row, team);
  const SingleSums of = sum_singles<K>(task, row, singles, others.max, team);
  const double from = anchor(static_cast<float>(of.highest));
  const double temperature = static_cast<double>(task.temperature.hi) + task.temperature.lo;
  double shares[2] = {0, 0};  // Σ p, Σ p (log p − (s − highest)/T)
  for_each_single(singles, [&](int i) {
    const double p = i < singles.end ? exp(singles.log_p[i]) : 0;
    if (p == 0) return;
    const double s = logit_of(row, row.student, singles.column(i)) - from;
    shares[0] += p;
    shares[1] += p * (singles.log_p[i] - s / temperature);
  });
  team_sum(shares, team);
  const float z = is_no_logit(row.s_label) ? kNaN : others.z;
  store_fields(task, row, team,
               {others.max, z, others.z_hard, row.s_label, of.offset, of.highest, of.z, of.z_hard,
                shares[0], shares[1], of.apart ? 1.0 : 0.0});
}

// The frame of the whole row, in shared memory once the block has met.
KDK_DEVICE void merge_kept_row(const ShardTask& task, const Row& row, KeptRow& kept) {
  if (thread_rank() != 0) return;
  const MergedKeptRow whole = merged_kept_row(task, row);
  const KeptShardStatistics& of = whole.of;
  const bool apart = of.apart != 0;
  kept.highest = of.highest;
  kept.sums = {of.others - of.highest, of.z,      of.z_hard, of.kept_z,
               of.kept_z_hard,         task.hard, apart,     of.label - of.highest};
  kept.frame =
      kept_frame(kept.sums, static_cast<double>(task.temperature.hi) + task.temperature.lo);
  kept.mean = whole.mean_slope;
}

template <typename K>
KDK_DEVICE void kept_shard_terms(const ShardTask& task, const Row& row, Team& team) {
  KeptRow& kept = kept_row(task);  // the row before was read before its sums met
  merge_kept_row(task, row, kept);
  sync_block();
  const Singles singles = singles_of(task, row);
  double sums[2] = {0, 0}, mass[2] = {0, 0};
  const auto add_class = [&](double log_p, double log_q) {
    const KeptShare of = share_of_kept(task, log_p, log_q);
    sums[0] += of.term;
    sums[1] += of.push;
    mass[0] += exp(log_q);
  };
  for_each_single(singles, [&](int i) {
    if (i == singles.end) return;
    const double s = logit_of(row, row.student, singles.column(i)) - kept.highest;
    add_class(singles.log_p[i], s * kept.frame.rate - kept.frame.log_z);
  });
  if (task.leads && leads(team)) add_class(singles.log_rest, kept.frame.log_q_rest);
  team_sum(sums, team);
  team_sum(mass, team);
  store_fields(task, row, team, {sums[0], mass[0], sums[1]});
}

template <typename K>
KDK_DEVICE void write_kept_shard_gradient(const ShardTask& task, const Row& row, const Pass& pass,
                                          Team& team) {
  const Singles singles = singles_of(task, row);
  mark_singles(task, row, singles);
  KeptRow& kept = kept_row(task);
  merge_kept_row(task, row, kept);
  if (thread_rank() == 0) {
    const KeptShare of_rest = share_of_kept(task, singles.log_rest, kept.frame.log_q_rest);
    kept.rest = rest_part(kept.frame, of_rest, kept.mean);
    kept.of_distill = kept.rest * share_of(kept.frame.rest, kept.sums.others * kept.frame.rate);
    kept.hard = kept_hard(kept.sums);
    kept.of_hard = share_of(kept.hard.all, kept.sums.others);
  }
  sync_block();
  const double log_z_hard = task.hard ? log_of(kept.hard.all) : 0;
  if (!(fabs(kept.frame.log_z) < kInfinity) || !(fabs(log_z_hard) < kInfinity) ||
      !(fabs(kept.mean) < kInfinity)) {
    fill_row<K>(row, kNaN);
    return;
  }
  // The highest of the others, wherever it is.
  const Others others{static_cast<float>(kept.sums.others + kept.highest), 0, 0};
  write_kept_gradient<K>(task, row, singles, others, kept, pass, team);
}

}  // namespace gpu
}  // namespace kdk
