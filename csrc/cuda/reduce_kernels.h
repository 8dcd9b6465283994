// What goes over rows and not over columns: the denominator of a mean before the rows are computed,
// the loss after, and the upstream gradient in the backward pass.
#pragma once

#include "cuda/slice.h"
#include "cuda/task.h"
#include "cuda/team.h"

namespace kdk {
namespace gpu {

KDK_DEVICE TwoFloats team_sum(TwoFloats mine, Exchange& exchange, int& turn) {
  float fields[2] = {mine.hi, mine.lo};
  team_reduce(fields, exchange, turn, [](float (&into)[2], const float (&other)[2]) {
    const TwoFloats sum = add({into[0], into[1]}, {other[0], other[1]});
    into[0] = sum.hi;
    into[1] = sum.lo;
  });
  return {fields[0], fields[1]};
}

struct MeanTask {
  std::int64_t rows;
  const std::int64_t* labels;
  const float* weights;
  const double* num_items;
  std::int64_t ignore_index;
  bool mean;
  float* out;  // 1 / the denominator in two floats, and 1 where it is 0
};

// One block.
KDK_DEVICE void prepare(const MeanTask& task) {
  Exchange& exchange = *reinterpret_cast<Exchange*>(shared_memory());
  int turn = 0;
  TwoFloats denominator{1, 0};
  if (task.mean && task.num_items != nullptr) {
    denominator = pair_from_double(task.num_items);
  } else if (task.mean) {
    TwoFloats sum{0, 0};
    for (std::int64_t row = thread_rank(); row < task.rows; row += block_threads()) {
      if (task.labels != nullptr && task.labels[row] == task.ignore_index) continue;
      sum = add(sum, {task.weights == nullptr ? 1.0f : task.weights[row], 0});
    }
    denominator = team_sum(sum, exchange, turn);
  }
  if (thread_rank() != 0) return;
  const TwoFloats inverse = divide({1, 0}, denominator);
  const bool empty = denominator.hi == 0;
  task.out[0] = empty ? 0 : inverse.hi;
  task.out[1] = empty ? 0 : inverse.lo;
  task.out[2] = empty ? 1 : 0;
}

struct FinishTask {
  std::int64_t rows;
  const float* row_losses;
  const float* mean;  // what `prepare` left
  float* loss;
  float* unscale;  // null where every row has its own
};

// One block: the rows' losses add up in pairs of floats.
KDK_DEVICE void finish(const FinishTask& task) {
  Exchange& exchange = *reinterpret_cast<Exchange*>(shared_memory());
  int turn = 0;
  TwoFloats sum{0, 0};
  for (std::int64_t row = thread_rank(); row < task.rows; row += block_threads()) {
    sum = add(sum, {task.row_losses[row], 0});
  }
  sum = team_sum(sum, exchange, turn);
  if (thread_rank() != 0) return;
  const bool empty = task.mean[2] != 0;
  *task.loss = empty ? 0 : multiply(sum, {task.mean[0], task.mean[1]}).hi;
  if (task.unscale != nullptr) *task.unscale = empty ? 0 : 1;
}

// A block takes rows in turn. A factor of 1 leaves a row as it is, without asking the host.
KDK_DEVICE void scale_rows(const ScaleArgs& args) {
  const std::int64_t rows = args.batch * args.length;
  for (std::int64_t row = cluster_index(); row < rows; row += grid_clusters()) {
    if (args.labels != nullptr && args.labels[row] == args.ignore_index) continue;
    if (args.weights != nullptr && args.weights[row] == 0) continue;
    const float unscale = args.unscale[args.grad.dtype == DType::kFloat16 ? row : 0];
    const float factor = args.upstream[args.per_row ? row : 0] * unscale;
    if (unscale == 0 || factor == 1) continue;
    const Side side =
        side_of(row_pointer(args.grad, row / args.length, row % args.length), args.grad.dtype, 0);
    const std::int64_t step = static_cast<std::int64_t>(block_threads()) * kChunk;
    for (std::int64_t column = thread_rank() * kChunk; column < args.vocab_size; column += step) {
      const std::int64_t left = args.vocab_size - column;
      const int n = left < kChunk ? static_cast<int>(left) : kChunk;
      float values[kChunk];
      load_chunk(side, column, n, values);
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) values[i] *= factor;
      store_chunk(side, column, n, values);
    }
  }
}

}  // namespace gpu
}  // namespace kdk
