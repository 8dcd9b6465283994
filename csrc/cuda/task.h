// What the host works out once for the kernels, in floats and pairs of floats: a GPU's doubles are
// slow.
#pragma once

#include <algorithm>

#include "common/args.h"
#include "common/pairs.h"

namespace kdk {
namespace gpu {

// How a row is shared out; see plan.h.
struct Plan {
  int threads;         // of a block, a multiple of 32
  int cluster_blocks;  // blocks that share a row
  int clusters;        // in the grid
  int slice;           // columns of a block, a multiple of kChunk
  int stages;          // rows in shared memory at a time; 0: rows are read from memory twice
  int shared_bytes;    // of a block
};

struct RowTask {
  std::int64_t rows, length, width, columns;  // B · L, L, V_s, V
  Rows student, teacher, grad;
  const std::int64_t* labels;
  const float* weights;
  const float* mean;        // what `prepare` leaves: see there
  float* row_losses;        // (3, B · L)
  float* unscale;           // see DistillArgs
  std::int64_t* bad_label;  // 1 + a row whose label is out of range; only ever written
  std::int64_t ignore_index;
  bool distill, hard, want_terms;
  int power;  // T where that is 1, 2, 3 or 4, else 0
  float w_p, w_q;
  TwoFloats rate, temperature;
  float inv_temperature;
  TwoFloats grad_distill, grad_hard;  // distill_weight / T, hard_weight
  float distill_weight, hard_weight, distill_scale;
  float label_smoothing;
  TwoFloats smoothing;   // ε / V
  float smoothed_label;  // ε (1 − 1 / V)
  Plan plan;
};

inline RowTask make_row_task(const DistillArgs& args, const Plan& plan) {
  const Objective& objective = args.objective;
  const auto columns = static_cast<double>(objective.vocab_size);
  RowTask task{};
  task.rows = args.batch * args.length;
  task.length = args.length;
  task.width = args.width;
  task.columns = objective.vocab_size;
  task.student = args.student;
  task.teacher = args.teacher;
  task.grad = args.grad;
  task.labels = args.labels;
  task.weights = args.weights;
  task.row_losses = args.rows;
  task.unscale = args.unscale;
  task.ignore_index = objective.ignore_index;
  task.distill = objective.distill_weight != 0;
  task.hard = objective.hard_weight != 0;
  task.want_terms = objective.want_terms;
  task.power = small_power(objective.temperature);
  const Mixture mixture = mixture_of(objective);
  task.w_p = static_cast<float>(mixture.teacher);
  task.w_q = static_cast<float>(mixture.student);
  task.rate = split(kLog2E / objective.temperature);
  task.temperature = split(objective.temperature);
  task.inv_temperature = static_cast<float>(1 / objective.temperature);
  task.grad_distill = split(objective.distill_weight / objective.temperature);
  task.grad_hard = split(objective.hard_weight);
  task.distill_weight = static_cast<float>(objective.distill_weight);
  task.hard_weight = static_cast<float>(objective.hard_weight);
  task.distill_scale = static_cast<float>(objective.distill_scale);
  task.label_smoothing = static_cast<float>(objective.label_smoothing);
  task.smoothing = split(objective.label_smoothing / columns);
  task.smoothed_label = static_cast<float>(objective.label_smoothing * (1 - 1 / columns));
  task.plan = plan;
  return task;
}

}  // namespace gpu
}  // namespace kdk
