// common/math.h with next to no exponentials, and wrong results on purpose: what a pass takes
// longer than with these, its exponentials take.
//
// The two functions that compute them get other names while math.h is read, and others take their
// place before any header that calls them is. So nothing in csrc knows of this.
#pragma once

#define exp_of exact_exp_of
#define exp2_unit exact_exp2_unit
#include "common/math.h"
#undef exp_of
#undef exp2_unit

namespace kdk {

// 2^x with x rounded to an integer: a multiply-add or addition, and a shift. Between 0.7 and 1.5
// times what it should be, 1 at 0 and 0 at −inf: normalisers stay positive and of their size, so
// that rows take the branches that they take in the product. Garbage below x = -127, where the
// product gives 0: no logit of a benchmark is there.
KDK_FN float power_of_2(float shifted) { return from_bits(to_bits(shifted) << 23); }

KDK_FN float exp2_unit(float x) { return power_of_2(x + kShift); }

// x_lo counts where the product has it count, or the compiler would drop what computes it.
template <bool kLow, bool kUnderflow = true>
KDK_FN float exp_of(float x, float x_lo, TwoFloats rate) {
  return power_of_2(x * rate.hi + (kLow ? x_lo + kShift : kShift));
}

KDK_FN float exp_of(float x, TwoFloats rate) { return exp_of<false>(x, 0.0f, rate); }

}  // namespace kdk
