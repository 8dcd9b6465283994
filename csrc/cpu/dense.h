// A row with a dense teacher: its losses and gradient while it is in cache.
//
//   p = softmax(t/T), q = softmax(s/T)
//   row loss = distill_weight · D(p, q) + hard_weight · CE(s, y)
//   gradient = weight / denominator · ∂(row loss)/∂s
//
// Fused are both softmaxes at T, the student's softmax at T = 1, the divergence, the cross-entropy
// and their gradients. From memory come student and teacher, once each, and the gradient goes there
// once: 3 · N · V elements. That is possible because all that a row's gradient needs of the other
// columns is a handful of sums:
//   1. statistics: the maxima and Σ e^{(s − max)/T}, Σ e^{(t − max)/T}, Σ_{j≠y} e^{s − max}, with
//      running maxima, tile by tile, so that the arithmetic hides the loads; with them the forward
//      KL, which is exact enough where it is not small;
//   2. for divergences whose gradient holds a sum over the row: D, Σ q φ, and φ, which is kept: a
//      row of floats in cache;
//   3. the gradient, where φ is kept from it and the student, and a small forward KL.
// Sweeps 2 and 3 run against the direction of the one before: its last tiles are still in cache.
//
// Exactness (hazards.md, N1-N9): sums of a tile in float lanes, of tiles in double; the label's
// column is left out of the vector sums and added in double, so that a confident row keeps its
// tail; differences from the maxima are exact; near-equal rows get the ratio of their normalisers
// from a sum of differences instead of a difference of sums.
//
// Everything is a plain loop over a tile that the compiler vectorises.
#pragma once

#include <type_traits>

#include "cpu/task.h"

namespace kdk {
namespace KDK_ISA {
namespace {

// ---- Sweep 1: statistics ----------------------------------------------------------------------

struct Statistics {
  float max_s = -kInfinity, max_t = -kInfinity;
  double z_s = 0, z_t = 0;      // Σ e^{(s − max_s)/T}, Σ e^{(t − max_t)/T}
  double gap = 0;               // Σ e^{(t − max_t)/T} ((s − max_s) − (t − max_t))
  double z_rest = 0;            // Σ_{j≠y} e^{s_j − max_s}
  double x_label = -kInfinity;  // s_y − max_s
  double offset = 0;            // Σ (s − max_s), where labels are smoothed
  bool normal = true;           // no exponential of these underflows: see Task::lowest
  float below = 0;              // the smallest of s − max_s and t − max_t, while normal

  double z_hard() const { return z_rest + std::exp(x_label); }
};

// Adds a tile to the sums, or returns false where it holds a logit above the maxima so far or,
// without kUnderflow, too far below them.
template <bool kDistill, bool kHard, int kPower, bool kUnderflow>
bool add_tile(const Task& task, const float* s, const float* t, std::int64_t n, Statistics& sums) {
  const TwoFloats rate = task.rate;
  const float max_s = anchor(sums.max_s), max_t = anchor(sums.max_t);
  // A call of it would not be vectorised.
  const auto at = [&](std::int64_t i) __attribute__((always_inline)) {
    return terms_of<kDistill, kHard, kPower, kUnderflow>(s[i], t[i], max_s, max_t, rate);
  };
  float z_s = 0, z_t = 0, gap = 0, z_rest = 0, above = 0, below = sums.below;
  // Four columns a turn: a quarter of the additions in a row, and of their error among equal terms.
  const std::int64_t part = n / 4;
#pragma omp simd reduction(+ : z_s, z_t, gap, z_rest) reduction(max : above) reduction(min : below)
  for (std::int64_t i = 0; i < part; ++i) {
    const Terms terms = (at(i) + at(i + part)) + (at(i + 2 * part) + at(i + 3 * part));
    z_s += terms.z_s;
    z_t += terms.z_t;
    gap += terms.gap;
    z_rest += terms.z_rest;
    above = terms.above > above ? terms.above : above;
    if constexpr (!kUnderflow) below = terms.below < below ? terms.below : below;
  }
  if (above > 0 || (!kUnderflow && below < task.lowest)) return false;
  sums.z_s += z_s;
  sums.z_t += z_t;
  sums.gap += gap;
  sums.z_rest += z_rest;
  sums.below = below;
  return true;
}

template <bool kUnderflow>
bool add_tile(const Task& task, const float* s, const float* t, std::int64_t n, Statistics& sums) {
  if (!task.hard) return add_tile<true, false, 0, kUnderflow>(task, s, t, n, sums);
  if (!task.distill) return add_tile<false, true, 0, kUnderflow>(task, s, t, n, sums);
  switch (task.power) {
    case 1:
      return add_tile<true, true, 1, kUnderflow>(task, s, t, n, sums);
    case 2:
      return add_tile<true, true, 2, kUnderflow>(task, s, t, n, sums);
    case 3:
      return add_tile<true, true, 3, kUnderflow>(task, s, t, n, sums);
    case 4:
      return add_tile<true, true, 4, kUnderflow>(task, s, t, n, sums);
    default:
      return add_tile<true, true, 0, kUnderflow>(task, s, t, n, sums);
  }
}

void add_label(const Task& task, float s, float t, Statistics& sums) {
  const double x = static_cast<double>(s) - anchor(sums.max_s);
  sums.x_label = x;
  if (!task.distill) return;
  const double y = static_cast<double>(t) - anchor(sums.max_t);
  const double e_t = std::exp(y / task.temperature);
  sums.z_s += std::exp(x / task.temperature);
  sums.z_t += e_t;
  sums.gap += y > -kInfinity ? e_t * (x - y) : 0.0;
}

void add_offset(const float* s, std::int64_t n, Statistics& sums) {
  const float max_s = anchor(sums.max_s);
  float offset = 0;
#pragma omp simd reduction(+ : offset)
  for (std::int64_t i = 0; i < n; ++i) offset += s[i] - max_s;
  sums.offset += offset;
}

// New maxima: what was summed over `done` columns so far, as it would be had they been known.
void raise_maxima(const Task& task, float max_s, float max_t, std::int64_t done, Statistics& sums) {
  const auto drop = [](float from, float to) {
    return to > from && from != -kInfinity ? static_cast<double>(from) - to : 0.0;
  };
  const double d_s = drop(sums.max_s, max_s), d_t = drop(sums.max_t, max_t);
  if (d_s != 0 || d_t != 0) {
    const double factor_t = std::exp(d_t / task.temperature);
    sums.gap = factor_t * (sums.gap + sums.z_t * (d_s - d_t));
    sums.z_t *= factor_t;
    sums.z_s *= std::exp(d_s / task.temperature);
    sums.z_rest *= std::exp(d_s);
    sums.x_label += d_s;
    sums.offset += static_cast<double>(done) * d_s;
  }
  sums.below += static_cast<float>(std::min(d_s, d_t));
  sums.max_s = std::max(sums.max_s, max_s);
  sums.max_t = std::max(sums.max_t, max_t);
}

Statistics statistics(const Task& task) {
  Statistics sums;
  alignas(64) Buffer buffer_s, buffer_t;
  for_each_tile(task.columns, false, [&](std::int64_t begin, std::int64_t n) {
    const std::int64_t padded = Side::padded(n);
    const float* s = task.student.tile(begin, n, buffer_s);
    const float* t = task.distill ? task.teacher.tile(begin, n, buffer_t) : s;
    const auto raise = [&] {
      raise_maxima(task, tile_max(s, padded), tile_max(t, padded), begin, sums);
    };
    const std::int64_t label = task.label - begin;
    const bool has_label = task.hard && label >= 0 && label < n;
    const bool smoothed = task.hard && task.label_smoothing > 0;
    // Elsewhere the maxima so far are taken to hold for this tile too: they mostly do.
    if (std::min(sums.max_s, sums.max_t) == -kInfinity || has_label || smoothed) raise();
    if (smoothed) add_offset(s, n, sums);
    const bool whole = !has_label && padded == n;
    if (whole && sums.normal) {
      if (add_tile<false>(task, s, t, n, sums)) return;
      raise();
      if (add_tile<false>(task, s, t, n, sums)) return;
    }
    // Here the padding, the label's place or a logit far below the maximum has no exponential.
    if (sums.normal) {
      sums.below = std::min(
          {sums.below, tile_min(s, n) - anchor(sums.max_s), tile_min(t, n) - anchor(sums.max_t)});
    }
    if (has_label) {
      // The label's column is taken out of the vector sums and added in double.
      add_label(task, s[label], t[label], sums);
      if (s != buffer_s) s = std::copy_n(s, padded, buffer_s) - padded;
      if (task.distill && t != buffer_t) t = std::copy_n(t, padded, buffer_t) - padded;
      buffer_s[label] = -kInfinity;
      if (task.distill) buffer_t[label] = -kInfinity;
    }
    if (!add_tile<true>(task, s, t, padded, sums)) {
      raise();
      add_tile<true>(task, s, t, padded, sums);
    }
    sums.normal &= sums.below >= task.lowest;
  });
  sums.normal &= sums.below >= task.lowest;
  return sums;
}

// ---- The ratio of the normalisers -------------------------------------------------------------

RowFrame make_frame(const Task& task, const Statistics& sums, double log_ratio) {
  RowFrame frame;
  frame.max_s = sums.max_s;
  frame.max_t = sums.max_t;
  frame.inv_z_s = static_cast<float>(1 / sums.z_s);
  frame.inv_z_t = static_cast<float>(1 / sums.z_t);
  frame.log_ratio = split(log_ratio * task.temperature);
  frame.rate = task.rate;
  frame.inv_temperature = static_cast<float>(1 / task.temperature);
  return frame;
}

// Σ (e^{(s − max_s)/T} − e^{(t − max_t)/T}), each difference taken before it is rounded.
double normaliser_difference(const Task& task, const Statistics& sums) {
  RowFrame frame = make_frame(task, sums, 0.0);
  frame.inv_z_s = frame.inv_z_t = 1.0f;
  alignas(64) Buffer buffer_s, buffer_t;
  double total = 0;
  for_each_tile(task.columns, true, [&](std::int64_t begin, std::int64_t n) {
    const float* s = task.student.tile(begin, n, buffer_s);
    const float* t = task.teacher.tile(begin, n, buffer_t);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < Side::padded(n); ++i) {
      const float e_s = exp_of(s[i] - frame.max_s, frame.rate);
      const float e_t = exp_of(t[i] - frame.max_t, frame.rate);
      sum += element(s[i], t[i], e_s, e_t, frame).difference;
    }
    total += sum;
  });
  return total;
}

struct NormaliserRatio {
  double log;  // log(z_s / z_t)
  double kl;   // the forward KL, to about 1e-6 · (1 + |log|)

  // Whether that is exact enough, and with it Care::kFar.
  bool far() const {
    return kl >= kFarFrom<Divergence::kForwardKL> * (1 + std::fabs(log)) && std::isfinite(kl);
  }
};

NormaliserRatio normaliser_ratio(const Task& task, const Statistics& sums) {
  NormaliserRatio ratio{std::log(sums.z_s / sums.z_t), 0};
  // Infinite or NaN where the student rules a class out that the teacher does not.
  ratio.kl = ratio.log - sums.gap / (task.temperature * sums.z_t);
  if (ratio.kl < kNearKL) {
    ratio.log = std::log1p(normaliser_difference(task, sums) / sums.z_t);
  }
  return ratio;
}

// ---- Sweeps 2 and 3: divergence and gradient --------------------------------------------------

struct DivergenceSums {
  double value = 0;            // D
  double mass = 0, slope = 0;  // Σ q and Σ q φ, of q and φ as they were rounded
  float peak = 0;              // the largest |∂(row loss)/∂s| where it is only measured

  double mean_slope() const { return slope / mass; }
};

// Whether a sweep for the value keeps the slopes for one for the gradient.
template <Divergence kDivergence, bool kDistill>
constexpr bool kKeepsSlopes = kDistill && kDivergence != Divergence::kForwardKL;

// A class's share of the gradient by its slope φ: what visit() finds.
template <bool kHard>
float part_of(float s, float slope, const RowFrame& frame, const GradientFrame& g) {
  const float x = s - frame.max_s;
  const float q = exp_of(x, frame.rate) * frame.inv_z_s;
  float part = kHard ? -g.smoothing : 0.0f;
  part += g.distill * (q * ((slope - g.mean_slope.hi) - g.mean_slope.lo));
  if constexpr (kHard) part += g.hard * exp_of(x, kUnitRate);
  return part;
}

// Where slopes are kept, a sweep for the value writes them to `out`, and a sweep for the gradient
// has them for `t`.
template <Divergence kDivergence, bool kDistill, bool kHard, int kPower, Care kCare, bool kValue,
          bool kGradient>
DivergenceSums sweep_tile(const Task& task, const RowFrame& row, const GradientFrame& gradient,
                          const float* s, const float* t, std::int64_t n, float* out) {
  const RowFrame frame = row;
  const GradientFrame g = gradient;
  const float w_p = task.w_p, w_q = task.w_q;
  // The forward KL, whose terms take the least time, has the widest bar.
  std::conditional_t<kDivergence == Divergence::kForwardKL, float, double> value = 0;
  double mass = 0, slope = 0;
  if constexpr (kGradient && kKeepsSlopes<kDivergence, kDistill>) {
    static_assert(!kValue && kCare == Care::kNear && kPower == 0);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = part_of<kHard>(s[i], t[i], frame, g);
    return {};
  }
#pragma omp simd reduction(+ : value, mass, slope)
  for (std::int64_t i = 0; i < n; ++i) {
    const Visit at = visit<kDivergence, kDistill, kHard, kPower, kCare>(
        s[i], t[i], frame, g, w_p, w_q, kHard ? -g.smoothing : 0.0f);
    if constexpr (kValue) {
      value += at.term;
      if constexpr (kDivergence != Divergence::kForwardKL) {
        mass += at.q;
        slope += static_cast<double>(at.q) * at.slope;
        out[i] = at.slope;
      }
    }
    if constexpr (kGradient) out[i] = at.part;
  }
  return {value, mass, slope};
}

// The columns of a row through sweep_tile, against the direction of the sweep before. `slopes`,
// where they are kept: a multiple of tiles, or null where no gradient is to follow.
template <Divergence kDivergence, bool kDistill, bool kHard, int kPower, Care kCare, bool kValue,
          bool kGradient>
DivergenceSums sweep(const Task& task, const RowFrame& row, const GradientFrame& gradient,
                     float label_gradient, const GradientTask* grad, float* slopes, bool backward) {
  alignas(64) Buffer buffer_s, buffer_t, buffer_out, cap_slopes;
  constexpr bool kKeeps = kKeepsSlopes<kDivergence, kDistill>;
  const bool projected = kGradient && changes(task.student.cap);
  DivergenceSums sums;
  for_each_tile(task.columns, backward, [&](std::int64_t begin, std::int64_t n) {
    const std::int64_t padded = Side::padded(n);
    const float* s = task.student.tile(begin, n, buffer_s);
    const float* t = s;
    if (kDistill) t = kGradient && kKeeps ? slopes + begin : task.teacher.tile(begin, n, buffer_t);
    const bool direct = kGradient && grad->dtype == DType::kFloat32 && padded == n;
    float* out = direct ? static_cast<float*>(grad->row) + begin : buffer_out;
    if (!kGradient && kKeeps && slopes != nullptr) out = slopes + begin;
    if (projected) task.student.slopes(begin, n, cap_slopes);  // before they may be overwritten
    const DivergenceSums tile =
        sweep_tile<kDivergence, kDistill, kHard, kPower, kCare, kValue, kGradient>(
            task, row, gradient, s, t, padded, out);
    sums.value += tile.value;
    sums.mass += tile.mass;
    sums.slope += tile.slope;
    if constexpr (kGradient) {
      const std::int64_t label = task.label - begin;
      if (kHard && label >= 0 && label < n) out[label] = label_gradient;
      if (projected) {
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) out[i] *= cap_slopes[i];
      }
      if (grad->row == nullptr) {
        sums.peak = largest(out, n, sums.peak);
      } else if (!direct) {
        store_floats(out, grad->dtype, begin, n, grad->row);
      }
    }
  });
  return sums;
}

// The gradient at the label's column. The cross-entropy's share is −Σ_{j≠y} q_j and not q_y − 1,
// which a confident row would lose to rounding.
template <Divergence kDivergence, bool kDistill, Care kCare>
float label_gradient(const Task& task, const Statistics& sums, const RowFrame& row,
                     const GradientFrame& gradient, const GradientTask& grad, const float* slopes) {
  float distill = 0;
  if constexpr (kDistill) {
    const float s = task.student.logit(task.label);
    const float t =
        kKeepsSlopes<kDivergence, kDistill> ? slopes[task.label] : task.teacher.logit(task.label);
    sweep_tile<kDivergence, true, false, 0, kCare, false, true>(task, row, gradient, &s, &t, 1,
                                                                &distill);
  }
  const double rest = sums.z_rest / sums.z_hard();
  const double smoothed = task.label_smoothing * (1 - 1.0 / static_cast<double>(task.classes));
  return static_cast<float>(distill + grad.scale * grad.hard * ((0 - rest) + smoothed));
}

GradientFrame make_gradient_frame(const Task& task, const Statistics& sums, double mean_slope,
                                  const GradientTask& grad) {
  const double distill = grad.scale * grad.distill, hard = grad.scale * grad.hard;
  GradientFrame frame{};
  frame.distill = static_cast<float>(distill);
  frame.mean_slope = split(mean_slope);
  frame.student = static_cast<float>(distill / sums.z_s);
  frame.teacher = static_cast<float>(distill / sums.z_t);
  if (task.hard) {
    frame.hard = static_cast<float>(hard / sums.z_hard());
    frame.smoothing =
        static_cast<float>(hard * task.label_smoothing / static_cast<double>(task.classes));
  }
  return frame;
}

template <Divergence kDivergence, bool kDistill, Care kCare, bool kValue>
DivergenceSums gradient_sweep(const Task& task, const Statistics& sums, const RowFrame& row,
                              double mean_slope, GradientTask grad, float* slopes, bool backward) {
  if (grad.dtype == DType::kFloat16 && grad.row != nullptr) {
    // Measured at scale 1 first, then written at the row's own scale.
    const GradientTask measured{nullptr, grad.dtype, grad.distill, grad.hard, 1, nullptr};
    const float peak = gradient_sweep<kDivergence, kDistill, kCare, false>(
                           task, sums, row, mean_slope, measured, slopes, backward)
                           .peak;
    const double prescale = float16_prescale(std::fabs(grad.scale) * peak, grad.weight());
    *grad.unscale = static_cast<float>(1 / prescale);
    grad.scale *= prescale;
    backward = !backward;
  }
  const GradientFrame frame = make_gradient_frame(task, sums, mean_slope, grad);
  if (!task.hard) {
    return sweep<kDivergence, kDistill, false, 0, kCare, kValue, true>(task, row, frame, 0, &grad,
                                                                       slopes, backward);
  }
  float label = 0;
  if (task.label >= 0) {
    label = label_gradient<kDivergence, kDistill, kCare>(task, sums, row, frame, grad, slopes);
  }
  const auto run = [&](auto power) {
    return sweep<kDivergence, kDistill, true, decltype(power)::value, kCare, kValue, true>(
        task, row, frame, label, &grad, slopes, backward);
  };
  if constexpr (kDistill && kDivergence == Divergence::kForwardKL) {
    switch (task.power) {
      case 1:
        return run(std::integral_constant<int, 1>());
      case 2:
        return run(std::integral_constant<int, 2>());
      case 3:
        return run(std::integral_constant<int, 3>());
      case 4:
        return run(std::integral_constant<int, 4>());
    }
  }
  return run(std::integral_constant<int, 0>());
}

// body(an integral constant) for the divergence of a row; forward KL, the default, alone has a
// faster variant than Care::kNear.
template <typename Body>
auto by_divergence(Divergence divergence, const Body& body) {
  switch (divergence) {
    case Divergence::kReverseKL:
      return body(std::integral_constant<Divergence, Divergence::kReverseKL>());
    case Divergence::kJSD:
      return body(std::integral_constant<Divergence, Divergence::kJSD>());
    case Divergence::kSkewForwardKL:
      return body(std::integral_constant<Divergence, Divergence::kSkewForwardKL>());
    case Divergence::kSkewReverseKL:
      return body(std::integral_constant<Divergence, Divergence::kSkewReverseKL>());
    case Divergence::kTVD:
      return body(std::integral_constant<Divergence, Divergence::kTVD>());
    case Divergence::kForwardKL:
    case Divergence::kKept:  // no row's own: see kept.h
      break;
  }
  return body(std::integral_constant<Divergence, Divergence::kForwardKL>());
}

// D, Σ q and Σ q φ; φ goes to `slopes`, unless that is null.
template <Divergence kDivergence>
DivergenceSums value_sweep(const Task& task, const RowFrame& row, float* slopes) {
  return sweep<kDivergence, true, false, 0, Care::kNear, true, false>(task, row, GradientFrame{}, 0,
                                                                      nullptr, slopes, true);
}

// D, and with `grad` the gradient of both terms.
template <Divergence kDivergence>
double near_divergence(const Task& task, const Statistics& sums, double log_ratio,
                       const GradientTask* grad) {
  const RowFrame row = make_frame(task, sums, log_ratio);
  if constexpr (kDivergence == Divergence::kForwardKL) {
    if (grad != nullptr) {
      return gradient_sweep<kDivergence, true, Care::kNear, true>(task, sums, row, 0, *grad,
                                                                  nullptr, true)
          .value;
    }
  }
  float* slopes = grad == nullptr ? nullptr : row_of_floats(task.columns);
  const DivergenceSums value = value_sweep<kDivergence>(task, row, slopes);
  if (grad == nullptr) return value.value;
  if (!std::isfinite(value.value)) {  // the reverse KL where the teacher rules a class out
    fill(kNaN, grad->dtype, 0, task.columns, grad->row);
  } else {
    gradient_sweep<kDivergence, true, Care::kNear, false>(task, sums, row, value.mean_slope(),
                                                          *grad, slopes, false);
  }
  return value.value;
}

// The gradient of both terms, the forward KL's value being known.
void forward_gradient(const Task& task, const Statistics& sums, const NormaliserRatio& ratio,
                      const GradientTask& grad) {
  const RowFrame row = make_frame(task, sums, ratio.log);
  const auto write = [&](auto care) {
    gradient_sweep<Divergence::kForwardKL, true, decltype(care)::value, false>(task, sums, row, 0,
                                                                               grad, nullptr, true);
  };
  // float16 shows more of a gradient's bits than float32's far form has.
  if (!ratio.far() || task.student.dtype == DType::kFloat16) {
    write(std::integral_constant<Care, Care::kNear>());
  } else if (sums.normal) {
    write(std::integral_constant<Care, Care::kFarNormal>());
  } else {
    write(std::integral_constant<Care, Care::kFar>());
  }
}

double divergence(const Task& task, const Statistics& sums, const NormaliserRatio& ratio,
                  const GradientTask* grad) {
  if (task.divergence == Divergence::kForwardKL && ratio.far()) {
    if (grad != nullptr) forward_gradient(task, sums, ratio, *grad);
    return ratio.kl;
  }
  return by_divergence(task.divergence, [&](auto of) {
    return near_divergence<decltype(of)::value>(task, sums, ratio.log, grad);
  });
}

// The gradient of the cross-entropy alone.
void hard_gradient(const Task& task, const Statistics& sums, const GradientTask& grad) {
  gradient_sweep<Divergence::kForwardKL, false, Care::kFar, false>(
      task, sums, make_frame(task, sums, 0.0), 0, grad, nullptr, true);
}

double cross_entropy(const Task& task, const Statistics& sums) {
  // Neither form subtracts what cancels: at the maximum the loss is the log of 1 + the rest,
  // elsewhere both summands are positive.
  const double log_z = std::log(sums.z_hard());
  const double nll = sums.x_label == 0 ? std::log1p(sums.z_rest) : log_z - sums.x_label;
  const double smoothing = task.label_smoothing;
  if (smoothing == 0) return nll;
  const double uniform = log_z - sums.offset / static_cast<double>(task.classes);
  return (smoothing < 1 ? (1 - smoothing) * nll : 0) + smoothing * uniform;
}

RowLoss evaluate(const Task& task, const GradientTask* grad) {
  const Statistics sums = statistics(task);
  // A NaN or +inf among the logits, or nothing but −inf, leaves no positive sum.
  const bool distill_ok = !task.distill || (sums.z_s > 0 && sums.z_t > 0);
  const bool hard_ok = !task.hard || sums.z_hard() > 0;
  RowLoss loss;
  loss.hard = hard_ok ? (task.hard ? cross_entropy(task, sums) : 0) : kNaN;
  if (!distill_ok) loss.distill = kNaN;
  if (!distill_ok || !hard_ok) {
    if (grad != nullptr) fill(kNaN, grad->dtype, 0, task.columns, grad->row);
  } else if (task.distill) {
    loss.distill = divergence(task, sums, normaliser_ratio(task, sums), grad);
  } else if (grad != nullptr) {
    hard_gradient(task, sums, *grad);
  }
  return loss;
}

}  // namespace
}  // namespace KDK_ISA
}  // namespace kdk
