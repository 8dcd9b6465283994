// How rows are shared out, on devices as they are sold.
#include "cuda/plan.h"
#include "tests/check.h"

namespace {

using kdk::DType;
using kdk::gpu::Limits;
using kdk::gpu::Plan;

constexpr Limits kHopper = {231424, 114688, 16, 132, 50 << 20};
constexpr Limits kAmpere = {166912, 82944, 0, 108, 40 << 20};

Plan plan_for(const Limits& device, DType student, DType teacher, std::int64_t columns,
              std::int64_t rows = 8192, int largest_cluster = 16) {
  kdk::DistillArgs args{};
  args.batch = 1;
  args.length = rows;
  args.student.dtype = student;
  args.teacher.dtype = teacher;
  args.objective.vocab_size = columns;
  return make_plan(args, device, [&](const Plan& plan) {
    if (plan.clusters && plan.team_blocks > largest_cluster) return 0;
    return device.multiprocessors / plan.team_blocks;
  });
}

void check_plan(const Plan& plan, std::int64_t columns, const Limits& device) {
  CHECK(plan.slice % kdk::gpu::kChunk == 0);
  CHECK(static_cast<std::int64_t>(plan.slice) * plan.team_blocks >= columns);
  CHECK(plan.shared_bytes <= device.shared_bytes);
  const int warps = plan.threads / 32;
  CHECK(plan.threads % 32 == 0 && (warps & (warps - 1)) == 0);
  CHECK(plan.threads <= kdk::gpu::kMaxThreads);
  CHECK((plan.team_blocks & (plan.team_blocks - 1)) == 0);
  CHECK(plan.teams >= 1 && plan.teams * plan.team_blocks <= device.multiprocessors);
}

void check(const Plan& plan, bool clusters, int blocks, int stages, int threads) {
  CHECK(plan.clusters == clusters);
  CHECK(plan.threads == threads);
  CHECK(plan.team_blocks == blocks);
  CHECK(plan.stages == stages);
}

}  // namespace

int main() {
  const DType half = DType::kBFloat16, single = DType::kFloat32;

  // Two rows in two blocks to a multiprocessor, in one, then one row.
  check(plan_for(kHopper, half, half, 1000), true, 1, 2, 128);
  check(plan_for(kHopper, half, half, 4096), true, 1, 2, 256);
  check(plan_for(kHopper, half, half, 32000), true, 4, 2, 256);
  check(plan_for(kHopper, half, half, 128256), true, 16, 2, 256);
  check(plan_for(kHopper, half, half, 151936), true, 16, 2, 256);
  check(plan_for(kHopper, half, half, 262144), true, 16, 2, 512);
  check(plan_for(kHopper, half, single, 128256), true, 16, 2, 256);
  check(plan_for(kHopper, single, single, 262144), true, 16, 1, 512);
  // A device whose clusters have 8 blocks at most.
  check(plan_for(kHopper, half, half, 128256, 8192, 8), true, 8, 2, 512);
  check(plan_for(kHopper, half, half, 262144, 8192, 8), true, 8, 1, 512);
  check(plan_for(kHopper, half, half, 200000, 8192, 8), true, 8, 2, 512);
  check(plan_for(kHopper, single, single, 262144, 8192, 8), false, 16, 0, 512);
  // Too long for every cluster: memory, as many blocks to a row as the cache needs.
  check(plan_for(kHopper, single, single, 1'000'000), false, 32, 0, 512);
  check(plan_for(kAmpere, half, half, 1000), false, 1, 0, 128);
  check(plan_for(kAmpere, half, half, 32000), false, 1, 0, 512);
  check(plan_for(kAmpere, half, half, 128256), false, 4, 0, 512);
  check(plan_for(kAmpere, single, single, 128256), false, 8, 0, 512);

  for (const Limits& device : {kHopper, kAmpere}) {
    for (DType student : {half, single}) {
      for (DType teacher : {half, single}) {
        for (std::int64_t columns : {1, 7, 8, 9, 1023, 50257, 128256, 262144, 1'100'000}) {
          check_plan(plan_for(device, student, teacher, columns), columns, device);
          // No more teams than rows.
          CHECK(plan_for(device, student, teacher, columns, 3).teams <= 3);
        }
      }
    }
  }
  // Nothing overflows on the way to the largest row there may be.
  const std::int64_t largest = kdk::gpu::kMaxColumns - 1;
  check_plan(plan_for(kHopper, single, single, largest), largest, kHopper);
  return kdk::test::checks_failed();
}
