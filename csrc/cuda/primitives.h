// What the kernels use of a GPU, one function each: this file in PTX, its twin for a processor
// without a GPU in tests/cuda_on_cpu/primitives.h. On GPUs without clusters a cluster is one block.
#pragma once

#ifdef KDK_CUDA_ON_CPU
#include "tests/cuda_on_cpu/primitives.h"
#else

#include <cstdint>

#define KDK_DEVICE static __device__ __forceinline__
#define KDK_DEVICE_METHOD __device__ __forceinline__
#define KDK_UNROLL _Pragma("unroll")
#define KDK_ROLLED _Pragma("unroll 1")

namespace kdk {
namespace gpu {

KDK_DEVICE int thread_rank() { return static_cast<int>(threadIdx.x); }
KDK_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }

KDK_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
KDK_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }

// Of kernels that are launched in clusters.
#if __CUDA_ARCH__ >= 900
#define KDK_HAS_CLUSTERS 1
KDK_DEVICE int block_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
KDK_DEVICE int cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}
#else
#define KDK_HAS_CLUSTERS 0
KDK_DEVICE int block_rank() { return 0; }
KDK_DEVICE int cluster_blocks() { return 1; }
#endif

// The block's dynamic shared memory.
KDK_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

KDK_DEVICE std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

KDK_DEVICE void sync_warp() { __syncwarp(); }
KDK_DEVICE void sync_block() { __syncthreads(); }

// Orders shared memory of all the cluster's blocks too.
KDK_DEVICE void sync_cluster() {
#if KDK_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// What the lane has whose number differs from this one's in the bits of the mask.
template <int kValues>
KDK_DEVICE void shuffle_xor(const float (&values)[kValues], int mask, float (&received)[kValues]) {
  KDK_UNROLL
  for (int i = 0; i < kValues; ++i) received[i] = __shfl_xor_sync(0xffffffffu, values[i], mask);
}

// What another block of the cluster has where this one has `shared`.
KDK_DEVICE float load_remote(const float* shared, int rank) {
#if KDK_HAS_CLUSTERS
  std::uint32_t address;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
#else
  return *shared;
#endif
}

// ---- Blocks that meet in memory ---------------------------------------------------------------

// Counts up; what this thread wrote to memory before is there for whoever has awaited it.
KDK_DEVICE void memory_arrive(std::uint32_t* arrivals) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(arrivals))
               : "memory");
}

// Until there are that many.
KDK_DEVICE void memory_await(const std::uint32_t* arrivals, std::uint32_t count) {
  std::uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(seen)
                 : "l"(__cvta_generic_to_global(arrivals))
                 : "memory");
  } while (static_cast<std::int32_t>(seen - count) < 0);
}

// What another block wrote, past this multiprocessor's cache.
KDK_DEVICE float load_from_block(const float* global) {
  float value;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];"
               : "=f"(value)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return value;
}

struct alignas(16) Bytes16 {
  std::uint32_t word[4];
};

// ---- Asynchronous bulk copies -----------------------------------------------------------------
// Addresses and sizes are multiples of 16 bytes. One thread issues.

struct Barrier {
  std::uint64_t state;
};

// GPUs before compute capability 9.0 have none: there Plan::stages is 0 and they are not called.

KDK_DEVICE void barrier_init(Barrier* barrier) {
#if KDK_HAS_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives, and makes the phase wait for that many bytes as well.
KDK_DEVICE void barrier_expect(Barrier* barrier, std::uint32_t bytes) {
#if KDK_HAS_CLUSTERS
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

KDK_DEVICE void barrier_wait(Barrier* barrier, int parity) {
#if KDK_HAS_CLUSTERS
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

KDK_DEVICE void bulk_load(void* shared, const void* global, std::uint32_t bytes, Barrier* barrier) {
#if KDK_HAS_CLUSTERS
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

KDK_DEVICE void bulk_store(void* global, const void* shared, std::uint32_t bytes) {
#if KDK_HAS_CLUSTERS
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until this thread's bulk stores have read their shared memory.
KDK_DEVICE void bulk_wait_read() {
#if KDK_HAS_CLUSTERS
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

// Before a barrier after which a bulk copy reads, or overwrites, what this thread wrote or read.
KDK_DEVICE void fence_async() {
#if KDK_HAS_CLUSTERS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace gpu
}  // namespace kdk

#endif
