#include <map>
#include <mutex>
#include <tuple>

#include "cuda/launch.h"

namespace kdk {
namespace gpu {
namespace {

struct Config {
  cudaLaunchConfig_t launch;
  cudaLaunchAttribute attributes[1];

  Config(const Plan& plan, int teams, cudaStream_t stream) : launch{}, attributes{} {
    launch.gridDim = dim3(static_cast<unsigned>(teams) * plan.team_blocks);
    launch.blockDim = dim3(plan.threads);
    launch.dynamicSmemBytes = plan.shared_bytes;
    launch.stream = stream;
    launch.attrs = attributes;
    launch.numAttrs = 1;
    if (plan.clusters) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim = {static_cast<unsigned>(plan.team_blocks), 1, 1};
    } else {
      // Blocks that wait for each other have to run at the same time.
      attributes[0].id = cudaLaunchAttributeCooperative;
      attributes[0].val.cooperative = plan.team_blocks > 1;
    }
  }
};

#define KDK_RETURN_IF_ERROR(call) \
  if (const cudaError_t status = (call)) return status

// A kernel may use all the shared memory there is, and clusters of more than 8 blocks where the
// device has them.
cudaError_t allow_all(const void* kernel, const Limits& limits) {
  KDK_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           limits.shared_bytes));
  if (limits.cluster_blocks > 0 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) {
    cudaGetLastError();
  }
  return cudaSuccess;
}

cudaError_t query_limits(const void* kernel, int device, Limits* limits) {
  const auto attribute = [&](cudaDeviceAttr which, int* value) {
    return cudaDeviceGetAttribute(value, which, device);
  };
  int clusters = 0, l2_bytes = 0, multiprocessor_bytes = 0, reserved_bytes = 0;
  KDK_RETURN_IF_ERROR(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_bytes));
  KDK_RETURN_IF_ERROR(attribute(cudaDevAttrMultiProcessorCount, &limits->multiprocessors));
  KDK_RETURN_IF_ERROR(attribute(cudaDevAttrL2CacheSize, &l2_bytes));
  KDK_RETURN_IF_ERROR(attribute(cudaDevAttrClusterLaunch, &clusters));
  KDK_RETURN_IF_ERROR(
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &multiprocessor_bytes));
  KDK_RETURN_IF_ERROR(attribute(cudaDevAttrReservedSharedMemoryPerBlock, &reserved_bytes));
  cudaFuncAttributes code;
  KDK_RETURN_IF_ERROR(cudaFuncGetAttributes(&code, kernel));
  // Code for older GPUs, which a newer one compiles from its PTX, has neither clusters nor bulk
  // copies: see primitives.h.
  limits->cluster_blocks = clusters != 0 && code.ptxVersion >= 90 ? 16 : 0;
  limits->l2_bytes = l2_bytes;
  limits->shared_bytes_of_two = multiprocessor_bytes / 2 - reserved_bytes;
  for (int* bytes : {&limits->shared_bytes, &limits->shared_bytes_of_two}) {
    *bytes -= static_cast<int>(code.sharedSizeBytes);
  }
  return allow_all(kernel, *limits);
}

cudaError_t query_resident(const void* kernel, int device, const Plan& plan, int* teams) {
  const Config config(plan, 1, nullptr);
  if (plan.clusters) {
    if (cudaOccupancyMaxActiveClusters(teams, kernel, &config.launch) != cudaSuccess) {
      cudaGetLastError();  // this device has no clusters of that size
      *teams = 0;
    }
    return cudaSuccess;
  }
  int blocks = 0, multiprocessors = 0;
  KDK_RETURN_IF_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, plan.threads,
                                                                    plan.shared_bytes));
  KDK_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  *teams = blocks * multiprocessors / plan.team_blocks;
  return cudaSuccess;
}

// Asked once each; a call costs microseconds, and so does a question.
template <typename Key, typename Value, typename Ask>
cudaError_t remember(std::map<Key, Value>& known, std::mutex& guard, const Key& key, Value* value,
                     const Ask& ask) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = known.find(key);
  if (found == known.end()) {
    KDK_RETURN_IF_ERROR(ask());
    known.emplace(key, *value);
  } else {
    *value = found->second;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t limits_of(const void* kernel, int device, Limits* limits) {
  static std::mutex guard;
  static std::map<std::tuple<const void*, int>, Limits> known;
  return remember(known, guard, std::tuple(kernel, device), limits,
                  [&] { return query_limits(kernel, device, limits); });
}

cudaError_t resident_teams(const void* kernel, int device, const Plan& plan, int* teams) {
  static std::mutex guard;
  static std::map<std::tuple<const void*, int, int, bool, int, int>, int> known;
  const std::tuple key(kernel, device, plan.team_blocks, plan.clusters, plan.threads,
                       plan.shared_bytes);
  return remember(known, guard, key, teams,
                  [&] { return query_resident(kernel, device, plan, teams); });
}

cudaError_t launch(const void* kernel, const Plan& plan, cudaStream_t stream, void** arguments) {
  const Config config(plan, plan.teams, stream);
  return cudaLaunchKernelExC(&config.launch, kernel, arguments);
}

}  // namespace gpu
}  // namespace kdk
