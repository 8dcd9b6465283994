// The row operators of csrc/cuda, run on the CPU, as a Python module for the tests.
#include "bind_args.h"
#include "cuda/distill_kernel.h"
#include "cuda/plan.h"
#include "cuda/reduce_kernels.h"

namespace py = pybind11;

namespace {

using namespace kdk::gpu;

constexpr int kThreads = 64;  // of the kernels over rows

template <kdk::Divergence kDivergence>
void run(const RowTask& task) {
  const Plan& plan = task.plan;
  launch({plan.clusters, plan.cluster_blocks, plan.threads,
          static_cast<std::size_t>(plan.shared_bytes)},
         [&] { distill_rows<kDivergence>(task); });
}

void run(const RowTask& task, kdk::Divergence divergence) {
  switch (divergence) {
    case kdk::Divergence::kForwardKL:
      return run<kdk::Divergence::kForwardKL>(task);
    case kdk::Divergence::kReverseKL:
      return run<kdk::Divergence::kReverseKL>(task);
    case kdk::Divergence::kJSD:
      return run<kdk::Divergence::kJSD>(task);
    case kdk::Divergence::kSkewForwardKL:
      return run<kdk::Divergence::kSkewForwardKL>(task);
    case kdk::Divergence::kSkewReverseKL:
      return run<kdk::Divergence::kSkewReverseKL>(task);
    case kdk::Divergence::kTVD:
      return run<kdk::Divergence::kTVD>(task);
  }
}

// `seed` is that of the schedule.
std::int64_t distill_rows_on_cpu(const kdk::PySizes& sizes, const kdk::PyRows& student,
                                 const kdk::PyRows& teacher, const std::optional<kdk::PyRows>& grad,
                                 const kdk::PyPointers& inputs, const kdk::PyPointers& outputs,
                                 bool want_terms, const kdk::PyOptions& options, int shared_bytes,
                                 int cluster_blocks, std::uint64_t seed) {
  const kdk::DistillArgs args =
      kdk::distill_args(sizes, student, teacher, grad, inputs, outputs, want_terms, options);
  const std::int64_t rows = args.batch * args.length;
  Plan plan = make_plan(args, {shared_bytes, cluster_blocks, 8});
  plan.threads = plan.slice <= 256 ? 32 : 64;  // each of them a fiber
  float mean[3];
  std::int64_t bad_label = 0;
  RowTask task = make_row_task(args, plan);
  task.mean = mean;
  task.bad_label = &bad_label;
  set_schedule(seed);
  const MeanTask mean_task{rows,
                           args.labels,
                           args.weights,
                           args.num_items,
                           args.objective.ignore_index,
                           args.objective.mean,
                           mean};
  launch({1, 1, kThreads, sizeof(Exchange)}, [&] { prepare(mean_task); });
  if (rows > 0) run(task, args.objective.divergence);
  const bool per_row = args.student.dtype == kdk::DType::kFloat16;
  const FinishTask finish_task{rows, args.rows, mean, args.loss, per_row ? nullptr : args.unscale};
  launch({1, 1, kThreads, sizeof(Exchange)}, [&] { finish(finish_task); });
  return bad_label - 1;
}

void scale_rows_on_cpu(const kdk::PySizes& sizes, const kdk::PyRows& grad, std::uintptr_t upstream,
                       bool per_row, const kdk::PyPointers& inputs, std::int64_t ignore_index,
                       std::int64_t vocab_size) {
  const kdk::ScaleArgs args =
      kdk::scale_args(sizes, grad, upstream, per_row, inputs, ignore_index, vocab_size);
  launch({2, 1, 32, 128}, [&] { scale_rows(args); });
}

}  // namespace

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.def("distill_rows", &distill_rows_on_cpu);
  m.def("scale_rows", &scale_rows_on_cpu);
}
