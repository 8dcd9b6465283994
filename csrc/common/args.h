// What a call of a row operator is given, on every device. The operators are declared in cpu/cpu.h
// and cuda/cuda.h, their tensors described in kdkernels/ops.py.
#pragma once

#include <cstdint>

#include "common/objective.h"
#include "common/rows.h"

namespace kdk {

// Objective (kdkernels/objective.py), and what the caller wants of it.
struct Objective {
  Divergence divergence;
  double beta;
  double temperature;
  double distill_weight;
  double hard_weight;
  double distill_scale;
  double label_smoothing;
  double student_scale = 1, student_cap = 0, teacher_scale = 1, teacher_cap = 0;  // see cap.h
  std::int64_t ignore_index;
  std::int64_t vocab_size;
  bool mean;  // the reduction; the others differ in what the caller does with the rows
  bool want_terms;
};

// The weights of the mixture m = teacher · p + student · q, for the divergences that have one.
struct Mixture {
  double teacher, student;
};

KDK_FN Mixture mixture_of(const Objective& objective) {
  const double beta = objective.beta;
  if (objective.divergence == Divergence::kSkewReverseKL) return {1 - beta, beta};
  return {beta, 1 - beta};
}

// T where e^s is that power of e^{s/T} by a few products, see power(); else 0.
KDK_FN int small_power(double temperature) {
  for (int power = 1; power <= 4; ++power) {
    if (temperature == power) return power;
  }
  return 0;
}

// A teacher that knows some classes of each row (kdkernels/kept.py: Kept).
struct Kept {
  std::int64_t count;       // K; 0: the teacher is dense
  const std::int64_t* ids;  // (B · L, K), ascending; at least V where there is no class
  const double* log_p;      // (B · L, K)
  const double* log_rest;   // (B · L): of all other classes
};

struct DistillArgs {
  std::int64_t batch, length;  // B, L
  std::int64_t width;          // V_s: columns of student and gradient, padding included
  Rows student;                // (B, L, V_s)
  Rows teacher;                // (B, L, V_t), or
  Kept kept;
  Rows grad;  // (B, L, V_s), may be the student's own memory; data null: not wanted
  const std::int64_t* labels;  // (B · L) or null
  const float* weights;        // (B · L) or null for 1
  const double* num_items;     // () or null: what a mean divides by
  float* loss;                 // ()
  float* unscale;  // what the gradient still has to be multiplied by: (B · L) where it is
                   // float16, else ()
  float* rows;     // (3, B · L): weight · loss, distillation term, cross-entropy
  Objective objective;
};

struct ScaleArgs {
  std::int64_t batch, length;
  Rows grad;              // (B, L, V_s)
  const float* upstream;  // (B · L), or () when !per_row
  bool per_row;
  const float* unscale;        // as in DistillArgs
  const std::int64_t* labels;  // (B · L) or null
  const float* weights;        // (B · L) or null
  std::int64_t ignore_index;
  std::int64_t vocab_size;
};

}  // namespace kdk
