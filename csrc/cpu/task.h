// What is to be computed of a row, whatever its teacher comes as.
#pragma once

#include <cmath>

#include "common/args.h"
#include "cpu/tiles.h"

namespace kdk {
namespace KDK_ISA {
namespace {

// What a teacher that is no Side knows of the row.
struct KeptRow {
  std::int64_t count;  // 0: it is a Side
  const std::int64_t* ids;
  const double* log_p;
  double log_rest;
};

// A row's share of the work: which terms of which logits.
struct Task {
  Side student, teacher;
  KeptRow kept;
  std::int64_t columns;  // V, or what a shard has of them
  std::int64_t classes;  // V, that labels are smoothed over
  std::int64_t label;    // a column, or negative: there is none here
  bool distill, hard;    // the terms to compute; neither side is read for a term that is not
  Divergence divergence;
  Mixture mixture;
  float w_p, w_q;  // the same, see contribution()
  double temperature;
  double label_smoothing;
  TwoFloats rate;  // log2(e) / T
  float lowest;    // below this difference from a maximum an exponential underflows
  int power;       // T where that is 1, 2, 3 or 4, else 0
};

// Where the gradient goes, and what it is multiplied by.
struct GradientTask {
  void* row;  // null: nowhere, it is only measured
  DType dtype;
  double distill, hard;  // weights of the two parts
  double scale;          // of their sum
  float* unscale;        // where a float16 row leaves 1 / its prescale

  double weight() const { return std::fabs(scale) * std::max(std::fabs(distill), std::fabs(hard)); }
};

struct RowLoss {
  double distill = 0, hard = 0;
};

// Divided by the number of tokens and spread over the vocabulary, most of a float16 gradient would
// be below the smallest float16 before the loss scale of mixed-precision training arrives in the
// backward pass. So a row is kept at a power of 2, which is exact: the largest that leaves its
// largest entry, `peak`, what float16 holds. `weight` is the larger of the two terms': of a shard
// far below the row's maximum the peak is so small that the weight would not be a float.
double float16_prescale(double peak, double weight) {
  if (!(peak > 0) || !std::isfinite(peak)) return 1;
  peak = std::max(peak, weight * 0x1p-90);
  constexpr double kRoom = 65408;  // 65504, less what the peak may be off
  // Within what a float holds of it and of its reciprocal.
  return std::ldexp(1, std::clamp(std::ilogb(kRoom / peak), -120, 120));
}

}  // namespace
}  // namespace KDK_ISA
}  // namespace kdk
