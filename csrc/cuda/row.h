// A row over the blocks of a team: its statistics, its terms, its gradient. Where the logits lie,
// in shared memory or in the tensors, is the caller's business: see distill_kernel.h.
//
//   1. statistics, see statistics.h;
//   2. for divergences whose gradient holds a sum over the row: D and Σ q φ, once as it suits rows
//      that are far apart, and again where they turn out not to be;
//   3. the gradient, and a near forward KL.
#pragma once

#include "cuda/statistics.h"

namespace kdk {
namespace gpu {

// Σ (s − max_s), where labels are smoothed.
template <typename K>
KDK_DEVICE float sum_of_offsets(const Row& row, const Sums& sums, Team& team) {
  float offset[1] = {0};
  for_each_chunk(row.columns, [&](int column, int n) {
    float s[kChunk];
    load_side<K>(row.student, *row.student_cap, column, n, s);
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) offset[0] += i < n ? s[i] - sums.max_s : 0.0f;
  });
  team_sum(offset, team);
  return offset[0];
}

template <typename K>
KDK_DEVICE float cross_entropy(const RowTask& task, const Row& row, const Sums& sums, Team& team) {
  // Neither form subtracts what cancels: at the maximum the loss is the log of 1 + the rest,
  // elsewhere both summands are positive.
  const float x_label = row.s_label - anchor(sums.max_s);
  const float log_z = log_of(hard_normaliser(row, sums));
  const float nll = x_label == 0 ? log1p_of(sums.z_rest) : log_z - x_label;
  const float smoothing = task.label_smoothing;
  if (smoothing == 0) return nll;
  const float offset = sum_of_offsets<K>(row, sums, team);
  const float uniform = log_z - offset / static_cast<float>(task.columns);
  return (smoothing < 1 ? (1 - smoothing) * nll : 0.0f) + smoothing * uniform;
}

// ---- Sweeps 2 and 3 ---------------------------------------------------------------------------

KDK_DEVICE RowFrame make_frame(const RowTask& task, const Sums& sums, TwoFloats log_ratio) {
  RowFrame frame;
  frame.max_s = sums.max_s;
  frame.max_t = sums.max_t;
  frame.inv_z_s = 1 / sums.z_s;
  frame.inv_z_t = 1 / sums.z_t;
  frame.log_ratio = multiply(log_ratio, task.temperature);
  frame.rate = task.rate;
  frame.inv_temperature = task.inv_temperature;
  return frame;
}

// Σ (e^{(s − max_s)/T} − e^{(t − max_t)/T}), each difference taken before it is rounded.
template <typename K>
KDK_DEVICE float normaliser_difference(const RowTask& task, const Row& row, const Sums& sums,
                                       Team& team) {
  RowFrame frame = make_frame(task, sums, {0, 0});
  frame.inv_z_s = frame.inv_z_t = 1;
  float total[1] = {0};
  for_each_logits<K>(row, [&](int, int, const auto& s, const auto& t) {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const float e_s = exp_of(s[i] - frame.max_s, frame.rate);
      const float e_t = exp_of(t[i] - frame.max_t, frame.rate);
      total[0] += element(s[i], t[i], e_s, e_t, frame).difference;
    }
  });
  team_sum(total, team);
  return total[0];
}

// D and Σ q φ, for the divergences whose gradient needs the latter.
struct Slope {
  float value;
  TwoFloats mean;         // Σ q φ / Σ q, of q and φ as they were rounded
  TwoFloats mass, total;  // Σ q, Σ q φ, of mean_slope()
};

template <typename K>
KDK_DEVICE Slope mean_slope(const RowTask& task, const Row& row, const RowFrame& frame,
                            Team& team) {
  float value = 0;
  TwoFloats mass{0, 0}, slope{0, 0};
  for_each_logits<K>(row, [&](int, int, const auto& s, const auto& t) {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const Visit at = visit<K::kDivergence, true, false, 0, Care::kNear>(
          s[i], t[i], frame, GradientFrame{}, task.w_p, task.w_q, 0.0f);
      value += at.term;
      mass = add(mass, {at.q, 0});
      slope = add(slope, two_product(at.q, at.slope));
    }
  });
  float fields[5] = {mass.hi, mass.lo, slope.hi, slope.lo, value};
  team_sum_pairs<2>(fields, team);
  return {fields[4],
          divide({fields[2], fields[3]}, {fields[0], fields[1]}),
          {fields[0], fields[1]},
          {fields[2], fields[3]}};
}

// See far.h.
KDK_DEVICE float balance_of(const RowTask& task, const Sums& sums) {
  return task.w_p * sums.z_s / (task.w_q * sums.z_t);
}

template <typename K, bool kGuarded>
KDK_DEVICE FarTerms far_chunk(const RowTask& task, const Sums& sums, const float (&s)[kChunk],
                              const float (&t)[kChunk]) {
  FarTerms total{};
  const float balance = balance_of(task, sums);
  KDK_UNROLL
  for (int i = 0; i < kChunk; ++i) {
    const FarTerms terms = far_terms<K::kDivergence, kGuarded>(s[i] - sums.max_s, t[i] - sums.max_t,
                                                               task.rate, balance, task.w_q);
    total.mass += terms.mass;
    total.from_p += terms.from_p;
    total.from_q += terms.from_q;
    total.slope += terms.slope;
  }
  return total;
}

// The same where the row is far apart: see far.h, whose units the mean has. `kl` is the divergence
// of a reverse KL.
template <typename K>
KDK_DEVICE Slope far_mean_slope(const RowTask& task, const Row& row, const Sums& sums,
                                TwoFloats log_ratio, float kl, Team& team) {
  TwoFloats mass{0, 0}, total{0, 0};
  float from_p = 0, from_q = 0;
  for_each_logits<K>(row, [&](int column, int n, auto& s, auto& t) {
    FarTerms terms = far_chunk<K, !K::kWhole>(task, sums, s, t);
    if (K::kWhole && !(absolute(terms.from_p + terms.from_q + terms.slope) < kInfinity)) {
      load_logits<K>(row, column, n, s, t);
      terms = far_chunk<K, true>(task, sums, s, t);
    }
    from_p += terms.from_p;
    from_q += terms.from_q;
    mass = add(mass, {terms.mass, 0});
    total = add(total, {terms.slope, 0});
  });
  float fields[6] = {mass.hi, mass.lo, total.hi, total.lo, from_p, from_q};
  team_sum_pairs<2>(fields, team);
  const TwoFloats mean = divide({fields[2], fields[3]}, {fields[0], fields[1]});
  Slope slope{kl, {mean.hi - far_offset<K::kDivergence>(task.w_q), 0}, {}, {}};
  if constexpr (!kSwapped<K>) {
    slope.value = far_value<K::kDivergence>(fields[4], fields[5], sums.z_s, sums.z_t, log_ratio,
                                            task.w_p, task.w_q);
  }
  return slope;
}

template <typename K>
KDK_DEVICE void fill_row(const Row& row, float value) {
  float values[kChunk];
  KDK_UNROLL
  for (int i = 0; i < kChunk; ++i) values[i] = value;
  for_each_chunk(row.columns,
                 [&](int column, int n) { store_chunk<K::kWhole>(row.grad, column, n, values); });
}

struct Swept {
  float value;  // D of a near forward KL
  float peak;   // the largest entry, where nothing is stored
};

// Whether the gradient takes e^s from e^{s/T} where it can.
template <typename K, Care kCare>
constexpr bool kPowers = K::kDistill && K::kHard && kCare == Care::kFar;

template <typename K, Care kCare>
KDK_DEVICE Swept gradient_sweep(const RowTask& task, const Row& row, const RowFrame& frame,
                                const GradientFrame& gradient, float label_gradient, bool store) {
  Swept swept{0, 0};
  for_each_logits<K>(row, [&](int column, int n, const auto& s, const auto& t) {
    constexpr bool kHardHere = K::kHard && !kPowers<K, kCare>;
    float parts[kChunk], e_s[kChunk];
    float value = 0;
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const Visit at = visit<K::kDivergence, K::kDistill, kHardHere, 0, kCare>(
          s[i], t[i], frame, gradient, task.w_p, task.w_q,
          K::kHard ? 0 - gradient.smoothing : 0.0f);
      value += at.term;
      parts[i] = at.part;
      e_s[i] = at.e_s;
    }
    swept.value += value;
    // At T = 1 it is in gradient.student.
    if (kPowers<K, kCare> && task.power != 1) {
      float e[kChunk];
      hard_exponentials<K, false>(task, s, frame.max_s, e_s, e);
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) parts[i] += gradient.hard * e[i];
    }
    if (K::kHard && holds_label(row, column)) {
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        if (column + i == row.label) parts[i] = label_gradient;
      }
    }
    if (!K::kWhole && changes(*row.student_cap)) {
      float x[kChunk];
      load_chunk<K::kWhole>(row.student, column, n, x);
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) parts[i] *= cap_slope(x[i], *row.student_cap);
    }
    if (store) {
      store_chunk<K::kWhole>(row.grad, column, n, parts);
    } else {
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        if (i < n) swept.peak = larger(absolute(parts[i]), swept.peak);
      }
    }
  });
  return swept;
}

// Divided by the number of tokens and spread over the vocabulary, most of a float16 gradient would
// be below the smallest float16 before the loss scale of mixed-precision training arrives in the
// backward pass. So a row is kept at a power of 2, which is exact: the largest that leaves its
// largest entry, `peak` times the scale, what float16 holds. Of a shard far below the row's maximum
// the peak is so small that the weight of a term would not be a float.
KDK_DEVICE float float16_prescale(const RowTask& task, float scale, float peak) {
  const float least =
      larger(absolute(task.grad_distill.hi), absolute(task.grad_hard.hi)) * 0x1p-90f;
  if (!(peak > 0) || !(peak < kInfinity)) return 1;
  peak = absolute(scale) * larger(peak, least);
  if (!(peak > 0) || !(peak < kInfinity)) return 1;
  const int exponent = static_cast<int>(to_bits(65408.0f / peak) >> 23) - 127;
  const int held = exponent > 120 ? 120 : exponent < -120 ? -120 : exponent;
  return from_bits(static_cast<std::uint32_t>(held + 127) << 23);
}

struct Pass {
  bool gradient;
  TwoFloats scale;  // of the gradient
};

// The gradient, for float16 at the row's own scale, where the pass wants it; D of a near forward
// KL.
template <typename K, Care kCare>
KDK_DEVICE float write_gradient(const RowTask& task, const Row& row, const Sums& sums,
                                const RowFrame& frame, TwoFloats slope, const Pass& pass,
                                Team& team) {
  const bool prescaled = pass.gradient && task.grad.dtype == DType::kFloat16;
  TwoFloats scale = pass.scale;
  Swept swept{0, 0};
  KDK_ROLLED
  for (int sweep = prescaled ? 0 : 1; sweep < 2; ++sweep) {
    const bool measures = sweep == 0;
    const TwoFloats factor = measures ? TwoFloats{1, 0} : scale;
    const TwoFloats distill = multiply(factor, task.grad_distill);
    GradientFrame gradient{};
    gradient.distill = distill.hi;
    gradient.mean_slope = slope;
    if constexpr (K::kDistill) {
      const float student = divide(distill, {sums.z_s, 0}).hi;
      if constexpr (K::kDivergence == Divergence::kForwardKL) {
        gradient.student = student;
        gradient.teacher = divide(distill, {sums.z_t, 0}).hi;
      } else {
        gradient.slope =
            student * far_unit<K::kDivergence>(task.w_p, task.w_q, task.inv_temperature);
        gradient.balance = balance_of(task, sums);
      }
    }
    float label = 0;
    if constexpr (K::kHard) {
      const TwoFloats weight = multiply(factor, task.grad_hard);
      const float normaliser = hard_normaliser(row, sums);
      gradient.hard = divide(weight, {normaliser, 0}).hi;
      gradient.smoothing = multiply(weight, task.smoothing).hi;
      // The cross-entropy's share at the label is −Σ_{j≠y} q_j and not q_y − 1, which a confident
      // row would lose to rounding.
      label = weight.hi * ((0 - sums.z_rest / normaliser) + task.smoothed_label);
      if constexpr (K::kDistill) {
        label += visit<K::kDivergence, true, false, 0, kCare>(row.s_label, row.t_label, frame,
                                                              gradient, task.w_p, task.w_q, 0.0f)
                     .part;
      }
      if (kPowers<K, kCare> && task.power == 1) gradient.student += gradient.hard;
    }
    swept = gradient_sweep<K, kCare>(task, row, frame, gradient, label, pass.gradient && !measures);
    if (measures) {
      const float prescale = float16_prescale(task, scale.hi, team_max(swept.peak, team));
      if (leads(team)) task.unscale[row.index] = 1 / prescale;
      scale = {scale.hi * prescale, scale.lo * prescale};
    }
  }
  return swept.value;
}

// ---- The terms of a row -----------------------------------------------------------------------

struct RowLoss {
  float distill, hard;
};

template <typename K>
KDK_DEVICE float divergence(const RowTask& task, const Row& row, const Sums& sums, const Pass& pass,
                            Team& team) {
  TwoFloats log = log_ratio(sums.z_s, sums.z_t);
  // The forward KL; for the reverse one that itself. Infinite or NaN where a side rules a class out
  // that the other one does not.
  const float kl = kSwapped<K> ? (0 - log.hi - sums.gap / (task.temperature.hi * sums.z_s)) - log.lo
                               : (log.hi - sums.gap / (task.temperature.hi * sums.z_t)) + log.lo;
  const float far_from = static_cast<float>(kFarFrom<K::kDivergence>) * (1 + absolute(log.hi));
  const bool far = kl >= far_from && kl < kInfinity;
  // float16 shows more of a gradient's bits than float32's far form has.
  const bool half = task.student.dtype == DType::kFloat16;
  if (kl < static_cast<float>(kNearKL)) {
    log = {log1p_of(normaliser_difference<K>(task, row, sums, team) / sums.z_t), 0};
  }
  const RowFrame frame = make_frame(task, sums, log);
  if constexpr (K::kDivergence == Divergence::kForwardKL) {
    if (far && !pass.gradient) return kl;
    if (far && !half) {
      write_gradient<K, Care::kFar>(task, row, sums, frame, {0, 0}, pass, team);
      return kl;
    }
    float value[1] = {write_gradient<K, Care::kNear>(task, row, sums, frame, {0, 0}, pass, team)};
    if (far) return kl;
    team_sum(value, team);
    return value[0];
  } else {
    if constexpr (kHasFar<K::kDivergence>) {
      if (far && !half && far_from < task.far_limit &&
          (!kSwapped<K> || kl + absolute(log.hi) < kFarSlope)) {
        if (kSwapped<K> && !pass.gradient) return kl;
        const Slope slope = far_mean_slope<K>(task, row, sums, log, kl, team);
        if (slope.value >= far_from && slope.value < task.far_limit) {
          if (pass.gradient) {
            write_gradient<K, Care::kFar>(task, row, sums, frame, slope.mean, pass, team);
          }
          return slope.value;
        }
      }
    }
    const Slope slope = mean_slope<K>(task, row, frame, team);
    if (!pass.gradient) return slope.value;
    if (!(absolute(slope.value) < kInfinity)) {
      fill_row<K>(row, kNaN);  // the reverse KL where the teacher rules a class out
    } else {
      write_gradient<K, Care::kNear>(task, row, sums, frame, slope.mean, pass, team);
    }
    return slope.value;
  }
}

// `loaded()` is called once every thread has read the row, so that the next one may be fetched.
template <typename K, typename Loaded>
KDK_DEVICE RowLoss evaluate(const RowTask& task, const Row& row, const Pass& pass, Team& team,
                            const Loaded& loaded) {
  const Sums sums = statistics<K>(task, row, team);
  loaded();
  // A NaN or +inf among the logits, or nothing but −inf, leaves no positive sum.
  const bool distill_ok = !K::kDistill || (sums.z_s > 0 && sums.z_t > 0);
  const bool hard_ok = !K::kHard || hard_normaliser(row, sums) > 0;
  RowLoss loss{0, 0};
  if constexpr (K::kHard) loss.hard = hard_ok ? cross_entropy<K>(task, row, sums, team) : kNaN;
  if (!distill_ok) loss.distill = kNaN;
  if (!distill_ok || !hard_ok) {
    if (pass.gradient) fill_row<K>(row, kNaN);
  } else if constexpr (K::kDistill) {
    loss.distill = divergence<K>(task, row, sums, pass, team);
  } else if (pass.gradient) {
    const RowFrame frame = make_frame(task, sums, {0, 0});
    if (task.student.dtype == DType::kFloat16) {
      write_gradient<K, Care::kNear>(task, row, sums, frame, {0, 0}, pass, team);
    } else {
      write_gradient<K, Care::kFar>(task, row, sums, frame, {0, 0}, pass, team);
    }
  }
  return loss;
}

}  // namespace gpu
}  // namespace kdk
