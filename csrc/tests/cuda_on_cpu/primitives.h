// The twin of cuda/primitives.h for a processor without a GPU: the same names over runtime.h, which
// runs the threads of a cluster as fibers and reports what a GPU would let pass or hang on.
#pragma once

#include <cstdint>

#include "tests/cuda_on_cpu/runtime.h"

#define KDK_DEVICE static inline
#define KDK_DEVICE_METHOD inline
#define KDK_UNROLL
#define KDK_ROLLED
#define KDK_HAS_CLUSTERS 1

namespace kdk {
namespace gpu {

KDK_DEVICE int thread_rank() { return runtime::place().thread; }
KDK_DEVICE int block_threads() { return runtime::place().threads; }
KDK_DEVICE int block_rank() { return runtime::place().block; }
KDK_DEVICE int cluster_blocks() { return runtime::place().blocks; }
KDK_DEVICE int block_index() {
  return runtime::place().cluster * runtime::place().blocks + runtime::place().block;
}
KDK_DEVICE int grid_blocks() { return runtime::place().clusters * runtime::place().blocks; }

KDK_DEVICE char* shared_memory() { return runtime::place().shared; }

KDK_DEVICE void sync_warp() { runtime::shuffle_xor(nullptr, 0, nullptr, 0); }
KDK_DEVICE void sync_block() { runtime::sync_block(); }
KDK_DEVICE void sync_cluster() { runtime::sync_cluster(); }

template <int kValues>
KDK_DEVICE void shuffle_xor(const float (&values)[kValues], int mask, float (&received)[kValues]) {
  runtime::shuffle_xor(values, mask, received, kValues);
}

KDK_DEVICE float load_remote(const float* shared, int rank) {
  return runtime::load_remote(shared, rank);
}

KDK_DEVICE void memory_arrive(std::uint32_t* arrivals) { runtime::memory_arrive(arrivals); }
KDK_DEVICE void memory_await(const std::uint32_t* arrivals, std::uint32_t count) {
  runtime::memory_await(arrivals, count);
}
KDK_DEVICE float load_from_block(const float* global) { return *global; }

struct alignas(16) Bytes16 {
  std::uint32_t word[4];
};

struct Barrier {
  std::uint64_t state;
};

KDK_DEVICE void barrier_init(Barrier* barrier) { runtime::barrier_init(barrier); }

KDK_DEVICE void barrier_expect(Barrier* barrier, std::uint32_t bytes) {
  runtime::barrier_expect(barrier, bytes);
}

KDK_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  runtime::barrier_wait(barrier, parity);
}

KDK_DEVICE void bulk_load(void* shared, const void* global, std::uint32_t bytes, Barrier* barrier) {
  runtime::bulk_load(shared, global, bytes, barrier);
}

KDK_DEVICE void bulk_store(void* global, const void* shared, std::uint32_t bytes) {
  runtime::bulk_store(global, shared, bytes);
}

KDK_DEVICE void bulk_wait_read() { runtime::bulk_wait_read(); }
KDK_DEVICE void fence_async() { runtime::fence_async(); }

}  // namespace gpu
}  // namespace kdk
