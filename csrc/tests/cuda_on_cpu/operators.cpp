#include "tests/cuda_on_cpu/operators.h"

#include <cstring>

#include "cuda/reduce_kernels.h"
#include "tests/cuda_on_cpu/kernels.h"

namespace kdk::gpu {
namespace {

constexpr int kThreads = 64;  // of the kernels over rows
constexpr Launch kOneBlock = {1, 1, kThreads, sizeof(Exchange)};

Plan plan_on(const DistillArgs& args, const Limits& device) {
  Plan plan = make_plan(
      args, device, [&](const Plan& plan) { return device.multiprocessors / plan.team_blocks; });
  plan.threads = plan.slice <= 256 ? 32 : 64;  // each of them a fiber
  return plan;
}

}  // namespace

std::int64_t distill_rows_on_cpu(const DistillArgs& args, const Limits& device,
                                 std::uint64_t seed) {
  const std::int64_t rows = args.batch * args.length;
  Scratch scratch;
  std::memset(&scratch, 0xff, sizeof scratch);  // memory that somebody else has used
  std::int64_t bad_label = 0;
  set_schedule(seed);
  const MeanTask mean_task = make_mean_task(args, args.objective.mean, &scratch);
  for_each_launch(make_row_task(args, &scratch, &bad_label), [&](RowTask task) {
    launch(kOneBlock, [&] { prepare(mean_task); });
    if (rows == 0) return;
    task.plan = plan_on(args, device);
    with_divergence(task, [&](auto divergence) { run_rows<divergence()>(task); });
  });
  const bool per_row = args.student.dtype == DType::kFloat16;
  const FinishTask last{rows, args.rows, &scratch, args.loss, per_row ? nullptr : args.unscale};
  launch(kOneBlock, [&] { finish(last); });
  return bad_label - 1;
}

std::int64_t shard_rows_on_cpu(const ShardArgs& args, Phase phase, Limits device,
                               std::uint64_t seed) {
  Scratch scratch;
  std::memset(&scratch, 0xff, sizeof scratch);
  std::int64_t bad_label = 0;
  set_schedule(seed);
  const MeanTask mean_task = make_mean_task(args.rows, args.rows.num_items != nullptr, &scratch);
  launch(kOneBlock, [&] { prepare(mean_task); });
  ShardTask task = make_shard_task(args, phase, &scratch, &bad_label);
  if (!sweeps(task)) device.cluster_blocks = 0;
  task.plan = plan_on(args.rows, device);
  with_divergence(task, [&](auto divergence) { run_shard_rows<divergence()>(task); });
  return bad_label - 1;
}

void scale_rows_on_cpu(const ScaleArgs& args) {
  launch({2, 1, 32, sizeof(Exchange)}, [&] { scale_rows(args); });
}

}  // namespace kdk::gpu
