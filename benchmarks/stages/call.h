// What Python asks of a stage, on every device the same; library.py has the twin of StageCall.
#pragma once

#include "common/args.h"

#define KDK_EXPORT extern "C" __attribute__((visibility("default")))

namespace kdk {

// The stages; that word is taken, by the rows in a GPU's shared memory. `no-exponentials` is kFull
// in a library of its own: see no_exponentials.h.
enum class Variant : std::int64_t { kLoads, kStores, kCopy, kStatistics, kLoss, kFull };

// What a stage leaves of a row. kLoads: the sums of student and teacher. kStatistics: both maxima,
// Σ e^{(s − max_s)/T}, Σ e^{(t − max_t)/T}, the gap (statistics.h), Σ_{j≠y} e^{s_j − max_s}.
constexpr int kSums = 6;

// Eight bytes each, so that no compiler pads them.
struct StageCall {
  Variant variant;
  std::int64_t rows, columns;  // N, V
  std::int64_t dtype;          // of the three matrices
  void* student;               // (N, V)
  void* teacher;               // (N, V)
  void* grad;                  // (N, V)
  const std::int64_t* labels;  // (N)
  float* loss;                 // ()
  float* unscale;              // (N)
  float* numbers;              // DistillArgs::rows, (3, N), and behind them the sums, (N, kSums)
  std::int64_t divergence;
  double beta, temperature;
  std::int64_t threads;  // of a CPU
  std::int64_t device;   // of a GPU, like all that follows: see CudaCall
  void* stream;
  void* scratch;
  std::int64_t* bad_label;
};

inline bool writes(Variant variant) {
  return variant == Variant::kStores || variant == Variant::kCopy || variant == Variant::kFull;
}

// Both terms, weighed alike, and the mean over the rows: what kd_loss computes by default.
inline DistillArgs args_of(const StageCall& call) {
  const auto rows = [&](void* data) {
    return Rows{data, static_cast<DType>(call.dtype), call.rows * call.columns, call.columns};
  };
  const double squared = call.temperature * call.temperature;
  DistillArgs args{};
  args.batch = 1;
  args.length = call.rows;
  args.width = call.columns;
  args.student = rows(call.student);
  args.teacher = rows(call.teacher);
  if (writes(call.variant)) args.grad = rows(call.grad);
  args.labels = call.labels;
  args.loss = call.loss;
  args.unscale = call.unscale;
  args.rows = call.numbers;
  args.objective.divergence = static_cast<Divergence>(call.divergence);
  args.objective.beta = call.beta;
  args.objective.temperature = call.temperature;
  args.objective.distill_weight = 0.5 * squared;
  args.objective.hard_weight = 0.5;
  args.objective.distill_scale = squared;
  args.objective.ignore_index = -100;
  args.objective.vocab_size = call.columns;
  args.objective.mean = true;
  return args;
}

// Where the sums of a row go.
KDK_FN float* sums_of_row(float* numbers, std::int64_t rows, std::int64_t row) {
  return numbers + 3 * rows + kSums * row;
}

}  // namespace kdk
