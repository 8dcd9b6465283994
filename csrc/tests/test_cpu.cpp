// csrc/cpu at every instruction-set level this processor has.
#include <cstdio>
#include <functional>
#include <initializer_list>

#include "cpu/cpu.h"
#include "tests/kept_rows.h"
#include "tests/rows.h"

namespace {

using kdk::DistillArgs;
using kdk::Divergence;
using kdk::DType;
using kdk::ScaleArgs;
using kdk::test::test_kept_operator;
using kdk::test::test_operators;

constexpr int kThreads = 2;

struct Level {
  const char* name;
  bool supported;
  void (*distill_rows)(const DistillArgs&, int);
  void (*scale_rows)(const ScaleArgs&, int);
};

const Level kLevels[] = {
#ifdef KDK_X86_LEVELS
    {"x86_64_v1", true, kdk::x86_64_v1::distill_rows, kdk::x86_64_v1::scale_rows},
    {"x86_64_v3", __builtin_cpu_supports("x86-64-v3") != 0, kdk::x86_64_v3::distill_rows,
     kdk::x86_64_v3::scale_rows},
    {"x86_64_v4", __builtin_cpu_supports("x86-64-v4") != 0, kdk::x86_64_v4::distill_rows,
     kdk::x86_64_v4::scale_rows},
#else
    {"baseline", true, kdk::baseline::distill_rows, kdk::baseline::scale_rows},
#endif
};

}  // namespace

int main() {
  for (const Level& level : kLevels) {
    std::printf("%s: %s\n", level.name, level.supported ? "tested" : "not on this processor");
    if (!level.supported) continue;
    const kdk::test::Operators operators = {
        [&](const DistillArgs& args) {
          CHECK(kdk::find_bad_label(args) == -1);
          level.distill_rows(args, kThreads);
        },
        [&](const ScaleArgs& args) { level.scale_rows(args, kThreads); }};
    // Within a lane block, a whole one, two tiles with a tail.
    test_kept_operator(operators.distill, {3, 64, 600});
    const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    for (DType student : dtypes) {
      for (DType teacher : dtypes) {
        // Below, at and above a lane block (64) and a tile (512), and several tiles with a tail.
        for (std::int64_t columns : {2, 63, 64, 65, 511, 512, 513, 2001}) {
          for (double temperature : {1.0, 2.0, 2.5}) {
            test_operators(operators,
                           {student, teacher, columns, Divergence::kForwardKL, temperature, false});
          }
          test_operators(operators, {student, teacher, columns, Divergence::kForwardKL, 2.0, true});
          test_operators(operators, {student, teacher, columns, Divergence::kReverseKL, 1.0, true});
        }
      }
    }
  }
  return kdk::test::checks_failed();
}
