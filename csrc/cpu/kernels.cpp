// The row operators on a CPU: which rows count, what they are told, and the sum over them. The rows
// themselves are in dense.h and kept.h, those of shards in shard.h and kept_shard.h.
#include <atomic>

#include "cpu/cpu.h"
#include "cpu/kept_shard.h"
#include "cpu/threads.h"

namespace kdk {
namespace KDK_ISA {
namespace {

// Rows with fewer elements in all than this are not worth waking other threads for.
constexpr std::int64_t kParallelElements = 1 << 15;

RowLoss evaluate_row(Task task, const GradientTask* grad) {
  if (!task.hard) task.label = -1;
  return task.distill && task.kept.count > 0 ? evaluate_kept(task, grad) : evaluate(task, grad);
}

// The one term, without a gradient.
double evaluate_term(Task task, bool distill) {
  task.distill = distill;
  task.hard = !distill;
  const RowLoss loss = evaluate_row(task, nullptr);
  return distill ? loss.distill : loss.hard;
}

Task make_task(const DistillArgs& args) {
  const Objective& objective = args.objective;
  Task task{};
  task.student.dtype = args.student.dtype;
  task.teacher.dtype = args.teacher.dtype;
  task.student.cap = make_cap(objective.student_scale, objective.student_cap);
  task.teacher.cap = make_cap(objective.teacher_scale, objective.teacher_cap);
  task.columns = task.classes = objective.vocab_size;
  task.label = -1;
  task.distill = objective.distill_weight != 0;
  task.hard = objective.hard_weight != 0;
  task.divergence = objective.divergence;
  task.mixture = mixture_of(objective);
  task.w_p = static_cast<float>(task.mixture.teacher);
  task.w_q = static_cast<float>(task.mixture.student);
  task.temperature = objective.temperature;
  task.label_smoothing = objective.label_smoothing;
  task.rate = split(kLog2E / objective.temperature);
  // The student's e^s has a temperature of its own where it is no power of e^{s/T}.
  task.lowest = -kUnderflowAt * static_cast<float>(std::min(1.0, objective.temperature));
  task.power = small_power(objective.temperature);
  return task;
}

bool counts(const DistillArgs& args, std::int64_t row) {
  return args.labels == nullptr || args.labels[row] != args.objective.ignore_index;
}

double weight_of(const DistillArgs& args, std::int64_t row) {
  return args.weights == nullptr ? 1 : args.weights[row];
}

// A task, and where its gradient goes, if it is wanted.
struct RowTask {
  Task task;
  GradientTask grad;
};

RowTask make_row(const DistillArgs& args, const Task& task, double denominator, std::int64_t row) {
  const Objective& objective = args.objective;
  const std::int64_t b = row / args.length, l = row % args.length;
  RowTask of{task, {}};
  if (args.labels != nullptr) of.task.label = args.labels[row];
  of.task.student.row = row_pointer(args.student, b, l);
  if (args.kept.count > 0) {
    const std::int64_t first = row * args.kept.count;
    of.task.kept = {args.kept.count, args.kept.ids + first, args.kept.log_p + first,
                    args.kept.log_rest[row]};
  } else {
    of.task.teacher.row = row_pointer(args.teacher, b, l);
  }
  if (args.grad.data != nullptr) {
    of.grad = {row_pointer(args.grad, b, l),
               args.grad.dtype,
               objective.distill_weight / objective.temperature,
               objective.hard_weight,
               weight_of(args, row) / denominator,
               args.unscale + row};
  }
  return of;
}

// `denominator` is what the gradient is divided by, besides the row's weight.
void distill_row(const DistillArgs& args, const Task& any, double denominator, std::int64_t row) {
  const Objective& objective = args.objective;
  const std::int64_t rows = args.batch * args.length;
  float* loss = args.rows + row;
  float* distill = loss + rows;
  float* hard = distill + rows;
  *loss = *distill = *hard = 0;

  const auto [task, grad] = make_row(args, any, denominator, row);
  const bool want_grad = args.grad.data != nullptr;
  const double weight = weight_of(args, row);

  // Before the gradient, which may replace the student's logits.
  const bool computed = counts(args, row) && weight != 0 && denominator != 0;
  RowLoss values;
  if (counts(args, row) && objective.want_terms) {
    if (!computed || !task.distill) values.distill = evaluate_term(task, true);
    if (args.labels != nullptr && (!computed || !task.hard))
      values.hard = evaluate_term(task, false);
  }
  if (computed) {
    const RowLoss terms = evaluate_row(task, want_grad ? &grad : nullptr);
    double sum = 0;
    if (task.distill) sum += objective.distill_weight * (values.distill = terms.distill);
    if (task.hard) sum += objective.hard_weight * (values.hard = terms.hard);
    *loss = static_cast<float>(weight * sum);
  }
  *distill = static_cast<float>(values.distill * objective.distill_scale);
  *hard = static_cast<float>(values.hard);
  // Stored zeros, not products with 0: whatever the logits held, they change nothing.
  if (want_grad) fill(0, grad.dtype, computed ? task.columns : 0, args.width, grad.row);
}

void scale_row(const ScaleArgs& args, std::int64_t row) {
  if (args.labels != nullptr && args.labels[row] == args.ignore_index) return;
  if (args.weights != nullptr && args.weights[row] == 0) return;
  const float unscale = args.unscale[args.grad.dtype == DType::kFloat16 ? row : 0];
  if (unscale == 0) return;
  const float factor = args.upstream[args.per_row ? row : 0] * unscale;
  if (factor == 1) return;
  void* data = row_pointer(args.grad, row / args.length, row % args.length);
  alignas(64) Buffer values;
  for_each_tile(args.vocab_size, false, [&](std::int64_t begin, std::int64_t n) {
    load_floats(data, args.grad.dtype, begin, n, values);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) values[i] *= factor;
    store_floats(values, args.grad.dtype, begin, n, data);
  });
}

// ---- Shards ------------------------------------------------------------------------------------

template <typename Fields>
constexpr std::int64_t kCount = sizeof(Fields) / sizeof(double);

// A row's numbers, one from each field (·, B · L).
template <typename Fields>
Fields gather(const double* from, std::int64_t rows, std::int64_t row) {
  double values[kCount<Fields>];
  for (std::int64_t i = 0; i < kCount<Fields>; ++i) values[i] = from[i * rows + row];
  Fields fields;
  std::memcpy(&fields, values, sizeof fields);
  return fields;
}

template <typename Fields>
void scatter(const Fields& fields, std::int64_t rows, std::int64_t row, double* to) {
  double values[kCount<Fields>];
  std::memcpy(values, &fields, sizeof fields);
  for (std::int64_t i = 0; i < kCount<Fields>; ++i) to[i * rows + row] = values[i];
}

template <typename Fields>
Fields all_of(double value) {
  return gather<Fields>(&value, 0, 0);
}

Task make_shard_task(Phase phase, const ShardArgs& args) {
  const bool want_terms = args.rows.objective.want_terms;
  Task task = make_task(args.rows);
  task.classes = args.classes;
  if (phase == Phase::kStatistics) {
    task.distill |= want_terms;
    task.hard |= want_terms && args.rows.labels != nullptr;
  } else if (phase == Phase::kTerms) {
    task.distill = true;
    task.hard = false;
  }
  return task;
}

// Fields: ShardStatistics or KeptShardStatistics, by which the functions called here are chosen.
template <typename Fields>
void shard_row(Phase phase, const ShardArgs& shard, const Task& any, std::int64_t row) {
  const DistillArgs& args = shard.rows;
  const std::int64_t rows = args.batch * args.length;
  const double denominator = args.num_items == nullptr ? 1 : *args.num_items;
  const auto [task, grad] = make_row(args, any, denominator, row);
  const bool weighs = counts(args, row) && weight_of(args, row) != 0;
  const bool read = weighs || (counts(args, row) && args.objective.want_terms);
  if (phase == Phase::kStatistics) {
    auto found = all_of<Fields>(0);
    if (read && task.label == kOutOfRange) {
      found = all_of<Fields>(kNaN);
    } else if (read) {
      find(task, found);
    }
    scatter(found, rows, row, shard.out);
    return;
  }
  const auto merged = gather<Fields>(shard.merged, rows, row);
  if (phase == Phase::kTerms) {
    const ShardTerms terms = read ? shard_terms(task, merged, shard.leads) : ShardTerms{};
    scatter(terms, rows, row, shard.out);
    return;
  }
  const bool computed = weighs && denominator != 0;
  if (computed) shard_gradient(task, merged, shard.merged[kCount<Fields> * rows + row], grad);
  fill(0, grad.dtype, computed ? task.columns : 0, args.width, grad.row);
}

// ---- The reduction ----------------------------------------------------------------------------

// What a mean divides by; with 0 no row counts.
double mean_denominator(const DistillArgs& args) {
  double denominator = 0;
  if (args.num_items != nullptr) {
    denominator = *args.num_items;
  } else {
    for (std::int64_t row = 0; row < args.batch * args.length; ++row) {
      if (counts(args, row)) denominator += weight_of(args, row);
    }
  }
  return denominator;
}

// body(row) for every row, shared out to the threads as they become free: ignored rows take no
// time.
template <typename Body>
void for_each_row(std::int64_t rows, std::int64_t columns, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  auto task = [&] {
    for (std::int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < rows;) body(row);
  };
  if (threads > 1 && rows * columns >= kParallelElements) {
    run_in_threads(threads, [](void* task_) { (*static_cast<decltype(task)*>(task_))(); }, &task);
  } else {
    task();
  }
}

}  // namespace

void distill_rows(const DistillArgs& args, int threads) {
  const Task task = make_task(args);
  const std::int64_t rows = args.batch * args.length;
  const double denominator = args.objective.mean ? mean_denominator(args) : 1;
  const bool per_row = args.student.dtype == DType::kFloat16;
  std::fill_n(args.unscale, per_row ? rows : 1, denominator == 0 ? 0.0f : 1.0f);
  for_each_row(rows, args.width, threads,
               [&](std::int64_t row) { distill_row(args, task, denominator, row); });
  double sum = 0;
  for (std::int64_t row = 0; row < rows; ++row) sum += args.rows[row];
  *args.loss = denominator == 0 ? 0 : static_cast<float>(sum / denominator);
}

void shard_rows(Phase phase, const ShardArgs& args, int threads) {
  const Task task = make_shard_task(phase, args);
  const std::int64_t rows = args.rows.batch * args.rows.length;
  if (phase == Phase::kGradient) {
    const bool per_row = args.rows.student.dtype == DType::kFloat16;
    const bool none = args.rows.num_items != nullptr && *args.rows.num_items == 0;
    std::fill_n(args.rows.unscale, per_row ? rows : 1, none ? 0.0f : 1.0f);
  }
  for_each_row(rows, args.rows.width, threads, [&](std::int64_t row) {
    if (args.rows.kept.count > 0) {
      shard_row<KeptShardStatistics>(phase, args, task, row);
    } else {
      shard_row<ShardStatistics>(phase, args, task, row);
    }
  });
}

void scale_rows(const ScaleArgs& args, int threads) {
  for_each_row(args.batch * args.length, args.vocab_size, threads,
               [&](std::int64_t row) { scale_row(args, row); });
}

}  // namespace KDK_ISA
}  // namespace kdk
