// A row over the blocks of a team: its statistics, its terms, its gradient. Where the logits lie,
// in shared memory or in the tensors, is the caller's business: see distill_kernel.h.
//
//   1. statistics: maxima, Σ e^{(s − max)/T}, Σ e^{(t − max)/T}, Σ_{j≠y} e^{s − max}, a far
//      forward or reverse KL; reduced over the team;
//   2. for divergences whose gradient holds a sum over the row: D and Σ q φ, once as it suits rows
//      that are far apart, and again where they turn out not to be;
//   3. the gradient, and a near forward KL.
#pragma once

#include "cuda/slice.h"
#include "cuda/task.h"
#include "cuda/team.h"

namespace kdk {
namespace gpu {

// What a kernel computes, so far as it is compiled for it.
template <Divergence kDivergence_, bool kDistill_, bool kHard_, bool kWhole_>
struct Kind {
  static constexpr Divergence kDivergence = kDivergence_;
  static constexpr bool kDistill = kDistill_, kHard = kHard_;  // the terms
  // Every chunk lies in shared memory, aligned and whole: see load_chunk.
  static constexpr bool kWhole = kWhole_;
};

// What every thread knows of the row in hand.
struct Row {
  std::int64_t index;
  int columns;            // of this block
  int label;              // its column here; of another block: any other number
  Side student, teacher;  // where to read
  Side grad;              // where to write, may be the student's
  float s_label, t_label;
};

// A chunk's logits; without a teacher t is −inf.
template <typename K>
KDK_DEVICE void load_logits(const Row& row, int column, int n, float (&s)[kChunk],
                            float (&t)[kChunk]) {
  load_chunk<K::kWhole>(row.student, column, n, s);
  if constexpr (K::kDistill) {
    load_chunk<K::kWhole>(row.teacher, column, n, t);
  } else {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) t[i] = -kInfinity;
  }
}

// body(column, n, s, t) for each of the thread's chunks.
template <typename K, typename Body>
KDK_DEVICE void for_each_logits(const Row& row, const Body& body) {
  for_each_chunk(row.columns, [&](int column, int n) {
    float s[kChunk], t[kChunk];
    load_logits<K>(row, column, n, s, t);
    body(column, n, s, t);
  });
}

// Whether the label is one of the chunk's columns, and which.
KDK_DEVICE bool holds_label(const Row& row, int column) {
  return row.label >= column && row.label < column + kChunk;
}

// ---- Sweep 1: statistics ----------------------------------------------------------------------

struct Sums {
  float max_s, max_t;
  float z_s, z_t;  // Σ e^{(s − max_s)/T}, Σ e^{(t − max_t)/T}
  float gap;       // Σ e^{(t − max_t)/T} ((s − max_s) − (t − max_t)); reverse KL: s and t swapped
  float z_rest;    // Σ_{j≠y} e^{s_j − max_s}
};

template <typename K>
constexpr bool kSwapped = K::kDivergence == Divergence::kReverseKL;

// What differences are taken from: the maximum, or 0 while everything is −inf.
KDK_DEVICE float anchor(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

KDK_DEVICE TwoFloats drop(float from, float to) {
  if (!(to > from) || from == -kInfinity) return {0, 0};
  return two_diff(from, to);
}

// New maxima: the sums as they would be had they been known from the beginning.
template <typename K>
KDK_DEVICE void raise_maxima(const RowTask& task, float max_s, float max_t, Sums& sums) {
  const TwoFloats d_s = drop(sums.max_s, max_s), d_t = drop(sums.max_t, max_t);
  if constexpr (K::kDistill) {
    const float factor_s = exp_of<true>(d_s.hi, d_s.lo, task.rate);
    const float factor_t = exp_of<true>(d_t.hi, d_t.lo, task.rate);
    sums.gap = kSwapped<K> ? factor_s * (sums.gap + sums.z_s * (d_t.hi - d_s.hi))
                           : factor_t * (sums.gap + sums.z_t * (d_s.hi - d_t.hi));
    sums.z_s *= factor_s;
    sums.z_t *= factor_t;
  }
  // A confident row's loss is as exact as this factor.
  if constexpr (K::kHard) sums.z_rest *= exp_of<true>(d_s.hi, d_s.lo, kUnitRate);
  sums.max_s = larger(sums.max_s, max_s);
  sums.max_t = larger(sums.max_t, max_t);
}

// e^{s − max_s} of a chunk; where T is a small integer a power of e_s = e^{(s − max_s)/T}.
template <typename K, bool kLow>
KDK_DEVICE void hard_exponentials(const RowTask& task, const float (&s)[kChunk], float max_s,
                                  const float (&e_s)[kChunk], float (&out)[kChunk]) {
  if (K::kDistill && task.power > 0) {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) out[i] = task.power == 1 ? e_s[i] : e_s[i] * e_s[i];
    KDK_ROLLED
    for (int power = 2; power < task.power; ++power) {
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) out[i] *= e_s[i];
    }
    return;
  }
  KDK_UNROLL
  for (int i = 0; i < kChunk; ++i) {
    const TwoFloats x = two_diff(s[i], max_s);
    out[i] = exp_of<kLow>(x.hi, x.lo, kUnitRate);
  }
}

// e^{(s − max_s)/T} and e^{(t − max_t)/T} of a chunk; returns its gap. Without kGuarded that is
// NaN where a logit is ruled out.
template <typename K, bool kLow, bool kGuarded>
KDK_DEVICE float exponentials(const RowTask& task, const float (&s)[kChunk],
                              const float (&t)[kChunk], float max_s, float max_t,
                              float (&e_s)[kChunk], float (&e_t)[kChunk]) {
  float gap = 0;
  KDK_UNROLL
  for (int i = 0; i < kChunk; ++i) {
    const Terms terms =
        terms_of<true, false, 0, kGuarded, kLow, kSwapped<K>>(s[i], t[i], max_s, max_t, task.rate);
    e_s[i] = terms.z_s;
    e_t[i] = terms.z_t;
    gap += terms.gap;
  }
  return gap;
}

KDK_DEVICE float sum_of_chunk(const float (&x)[kChunk]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// The label's column is added at the end, by itself.
template <typename K>
KDK_DEVICE void leave_out_label(const Row& row, int column, float (&s)[kChunk],
                                float (&t)[kChunk]) {
  if (!K::kHard || !holds_label(row, column)) return;
  KDK_UNROLL
  for (int i = 0; i < kChunk; ++i) {
    if (column + i == row.label) s[i] = t[i] = -kInfinity;
  }
}

template <typename K, bool kLow>
KDK_DEVICE Sums add_chunks(const RowTask& task, const Row& row) {
  Sums sums{-kInfinity, -kInfinity, 0, 0, 0, 0};
  for_each_logits<K>(row, [&](int column, int n, auto& s, auto& t) {
    leave_out_label<K>(row, column, s, t);
    float max_s = sums.max_s, max_t = sums.max_t;
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      max_s = larger(s[i], max_s);
      max_t = larger(t[i], max_t);
    }
    if (max_s > sums.max_s || max_t > sums.max_t) raise_maxima<K>(task, max_s, max_t, sums);
    max_s = anchor(max_s);
    max_t = anchor(max_t);
    float e_s[kChunk] = {}, e_t[kChunk];
    float z_s = 0;
    if constexpr (K::kDistill) {
      float gap = exponentials<K, kLow, !K::kWhole>(task, s, t, max_s, max_t, e_s, e_t);
      if (K::kWhole && gap != gap) {
        load_logits<K>(row, column, n, s, t);
        leave_out_label<K>(row, column, s, t);
        gap = exponentials<K, kLow, true>(task, s, t, max_s, max_t, e_s, e_t);
      }
      sums.gap += gap;
      sums.z_s += z_s = sum_of_chunk(e_s);
      sums.z_t += sum_of_chunk(e_t);
    }
    if constexpr (K::kHard) {
      if (!K::kDistill || task.power != 1) {
        float e[kChunk];
        hard_exponentials<K, kLow>(task, s, max_s, e_s, e);
        z_s = sum_of_chunk(e);
      }
      sums.z_rest += z_s;
    }
  });
  return sums;
}

template <typename K>
KDK_DEVICE void add_label(const RowTask& task, const Row& row, Sums& sums) {
  const float x = row.s_label - anchor(row.s_label), y = row.t_label - anchor(row.t_label);
  raise_maxima<K>(task, larger(row.s_label, sums.max_s), larger(row.t_label, sums.max_t), sums);
  if constexpr (K::kDistill) {
    Sums own{row.s_label, row.t_label, x == 0 ? 1.0f : 0.0f, y == 0 ? 1.0f : 0.0f, 0, 0};
    if (kSwapped<K> ? x == 0 : y == 0) own.gap = kSwapped<K> ? y - x : x - y;
    if (x != x) own.z_s = x;
    if (y != y) own.z_t = y;
    raise_maxima<K>(task, sums.max_s, sums.max_t, own);
    sums.z_s += own.z_s;
    sums.z_t += own.z_t;
    sums.gap += own.gap;
  }
}

template <typename K>
KDK_DEVICE Sums merge_sums(const RowTask& task, const Row& row, const Sums& sums, Team& team) {
  float fields[6] = {sums.max_s, sums.max_t, sums.z_s, sums.z_t, sums.gap, sums.z_rest};
  const auto sums_of = [](const float (&from)[6]) {
    return Sums{from[0], from[1], from[2], from[3], from[4], from[5]};
  };
  team_reduce(fields, team, [&](float (&mine)[6], int lanes) {
    float maxima[2] = {mine[0], mine[1]};
    reduce_lanes(maxima, lanes, [](float (&into)[2], const float (&other)[2]) {
      into[0] = larger(other[0], into[0]);
      into[1] = larger(other[1], into[1]);
    });
    Sums raised = sums_of(mine);
    raise_maxima<K>(task, maxima[0], maxima[1], raised);
    float rest[4] = {raised.z_s, raised.z_t, raised.gap, raised.z_rest};
    reduce_lanes(rest, lanes, [](float (&into)[4], const float (&other)[4]) {
      KDK_UNROLL
      for (int i = 0; i < 4; ++i) into[i] += other[i];
    });
    mine[0] = raised.max_s;
    mine[1] = raised.max_t;
    KDK_UNROLL
    for (int i = 0; i < 4; ++i) mine[2 + i] = rest[i];
  });
  Sums merged = sums_of(fields);
  if constexpr (K::kHard) add_label<K>(task, row, merged);
  return merged;
}

// Below this Σ_{j≠y} e^{s_j − max_s}, e^-8, what a float loses of s − max_s and of its product with
// log2(e) / T shows in the loss and in the label's gradient (hazards.md, N1 and N6).
constexpr float kConfident = 3.4e-4f;

template <typename K>
KDK_DEVICE Sums statistics(const RowTask& task, const Row& row, Team& team) {
  const Sums sums = merge_sums<K>(task, row, add_chunks<K, false>(task, row), team);
  if constexpr (K::kHard) {
    if (sums.z_rest < kConfident) {
      return merge_sums<K>(task, row, add_chunks<K, true>(task, row), team);
    }
  }
  return sums;
}

// Σ_j e^{s_j − max_s}, the label's column included.
KDK_DEVICE float hard_normaliser(const Row& row, const Sums& sums) {
  const TwoFloats x = two_diff(row.s_label, anchor(sums.max_s));
  return sums.z_rest + exp_of<true>(x.hi, x.lo, kUnitRate);
}

// Σ (s − max_s), where labels are smoothed.
template <typename K>
KDK_DEVICE float sum_of_offsets(const Row& row, const Sums& sums, Team& team) {
  float offset[1] = {0};
  for_each_chunk(row.columns, [&](int column, int n) {
    float s[kChunk];
    load_chunk<K::kWhole>(row.student, column, n, s);
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
  TwoFloats mean;  // Σ q φ / Σ q, of q and φ as they were rounded
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
  return {fields[4], divide({fields[2], fields[3]}, {fields[0], fields[1]})};
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
  Slope slope{kl, {mean.hi - far_offset<K::kDivergence>(task.w_q), 0}};
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
// largest entry, `peak`, what float16 holds.
KDK_DEVICE float float16_prescale(float peak) {
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
      const float peak = absolute(scale.hi) * team_max(swept.peak, team);
      const float prescale = float16_prescale(peak);
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
