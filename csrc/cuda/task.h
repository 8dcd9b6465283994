// What the host works out once for the kernels, in floats and pairs of floats: a GPU's doubles are
// slow.
#pragma once

#include <type_traits>

#include "common/cap.h"
#include "common/pairs.h"
#include "cuda/plan.h"

namespace kdk {
namespace gpu {

struct RowTask {
  static constexpr bool kShard = false;  // the columns are all there are: see shard_task.h
  std::int64_t rows, length, width;      // B · L, L, V_s
  int columns;                           // V
  Rows student, teacher, grad;
  const std::int64_t* labels;
  const float* weights;
  Scratch* scratch;
  float* row_losses;        // (3, B · L)
  float* unscale;           // see DistillArgs
  std::int64_t* bad_label;  // 1 + a row whose label is out of range; only ever written
  std::int64_t ignore_index;
  Divergence divergence;
  bool distill, hard;  // the terms that this launch computes
  bool main;           // it is the one that writes loss and gradient
  bool others;         // and the one before has written the term that this one does not compute
  bool want_terms;     // also of rows of weight 0
  int power;           // T where e^s is taken as that power of e^{s/T}, else 0
  float w_p, w_q;
  float far_limit;  // see far.h
  TwoFloats rate, temperature;
  float inv_temperature;
  TwoFloats grad_distill, grad_hard;  // distill_weight / T, hard_weight
  float distill_weight, hard_weight, distill_scale;
  float label_smoothing;
  TwoFloats smoothing;   // ε / V
  float smoothed_label;  // ε (1 − 1 / V)
  Plan plan;
  Kept kept;  // instead of the teacher, where its count is not 0
  Cap student_cap, teacher_cap;
  Mixture mixture;
};

// All but the plan.
inline RowTask make_row_task(const DistillArgs& args, Scratch* scratch, std::int64_t* bad_label) {
  const Objective& objective = args.objective;
  const auto columns = static_cast<double>(objective.vocab_size);
  RowTask task{};
  task.rows = args.batch * args.length;
  task.length = args.length;
  task.width = args.width;
  task.columns = static_cast<int>(objective.vocab_size);
  task.student = args.student;
  task.teacher = args.teacher;
  task.grad = args.grad;
  task.kept = args.kept;
  task.student_cap = make_cap(objective.student_scale, objective.student_cap);
  task.teacher_cap = make_cap(objective.teacher_scale, objective.teacher_cap);
  task.labels = args.labels;
  task.weights = args.weights;
  task.scratch = scratch;
  task.row_losses = args.rows;
  task.unscale = args.unscale;
  task.bad_label = bad_label;
  task.ignore_index = objective.ignore_index;
  task.divergence = objective.divergence;
  task.distill = objective.distill_weight != 0;
  task.hard = objective.hard_weight != 0;
  task.main = true;
  task.want_terms = objective.want_terms;
  task.power = small_power(objective.temperature);
  const Mixture mixture = task.mixture = mixture_of(objective);
  task.w_p = static_cast<float>(mixture.teacher);
  task.w_q = static_cast<float>(mixture.student);
  task.far_limit = static_cast<float>(far_limit(task.divergence, mixture.teacher, mixture.student));
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
  return task;
}

// call(divergence) with the divergence whose kernels compute the task, as a constant. The
// cross-entropy alone is among those of the forward KL.
template <typename Call>
auto with_divergence(const RowTask& task, const Call& call) {
  const bool kept = task.distill && task.kept.count > 0;
  switch (kept ? Divergence::kKept : task.distill ? task.divergence : Divergence::kForwardKL) {
    case Divergence::kKept:
      return call(std::integral_constant<Divergence, Divergence::kKept>{});
    case Divergence::kReverseKL:
      return call(std::integral_constant<Divergence, Divergence::kReverseKL>{});
    case Divergence::kJSD:
      return call(std::integral_constant<Divergence, Divergence::kJSD>{});
    case Divergence::kSkewForwardKL:
      return call(std::integral_constant<Divergence, Divergence::kSkewForwardKL>{});
    case Divergence::kSkewReverseKL:
      return call(std::integral_constant<Divergence, Divergence::kSkewReverseKL>{});
    case Divergence::kTVD:
      return call(std::integral_constant<Divergence, Divergence::kTVD>{});
    default:
      return call(std::integral_constant<Divergence, Divergence::kForwardKL>{});
  }
}

// launch(task) for each launch that a call takes: the term that is wanted but not part of the loss
// first, because the gradient may replace the logits.
template <typename Launch>
void for_each_launch(RowTask task, const Launch& launch) {
  const bool other = task.distill ? task.labels != nullptr && !task.hard : true;
  if (task.want_terms && other) {
    RowTask before = task;
    before.distill = !task.distill;
    before.hard = !task.hard;
    before.main = false;
    before.grad = {};
    launch(before);
    task.others = true;
  }
  launch(task);
}

}  // namespace gpu
}  // namespace kdk
