// The row operators for the CPU. What they compute is stated in kernels.cpp.
#pragma once

#include <cstdint>

#include "common/args.h"

namespace kdk {

// The first row whose label is out of range, or -1.
std::int64_t find_bad_label(const DistillArgs& args);

void distill_rows(const DistillArgs& args, int threads);
void scale_rows(const ScaleArgs& args, int threads);
void shard_rows(Phase phase, const ShardArgs& args, int threads);

// The instruction-set level in use, as in "x86_64_v4".
const char* isa_level();

// One copy per instruction-set level; see CMakeLists.txt.
#define KDK_DECLARE_LEVEL(level)                                    \
  namespace level {                                                 \
  void distill_rows(const DistillArgs& args, int threads);          \
  void scale_rows(const ScaleArgs& args, int threads);              \
  void shard_rows(Phase phase, const ShardArgs& args, int threads); \
  }

#ifdef KDK_X86_LEVELS
KDK_DECLARE_LEVEL(x86_64_v1)
KDK_DECLARE_LEVEL(x86_64_v3)
KDK_DECLARE_LEVEL(x86_64_v4)
#else
KDK_DECLARE_LEVEL(baseline)
#endif
#undef KDK_DECLARE_LEVEL

}  // namespace kdk
