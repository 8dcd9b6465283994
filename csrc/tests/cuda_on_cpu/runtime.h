// Runs a CUDA kernel on the CPU, every CUDA thread a fiber, in an order that a seed decides. It is
// made to show bugs, not to be fast: shared memory starts as NaNs, bulk copies happen as late as
// they may, and misuse of a primitive ends the launch with a message instead of a hang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace kdk::gpu {

struct Launch {
  int clusters;
  int cluster_blocks;
  int threads;
  std::size_t shared_bytes;
};

// The clusters run one after the other, the blocks of a cluster side by side. Throws
// std::runtime_error on misuse, and whatever the kernel itself throws.
void launch(const Launch& shape, const std::function<void()>& kernel);

// For the launches of the calling system thread from now on. 0, the default: threads run in the
// order of their ranks. Otherwise: a pseudo-random order, the same for every launch with that seed.
// The seed also decides how eagerly a warp or block that may go on leaves the others behind; seeds
// 1 to 4 cover all temperaments.
void set_schedule(std::uint64_t seed);

// What the primitives do, for the thread that runs.
namespace runtime {

struct Place {
  int thread;
  int threads;
  int block;
  int blocks;
  int cluster;
  int clusters;
  char* shared;
};

const Place& place();
void sync_block();
void sync_cluster();
void shuffle_xor(const float* values, int mask, float* received, int count);
float load_remote(const float* shared, int rank);
void memory_arrive(std::uint32_t* arrivals);
void memory_await(const std::uint32_t* arrivals, std::uint32_t count);
void barrier_init(void* barrier);
void barrier_expect(void* barrier, std::uint32_t bytes);
void barrier_wait(void* barrier, int parity);
void bulk_load(void* shared, const void* global, std::uint32_t bytes, void* barrier);
void bulk_store(void* global, const void* shared, std::uint32_t bytes);
void bulk_wait_read();
void fence_async();

}  // namespace runtime
}  // namespace kdk::gpu
