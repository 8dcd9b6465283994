// One call of the row operator with a teacher that knows some classes, as rows.h is for a dense
// one.
#pragma once

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <numeric>

#include "tests/definition.h"
#include "tests/rows.h"

namespace kdk::test {

struct KeptCase {
  DType student;
  std::int64_t columns, kept;  // V, K
  Divergence divergence;
  double temperature;
  bool labels, in_place;
  double distill_weight = 0.5, label_smoothing = 0;
  double scale = 1, cap = 0;  // see common/cap.h
};

// The largest errors so far: relative; of the gradient, by the largest entry of its row or by
// kSmallest, where what is left is a difference of doubles near the row's weight.
constexpr double kSmallest = 1e-9;

struct KeptErrors {
  double distill = 0, hard = 0, grad = 0;
};

inline void raise(double& so_far, long double error) {
  so_far = std::isnan(error) ? INFINITY : std::fmax(so_far, static_cast<double>(error));
}

// In allocations that end where they do, see Logits.
struct KeptTeacher {
  std::int64_t count;
  std::vector<std::int64_t> ids;
  std::vector<double> log_p, log_rest;

  KeptTeacher(std::int64_t rows, std::int64_t count)
      : count(count),
        ids(static_cast<std::size_t>(rows * count)),
        log_p(ids.size()),
        log_rest(static_cast<std::size_t>(rows)) {}

  // Of p it knows the classes `known`. The others share what these leave, or nothing.
  void set(std::size_t row, const std::vector<std::int64_t>& known,
           const std::vector<long double>& p, bool renormalize) {
    std::vector<long double> others = p;
    long double total = 0;
    for (std::int64_t id : known) {
      total += p[static_cast<std::size_t>(id)];
      others[static_cast<std::size_t>(id)] = 0;
    }
    const long double rest = std::accumulate(others.begin(), others.end(), 0.0L);
    log_rest[row] = known.empty() ? 0 : static_cast<double>(std::log(renormalize ? 0 : rest));
    for (std::size_t k = 0; k < static_cast<std::size_t>(count); ++k) {
      const std::size_t at = row * static_cast<std::size_t>(count) + k;
      const bool exists = k < known.size();
      ids[at] = exists ? known[k] : static_cast<std::int64_t>(p.size());
      const long double share = exists ? p[static_cast<std::size_t>(known[k])] : 0;
      log_p[at] = static_cast<double>(std::log(renormalize ? share / total : share));
    }
  }

  // The row's log p by column, NaN where it is not known.
  std::vector<double> dense(std::size_t row, std::size_t columns) const {
    std::vector<double> all(columns, kNaN);
    for (std::size_t k = 0; k < static_cast<std::size_t>(count); ++k) {
      const std::size_t at = row * static_cast<std::size_t>(count) + k;
      const auto id = static_cast<std::size_t>(ids[at]);
      if (id < columns) all[id] = log_p[at];
    }
    return all;
  }
};

// D has a class for each that is known, and one more: the rest.
inline Reference kept_reference(const Logits& student, const KeptTeacher& teacher, std::int64_t row,
                                std::int64_t label, const Objective& objective) {
  const auto n = static_cast<std::size_t>(objective.vocab_size);
  const long double temperature = objective.temperature, scale = objective.student_scale,
                    cap = objective.student_cap, smoothing = objective.label_smoothing;
  std::vector<long double> z, slope, q(n), push(n);
  for (std::int64_t j = 0; j < objective.vocab_size; ++j) {
    const long double x = scale * student.get(row, j), bent = std::tanh(x / cap);
    z.push_back(cap == 0 ? x : cap * bent);
    slope.push_back(cap == 0 ? scale : scale * (1 - bent * bent));
  }
  const long double highest = *std::max_element(z.begin(), z.end());
  long double sum = 0, sum_hard = 0, q_rest = 0;
  for (long double x : z) {
    sum += std::exp((x - highest) / temperature);
    sum_hard += std::exp(x - highest);
  }
  const auto share = [&](long double log_p, long double log_q) {
    return exact_share(objective.divergence, log_p, log_q, objective.beta);
  };
  const std::vector<double> log_p = teacher.dense(static_cast<std::size_t>(row), n);
  long double value = 0, mean = 0;
  for (std::size_t j = 0; j < n; ++j) {
    const long double log_q = (z[j] - highest) / temperature - std::log(sum);
    q[j] = std::exp(log_q);
    if (std::isnan(log_p[j])) {
      q_rest += q[j];
    } else {
      const ExactShare of = share(log_p[j], log_q);
      push[j] = of.push;
      value += of.term;
      mean += of.push;
    }
  }
  // Where nothing is known the rest is everything, on both sides.
  const double log_rest = teacher.log_rest[static_cast<std::size_t>(row)];
  const ExactShare rest = log_rest == 0 ? ExactShare{0, 0} : share(log_rest, std::log(q_rest));
  Reference result{value + rest.term, 0, {}};
  mean += rest.push;
  for (std::size_t j = 0; j < n; ++j) {
    if (std::isnan(log_p[j])) push[j] = rest.push * (q[j] / q_rest);
    long double part = 0;
    if (objective.distill_weight != 0) {
      part = objective.distill_weight / temperature * (push[j] - q[j] * mean);
    }
    if (objective.hard_weight != 0) {
      const long double one = static_cast<std::int64_t>(j) == label;
      const long double target = (1 - smoothing) * one + smoothing / static_cast<long double>(n);
      const long double log_q = z[j] - highest - std::log(sum_hard);
      result.hard -= target == 0 ? 0 : target * log_q;
      part += objective.hard_weight * (std::exp(log_q) - target);
    }
    result.grad.push_back(slope[j] * part);
  }
  return result;
}

inline void test_kept_rows(const std::function<void(const DistillArgs&)>& distill,
                           const KeptCase& which, KeptErrors& errors) {
  // In this order: the label among the known classes; ignored; a teacher that rules out all other
  // classes, the label too; one that knows no class; a student that is sure of the label.
  enum { kRegular, kIgnored, kRuledOut, kUnknown, kSure, kRows };
  const std::int64_t columns = which.columns, padding = columns % 5;
  std::mt19937 random(static_cast<unsigned>(columns + which.kept));
  std::normal_distribution<float> normal(0, 3);
  Logits student(which.student, kRows, columns + padding), teacher(DType::kFloat32, kRows, columns);
  KeptTeacher kept(kRows, which.kept);
  std::vector<std::int64_t> labels(kRows), all(static_cast<std::size_t>(columns));
  std::iota(all.begin(), all.end(), 0);
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const float t = normal(random);
      teacher.set(row, j, t);
      student.set(row, j, t + normal(random));
    }
    for (std::int64_t j = columns; j < columns + padding; ++j) student.set(row, j, kNaN);
    const bool short_of_one = row == kRuledOut && which.kept > 1;
    const std::int64_t count = row == kUnknown ? 0 : which.kept - short_of_one;
    std::vector<std::int64_t> known, others;
    std::sample(all.begin(), all.end(), std::back_inserter(known), count, random);
    std::set_difference(all.begin(), all.end(), known.begin(), known.end(),
                        std::back_inserter(others));
    const bool apart = known.empty() || (row == kRuledOut && !others.empty());
    labels[static_cast<std::size_t>(row)] = apart ? others.back() : known[known.size() / 2];
    if (row == kSure) student.set(row, known[known.size() / 2], 25);
    if (row == kRuledOut && others.size() > 1 && which.label_smoothing == 0) {
      student.set(row, others[0], -kInfinity);
    }
    kept.set(static_cast<std::size_t>(row), known,
             softmax(teacher, row, columns, which.temperature), row == kRuledOut);
  }
  if (which.labels) {
    labels[kIgnored] = kIgnore;
    for (std::int64_t j = 0; j < columns; ++j) student.set(kIgnored, j, kNaN);
  }

  DistillArgs args{};
  args.batch = 1;
  args.length = kRows;
  args.width = columns + padding;
  args.student = student.view();
  args.kept = {kept.count, kept.ids.data(), kept.log_p.data(), kept.log_rest.data()};
  args.labels = which.labels ? labels.data() : nullptr;
  Objective& objective = args.objective;
  objective.divergence = which.divergence;
  objective.beta = 0.3;
  objective.temperature = which.temperature;
  objective.distill_weight = which.distill_weight;
  objective.hard_weight = which.labels ? 0.4 : 0;
  objective.distill_scale = 2;
  objective.label_smoothing = which.label_smoothing;
  objective.student_scale = which.scale;
  objective.student_cap = which.cap;
  objective.ignore_index = kIgnore;
  objective.vocab_size = columns;
  objective.want_terms = true;
  std::vector<Reference> want;
  for (std::int64_t row = 0; row < kRows; ++row) {
    want.push_back(
        kept_reference(student, kept, row, labels[static_cast<std::size_t>(row)], objective));
  }
  Logits separate(which.student, kRows, columns + padding);
  Logits& grad = which.in_place ? student : separate;
  args.grad = grad.view();
  float rows[3 * kRows], loss, unscale[kRows];
  args.rows = rows;
  args.loss = &loss;
  args.unscale = unscale;
  distill(args);

  bool zeros = true;
  double sum = 0;
  for (std::int64_t row = 0; row < kRows; ++row) {
    const bool ignored = which.labels && row == kIgnored;
    const Reference& exact = want[static_cast<std::size_t>(row)];
    const float value = rows[kRows + row], hard = rows[2 * kRows + row];
    sum += rows[row];
    for (std::int64_t j = ignored ? 0 : columns; j < grad.width; ++j) {
      zeros &= to_bits(grad.get(row, j)) == 0;
    }
    if (ignored) {
      zeros &= rows[row] == 0 && value == 0 && hard == 0;
      continue;
    }
    if (std::isinf(exact.distill)) {  // the reverse KL from a teacher that rules a class out
      CHECK(value == kInfinity);
    } else if (row == kUnknown) {
      zeros &= value == 0;
    } else {
      raise(errors.distill, std::fabs(value / (2 * exact.distill) - 1));
    }
    if (which.labels) raise(errors.hard, std::fabs(hard / exact.hard - 1));
    long double weighted = objective.hard_weight * exact.hard;
    if (objective.distill_weight != 0) weighted += objective.distill_weight * exact.distill;
    if (std::isinf(weighted)) {
      bool undefined = rows[row] == kInfinity;
      for (std::int64_t j = 0; j < columns; ++j) undefined &= std::isnan(grad.get(row, j));
      CHECK(undefined);
      continue;
    }
    CHECK(std::fabs(rows[row] - weighted) <= 1e-5L * weighted);
    long double error = 0, largest = kSmallest;
    for (std::int64_t j = 0; j < columns; ++j) {
      const long double g = exact.grad[static_cast<std::size_t>(j)];
      const bool half = which.student == DType::kFloat16;
      const long double off =
          std::fabs(static_cast<long double>(grad.get(row, j)) * unscale[half ? row : 0] - g);
      error = std::isnan(off) ? INFINITY : std::fmax(error, off);
      largest = std::fmax(largest, std::fabs(g));
    }
    raise(errors.grad, error / largest);
  }
  CHECK(zeros);
  if (std::isfinite(sum)) CHECK(std::fabs(loss - sum) <= 1e-7 * sum);
}

inline void test_kept_operator(const std::function<void(const DistillArgs&)>& distill,
                               std::initializer_list<std::int64_t> widths) {
  for (DType student : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    KeptErrors errors;
    for (std::int64_t columns : widths) {
      for (std::int64_t kept : {std::int64_t{1}, (columns + 1) / 2, columns}) {
        for (int of = 0; of < 6; ++of) {
          const auto divergence = static_cast<Divergence>(of);
          const bool in_place = of % 2 == 0;
          const KeptCase cases[] = {
              {student, columns, kept, divergence, 1, true, in_place},
              {student, columns, kept, divergence, 2.5, false, !in_place},
              {student, columns, kept, divergence, 2, true, in_place, 0, 0.1},
              {student, columns, kept, divergence, 1.5, true, !in_place, 0.7, 0.2, -1.5, 9}};
          for (const KeptCase& which : cases) test_kept_rows(distill, which, errors);
        }
      }
    }
    std::printf("  kept: distillation %.2g, cross-entropy %.2g, gradient %.2g\n", errors.distill,
                errors.hard, errors.grad);
    CHECK(errors.distill < 1e-5);
    CHECK(errors.hard < 1e-6);
    CHECK(errors.grad < (student == DType::kFloat32    ? 4e-6
                         : student == DType::kBFloat16 ? 0x1.0p-8
                                                       : 0x1.0p-11));
  }
}

}  // namespace kdk::test
