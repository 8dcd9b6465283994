// The row operators on a CPU: which rows count, what they are told, and the sum over them. The rows
// themselves are in dense.h and kept.h.
#include "cpu/cpu.h"
#include "cpu/kept.h"

namespace kdk {
namespace KDK_ISA {
namespace {

// Rows with fewer elements in all than this are not worth waking other threads for.
constexpr std::int64_t kParallelElements = 1 << 15;

RowLoss evaluate_row(const Task& task, const GradientTask* grad) {
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
  task.columns = objective.vocab_size;
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

// `denominator` is what the gradient is divided by, besides the row's weight.
void distill_row(const DistillArgs& args, Task task, double denominator, std::int64_t row) {
  const Objective& objective = args.objective;
  const std::int64_t b = row / args.length, l = row % args.length;
  const std::int64_t rows = args.batch * args.length;
  float* loss = args.rows + row;
  float* distill = loss + rows;
  float* hard = distill + rows;
  *loss = *distill = *hard = 0;

  GradientTask grad{};
  const bool want_grad = args.grad.data != nullptr;
  if (want_grad) {
    grad.row = row_pointer(args.grad, b, l);
    grad.dtype = args.grad.dtype;
  }
  const bool labelled = args.labels != nullptr;
  const bool counts = !labelled || args.labels[row] != objective.ignore_index;
  const double weight = args.weights == nullptr ? 1 : args.weights[row];
  if (labelled) task.label = args.labels[row];
  task.student.row = row_pointer(args.student, b, l);
  if (args.kept.count > 0) {
    const std::int64_t first = row * args.kept.count;
    task.kept = {args.kept.count, args.kept.ids + first, args.kept.log_p + first,
                 args.kept.log_rest[row]};
  } else {
    task.teacher.row = row_pointer(args.teacher, b, l);
  }

  // Before the gradient, which may replace the student's logits.
  const bool computed = counts && weight != 0 && denominator != 0;
  RowLoss values;
  if (counts && objective.want_terms) {
    if (!computed || !task.distill) values.distill = evaluate_term(task, true);
    if (labelled && (!computed || !task.hard)) values.hard = evaluate_term(task, false);
  }
  if (computed) {
    grad.distill = objective.distill_weight / objective.temperature;
    grad.hard = objective.hard_weight;
    grad.scale = weight / denominator;
    grad.unscale = args.unscale + row;
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

// ---- The reduction ----------------------------------------------------------------------------

// What a mean divides by; with 0 no row counts.
double mean_denominator(const DistillArgs& args) {
  double denominator = 0;
  if (args.num_items != nullptr) {
    denominator = *args.num_items;
  } else {
    for (std::int64_t row = 0; row < args.batch * args.length; ++row) {
      if (args.labels != nullptr && args.labels[row] == args.objective.ignore_index) continue;
      denominator += args.weights == nullptr ? 1 : args.weights[row];
    }
  }
  return denominator;
}

// body(row) for every row, shared out to the threads as they become free: ignored rows take no
// time.
template <typename Body>
void for_each_row(std::int64_t rows, std::int64_t columns, int threads, const Body& body) {
#pragma omp parallel for schedule(dynamic) \
    num_threads(threads) if (threads > 1 && rows * columns >= kParallelElements)
  for (std::int64_t row = 0; row < rows; ++row) body(row);
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

void scale_rows(const ScaleArgs& args, int threads) {
  for_each_row(args.batch * args.length, args.vocab_size, threads,
               [&](std::int64_t row) { scale_row(args, row); });
}

}  // namespace KDK_ISA
}  // namespace kdk
