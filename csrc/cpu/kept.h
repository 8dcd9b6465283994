// A row whose teacher knows some classes only: its losses and gradient while it is in cache.
//
// From memory comes the student, once, and the gradient goes there once: 2 · N · V elements. Of all
// classes that are neither kept nor the label a sweep sums e^{(s − max)/T} and e^{s − max}, and
// keeps the former; a second one writes their gradient, which for all of them is the same multiple
// of these exponentials. The others, K + 1 of them, are taken out of both sweeps and computed one
// by one in double: the mass of the rest is a sum of what is in it and not 1 less what is not.
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
  double s;     // its logit, which sweep 1 finds
  double part;  // its share of the gradient
};

// The kept classes and the label, by column.
std::vector<Single> singles_of(const Task& task) {
  std::vector<Single> singles;
  bool label_pending = task.label >= 0;
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
  return singles;
}

struct Singles {
  Single *first, *last;
  Single* begin() const { return first; }
  Single* end() const { return last; }
};

// Those among the columns [begin, begin + n).
Singles within(std::vector<Single>& singles, std::int64_t begin, std::int64_t n) {
  const auto from = [&](std::int64_t column) {
    const auto before = [](const Single& single, std::int64_t at) { return single.column < at; };
    return std::lower_bound(singles.data(), singles.data() + singles.size(), column, before);
  };
  return {from(begin), from(begin + n)};
}

// ---- Sweep 1 ----------------------------------------------------------------------------------

// Sums over the classes that are no singles.
struct Others {
  float max = -kInfinity;
  double z = 0;       // Σ e^{(s − max)/T}
  double z_hard = 0;  // Σ e^{s − max}
  // e^{(s − m)/T}, 0 for singles; and tile by tile m, the maximum so far.
  float* exponentials = nullptr;
  std::vector<float> maxima;
};

// A tile without its singles, which are mostly the highest of a row.
const float* without(Singles singles, const float* s, std::int64_t begin, std::int64_t n,
                     Buffer& buffer) {
  for (const Single& single : singles) {
    if (s != buffer) s = std::copy_n(s, n, buffer) - n;
    buffer[single.column - begin] = -kInfinity;
  }
  return s;
}

struct TileSum {
  float z, peak;  // Σ e^{(s − max)/T}, and the largest summand: above 1 where a logit is above max
};

TileSum sum_tile(const float* s, std::int64_t begin, std::int64_t n, float max, TwoFloats rate,
                 Singles singles, float* out) {
  const float highest = 1 / rate.hi;  // an exponential of more would not be one
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const TwoFloats x = two_diff(s[i], max);
    out[i] = exp_of<true>(x.hi > highest ? highest : x.hi, x.lo, rate);
  }
  for (const Single& single : singles) out[single.column - begin] = 0;
  float z = 0, peak = 0;
  const std::int64_t part = n / 4;
#pragma omp simd reduction(+ : z) reduction(max : peak)
  for (std::int64_t i = 0; i < part; ++i) {
    const float a = out[i], b = out[i + part], c = out[i + 2 * part], d = out[i + 3 * part];
    z += (a + b) + (c + d);
    const float left = a > b ? a : b, right = c > d ? c : d;
    const float largest = left > right ? left : right;
    peak = largest > peak ? largest : peak;
  }
  return {z, peak};
}

// `max`: known to be no less than any of them, or −inf.
Others sum_others(const Task& task, std::vector<Single>& singles, float max) {
  Others others;
  others.max = max;
  others.exponentials = row_of_floats(task.columns);
  others.maxima.reserve(static_cast<std::size_t>((task.columns + kTile - 1) / kTile));
  alignas(64) Buffer buffer, rest;
  for_each_tile(task.columns, false, [&](std::int64_t begin, std::int64_t n) {
    const std::int64_t padded = Side::padded(n);
    const float* s = task.student.tile(begin, n, buffer);
    const Singles here = within(singles, begin, n);
    for (Single& single : here) single.s = s[single.column - begin];
    const auto raise = [&] {
      const float max =
          std::max(others.max, tile_max(without(here, s, begin, padded, rest), padded));
      if (max > others.max && others.max > -kInfinity) {
        const double drop = static_cast<double>(others.max) - max;
        others.z *= std::exp(drop / task.temperature);
        others.z_hard *= std::exp(drop);
      }
      others.max = max;
    };
    const auto sum = [&](TwoFloats rate, float* out) {
      return sum_tile(s, begin, padded, anchor(others.max), rate, here, out);
    };
    // The maximum so far is taken to hold for this tile too: it mostly does.
    if (others.max == -kInfinity) raise();
    TileSum tile = sum(task.rate, others.exponentials + begin);
    if (tile.peak > 1) {
      raise();
      tile = sum(task.rate, others.exponentials + begin);
    }
    others.maxima.push_back(others.max);
    others.z += tile.z;
    others.z_hard += task.hard && task.power != 1 ? sum(kUnitRate, rest).z : tile.z;
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
    s = without(within(singles, begin, n), s, begin, n, buffer);
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
  KeptSums sums{others.max - highest, others.z, others.z_hard, 0, 0, task.label >= 0, false, 0};
  for (const Single& single : singles) {
    const double s = single.s - highest;
    const bool is_label = single.column == task.label;
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

// What the classes have of D: the rest as a whole, and one by one the singles, of which a label
// that the teacher does not know is in the rest.
struct DistillShares {
  KeptFrame frame;
  KeptShare rest;
  std::vector<KeptShare> of_singles;
};

DistillShares distill_shares(const Task& task, const KeptSums& sums, double highest,
                             const std::vector<Single>& singles) {
  const KeptFrame frame = kept_frame(sums, task.temperature);
  const auto share = [&](double log_p, double log_q) {
    return kept_share(task.divergence, {log_p, log_q}, task.mixture.teacher, task.mixture.student);
  };
  DistillShares shares{frame, share(task.kept.log_rest, frame.log_q_rest), {}};
  for (const Single& single : singles) {
    const double log_q = (single.s - highest) * frame.rate - frame.log_z;
    shares.of_singles.push_back(single.kept ? share(single.log_p, log_q) : KeptShare{});
  }
  return shares;
}

// `first` and what the singles have.
KeptShare total(KeptShare first, const DistillShares& shares) {
  for (const KeptShare& share : shares.of_singles) {
    first.term += share.term;
    first.push += share.push;
  }
  return first;
}

// D's gradient times `unit`; `mean` is Σ q φ.
void distill_parts(const DistillShares& shares, const KeptSums& sums, double highest, double mean,
                   double unit, std::vector<Single>& singles, OtherShares& others) {
  const KeptFrame& frame = shares.frame;
  const double rest = rest_part(frame, shares.rest, mean);
  for (std::size_t i = 0; i < singles.size(); ++i) {
    const double s = singles[i].s - highest;
    singles[i].part = unit * (singles[i].kept ? kept_part(frame, shares.of_singles[i], mean, s)
                                              : rest * share_of(frame.rest, s * frame.rate));
  }
  others.distill = unit * rest * share_of(frame.rest, sums.others * frame.rate);
  others.rest = rest;
}

// D, and its gradient times `unit`.
double distill_singles(const Task& task, const KeptSums& sums, double highest, double unit,
                       std::vector<Single>& singles, OtherShares& others) {
  const DistillShares shares = distill_shares(task, sums, highest, singles);
  const KeptShare all = total(shares.rest, shares);
  distill_parts(shares, sums, highest, all.push, unit, singles, others);
  return all.term;
}

// The cross-entropy's gradient times `unit` is added.
void hard_parts(const Task& task, const KeptHard& hard, const KeptSums& sums, double highest,
                double unit, std::vector<Single>& singles, OtherShares& others) {
  const double smoothing = task.label_smoothing, classes = static_cast<double>(task.classes);
  for (Single& single : singles) {
    const bool is_label = single.column == task.label;
    const double smoothed = is_label ? smoothing * (1 - 1 / classes) : -smoothing / classes;
    single.part += unit * (hard_part(hard, single.s - highest, is_label) + smoothed);
  }
  others.hard = unit * share_of(hard.all, sums.others);
}

double kept_cross_entropy(const Task& task, const KeptHard& hard, const KeptSums& sums,
                          double highest) {
  const double smoothing = task.label_smoothing;
  const double loss = label_loss(hard, sums.label);
  if (smoothing == 0) return loss;
  const double uniform =
      log_of(hard.all) - sum_of_offsets(task, highest) / static_cast<double>(task.classes);
  return (smoothing < 1 ? (1 - smoothing) * loss : 0) + smoothing * uniform;
}

// ---- Sweep 2 ----------------------------------------------------------------------------------

// The gradient, times grad.scale; where it is only measured, the largest |entry|.
float write_kept_gradient(const Task& task, const Others& others, std::vector<Single>& singles,
                          OtherShares shares, const GradientTask& grad) {
  const bool two = task.hard && task.power != 1;  // e^s is no e^{s/T}
  if (!two) shares.distill += shares.hard;
  const auto hard = static_cast<float>(grad.scale * shares.hard);
  const double smoothed = task.label_smoothing / static_cast<double>(task.classes);
  const auto smoothing = static_cast<float>(task.hard ? grad.scale * grad.hard * smoothed : 0);
  const float max = anchor(others.max);
  alignas(64) Buffer buffer, slopes, buffer_out;
  float peak = 0;
  for_each_tile(task.columns, true, [&](std::int64_t begin, std::int64_t n) {
    const bool direct = grad.row != nullptr && grad.dtype == DType::kFloat32;
    float* out = direct ? static_cast<float*>(grad.row) + begin : buffer_out;
    // Before they may be overwritten.
    const float* s = two ? task.student.tile(begin, n, buffer) : nullptr;
    if (changes(task.student.cap)) task.student.slopes(begin, n, slopes);
    const float* e = others.exponentials + begin;
    const double drop = static_cast<double>(others.maxima[begin / kTile]) - max;
    const auto distill =
        static_cast<float>(grad.scale * shares.distill * std::exp(drop / task.temperature));
    if (two) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) {
        out[i] = distill * e[i] - smoothing + hard * exp_of(s[i] - max, kUnitRate);
      }
    } else {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) out[i] = distill * e[i] - smoothing;
    }
    for (const Single& single : within(singles, begin, n)) {
      out[single.column - begin] = static_cast<float>(grad.scale * single.part);
    }
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

// The same, float16 at the row's own scale.
void write_scaled(const Task& task, const Others& others, std::vector<Single>& singles,
                  const OtherShares& shares, GradientTask grad) {
  if (grad.dtype == DType::kFloat16) {
    GradientTask measured = grad;
    measured.row = nullptr;
    measured.scale = 1;
    const float peak = write_kept_gradient(task, others, singles, shares, measured);
    const double prescale = float16_prescale(std::fabs(grad.scale) * peak, grad.weight());
    *grad.unscale = static_cast<float>(1 / prescale);
    grad.scale *= prescale;
  }
  write_kept_gradient(task, others, singles, shares, grad);
}

double highest_of(const Others& others, const std::vector<Single>& singles) {
  double highest = others.max;
  for (const Single& single : singles) highest = std::max(highest, single.s);
  return highest;
}

RowLoss evaluate_kept(const Task& task, const GradientTask* grad) {
  std::vector<Single> singles = singles_of(task);
  const Others others = sum_others(task, singles, -kInfinity);
  const double highest = highest_of(others, singles);
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
    const KeptHard hard = kept_hard(sums);
    hard_parts(task, hard, sums, highest, grad ? grad->hard : 0, singles, shares);
    loss.hard = kept_cross_entropy(task, hard, sums, highest);
  }
  if (grad == nullptr) return loss;
  const bool gradient = task.divergence == Divergence::kForwardKL ? loss.distill == loss.distill
                                                                  : std::isfinite(loss.distill);
  if (!gradient || loss.hard != loss.hard) {
    fill(kNaN, grad->dtype, 0, task.columns, grad->row);
  } else {
    write_scaled(task, others, singles, shares, *grad);
  }
  return loss;
}

}  // namespace
}  // namespace KDK_ISA
}  // namespace kdk
