// A row's logits, wherever they lie, and its statistics, reduced over the team: maxima,
// Σ e^{(s − max)/T}, Σ e^{(t − max)/T}, Σ_{j≠y} e^{s − max}, and what a far forward or reverse KL
// follows from. Each thread raises the maxima that its sums are relative to as it goes.
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
  // Every chunk lies in shared memory, aligned and whole: see load_chunk. And what lies there are
  // logits, not projections that cap.h makes logits of.
  static constexpr bool kWhole = kWhole_;
};

// What every thread knows of the row in hand.
struct Row {
  std::int64_t index;
  int columns;            // of this block
  std::int64_t first;     // of these columns, in the row
  int label;              // its column here; of another block: any negative number
  Side student, teacher;  // where to read
  Side grad;              // where to write, may be the student's
  const Cap *student_cap, *teacher_cap;
  float s_label, t_label;
};

// A chunk's logits of one side.
template <typename K>
KDK_DEVICE void load_side(const Side& side, Cap cap, int column, int n, float (&out)[kChunk]) {
  load_chunk<K::kWhole>(side, column, n, out);
  if constexpr (!K::kWhole) {
    if (!changes(cap)) return;
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (i < n) out[i] = capped(out[i], cap);
    }
  }
}

// A chunk's logits; without a teacher t is −inf.
template <typename K>
KDK_DEVICE void load_logits(const Row& row, int column, int n, float (&s)[kChunk],
                            float (&t)[kChunk]) {
  load_side<K>(row.student, *row.student_cap, column, n, s);
  if constexpr (K::kDistill) {
    load_side<K>(row.teacher, *row.teacher_cap, column, n, t);
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

}  // namespace gpu
}  // namespace kdk
