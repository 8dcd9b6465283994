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

// What the rows of a shard hold: the columns of one of several devices (kdkernels/parallel/).
// Statistics of its columns, or merged over all of them, are (fields, B · L) in this order.

struct ShardStatistics {
  double max_s;   // the highest logit
  double z_s;     // Σ e^{(s − max_s)/T}
  double z_rest;  // Σ_{j≠y} e^{s_j − max_s}
  double label;   // s_y; −inf where the label's column is not here
  double offset;  // Σ (s − max_s)
  double max_t;
  double z_t;        // Σ e^{(t − max_t)/T}
  double log_ratio;  // log(z_s / z_t), of these columns; exactly 0 where they are equal
  double kl;         // the forward KL of their softmaxes, where that is the divergence
};

// Of rows whose teacher is sparse. Others are the classes that are neither kept nor the label.
struct KeptShardStatistics {
  double others;       // the highest of them
  double z;            // Σ e^{(s − others)/T} over them
  double z_hard;       // Σ e^{s − others} over them
  double label;        // s_y; −inf where the label's column is not here
  double offset;       // Σ (s − highest) over all classes
  double highest;      // of all classes
  double kept_z;       // Σ e^{(s − highest)/T} over the kept classes
  double kept_z_hard;  // Σ e^{s − highest} over those that are not the label
  double share;        // Σ p over the kept classes
  double cross;        // Σ p (log p − (s − highest)/T) over them
  double apart;        // 1 where the label is here and not kept
};

enum class Phase : int {
  kStatistics = 0,  // -> out: the statistics of these columns
  kTerms = 1,       // merged -> out, three fields: what these columns add to D, Σ q and Σ q φ
  kGradient = 2,    // merged -> rows.grad, rows.unscale
};

struct ShardArgs {
  // Of these columns, which objective.vocab_size counts; there are neither losses nor rows. Labels
  // are columns here, kElsewhere, kOutOfRange or objective.ignore_index, which is neither.
  DistillArgs rows;
  std::int64_t classes;  // V, of all shards together
  // The statistics of the whole rows, and one field more, the mean slope Σ q φ.
  const double* merged;
  double* out;
  bool leads;  // the shard that adds what is nobody's: a sparse teacher's rest to kTerms
};

constexpr std::int64_t kElsewhere = -1, kOutOfRange = -2;

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
