// A row whose teacher knows some classes only, over the blocks of a team: see cpu/kept.h, of which
// this is the twin. The classes that are computed one by one, in double, are shared out by where
// they lie: a block has those of its slice. A bit for each column says which the sweeps leave out.
#pragma once

#include "common/kept.h"
#include "cuda/row.h"

namespace kdk {
namespace gpu {

// What every thread knows of the row once it has been read. It lies in shared memory, because its
// doubles would be half of a thread's registers, and one thread of a block computes it, because
// most GPUs have few units for doubles.
struct KeptRow {
  double highest;
  KeptSums sums;
  KeptFrame frame;
  KeptHard hard;
  double mean, rest;           // Σ q φ; what the rest as a whole has of D's gradient
  double of_distill, of_hard;  // what the highest of the others has of either gradient
  float distill_loss, hard_loss;
  bool exact;  // no other z is needed
};
static_assert(sizeof(KeptRow) <= kKeptRowBytes && alignof(KeptRow) <= 16, "see plan.h");

KDK_DEVICE KeptRow& kept_row(const RowTask& task) {
  char* end = shared_memory() + task.plan.shared_bytes;
  return *reinterpret_cast<KeptRow*>(end - kKeptRowBytes);
}

// A byte for each chunk.
KDK_DEVICE unsigned char* left_out(const RowTask& task) {
  return reinterpret_cast<unsigned char*>(shared_memory()) + task.plan.shared_bytes -
         task.plan.kept_bytes;
}

// The first of `count` ascending ids that is no less than `column`.
KDK_DEVICE int first_from(const std::int64_t* ids, int count, std::int64_t column) {
  int begin = 0, end = count;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (ids[middle] < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The classes of a row that the sweeps of this block leave out.
struct Singles {
  const std::int64_t* ids;
  const double* log_p;
  double log_rest;
  int begin, end;     // the row's kept classes in this slice
  std::int64_t from;  // its first column
  bool apart;         // the label is in it, and is not kept
  int label;          // its column here

  KDK_DEVICE_METHOD int column(int i) const {
    return i < end ? static_cast<int>(ids[i] - from) : label;
  }
};

KDK_DEVICE Singles singles_of(const RowTask& task, const Row& row) {
  const int count = static_cast<int>(task.kept.count);
  Singles singles{};
  singles.ids = task.kept.ids + row.index * count;
  singles.log_p = task.kept.log_p + row.index * count;
  singles.log_rest = task.kept.log_rest[row.index];
  singles.from = row.first;
  singles.begin = first_from(singles.ids, count, row.first);
  singles.end = first_from(singles.ids, count, row.first + row.columns);
  singles.label = row.label;
  if (task.hard && row.label >= 0) {
    const std::int64_t label = row.first + row.label;
    const int place = first_from(singles.ids, count, label);
    singles.apart = place == count || singles.ids[place] != label;
  }
  return singles;
}

// body(i) for each of the thread's singles; i is `end` for a label that is not kept.
template <typename Body>
KDK_DEVICE void for_each_single(const Singles& singles, const Body& body) {
  const int end = singles.end + (singles.apart ? 1 : 0);
  KDK_ROLLED
  for (int i = singles.begin + thread_rank(); i < end; i += block_threads()) body(i);
}

KDK_DEVICE void mark_singles(const RowTask& task, const Row& row, const Singles& singles) {
  unsigned char* bits = left_out(task);
  for (int i = thread_rank(); i < (row.columns + kChunk - 1) / kChunk; i += block_threads()) {
    bits[i] = 0;
  }
  sync_block();
  // Neighbours share a byte: the first of them writes it.
  for_each_single(singles, [&](int i) {
    const int chunk = singles.column(i) / kChunk;
    if (i == singles.end) return;
    if (i > singles.begin && singles.column(i - 1) / kChunk == chunk) return;
    unsigned byte = 0;
    for (int j = i; j < singles.end && singles.column(j) / kChunk == chunk; ++j) {
      byte |= 1u << singles.column(j) % kChunk;
    }
    bits[chunk] = static_cast<unsigned char>(byte);
  });
  sync_block();
  if (singles.apart && thread_rank() == 0) {
    bits[singles.label / kChunk] |= static_cast<unsigned char>(1u << singles.label % kChunk);
  }
  sync_block();
}

// ---- Sweep 1 ----------------------------------------------------------------------------------

// Sums over the classes that are no singles.
struct Others {
  float max, z, z_hard;  // Σ e^{(s − max)/T}, Σ e^{s − max}
};

KDK_DEVICE bool two_exponentials(const RowTask& task) { return task.hard && task.power != 1; }

KDK_DEVICE void raise_others(const RowTask& task, float max, Others& others) {
  const TwoFloats d = drop(others.max, max);
  others.z *= exp_of<true>(d.hi, d.lo, task.rate);
  others.z_hard *= exp_of<true>(d.hi, d.lo, kUnitRate);
  others.max = larger(others.max, max);
}

template <typename K>
KDK_DEVICE Others sum_others(const RowTask& task, const Row& row, Team& team) {
  Others others{-kInfinity, 0, 0};
  const bool two = two_exponentials(task);
  for_each_chunk(row.columns, [&](int column, int n) {
    float s[kChunk];
    load_side<K>(row.student, *row.student_cap, column, n, s);
    const unsigned bits = left_out(task)[column / kChunk];
    float max = others.max;
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (bits >> i & 1) s[i] = -kInfinity;
      max = larger(s[i], max);
    }
    if (max > others.max) raise_others(task, max, others);
    max = anchor(max);
    float e[kChunk];
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const TwoFloats x = two_diff(s[i], max);
      e[i] = exp_of<true>(x.hi, x.lo, task.rate);
    }
    const float z = sum_of_chunk(e);
    others.z += z;
    if (two) {
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        const TwoFloats x = two_diff(s[i], max);
        e[i] = exp_of<true>(x.hi, x.lo, kUnitRate);
      }
      others.z_hard += sum_of_chunk(e);
    } else {
      others.z_hard += z;
    }
  });
  float fields[3] = {others.max, others.z, others.z_hard};
  team_reduce(fields, team, [&](float (&mine)[3], int lanes) {
    float highest[1] = {mine[0]};
    reduce_lanes(highest, lanes, [](float (&into)[1], const float (&other)[1]) {
      into[0] = larger(other[0], into[0]);
    });
    Others raised{mine[0], mine[1], mine[2]};
    raise_others(task, highest[0], raised);
    float sums[2] = {raised.z, raised.z_hard};
    reduce_lanes(sums, lanes, [](float (&into)[2], const float (&other)[2]) {
      into[0] += other[0];
      into[1] += other[1];
    });
    mine[0] = raised.max;
    mine[1] = sums[0];
    mine[2] = sums[1];
  });
  return {fields[0], fields[1], fields[2]};
}

// ---- The classes one by one -------------------------------------------------------------------

KDK_DEVICE float logit_of(const Row& row, const Side& from, int column) {
  return capped(load_one(from, column), *row.student_cap);
}

// Sums of two doubles over the team.
KDK_DEVICE void team_sum(double (&values)[2], Team& team) {
  const TwoFloats first = split(values[0]), second = split(values[1]);
  float fields[4] = {first.hi, first.lo, second.hi, second.lo};
  team_sum_pairs<2>(fields, team);
  values[0] = static_cast<double>(fields[0]) + fields[1];
  values[1] = static_cast<double>(fields[2]) + fields[3];
}

KDK_DEVICE KeptShare share_of_kept(const RowTask& task, double log_p, double log_q) {
  return kept_share(task.divergence, {log_p, log_q}, task.mixture.teacher, task.mixture.student);
}

KDK_DEVICE float cross_entropy(const RowTask& task, const KeptRow& kept, float offset) {
  const double loss = label_loss(kept.hard, kept.sums.label);
  const float smoothing = task.label_smoothing;
  if (smoothing == 0) return static_cast<float>(loss);
  const double uniform = log_of(kept.hard.all) - offset / static_cast<double>(task.columns);
  return static_cast<float>((smoothing < 1 ? (1 - smoothing) * loss : 0) + smoothing * uniform);
}

// This thread's share of Others::z again, in double.
template <typename K>
KDK_DEVICE double exact_z(const RowTask& task, const Row& row, float max) {
  const double temperature = static_cast<double>(task.temperature.hi) + task.temperature.lo;
  double z = 0;
  for_each_chunk(row.columns, [&](int column, int n) {
    float s[kChunk];
    load_side<K>(row.student, *row.student_cap, column, n, s);
    const unsigned bits = left_out(task)[column / kChunk];
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (!(bits >> i & 1)) z += exp((static_cast<double>(s[i]) - max) / temperature);
    }
  });
  return z;
}

// What the singles add to the sums.
struct SingleSums {
  double highest;    // of all classes
  double z, z_hard;  // KeptSums::kept_z, kept_z_hard
  bool apart;        // the label is not kept, in any block
  float offset;      // Σ (s − highest) of all classes, where labels are smoothed
};

template <typename K>
KDK_DEVICE SingleSums sum_singles(const RowTask& task, const Row& row, const Singles& singles,
                                  float max, Team& team) {
  for_each_single(singles,
                  [&](int i) { max = larger(logit_of(row, row.student, singles.column(i)), max); });
  max = team_max(max, team);
  const double from = anchor(max);
  const double temperature = static_cast<double>(task.temperature.hi) + task.temperature.lo;
  // z_s, z_t of the singles: all that are kept at T; those that are not the label at T = 1.
  double sums[2] = {0, 0};
  for_each_single(singles, [&](int i) {
    if (i == singles.end) return;
    const double s = logit_of(row, row.student, singles.column(i)) - from;
    sums[0] += exp(s / temperature);
    if (task.hard && singles.column(i) != singles.label) sums[1] += exp(s);
  });
  team_sum(sums, team);
  float apart[1] = {singles.apart && thread_rank() == 0 ? 1.0f : 0.0f};
  team_sum(apart, team);
  float offset = 0;
  if (task.hard && task.label_smoothing != 0) {
    Sums dense{};
    dense.max_s = static_cast<float>(from);
    offset = sum_of_offsets<K>(row, dense, team);
  }
  return {max, sums[0], sums[1], apart[0] != 0.0f, offset};
}

template <typename K>
KDK_DEVICE void look_at_singles(const RowTask& task, const Row& row, const Singles& singles,
                                const Others& others, KeptRow& kept, Team& team) {
  const SingleSums of = sum_singles<K>(task, row, singles, others.max, team);
  const double temperature = static_cast<double>(task.temperature.hi) + task.temperature.lo;
  if (thread_rank() == 0) {
    kept.highest = of.highest;
    kept.sums = {
        others.max - of.highest, others.z, others.z_hard, of.z, of.z_hard, task.hard, of.apart,
        row.s_label - of.highest};
    kept.frame = kept_frame(kept.sums, temperature);
    kept.exact = false;
    kept.hard_loss = 0;
    if (task.hard) {
      kept.hard = kept_hard(kept.sums);
      kept.hard_loss = cross_entropy(task, kept, of.offset);
      kept.of_hard = share_of(kept.hard.all, kept.sums.others);
    }
  }
  double sums[2];
  // Twice where D is so small that z has to be exact.
  KDK_ROLLED
  for (bool again = true; again;) {
    sync_block();
    sums[0] = sums[1] = 0;
    for_each_single(singles, [&](int i) {
      if (i == singles.end) return;
      const double s = logit_of(row, row.student, singles.column(i)) - kept.highest;
      const KeptShare of =
          share_of_kept(task, singles.log_p[i], s * kept.frame.rate - kept.frame.log_z);
      sums[0] += of.term;
      sums[1] += of.push;
    });
    team_sum(sums, team);
    if (thread_rank() == 0) {
      const KeptShare of_rest = share_of_kept(task, singles.log_rest, kept.frame.log_q_rest);
      const double distill = sums[0] + of_rest.term;
      kept.distill_loss = static_cast<float>(distill);
      kept.mean = sums[1] + of_rest.push;
      kept.rest = rest_part(kept.frame, of_rest, kept.mean);
      kept.of_distill = kept.rest * share_of(kept.frame.rest, kept.sums.others * kept.frame.rate);
      kept.exact = kept.exact || !needs_exact_rest(distill, kept.rest);
    }
    sync_block();
    again = !kept.exact;
    if (again) {
      sums[0] = exact_z<K>(task, row, anchor(others.max));
      sums[1] = 0;
      team_sum(sums, team);
      if (thread_rank() == 0) {
        kept.sums.z = sums[0];
        kept.frame = kept_frame(kept.sums, temperature);
        kept.exact = true;
      }
    }
  }
}

// ∂(row loss)/∂s of a single with logit s.
KDK_DEVICE double single_part(const RowTask& task, const Singles& singles, const KeptRow& kept,
                              int i, float logit, const TwoFloats& distill, const TwoFloats& hard) {
  const double s = logit - kept.highest;
  double part;
  if (i < singles.end) {
    const double log_q = s * kept.frame.rate - kept.frame.log_z;
    part = kept_part(kept.frame, share_of_kept(task, singles.log_p[i], log_q), kept.mean, s);
  } else {
    part = kept.rest * share_of(kept.frame.rest, s * kept.frame.rate);
  }
  part *= static_cast<double>(distill.hi) + distill.lo;
  if (task.hard) {
    const bool is_label = singles.column(i) == singles.label;
    const double smoothing = static_cast<double>(task.smoothing.hi) + task.smoothing.lo;
    const double of_hard = hard_part(kept.hard, s, is_label) +
                           (is_label ? static_cast<double>(task.smoothed_label) : -smoothing);
    part += (static_cast<double>(hard.hi) + hard.lo) * of_hard;
  }
  return part;
}

// ---- Sweep 2 ----------------------------------------------------------------------------------

// The gradient, or without `store` only its largest |entry|. Singles keep what the student has
// there, for write_singles.
template <typename K>
KDK_DEVICE float write_others(const RowTask& task, const Row& row, const Others& others,
                              const KeptRow& kept, TwoFloats distill, TwoFloats hard, bool store) {
  const double of_distill = (static_cast<double>(distill.hi) + distill.lo) * kept.of_distill;
  double of_hard = 0;
  float smoothing = 0;
  if (task.hard) {
    of_hard = (static_cast<double>(hard.hi) + hard.lo) * kept.of_hard;
    smoothing = multiply(hard, task.smoothing).hi;
  }
  const bool two = two_exponentials(task);
  const auto student = static_cast<float>(two ? of_distill : of_distill + of_hard);
  const auto second = static_cast<float>(of_hard);
  const float max = anchor(others.max);
  float peak = 0;
  for_each_chunk(row.columns, [&](int column, int n) {
    float s[kChunk], parts[kChunk];
    load_side<K>(row.student, *row.student_cap, column, n, s);
    KDK_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      parts[i] = student * exp_of<kForGPU>(s[i] - max, 0.0f, task.rate) - smoothing;
    }
    if (two) {
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        parts[i] += second * exp_of<kForGPU>(s[i] - max, 0.0f, kUnitRate);
      }
    }
    const unsigned bits = left_out(task)[column / kChunk];
    if (bits != 0 || (!K::kWhole && changes(*row.student_cap))) {
      float x[kChunk];
      load_chunk<K::kWhole>(row.student, column, n, x);
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        if (!K::kWhole) parts[i] *= cap_slope(x[i], *row.student_cap);
        if (bits >> i & 1) parts[i] = store ? x[i] : 0.0f;
      }
    }
    if (store) {
      store_chunk<K::kWhole>(row.grad, column, n, parts);
    } else {
      KDK_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        if (i < n) peak = larger(absolute(parts[i]), peak);
      }
    }
  });
  return peak;
}

// body(column, part) for the thread's singles, whose raw logits are in `from`.
template <typename Body>
KDK_DEVICE void for_each_part(const RowTask& task, const Row& row, const Singles& singles,
                              const KeptRow& kept, const Side& from, TwoFloats distill,
                              TwoFloats hard, const Body& body) {
  for_each_single(singles, [&](int i) {
    const int column = singles.column(i);
    const float x = load_one(from, column);
    const double part =
        single_part(task, singles, kept, i, capped(x, *row.student_cap), distill, hard);
    body(column, static_cast<float>(part) * cap_slope(x, *row.student_cap));
  });
}

template <typename K>
KDK_DEVICE void write_kept_gradient(const RowTask& task, const Row& row, const Singles& singles,
                                    const Others& others, const KeptRow& kept, const Pass& pass,
                                    Team& team) {
  TwoFloats scale = pass.scale;
  if (task.grad.dtype == DType::kFloat16) {
    float peak = write_others<K>(task, row, others, kept, task.grad_distill, task.grad_hard, false);
    for_each_part(task, row, singles, kept, row.student, task.grad_distill, task.grad_hard,
                  [&](int, float part) { peak = larger(absolute(part), peak); });
    const float prescale = float16_prescale(task, scale.hi, team_max(peak, team));
    if (leads(team)) task.unscale[row.index] = 1 / prescale;
    scale = {scale.hi * prescale, scale.lo * prescale};
  }
  const TwoFloats distill = multiply(scale, task.grad_distill);
  const TwoFloats hard = multiply(scale, task.grad_hard);
  sync_block();  // the singles have been read
  write_others<K>(task, row, others, kept, distill, hard, true);
  sync_block();
  for_each_part(task, row, singles, kept, row.grad, distill, hard,
                [&](int column, float part) { store_one(row.grad, column, part); });
}

template <typename K, typename Loaded>
KDK_DEVICE RowLoss evaluate_kept(const RowTask& task, const Row& row, const Pass& pass, Team& team,
                                 const Loaded& loaded) {
  const Singles singles = singles_of(task, row);
  mark_singles(task, row, singles);
  const Others others = sum_others<K>(task, row, team);
  loaded();
  KeptRow& kept = kept_row(task);
  look_at_singles<K>(task, row, singles, others, kept, team);
  const RowLoss loss{kept.distill_loss, kept.hard_loss};
  if (!pass.gradient) return loss;
  const bool infinite = !(absolute(loss.distill) < kInfinity);
  const bool wrong =
      task.divergence == Divergence::kForwardKL ? loss.distill != loss.distill : infinite;
  if (wrong || loss.hard != loss.hard) {
    fill_row<K>(row, kNaN);
  } else {
    write_kept_gradient<K>(task, row, singles, others, kept, pass, team);
  }
  return loss;
}

}  // namespace gpu
}  // namespace kdk
