// csrc/cpu at every instruction-set level this processor has: values against long double, and, with
// the sanitizers on, not a byte read or written outside the rows.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/cpu.h"

namespace {

using kdk::DistillArgs;
using kdk::Divergence;
using kdk::DType;

struct Level {
  const char* name;
  bool supported;
  void (*distill_rows)(const DistillArgs&, int);
  void (*scale_rows)(const kdk::ScaleArgs&, int);
};

const Level kLevels[] = {
#ifdef KDK_X86_LEVELS
    {"x86_64_v1", true, kdk::x86_64_v1::distill_rows, kdk::x86_64_v1::scale_rows},
    {"x86_64_v3", __builtin_cpu_supports("x86-64-v3") != 0, kdk::x86_64_v3::distill_rows,
     kdk::x86_64_v3::scale_rows},
    {"x86_64_v4", __builtin_cpu_supports("x86-64-v4") != 0, kdk::x86_64_v4::distill_rows,
     kdk::x86_64_v4::scale_rows},
#else
    {"baseline", true, kdk::baseline::distill_rows, kdk::baseline::scale_rows},
#endif
};

constexpr std::int64_t kIgnore = -100;

// Logits in an allocation of exactly their size, so that the address sanitizer guards both ends.
struct Logits {
  DType dtype;
  std::int64_t rows, width;
  std::unique_ptr<unsigned char[]> bytes;

  Logits(DType dtype, std::int64_t rows, std::int64_t width)
      : dtype(dtype),
        rows(rows),
        width(width),
        bytes(new unsigned char[static_cast<std::size_t>(rows * width * kdk::size_of(dtype))]) {}

  float get(std::int64_t row, std::int64_t column) const {
    const std::int64_t i = row * width + column;
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(bytes.get())[i];
    const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(bytes.get())[i];
    return dtype == DType::kBFloat16 ? kdk::float_from_bfloat16(bits)
                                     : kdk::float_from_float16(bits);
  }

  void set(std::int64_t row, std::int64_t column, float value) {
    const std::int64_t i = row * width + column;
    if (dtype == DType::kFloat32) {
      reinterpret_cast<float*>(bytes.get())[i] = value;
    } else {
      reinterpret_cast<std::uint16_t*>(bytes.get())[i] = dtype == DType::kBFloat16
                                                             ? kdk::bfloat16_from_float(value)
                                                             : kdk::float16_from_float(value);
    }
  }

  kdk::Rows view() const { return {bytes.get(), dtype, rows * width, width}; }
};

struct Reference {
  long double distill, hard;
  std::vector<long double> grad;  // of distill_weight · D + hard_weight · CE
};

std::vector<long double> softmax(const Logits& logits, std::int64_t row, std::int64_t n,
                                 long double temperature) {
  long double maximum = -INFINITY, z = 0;
  for (std::int64_t j = 0; j < n; ++j) maximum = std::fmax(maximum, logits.get(row, j));
  std::vector<long double> p(static_cast<std::size_t>(n));
  for (std::int64_t j = 0; j < n; ++j) {
    z += p[static_cast<std::size_t>(j)] = std::exp((logits.get(row, j) - maximum) / temperature);
  }
  for (long double& x : p) x /= z;
  return p;
}

// The forward and reverse KL and the cross-entropy; the other divergences are tested element by
// element in test_objective.cpp and as a whole from Python.
Reference reference(const Logits& student, const Logits& teacher, std::int64_t row,
                    std::int64_t label, const kdk::Objective& objective) {
  const std::int64_t n = objective.vocab_size;
  const auto q = softmax(student, row, n, objective.temperature);
  const auto p = softmax(teacher, row, n, objective.temperature);
  const auto hard = softmax(student, row, n, 1);
  Reference result{0, -std::log(hard[static_cast<std::size_t>(label)]), {}};
  const bool forward = objective.divergence == Divergence::kForwardKL;
  for (std::size_t j = 0; j < q.size(); ++j) {
    result.distill += forward ? p[j] * std::log(p[j] / q[j]) : q[j] * std::log(q[j] / p[j]);
  }
  for (std::size_t j = 0; j < q.size(); ++j) {
    const long double distill =
        forward ? q[j] - p[j] : q[j] * (std::log(q[j] / p[j]) - result.distill);
    const long double one = static_cast<std::int64_t>(j) == label;
    result.grad.push_back(objective.distill_weight / objective.temperature * distill +
                          objective.hard_weight * (hard[j] - one));
  }
  return result;
}

void test_level(const Level& level, DType student_type, DType teacher_type, std::int64_t columns,
                Divergence divergence, double temperature, bool in_place) {
  constexpr std::int64_t kRows = 3;
  const std::int64_t padding = columns % 5;
  std::mt19937 random(static_cast<unsigned>(columns));
  std::normal_distribution<float> normal(0, 3);
  Logits student(student_type, kRows, columns + padding);
  Logits teacher(teacher_type, kRows, columns);
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const float t = normal(random);
      teacher.set(row, j, t);
      student.set(row, j, t + normal(random) / 3);
    }
    for (std::int64_t j = columns; j < columns + padding; ++j) student.set(row, j, kdk::kNaN);
  }
  const std::int64_t labels[kRows] = {columns / 2, kIgnore, columns - 1};
  for (std::int64_t j = 0; j < columns; ++j) student.set(1, j, kdk::kNaN);  // the ignored row

  DistillArgs args{};
  args.batch = 1;
  args.length = kRows;
  args.width = columns + padding;
  args.student = student.view();
  args.teacher = teacher.view();
  args.labels = labels;
  args.objective = {divergence,  0,
                    temperature, 0.5 * temperature * temperature,
                    0.5,         temperature * temperature,
                    0,           kIgnore,
                    columns,     false,
                    false};
  std::vector<Reference> want;
  for (std::int64_t row : {0, 2}) {
    want.push_back(reference(student, teacher, row, labels[row], args.objective));
  }
  Logits separate(student_type, kRows, columns + padding);
  Logits& grad = in_place ? student : separate;
  args.grad = grad.view();
  float rows[3 * kRows], loss, unscale[kRows];
  args.rows = rows;
  args.loss = &loss;
  args.unscale = unscale;
  CHECK(kdk::find_bad_label(args) == -1);
  level.distill_rows(args, 2);

  bool zeros = rows[1] == 0 && rows[kRows + 1] == 0 && rows[2 * kRows + 1] == 0;
  for (std::int64_t j = 0; j < grad.width; ++j) zeros &= kdk::to_bits(grad.get(1, j)) == 0;
  for (std::int64_t j = columns; j < grad.width; ++j) {
    zeros &= kdk::to_bits(grad.get(0, j)) == 0 && kdk::to_bits(grad.get(2, j)) == 0;
  }
  CHECK(zeros);
  const double exact_sum = static_cast<double>(rows[0]) + rows[1] + rows[2];
  CHECK(std::fabs(loss - exact_sum) <= 1e-7 * exact_sum);
  const bool half = student_type == DType::kFloat16;
  const double unit = student_type == DType::kFloat32    ? 4e-6
                      : student_type == DType::kBFloat16 ? 0x1.0p-8
                                                         : 0x1.0p-11;
  for (int k = 0; k < 2; ++k) {
    const std::int64_t row = 2 * k;
    const Reference& exact = want[static_cast<std::size_t>(k)];
    const long double scale = temperature * temperature;
    CHECK(std::fabs(rows[kRows + row] - scale * exact.distill) <= 1e-5L * scale * exact.distill);
    CHECK(std::fabs(rows[2 * kRows + row] - exact.hard) <= 1e-6L * exact.hard);
    long double error = 0, largest = 0;
    for (std::int64_t j = 0; j < columns; ++j) {
      const long double g = exact.grad[static_cast<std::size_t>(j)];
      error = std::fmax(error, std::fabs(static_cast<long double>(grad.get(row, j)) *
                                             (half ? unscale[row] : unscale[0]) -
                                         g));
      largest = std::fmax(largest, std::fabs(g));
    }
    CHECK(error <= unit * largest);
  }

  // One row is halved, the ignored one stays 0 under a NaN.
  const float ones[kRows] = {1, 1, 1};
  const float factors[kRows] = {0.5f, kdk::kNaN, 1};
  const float before = grad.get(0, 0), untouched = grad.get(2, 0);
  level.scale_rows({1, kRows, grad.view(), factors, true, ones, labels, nullptr, kIgnore, columns},
                   2);
  CHECK(grad.get(0, 0) == 0.5f * before);
  CHECK(kdk::to_bits(grad.get(1, 0)) == 0);
  CHECK(grad.get(2, 0) == untouched);
}

}  // namespace

int main() {
  for (const Level& level : kLevels) {
    std::printf("%s: %s\n", level.name, level.supported ? "tested" : "not on this processor");
    if (!level.supported) continue;
    const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    for (DType student : dtypes) {
      for (DType teacher : dtypes) {
        // Below, at and above a lane block (64) and a tile (512), and several tiles with a tail.
        for (std::int64_t columns : {2, 63, 64, 65, 511, 512, 513, 2001}) {
          for (double temperature : {1.0, 2.0, 2.5}) {
            test_level(level, student, teacher, columns, Divergence::kForwardKL, temperature,
                       false);
          }
          test_level(level, student, teacher, columns, Divergence::kForwardKL, 2.0, true);
          test_level(level, student, teacher, columns, Divergence::kReverseKL, 1.0, true);
        }
      }
    }
  }
  return kdk::test::checks_failed();
}
