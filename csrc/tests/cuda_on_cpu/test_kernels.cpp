// The kernels of csrc/cuda on imaginary devices, their threads in several orders.
#include <initializer_list>

#include "tests/cuda_on_cpu/operators.h"
#include "tests/kept_rows.h"
#include "tests/rows.h"

namespace {

using kdk::DistillArgs;
using kdk::Divergence;
using kdk::DType;
using kdk::ScaleArgs;
using kdk::gpu::Limits;

constexpr std::uint64_t kSeeds = 5;  // see set_schedule

// By shared memory and clusters: two rows or one in a cluster, none, teams that meet in memory.
constexpr Limits kDevices[] = {{8192, 4096, 4, 8, 65536},
                               {3072, 0, 4, 4, 65536},
                               {1024, 0, 2, 4, 65536},
                               {65536, 32768, 0, 8, 4096}};
constexpr Limits kOneRowInOneBlock = {3072, 0, 1, 1, 65536};

kdk::test::Operators operators_on(const Limits& device, std::uint64_t seed) {
  return {[=](const DistillArgs& args) {
            CHECK(kdk::gpu::distill_rows_on_cpu(args, device, seed) == -1);
          },
          [](const ScaleArgs& args) { kdk::gpu::scale_rows_on_cpu(args); }};
}

}  // namespace

int main() {
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (const Limits& device : kDevices) {
    for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
      kdk::test::test_kept_operator(operators_on(device, seed).distill, {33, 300});
    }
    for (DType student : dtypes) {
      for (DType teacher : dtypes) {
        // One block, several, and some that have no columns; aligned and not.
        for (std::int64_t columns : {2, 33, 256, 777}) {
          for (Divergence divergence : {Divergence::kForwardKL, Divergence::kReverseKL}) {
            const bool in_place = columns % 2 == 1;
            const double temperature = columns == 256 ? 2.0 : 1.5;
            std::vector<std::uint32_t> first;
            for (std::uint64_t seed = 0; seed < (student == teacher ? kSeeds : 1); ++seed) {
              const auto bits = kdk::test::test_operators(
                  operators_on(device, seed),
                  {student, teacher, columns, divergence, temperature, in_place});
              if (seed == 0) first = bits;
              CHECK(bits == first);
            }
          }
        }
      }
    }
  }
  // Where the gradient lies elsewhere within 16 bytes all warps store it by hand, and the first one
  // must not fetch the next row's edges meanwhile. Few orders of the threads show that it does.
  for (std::uint64_t seed = 0; seed < 12 * kSeeds; ++seed) {
    kdk::test::test_operators(
        operators_on(kOneRowInOneBlock, seed),
        {DType::kBFloat16, DType::kBFloat16, 490, Divergence::kForwardKL, 1.5, false, 1});
  }
  return kdk::test::checks_failed();
}
