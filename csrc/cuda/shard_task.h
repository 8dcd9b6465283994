// What the host works out for the kernels of a shard's rows.
#pragma once

#include "cuda/task.h"

namespace kdk {
namespace gpu {

struct ShardTask : RowTask {
  static constexpr bool kShard = true;
  Phase phase;
  const double* merged;  // as in ShardArgs
  double* out;
  bool leads;
  bool wants_kl;
};

// All but the plan.
inline ShardTask make_shard_task(const ShardArgs& args, Phase phase, Scratch* scratch,
                                 std::int64_t* bad_label) {
  const Objective& objective = args.rows.objective;
  const auto classes = static_cast<double>(args.classes);
  ShardTask task{};
  static_cast<RowTask&>(task) = make_row_task(args.rows, scratch, bad_label);
  task.phase = phase;
  task.merged = args.merged;
  task.out = args.out;
  task.leads = args.leads;
  task.distill = objective.distill_weight != 0 || objective.want_terms;
  // Beside a sparse teacher's classes statistics are others, and the label is a class by itself,
  // whatever is wanted of them.
  if (phase == Phase::kStatistics && task.kept.count > 0) task.distill = true;
  const bool apart = task.distill && task.kept.count > 0;
  task.hard =
      task.labels != nullptr && (objective.hard_weight != 0 || objective.want_terms || apart);
  task.main = task.distill || task.hard;
  task.wants_kl = task.divergence == Divergence::kForwardKL;
  if (phase == Phase::kStatistics) task.divergence = Divergence::kForwardKL;  // for all the same
  if (phase == Phase::kGradient) {
    task.smoothing = split(objective.label_smoothing / classes);
    task.smoothed_label = static_cast<float>(objective.label_smoothing * (1 - 1 / classes));
  }
  return task;
}

// The phase reads every column of the student.
inline bool sweeps(const ShardTask& task) {
  return task.phase != Phase::kTerms || task.kept.count == 0;
}

}  // namespace gpu
}  // namespace kdk
