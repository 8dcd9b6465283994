// The stages of a pass over dense rows on a CPU. `loss` and `full` are the operator itself, the
// others its functions: this file includes the sources of the product, and copies none.
//
// One copy of the kernels, compiled for the processor at hand, takes the place of the product's
// copies for all levels: without KDK_X86_LEVELS there is one, called baseline.
#undef KDK_X86_LEVELS
#ifdef KDK_NO_EXPONENTIALS
#include "no_exponentials.h"
#endif

#include "call.h"
#include "cpu/dispatch.cpp"
#include "cpu/kernels.cpp"
#include "cpu/threads.cpp"

namespace kdk {
namespace baseline {
namespace {

// Lanes that last for the row: a reduction of each tile would take longer than to read it.
void add_to_lanes(const float* x, std::int64_t n, float (&lanes)[kLanes]) {
  float sums[kLanes];
  std::copy_n(lanes, kLanes, sums);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (std::int64_t j = 0; j < kLanes; ++j) sums[j] += x[i + j];
  }
  for (; i < n; ++i) sums[0] += x[i];
  std::copy_n(sums, kLanes, lanes);
}

float sum_of_lanes(const float (&lanes)[kLanes]) {
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return static_cast<float>(sum);
}

void load_row(const Task& task, float* sums) {
  alignas(64) Buffer buffer_s, buffer_t;
  alignas(64) float lanes_s[kLanes] = {}, lanes_t[kLanes] = {};
  for_each_tile(task.columns, false, [&](std::int64_t begin, std::int64_t n) {
    add_to_lanes(task.student.tile(begin, n, buffer_s), n, lanes_s);
    add_to_lanes(task.teacher.tile(begin, n, buffer_t), n, lanes_t);
  });
  sums[0] = sum_of_lanes(lanes_s);
  sums[1] = sum_of_lanes(lanes_t);
}

// The gradient is student + teacher, stored as sweep() stores it.
void copy_row(const Task& task, DType dtype, void* row) {
  alignas(64) Buffer buffer_s, buffer_t, buffer_out;
  for_each_tile(task.columns, false, [&](std::int64_t begin, std::int64_t n) {
    const float* s = task.student.tile(begin, n, buffer_s);
    const float* t = task.teacher.tile(begin, n, buffer_t);
    const std::int64_t padded = Side::padded(n);
    const bool direct = dtype == DType::kFloat32 && padded == n;
    float* out = direct ? static_cast<float*>(row) + begin : buffer_out;
#pragma omp simd
    for (std::int64_t i = 0; i < padded; ++i) out[i] = s[i] + t[i];
    if (!direct) store_floats(out, dtype, begin, n, row);
  });
}

void keep_statistics(const Task& task, float* out) {
  const Statistics sums = statistics(task);
  const double kept[kSums] = {sums.max_s, sums.max_t, sums.z_s, sums.z_t, sums.gap, sums.z_rest};
  for (int i = 0; i < kSums; ++i) out[i] = static_cast<float>(kept[i]);
}

void run_row(const DistillArgs& args, Variant variant, Task task, std::int64_t row) {
  task.label = args.labels[row];
  task.student.row = row_pointer(args.student, 0, row);
  task.teacher.row = row_pointer(args.teacher, 0, row);
  float* sums = sums_of_row(args.rows, args.length, row);
  void* grad = writes(variant) ? row_pointer(args.grad, 0, row) : nullptr;
  switch (variant) {
    case Variant::kLoads:
      return load_row(task, sums);
    case Variant::kStores:
      return fill(1, args.grad.dtype, 0, task.columns, grad);
    case Variant::kCopy:
      return copy_row(task, args.grad.dtype, grad);
    case Variant::kStatistics:
      return keep_statistics(task, sums);
    case Variant::kLoss:
    case Variant::kFull:
      return;  // not row by row
  }
}

}  // namespace
}  // namespace baseline
}  // namespace kdk

// Null, or what is wrong.
KDK_EXPORT const char* run_stage(const kdk::StageCall* call) {
  using namespace kdk;
  const DistillArgs args = args_of(*call);
  const int threads = static_cast<int>(call->threads);
  if (call->variant == Variant::kLoss || call->variant == Variant::kFull) {
    distill_rows(args, threads);
    return nullptr;
  }
  const baseline::Task task = baseline::make_task(args);
  baseline::for_each_row(args.length, args.width, threads, [&](std::int64_t row) {
    baseline::run_row(args, call->variant, task, row);
  });
  return nullptr;
}
