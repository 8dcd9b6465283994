// A row over the blocks of a cluster: its statistics, its terms, its gradient. Where the logits
// lie, in shared memory or in the tensors, is the caller's business: see distill_kernel.h.
//
//   1. statistics: maxima, Σ e^{(s − max)/T}, Σ e^{(t − max)/T}, Σ_{j≠y} e^{s − max}, the far
//      forward KL; reduced over the cluster;
//   2. for divergences whose gradient holds a sum over the row: D and Σ q φ;
//   3. the gradient, and a near forward KL.
#pragma once

#include "cuda/slice.h"
#include "cuda/task.h"
#include "cuda/team.h"

namespace kdk {
namespace gpu {

// ---- Sweep 1: statistics ----------------------------------------------------------------------

struct Sums {
  float max_s, max_t;
  float z_s, z_t;  // Σ e^{(s − max_s)/T}, Σ e^{(t − max_t)/T}
  float gap;       // Σ e^{(t − max_t)/T} ((s − max_s) − (t − max_t))
  float z_rest;    // Σ_{j≠y} e^{s_j − max_s}
  float offset;    // Σ (s − max_s) over `count` columns, where labels are smoothed
  float count;
};

// What differences are taken from: the maximum, or 0 while everything is −inf.
KDK_DEVICE float anchor(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

KDK_DEVICE float larger(float a, float b) { return a > b ? a : b; }

KDK_DEVICE TwoFloats drop(float from, float to) {
  if (!(to > from) || from == -kInfinity) return {0, 0};
  return two_diff(from, to);
}

// New maxima: the sums as they would be had they been known from the beginning.
KDK_DEVICE void raise_maxima(const RowTask& task, float max_s, float max_t, Sums& sums) {
  const TwoFloats d_s = drop(sums.max_s, max_s), d_t = drop(sums.max_t, max_t);
  if (d_s.hi != 0 || d_t.hi != 0) {
    const float factor_t = exp_of<true>(d_t.hi, d_t.lo, task.rate);
    sums.gap = factor_t * (sums.gap + sums.z_t * (d_s.hi - d_t.hi));
    sums.z_t *= factor_t;
    sums.z_s *= exp_of<true>(d_s.hi, d_s.lo, task.rate);
    // A confident row's loss is as exact as this factor.
    sums.z_rest *= exp_of<true>(d_s.hi, d_s.lo, kUnitRate);
    sums.offset += sums.count * d_s.hi;
  }
  sums.max_s = larger(sums.max_s, max_s);
  sums.max_t = larger(sums.max_t, max_t);
}

KDK_DEVICE void merge(const RowTask& task, Sums& into, Sums other) {
  const float max_s = larger(into.max_s, other.max_s), max_t = larger(into.max_t, other.max_t);
  raise_maxima(task, max_s, max_t, into);
  raise_maxima(task, max_s, max_t, other);
  into.z_s += other.z_s;
  into.z_t += other.z_t;
  into.gap += other.gap;
  into.z_rest += other.z_rest;
  into.offset += other.offset;
  into.count += other.count;
}

// ---- A row ------------------------------------------------------------------------------------

// What every thread knows of the row in hand.
struct Row {
  std::int64_t index;
  std::int64_t begin, end;  // this block's columns
  std::int64_t label;       // of the hard term, or -1
  Side student, teacher;    // where to read
  Side memory;              // the gradient in memory
  Side staged;              // and in shared memory, from where its interior is stored
  Interior interior;        // empty: all goes to memory at once
  float s_label, t_label;
};

// body(column, n) for each of the thread's chunks.
template <typename Body>
KDK_DEVICE void for_each_chunk(const Row& row, const Body& body) {
  const std::int64_t step = static_cast<std::int64_t>(block_threads()) * kChunk;
  for (std::int64_t column = row.begin + thread_rank() * kChunk; column < row.end; column += step) {
    const std::int64_t left = row.end - column;
    body(column, left < kChunk ? static_cast<int>(left) : kChunk);
  }
}

// body(column, n, s, t) with the chunk's logits; without kTeacher t is not read and −inf.
template <bool kTeacher, typename Body>
KDK_DEVICE void for_each_logits(const Row& row, const Body& body) {
  for_each_chunk(row, [&](std::int64_t column, int n) {
    float s[kChunk], t[kChunk];
    load_chunk(row.student, column, n, s);
    if constexpr (kTeacher) {
      load_chunk(row.teacher, column, n, t);
    } else {
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) t[i] = -kInfinity;
    }
    body(column, n, s, t);
  });
}

template <bool kDistill, bool kHard, int kPower>
KDK_DEVICE Sums add_chunks(const RowTask& task, const Row& row) {
  Sums sums{-kInfinity, -kInfinity, 0, 0, 0, 0, 0, 0};
  for_each_logits<kDistill>(row, [&](auto column, int n, auto& s, auto& t) {
    // The label's column is added at the end, by itself.
    const std::int64_t label = kHard ? row.label - column : -1;
    float max_s = sums.max_s, max_t = sums.max_t;
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (i == label) s[i] = -kInfinity;
      if (i == label) t[i] = -kInfinity;
      max_s = larger(s[i], max_s);
      max_t = larger(t[i], max_t);
    }
    if (max_s > sums.max_s || max_t > sums.max_t) raise_maxima(task, max_s, max_t, sums);
    max_s = anchor(max_s);
    max_t = anchor(max_t);
    Terms terms[kChunk];
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      terms[i] = terms_of<kDistill, kHard, kPower, true>(s[i], t[i], max_s, max_t, task.rate);
    }
    const Terms all = ((terms[0] + terms[1]) + (terms[2] + terms[3])) +
                      ((terms[4] + terms[5]) + (terms[6] + terms[7]));
    sums.z_s += all.z_s;
    sums.z_t += all.z_t;
    sums.gap += all.gap;
    sums.z_rest += all.z_rest;
    if (kHard && task.label_smoothing > 0) {
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        if (i < n && i != label) {
          sums.offset += s[i] - max_s;
          sums.count += 1;
        }
      }
    }
  });
  return sums;
}

KDK_DEVICE Sums label_sums(const Row& row, bool distill) {
  const float x = row.s_label - anchor(row.s_label), y = row.t_label - anchor(row.t_label);
  Sums sums{row.s_label, row.t_label, x == 0 ? 1.0f : 0.0f, y == 0 ? 1.0f : 0.0f, 0, 0, x, 1};
  sums.gap = y == 0 ? x - y : 0.0f;
  if (x != x) sums.z_s = x;
  if (y != y) sums.z_t = y;
  if (!distill) sums.z_s = sums.z_t = sums.gap = 0;
  return sums;
}

KDK_DEVICE Sums statistics(const RowTask& task, const Row& row, bool distill, bool hard,
                           Exchange& exchange, int& turn) {
  Sums sums;
  if (!hard) {
    sums = add_chunks<true, false, 0>(task, row);
  } else if (!distill) {
    sums = add_chunks<false, true, 0>(task, row);
  } else if (task.power == 1) {
    sums = add_chunks<true, true, 1>(task, row);
  } else if (task.power == 2) {
    sums = add_chunks<true, true, 2>(task, row);
  } else if (task.power == 3) {
    sums = add_chunks<true, true, 3>(task, row);
  } else if (task.power == 4) {
    sums = add_chunks<true, true, 4>(task, row);
  } else {
    sums = add_chunks<true, true, 0>(task, row);
  }
  float fields[8] = {sums.max_s, sums.max_t,  sums.z_s,    sums.z_t,
                     sums.gap,   sums.z_rest, sums.offset, sums.count};
  const auto sums_of = [](const float (&from)[8]) {
    return Sums{from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]};
  };
  team_reduce(fields, exchange, turn, [&](float (&into)[8], const float (&other)[8]) {
    Sums merged = sums_of(into);
    merge(task, merged, sums_of(other));
    into[0] = merged.max_s;
    into[1] = merged.max_t;
    into[2] = merged.z_s;
    into[3] = merged.z_t;
    into[4] = merged.gap;
    into[5] = merged.z_rest;
    into[6] = merged.offset;
    into[7] = merged.count;
  });
  sums = sums_of(fields);
  if (hard) merge(task, sums, label_sums(row, distill));
  return sums;
}

// Σ_j e^{s_j − max_s}, the label's column included.
KDK_DEVICE float hard_normaliser(const Row& row, const Sums& sums) {
  const TwoFloats x = two_diff(row.s_label, anchor(sums.max_s));
  return sums.z_rest + exp_of<true>(x.hi, x.lo, kUnitRate);
}

KDK_DEVICE float cross_entropy(const RowTask& task, const Row& row, const Sums& sums) {
  // Neither form subtracts what cancels: at the maximum the loss is the log of 1 + the rest,
  // elsewhere both summands are positive.
  const float x_label = row.s_label - anchor(sums.max_s);
  const float log_z = log_of(hard_normaliser(row, sums));
  const float nll = x_label == 0 ? log1p_of(sums.z_rest) : log_z - x_label;
  const float smoothing = task.label_smoothing;
  if (smoothing == 0) return nll;
  const float uniform = log_z - sums.offset / static_cast<float>(task.columns);
  return (smoothing < 1 ? (1 - smoothing) * nll : 0.0f) + smoothing * uniform;
}

// ---- Sweeps 2 and 3 ---------------------------------------------------------------------------

template <int kFields>
KDK_DEVICE void team_sum(float (&values)[kFields], Exchange& exchange, int& turn) {
  team_reduce(values, exchange, turn, [](float (&into)[kFields], const float (&other)[kFields]) {
    KDK_UNROLL
    for (int i = 0; i < kFields; ++i) into[i] += other[i];
  });
}

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
KDK_DEVICE float normaliser_difference(const RowTask& task, const Row& row, const Sums& sums,
                                       Exchange& exchange, int& turn) {
  RowFrame frame = make_frame(task, sums, {0, 0});
  frame.inv_z_s = frame.inv_z_t = 1;
  float total[1] = {0};
  for_each_logits<true>(row, [&](auto, int, const auto& s, const auto& t) {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const float e_s = exp_of(s[i] - frame.max_s, frame.rate);
      const float e_t = exp_of(t[i] - frame.max_t, frame.rate);
      total[0] += element(s[i], t[i], e_s, e_t, frame).difference;
    }
  });
  team_sum(total, exchange, turn);
  return total[0];
}

// D, Σ q and Σ q φ, for the divergences whose gradient needs the latter.
struct Slope {
  float value;
  TwoFloats mean;  // Σ q φ / Σ q, of q and φ as they were rounded
};

template <Divergence kDivergence>
KDK_DEVICE Slope mean_slope(const RowTask& task, const Row& row, const RowFrame& frame,
                            Exchange& exchange, int& turn) {
  float value = 0;
  TwoFloats mass{0, 0}, slope{0, 0};
  for_each_logits<true>(row, [&](auto, int, const auto& s, const auto& t) {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const Visit at = visit<kDivergence, true, false, 0, Care::kNear>(
          s[i], t[i], frame, GradientFrame{}, task.w_p, task.w_q);
      value += at.term;
      mass = add(mass, {at.q, 0});
      slope = add(slope, two_product(at.q, at.slope));
    }
  });
  float fields[5] = {value, mass.hi, mass.lo, slope.hi, slope.lo};
  team_reduce(fields, exchange, turn, [](float (&into)[5], const float (&other)[5]) {
    into[0] += other[0];
    const TwoFloats sum = add({into[1], into[2]}, {other[1], other[2]});
    const TwoFloats slopes = add({into[3], into[4]}, {other[3], other[4]});
    into[1] = sum.hi;
    into[2] = sum.lo;
    into[3] = slopes.hi;
    into[4] = slopes.lo;
  });
  return {fields[0], divide({fields[3], fields[4]}, {fields[1], fields[2]})};
}

// Where columns go: into shared memory what the bulk store takes, the rest to memory.
KDK_DEVICE void put_chunk(const Row& row, std::int64_t column, int n,
                          const float (&values)[kChunk]) {
  if (column >= row.interior.begin && column + n <= row.interior.end) {
    store_chunk(row.staged, column, n, values);
  } else if (column >= row.interior.end || column + n <= row.interior.begin) {
    store_chunk(row.memory, column, n, values);
  } else {
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const bool inside = column + i >= row.interior.begin && column + i < row.interior.end;
      if (i < n) store_one(inside ? row.staged : row.memory, column + i, values[i]);
    }
  }
}

KDK_DEVICE void fill_row(const Row& row, float value) {
  float values[kChunk];
  KDK_UNROLL
  for (int i = 0; i < kChunk; ++i) values[i] = value;
  for_each_chunk(row, [&](std::int64_t column, int n) { put_chunk(row, column, n, values); });
}

struct Swept {
  float value;  // D of a near forward KL
  float peak;   // the largest entry, where nothing is stored
};

template <Divergence kDivergence, bool kDistill, bool kHard, int kPower, Care kCare>
KDK_DEVICE Swept gradient_chunks(const RowTask& task, const Row& row, const RowFrame& frame,
                                 const GradientFrame& gradient, float label_gradient, bool store) {
  Swept swept{0, 0};
  for_each_logits<kDistill>(row, [&](auto column, int n, const auto& s, const auto& t) {
    float parts[kChunk];
    const std::int64_t label = kHard ? row.label - column : -1;
    float value = 0;
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const Visit at = visit<kDivergence, kDistill, kHard, kPower, kCare>(
          s[i], t[i], frame, gradient, task.w_p, task.w_q);
      value += at.term;
      parts[i] = i == label ? label_gradient : at.part;
      if (!store && i < n) swept.peak = larger(absolute(parts[i]), swept.peak);
    }
    swept.value += value;
    if (store) put_chunk(row, column, n, parts);
  });
  return swept;
}

template <Divergence kDivergence, bool kDistill, Care kCare>
KDK_DEVICE Swept gradient_sweep(const RowTask& task, const Row& row, const Sums& sums,
                                const RowFrame& frame, TwoFloats slope, TwoFloats scale, bool hard,
                                bool store) {
  const TwoFloats distill = multiply(scale, task.grad_distill);
  GradientFrame gradient{};
  gradient.distill = distill.hi;
  gradient.mean_slope = slope;
  if constexpr (kDistill) {
    gradient.student = divide(distill, {sums.z_s, 0}).hi;
    gradient.teacher = divide(distill, {sums.z_t, 0}).hi;
  }
  if (!hard) {
    return gradient_chunks<kDivergence, kDistill, false, 0, kCare>(task, row, frame, gradient, 0,
                                                                   store);
  }
  const TwoFloats weight = multiply(scale, task.grad_hard);
  const float normaliser = hard_normaliser(row, sums);
  gradient.hard = divide(weight, {normaliser, 0}).hi;
  gradient.smoothing = multiply(weight, task.smoothing).hi;
  // The cross-entropy's share at the label is −Σ_{j≠y} q_j and not q_y − 1, which a confident row
  // would lose to rounding.
  float label = weight.hi * ((0 - sums.z_rest / normaliser) + task.smoothed_label);
  if constexpr (kDistill) {
    label += visit<kDivergence, true, false, 0, kCare>(row.s_label, row.t_label, frame, gradient,
                                                       task.w_p, task.w_q)
                 .part;
  }
  if constexpr (kDistill && kDivergence == Divergence::kForwardKL) {
    switch (task.power) {
      case 1:
        return gradient_chunks<kDivergence, kDistill, true, 1, kCare>(task, row, frame, gradient,
                                                                      label, store);
      case 2:
        return gradient_chunks<kDivergence, kDistill, true, 2, kCare>(task, row, frame, gradient,
                                                                      label, store);
      case 3:
        return gradient_chunks<kDivergence, kDistill, true, 3, kCare>(task, row, frame, gradient,
                                                                      label, store);
      case 4:
        return gradient_chunks<kDivergence, kDistill, true, 4, kCare>(task, row, frame, gradient,
                                                                      label, store);
    }
  }
  return gradient_chunks<kDivergence, kDistill, true, 0, kCare>(task, row, frame, gradient, label,
                                                                store);
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

// gradient_sweep, for float16 at the row's own scale.
template <Divergence kDivergence, bool kDistill, Care kCare>
KDK_DEVICE float write_gradient(const RowTask& task, const Row& row, const Sums& sums,
                                const RowFrame& frame, TwoFloats slope, TwoFloats scale, bool hard,
                                Exchange& exchange, int& turn) {
  if (task.grad.dtype == DType::kFloat16) {
    float peak[1] = {gradient_sweep<kDivergence, kDistill, kCare>(task, row, sums, frame, slope,
                                                                  {1, 0}, hard, false)
                         .peak};
    team_reduce(peak, exchange, turn, [](float (&into)[1], const float (&other)[1]) {
      into[0] = larger(into[0], other[0]);
    });
    const float prescale = float16_prescale(absolute(scale.hi) * peak[0]);
    if (thread_rank() == 0 && block_rank() == 0) task.unscale[row.index] = 1 / prescale;
    scale = {scale.hi * prescale, scale.lo * prescale};
  }
  float value[1] = {
      gradient_sweep<kDivergence, kDistill, kCare>(task, row, sums, frame, slope, scale, hard, true)
          .value};
  if constexpr (kDistill && kDivergence == Divergence::kForwardKL && kCare == Care::kNear) {
    team_sum(value, exchange, turn);
  }
  return value[0];
}

// ---- The terms of a row -----------------------------------------------------------------------

struct Pass {
  bool distill, hard;  // the terms to compute
  bool gradient;
  TwoFloats scale;  // of the gradient
};

struct RowLoss {
  float distill, hard;
};

template <Divergence kDivergence>
KDK_DEVICE float divergence(const RowTask& task, const Row& row, const Sums& sums, const Pass& pass,
                            Exchange& exchange, int& turn) {
  TwoFloats log = log_ratio(sums.z_s, sums.z_t);
  // Infinite or NaN where the student rules a class out that the teacher does not.
  const float kl = (log.hi - sums.gap / (task.temperature.hi * sums.z_t)) + log.lo;
  if (kl < static_cast<float>(kNearKL)) {
    log = {log1p_of(normaliser_difference(task, row, sums, exchange, turn) / sums.z_t), 0};
  }
  const RowFrame frame = make_frame(task, sums, log);
  if constexpr (kDivergence == Divergence::kForwardKL) {
    const bool far = kl >= static_cast<float>(kFarKL) * (1 + absolute(log.hi)) && kl < kInfinity;
    if (far && (!pass.gradient || task.student.dtype != DType::kFloat16)) {
      if (pass.gradient) {
        write_gradient<kDivergence, true, Care::kFar>(task, row, sums, frame, {0, 0}, pass.scale,
                                                      pass.hard, exchange, turn);
      }
      return kl;
    }
    if (pass.gradient) {
      // float16 shows more of a gradient's bits than float32's far form has.
      const float near = write_gradient<kDivergence, true, Care::kNear>(
          task, row, sums, frame, {0, 0}, pass.scale, pass.hard, exchange, turn);
      return far ? kl : near;
    }
    float value[1] = {gradient_chunks<kDivergence, true, false, 0, Care::kNear>(
                          task, row, frame, GradientFrame{}, 0, false)
                          .value};
    team_sum(value, exchange, turn);
    return value[0];
  } else {
    const Slope slope = mean_slope<kDivergence>(task, row, frame, exchange, turn);
    if (!pass.gradient) return slope.value;
    if (!(absolute(slope.value) < kInfinity)) {
      fill_row(row, kNaN);  // the reverse KL where the teacher rules a class out
    } else {
      write_gradient<kDivergence, true, Care::kNear>(task, row, sums, frame, slope.mean, pass.scale,
                                                     pass.hard, exchange, turn);
    }
    return slope.value;
  }
}

// `loaded()` is called once every thread has read the row, so that the next one may be fetched.
template <Divergence kDivergence, typename Loaded>
KDK_DEVICE RowLoss evaluate(const RowTask& task, const Row& row, const Pass& pass,
                            Exchange& exchange, int& turn, const Loaded& loaded) {
  const Sums sums = statistics(task, row, pass.distill, pass.hard, exchange, turn);
  loaded();
  // A NaN or +inf among the logits, or nothing but −inf, leaves no positive sum.
  const bool distill_ok = !pass.distill || (sums.z_s > 0 && sums.z_t > 0);
  const bool hard_ok = !pass.hard || hard_normaliser(row, sums) > 0;
  RowLoss loss{0, 0};
  if (pass.hard) loss.hard = hard_ok ? cross_entropy(task, row, sums) : kNaN;
  if (!distill_ok) loss.distill = kNaN;
  if (!distill_ok || !hard_ok) {
    if (pass.gradient) fill_row(row, kNaN);
  } else if (pass.distill) {
    loss.distill = divergence<kDivergence>(task, row, sums, pass, exchange, turn);
  } else if (pass.gradient) {
    write_gradient<Divergence::kForwardKL, false, Care::kFar>(
        task, row, sums, make_frame(task, sums, {0, 0}), {0, 0}, pass.scale, true, exchange, turn);
  }
  return loss;
}

}  // namespace gpu
}  // namespace kdk
