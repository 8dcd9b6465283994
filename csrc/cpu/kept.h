// A row whose teacher knows some classes only: its losses and gradient while it is in cache.
//
// From memory comes the student, once, and the gradient goes there once: 2 · N · V elements. Of all
// classes that are neither kept nor the label a sweep sums e^{(s − max)/T} and e^{s − max}; a
// second one writes their gradient, which for all of them is the same multiple of these
// exponentials. The others, K + 1 of them, are taken out of both sweeps and computed one by one in
// double: the mass of the rest is a sum of what is in it and not 1 less what is not.
#pragma once

#include <cstring>
#include <vector>

#include "common/kept.h"
#include "cpu/dense.h"

namespace kdk {
namespace KDK_ISA {
namespace {

// A class that the sweeps leave out.
struct Single {
  std::int64_t column;
  double log_p;  // −inf for a label that the teacher does not know
  bool kept;
  double s;     // its logit
  double part;  // its share of the gradient
};

// The kept classes and the label, by column.
std::vector<Single> singles_of(const Task& task) {
  std::vector<Single> singles;
  bool label_pending = task.hard;
  const auto add_label = [&] {
    singles.push_back({task.label, -static_cast<double>(kInfinity), false, 0, 0});
    label_pending = false;
  };
  for (std::int64_t k = 0; k < task.kept.count && task.kept.ids[k] < task.columns; ++k) {
    const std::int64_t id = task.kept.ids[k];
    if (label_pending && task.label < id) add_label();
    if (id == task.label) label_pending = false;
    singles.push_back({id, task.kept.log_p[k], true, 0, 0});
  }
  if (label_pending) add_label();
  for (Single& single : singles) single.s = task.student.logit(single.column);
  return singles;
}

// body(single, its place in the tile) for those among the columns [begin, begin + n).
template <typename Body>
void for_each_single(std::vector<Single>& singles, std::int64_t begin, std::int64_t n,
                     const Body& body) {
  auto it = std::lower_bound(
      singles.begin(), singles.end(), begin,
      [](const Single& single, std::int64_t column) { return single.column < column; });
  for (; it != singles.end() && it->column < begin + n; ++it) body(*it, it->column - begin);
}

// ---- Sweep 1 ----------------------------------------------------------------------------------

// Sums over the classes that are no singles.
struct Others {
  float max = -kInfinity;
  double z = 0;       // Σ e^{(s − max)/T}
  double z_hard = 0;  // Σ e^{s − max}
};

// kHard: at T ≠ 1, where e^{s − max} is another exponential.
template <bool kHard>
void add_others(const float* s, std::int64_t n, TwoFloats rate, Others& others) {
  const float max = anchor(others.max);
  const auto at = [&](std::int64_t i, TwoFloats per) __attribute__((always_inline)) {
    const TwoFloats x = two_diff(s[i], max);
    return exp_of<true>(x.hi, x.lo, per);
  };
  float z = 0, z_hard = 0;
  const std::int64_t part = n / 4;
#pragma omp simd reduction(+ : z, z_hard)
  for (std::int64_t i = 0; i < part; ++i) {
    z += (at(i, rate) + at(i + part, rate)) + (at(i + 2 * part, rate) + at(i + 3 * part, rate));
    if constexpr (kHard) {
      z_hard += (at(i, kUnitRate) + at(i + part, kUnitRate)) +
                (at(i + 2 * part, kUnitRate) + at(i + 3 * part, kUnitRate));
    }
  }
  others.z += z;
  others.z_hard += kHard ? z_hard : z;
}

Others sum_others(const Task& task, std::vector<Single>& singles) {
  Others others;
  alignas(64) Buffer buffer;
  for_each_tile(task.columns, false, [&](std::int64_t begin, std::int64_t n) {
    const std::int64_t padded = Side::padded(n);
    const float* s = task.student.tile(begin, n, buffer);
    for_each_single(singles, begin, n, [&](const Single&, std::int64_t place) {
      if (s != buffer) s = std::copy_n(s, padded, buffer) - padded;
      buffer[place] = -kInfinity;
    });
    const float max = std::max(others.max, tile_max(s, padded));
    if (max > others.max && others.max > -kInfinity) {
      const double drop = static_cast<double>(others.max) - max;
      others.z *= std::exp(drop / task.temperature);
      others.z_hard *= std::exp(drop);
    }
    others.max = max;
    task.hard&& task.power != 1 ? add_others<true>(s, padded, task.rate, others)
                                : add_others<false>(s, padded, task.rate, others);
  });
  return others;
}

// e^x for x <= 0, to 1e-11; 0 where it is next to nothing.
double exp_wide(double x) {
  constexpr double kWideShift = 0x1.8p52, kLn2 = 0x1.62e42fefa39efp-1;
  const double shifted = x * kLog2E + kWideShift;
  const double f = x - (shifted - kWideShift) * kLn2;
  double y = 1.0 / 362880;
  y = y * f + 1.0 / 40320;
  y = y * f + 1.0 / 5040;
  y = y * f + 1.0 / 720;
  y = y * f + 1.0 / 120;
  y = y * f + 1.0 / 24;
  y = y * f + 1.0 / 6;
  y = y * f + 0.5;
  y = y * f + 1;
  y = y * f + 1;
  std::uint64_t bits, power;
  std::memcpy(&bits, &y, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 52;
  std::memcpy(&y, &bits, sizeof y);
  return x > -700 ? y : 0;
}

// Others::z again, in double.
double exact_z(const Task& task, std::vector<Single>& singles, float max) {
  alignas(64) Buffer buffer;
  const double rate = 1 / task.temperature;
  double z = 0;
  for_each_tile(task.columns, true, [&](std::int64_t begin, std::int64_t n) {
    const float* s = task.student.tile(begin, n, buffer);
    for_each_single(singles, begin, n, [&](const Single&, std::int64_t place) {
      if (s != buffer) s = std::copy_n(s, n, buffer) - n;
      buffer[place] = -kInfinity;
    });
#pragma omp simd reduction(+ : z)
    for (std::int64_t i = 0; i < n; ++i) z += exp_wide((static_cast<double>(s[i]) - max) * rate);
  });
  return z;
}

// Σ (s − max) of all classes, where labels are smoothed.
double sum_of_offsets(const Task& task, double max) {
  alignas(64) Buffer buffer;
  double total = 0;
  for_each_tile(task.columns, true, [&](std::int64_t begin, std::int64_t n) {
    const float* s = task.student.tile(begin, n, buffer);
    double offset = 0;
#pragma omp simd reduction(+ : offset)
    for (std::int64_t i = 0; i < n; ++i) offset += s[i] - max;
    total += offset;
  });
  return total;
}

// ---- The classes one by one -------------------------------------------------------------------

KeptSums sums_of(const Task& task, const Others& others, double highest,
                 const std::vector<Single>& singles) {
  KeptSums sums{others.max - highest, others.z, others.z_hard, 0, 0, task.hard, false, 0};
  for (const Single& single : singles) {
    const double s = single.s - highest;
    const bool is_label = task.hard && single.column == task.label;
    if (single.kept) sums.kept_z += std::exp(s / task.temperature);
    if (single.kept && !is_label) sums.kept_z_hard += std::exp(s);
    if (is_label) {
      sums.label = s;
      sums.apart = !single.kept;
    }
  }
  return sums;
}

// What e^{(s − max)/T} and e^{s − max} of the others are multiplied by in the gradient.
struct OtherShares {
  double distill = 0, hard = 0;
  double rest = 0;  // what the rest as a whole has of D's gradient
};

// D, and its gradient times `unit`.
double distill_singles(const Task& task, const KeptSums& sums, double highest, double unit,
                       std::vector<Single>& singles, OtherShares& others) {
  const KeptFrame frame = kept_frame(sums, task.temperature);
  const auto share = [&](double log_p, double log_q) {
    return kept_share(task.divergence, {log_p, log_q}, task.mixture.teacher, task.mixture.student);
  };
  const KeptShare of_rest = share(task.kept.log_rest, frame.log_q_rest);
  double value = of_rest.term, mean = of_rest.push;
  std::vector<KeptShare> shares;
  for (const Single& single : singles) {
    const double log_q = (single.s - highest) * frame.rate - frame.log_z;
    shares.push_back(single.kept ? share(single.log_p, log_q) : KeptShare{});
    value += shares.back().term;
    mean += shares.back().push;
  }
  const double rest = rest_part(frame, of_rest, mean);
  for (std::size_t i = 0; i < singles.size(); ++i) {
    const double s = singles[i].s - highest;
    singles[i].part = unit * (singles[i].kept ? kept_part(frame, shares[i], mean, s)
                                              : rest * share_of(frame.rest, s * frame.rate));
  }
  others.distill = unit * rest * share_of(frame.rest, sums.others * frame.rate);
  others.rest = rest;
  return value;
}

// The cross-entropy; its gradient times `unit` is added.
double hard_singles(const Task& task, const KeptSums& sums, double highest, double unit,
                    std::vector<Single>& singles, OtherShares& others) {
  const KeptHard hard = kept_hard(sums);
  const double smoothing = task.label_smoothing, columns = static_cast<double>(task.columns);
  for (Single& single : singles) {
    const bool is_label = single.column == task.label;
    const double smoothed = is_label ? smoothing * (1 - 1 / columns) : -smoothing / columns;
    single.part += unit * (hard_part(hard, single.s - highest, is_label) + smoothed);
  }
  others.hard = unit * share_of(hard.all, sums.others);
  const double loss = label_loss(hard, sums.label);
  if (smoothing == 0) return loss;
  const double uniform = log_of(hard.all) - sum_of_offsets(task, highest) / columns;
  return (smoothing < 1 ? (1 - smoothing) * loss : 0) + smoothing * uniform;
}

// ---- Sweep 2 ----------------------------------------------------------------------------------

template <bool kHard>
void write_others(const float* s, std::int64_t n, float max, TwoFloats rate, float distill,
                  float hard, float smoothing, float* out) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = s[i] - max;
    float part = distill * exp_of(x, rate) - smoothing;
    if constexpr (kHard) part += hard * exp_of(x, kUnitRate);
    out[i] = part;
  }
}

// The gradient, times grad.scale; where it is only measured, the largest |entry|.
float write_kept_gradient(const Task& task, const Others& others, std::vector<Single>& singles,
                          OtherShares shares, const GradientTask& grad) {
  const bool two = task.hard && task.power != 1;
  if (!two) shares.distill += shares.hard;
  const auto distill = static_cast<float>(grad.scale * shares.distill);
  const auto hard = static_cast<float>(grad.scale * shares.hard);
  const double smoothed = task.label_smoothing / static_cast<double>(task.columns);
  const auto smoothing = static_cast<float>(task.hard ? grad.scale * grad.hard * smoothed : 0);
  const float max = anchor(others.max);
  alignas(64) Buffer buffer, slopes, buffer_out;
  float peak = 0;
  for_each_tile(task.columns, true, [&](std::int64_t begin, std::int64_t n) {
    const float* s = task.student.tile(begin, n, buffer);
    const bool direct = grad.row != nullptr && grad.dtype == DType::kFloat32;
    float* out = direct ? static_cast<float*>(grad.row) + begin : buffer_out;
    if (changes(task.student.cap)) task.student.slopes(begin, n, slopes);
    two ? write_others<true>(s, n, max, task.rate, distill, hard, smoothing, out)
        : write_others<false>(s, n, max, task.rate, distill, hard, smoothing, out);
    for_each_single(singles, begin, n, [&](const Single& single, std::int64_t place) {
      out[place] = static_cast<float>(grad.scale * single.part);
    });
    if (changes(task.student.cap)) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) out[i] *= slopes[i];
    }
    if (grad.row == nullptr) {
      peak = largest(out, n, peak);
    } else if (!direct) {
      store_floats(out, grad.dtype, begin, n, grad.row);
    }
  });
  return peak;
}

RowLoss evaluate_kept(const Task& task, const GradientTask* grad) {
  std::vector<Single> singles = singles_of(task);
  const Others others = sum_others(task, singles);
  double highest = others.max;
  for (const Single& single : singles) highest = std::max(highest, single.s);
  KeptSums sums = sums_of(task, others, highest, singles);
  RowLoss loss;
  OtherShares shares;
  const double unit = grad ? grad->distill : 0;
  loss.distill = distill_singles(task, sums, highest, unit, singles, shares);
  if (needs_exact_rest(loss.distill, shares.rest)) {
    sums.z = exact_z(task, singles, anchor(others.max));
    loss.distill = distill_singles(task, sums, highest, unit, singles, shares);
  }
  if (task.hard) {
    loss.hard = hard_singles(task, sums, highest, grad ? grad->hard : 0, singles, shares);
  }
  if (grad == nullptr) return loss;
  const bool gradient = task.divergence == Divergence::kForwardKL ? loss.distill == loss.distill
                                                                  : std::isfinite(loss.distill);
  if (!gradient || loss.hard != loss.hard) {
    fill(kNaN, grad->dtype, 0, task.columns, grad->row);
    return loss;
  }
  GradientTask written = *grad;
  if (grad->dtype == DType::kFloat16) {
    GradientTask measured = *grad;
    measured.row = nullptr;
    measured.scale = 1;
    const float peak = write_kept_gradient(task, others, singles, shares, measured);
    const double prescale = float16_prescale(std::fabs(grad->scale) * peak);
    *grad->unscale = static_cast<float>(1 / prescale);
    written.scale *= prescale;
  }
  write_kept_gradient(task, others, singles, shares, written);
  return loss;
}

}  // namespace
}  // namespace KDK_ISA
}  // namespace kdk
