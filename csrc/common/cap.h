// Logits that come as a projection x: z = c tanh(scale · x / c), or scale · x without a cap, and
// dz/dx (kdkernels/sources.py: LinearHead).
#pragma once

#include "common/math.h"

namespace kdk {

struct Cap {
  float scale = 1;
  float cap = 0;   // c; 0: none
  float rate = 0;  // scale / c
};

KDK_FN bool changes(Cap cap) { return cap.scale != 1 || cap.cap != 0; }

KDK_FN Cap make_cap(double scale, double cap) {
  return {static_cast<float>(scale), static_cast<float>(cap),
          cap != 0 ? static_cast<float>(scale / cap) : 0.0f};
}

// tanh(u) and 1 − tanh²(u), neither a difference of what cancels.
struct Tanh {
  float value, slope;
};

KDK_FN Tanh tanh_of(float u) {
  const float size = absolute(u);
  const float e = exp_of(-2 * size, kUnitRate);
  const float inverse = reciprocal(1 + e);
  const float u2 = u * u;
  // For |u| < ¼ the series, to u^9: 1e-8 of it is missing.
  float y = 2.1869488e-2f;
  y = y * u2 - 5.3968254e-2f;
  y = y * u2 + 1.3333334e-1f;
  y = y * u2 - 3.3333334e-1f;
  const float near = size + size * u2 * y;
  const float value = size < 0.25f ? near : (1 - e) * inverse;
  return {from_bits(to_bits(value) | (to_bits(u) & 0x80000000u)), 4 * e * inverse * inverse};
}

KDK_FN float capped(float x, Cap cap) {
  return cap.cap == 0 ? x * cap.scale : cap.cap * tanh_of(x * cap.rate).value;
}

// dz/dx.
KDK_FN float cap_slope(float x, Cap cap) {
  return cap.cap == 0 ? cap.scale : cap.scale * tanh_of(x * cap.rate).slope;
}

}  // namespace kdk
