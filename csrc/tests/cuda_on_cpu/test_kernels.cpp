// The kernels of csrc/cuda on imaginary devices, their threads in several orders.
#include <initializer_list>

#include "tests/cuda_on_cpu/operators.h"
#include "tests/rows.h"

namespace {

using kdk::DistillArgs;
using kdk::Divergence;
using kdk::DType;
using kdk::ScaleArgs;
using kdk::gpu::Limits;

constexpr std::uint64_t kSeeds = 5;  // see set_schedule

// By shared memory and clusters: two rows or one in a cluster, none, teams that meet in memory.
constexpr Limits kDevices[] = {
    {8192, 4, 8, 65536}, {3072, 4, 4, 65536}, {1024, 2, 4, 65536}, {65536, 0, 8, 4096}};

}  // namespace

int main() {
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (const Limits& device : kDevices) {
    for (DType student : dtypes) {
      for (DType teacher : dtypes) {
        // One block, several, and some that have no columns; aligned and not.
        for (std::int64_t columns : {2, 33, 256, 777}) {
          for (Divergence divergence : {Divergence::kForwardKL, Divergence::kReverseKL}) {
            const bool in_place = columns % 2 == 1;
            const double temperature = columns == 256 ? 2.0 : 1.5;
            std::vector<std::uint32_t> first;
            for (std::uint64_t seed = 0; seed < (student == teacher ? kSeeds : 1); ++seed) {
              const kdk::test::Operators operators = {
                  [&](const DistillArgs& args) {
                    CHECK(kdk::gpu::distill_rows_on_cpu(args, device, seed) == -1);
                  },
                  [&](const ScaleArgs& args) { kdk::gpu::scale_rows_on_cpu(args); }};
              const auto bits = kdk::test::test_operators(
                  operators, {student, teacher, columns, divergence, temperature, in_place});
              if (seed == 0) first = bits;
              CHECK(bits == first);
            }
          }
        }
      }
    }
  }
  return kdk::test::checks_failed();
}
