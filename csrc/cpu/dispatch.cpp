// Picks the copy of the kernels that this processor runs best.
#include "cpu/cpu.h"

namespace kdk {
namespace {

struct Level {
  const char* name;
  void (*distill_rows)(const DistillArgs&, int);
  void (*scale_rows)(const ScaleArgs&, int);
  void (*shard_rows)(Phase, const ShardArgs&, int);
};

#define KDK_LEVEL(level) \
  Level { #level, level::distill_rows, level::scale_rows, level::shard_rows }

Level choose() {
#ifdef KDK_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return KDK_LEVEL(x86_64_v4);
  if (__builtin_cpu_supports("x86-64-v3")) return KDK_LEVEL(x86_64_v3);
  return KDK_LEVEL(x86_64_v1);
#else
  return KDK_LEVEL(baseline);
#endif
}

const Level& level() {
  static const Level chosen = choose();
  return chosen;
}

}  // namespace

std::int64_t find_bad_label(const DistillArgs& args) {
  if (args.labels == nullptr) return -1;
  for (std::int64_t row = 0; row < args.batch * args.length; ++row) {
    const std::int64_t label = args.labels[row];
    if (label == args.objective.ignore_index) continue;
    if (label < 0 || label >= args.objective.vocab_size) return row;
  }
  return -1;
}

void distill_rows(const DistillArgs& args, int threads) { level().distill_rows(args, threads); }

void scale_rows(const ScaleArgs& args, int threads) { level().scale_rows(args, threads); }

void shard_rows(Phase phase, const ShardArgs& args, int threads) {
  level().shard_rows(phase, args, threads);
}

const char* isa_level() { return level().name; }

}  // namespace kdk
