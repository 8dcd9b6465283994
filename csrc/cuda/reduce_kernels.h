// What goes over rows and not over columns: the denominator of a mean before the rows are computed,
// the loss after, and the upstream gradient in the backward pass.
#pragma once

#include "cuda/slice.h"
#include "cuda/task.h"
#include "cuda/team.h"

namespace kdk {
namespace gpu {

struct MeanTask {
  std::int64_t rows;
  const std::int64_t* labels;
  const float* weights;
  const double* num_items;
  std::int64_t ignore_index;
  bool mean;
  Scratch* scratch;
};

// `mean`: of the rows' losses, or else 1 is what the gradient is divided by.
inline MeanTask make_mean_task(const DistillArgs& args, bool mean, Scratch* scratch) {
  return {args.batch * args.length,    args.labels, args.weights, args.num_items,
          args.objective.ignore_index, mean,        scratch};
}

// One block.
KDK_DEVICE void prepare(const MeanTask& task) {
  Team team = join_team(1, task.scratch);
  for (int i = thread_rank(); i < kMaxBlocks; i += block_threads()) task.scratch->arrivals[i] = 0;
  TwoFloats denominator{1, 0};
  if (task.mean && task.num_items != nullptr) {
    denominator = pair_from_double(task.num_items);
  } else if (task.mean) {
    TwoFloats sum{0, 0};
    for (std::int64_t row = thread_rank(); row < task.rows; row += block_threads()) {
      if (task.labels != nullptr && task.labels[row] == task.ignore_index) continue;
      sum = add(sum, {task.weights == nullptr ? 1.0f : task.weights[row], 0});
    }
    float fields[2] = {sum.hi, sum.lo};
    team_sum_pairs<1>(fields, team);
    denominator = {fields[0], fields[1]};
  }
  if (thread_rank() != 0) return;
  const TwoFloats inverse = divide({1, 0}, denominator);
  const bool empty = denominator.hi == 0;
  task.scratch->inverse[0] = empty ? 0 : inverse.hi;
  task.scratch->inverse[1] = empty ? 0 : inverse.lo;
  task.scratch->empty = empty ? 1 : 0;
}

struct FinishTask {
  std::int64_t rows;
  const float* row_losses;
  Scratch* scratch;
  float* loss;
  float* unscale;  // null where every row has its own
};

// One block: the rows' losses add up in pairs of floats.
KDK_DEVICE void finish(const FinishTask& task) {
  Team team = join_team(1, task.scratch);
  TwoFloats sum{0, 0};
  for (std::int64_t row = thread_rank(); row < task.rows; row += block_threads()) {
    sum = add(sum, {task.row_losses[row], 0});
  }
  float fields[2] = {sum.hi, sum.lo};
  team_sum_pairs<1>(fields, team);
  if (thread_rank() != 0) return;
  const Scratch& scratch = *task.scratch;
  const bool empty = scratch.empty != 0;
  const TwoFloats inverse{scratch.inverse[0], scratch.inverse[1]};
  *task.loss = empty ? 0 : multiply({fields[0], fields[1]}, inverse).hi;
  if (task.unscale != nullptr) *task.unscale = empty ? 0 : 1;
}

// A block takes rows in turn. A factor of 1 leaves a row as it is, without asking the host.
KDK_DEVICE void scale_rows(const ScaleArgs& args) {
  const std::int64_t rows = args.batch * args.length;
  for (std::int64_t row = block_index(); row < rows; row += grid_blocks()) {
    if (args.labels != nullptr && args.labels[row] == args.ignore_index) continue;
    if (args.weights != nullptr && args.weights[row] == 0) continue;
    const float unscale = args.unscale[args.grad.dtype == DType::kFloat16 ? row : 0];
    const float factor = args.upstream[args.per_row ? row : 0] * unscale;
    if (unscale == 0 || factor == 1) continue;
    const Side side{
        static_cast<char*>(row_pointer(args.grad, row / args.length, row % args.length)),
        args.grad.dtype};
    for_each_chunk(static_cast<int>(args.vocab_size), [&](int column, int n) {
      float values[kChunk];
      load_chunk<false>(side, column, n, values);
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) values[i] *= factor;
      store_chunk<false>(side, column, n, values);
    });
  }
}

}  // namespace gpu
}  // namespace kdk
