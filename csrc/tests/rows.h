// One call of the row operators: values against long double and, with the sanitizers on, not a byte
// read or written outside the rows.
#pragma once

#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "common/args.h"
#include "tests/check.h"

namespace kdk::test {

constexpr std::int64_t kIgnore = -100;

// Logits in an allocation that ends where they do, so that the address sanitizer guards it; they
// begin `offset` elements from a multiple of 16 bytes.
struct Logits {
  DType dtype;
  std::int64_t rows, width, offset;
  std::unique_ptr<unsigned char[]> bytes;

  Logits(DType dtype, std::int64_t rows, std::int64_t width, std::int64_t offset = 0)
      : dtype(dtype),
        rows(rows),
        width(width),
        offset(offset),
        bytes(
            new unsigned char[static_cast<std::size_t>((offset + rows * width) * size_of(dtype))]) {
  }

  float get(std::int64_t row, std::int64_t column) const {
    const std::int64_t i = offset + row * width + column;
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(bytes.get())[i];
    const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(bytes.get())[i];
    return dtype == DType::kBFloat16 ? float_from_bfloat16(bits) : float_from_float16(bits);
  }

  void set(std::int64_t row, std::int64_t column, float value) {
    const std::int64_t i = offset + row * width + column;
    if (dtype == DType::kFloat32) {
      reinterpret_cast<float*>(bytes.get())[i] = value;
    } else {
      reinterpret_cast<std::uint16_t*>(bytes.get())[i] =
          dtype == DType::kBFloat16 ? bfloat16_from_float(value) : float16_from_float(value);
    }
  }

  Rows view() const { return {bytes.get() + offset * size_of(dtype), dtype, rows * width, width}; }
};

struct Reference {
  long double distill, hard;
  std::vector<long double> grad;  // of distill_weight · D + hard_weight · CE
};

inline std::vector<long double> softmax(const Logits& logits, std::int64_t row, std::int64_t n,
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
// element in test_divergence.cpp and as a whole from Python.
inline Reference reference(const Logits& student, const Logits& teacher, std::int64_t row,
                           std::int64_t label, const Objective& objective) {
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

struct Operators {
  std::function<void(const DistillArgs&)> distill;
  std::function<void(const ScaleArgs&)> scale;
};

struct Case {
  DType student, teacher;
  std::int64_t columns;
  Divergence divergence;
  double temperature;
  bool in_place;
  std::int64_t grad_offset = 0;  // of a gradient that is not in place: see Logits
};

// Returns all that was computed, as bits.
inline std::vector<std::uint32_t> test_operators(const Operators& operators, const Case& which) {
  const auto& [student_type, teacher_type, columns, divergence, temperature, in_place,
               grad_offset] = which;
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
    for (std::int64_t j = columns; j < columns + padding; ++j) student.set(row, j, kNaN);
  }
  const std::int64_t labels[kRows] = {columns / 2, kIgnore, columns - 1};
  for (std::int64_t j = 0; j < columns; ++j) student.set(1, j, kNaN);  // the ignored row

  DistillArgs args{};
  args.batch = 1;
  args.length = kRows;
  args.width = columns + padding;
  args.student = student.view();
  args.teacher = teacher.view();
  args.labels = labels;
  Objective& objective = args.objective;
  objective.divergence = divergence;
  objective.temperature = temperature;
  objective.distill_weight = 0.5 * temperature * temperature;
  objective.hard_weight = 0.5;
  objective.distill_scale = temperature * temperature;
  objective.ignore_index = kIgnore;
  objective.vocab_size = columns;
  std::vector<Reference> want;
  for (std::int64_t row : {0, 2}) {
    want.push_back(reference(student, teacher, row, labels[row], args.objective));
  }
  Logits separate(student_type, kRows, columns + padding, grad_offset);
  Logits& grad = in_place ? student : separate;
  args.grad = grad.view();
  float rows[3 * kRows], loss, unscale[kRows];
  args.rows = rows;
  args.loss = &loss;
  args.unscale = unscale;
  operators.distill(args);

  bool zeros = rows[1] == 0 && rows[kRows + 1] == 0 && rows[2 * kRows + 1] == 0;
  for (std::int64_t j = 0; j < grad.width; ++j) zeros &= to_bits(grad.get(1, j)) == 0;
  for (std::int64_t j = columns; j < grad.width; ++j) {
    zeros &= to_bits(grad.get(0, j)) == 0 && to_bits(grad.get(2, j)) == 0;
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
      const long double got = static_cast<long double>(grad.get(row, j)) * unscale[half ? row : 0];
      error = std::isnan(got) ? INFINITY : std::fmax(error, std::fabs(got - g));
      largest = std::fmax(largest, std::fabs(g));
    }
    CHECK(error <= unit * largest);
  }

  // One row is halved, the ignored one stays 0 under a NaN.
  const float ones[kRows] = {1, 1, 1};
  const float factors[kRows] = {0.5f, kNaN, 1};
  const float before = grad.get(0, 0), untouched = grad.get(2, 0);
  operators.scale({1, kRows, grad.view(), factors, true, ones, labels, nullptr, kIgnore, columns});
  CHECK(grad.get(0, 0) == 0.5f * before);
  CHECK(to_bits(grad.get(1, 0)) == 0);
  CHECK(grad.get(2, 0) == untouched);

  std::vector<std::uint32_t> bits = {to_bits(loss)};
  for (float value : rows) bits.push_back(to_bits(value));
  for (std::int64_t i = 0; i < kRows * grad.width; ++i) {
    bits.push_back(to_bits(grad.get(i / grad.width, i % grad.width)));
  }
  return bits;
}

}  // namespace kdk::test
