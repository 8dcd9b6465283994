#include <cstring>

#include "cuda/device.h"
#include "cuda/error.h"

namespace kdk {
const char* cuda_device_count(int* count) {
  *count = 0;
  return words(cudaGetDeviceCount(count));
}

const char* cuda_device(int index, CudaDevice* device) {
  cudaDeviceProp properties;
  if (const char* error = words(cudaGetDeviceProperties(&properties, index))) return error;
  int clusters = 0;
  if (const char* error =
          words(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index))) {
    return error;
  }
  static_assert(sizeof(device->name) == sizeof(properties.name), "the name would be cut");
  std::memcpy(device->name, properties.name, sizeof(device->name));
  device->compute_major = properties.major;
  device->compute_minor = properties.minor;
  device->multiprocessors = properties.multiProcessorCount;
  device->memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
  device->l2_bytes = properties.l2CacheSize;
  device->shared_bytes_per_block = static_cast<std::int64_t>(properties.sharedMemPerBlockOptin);
  device->clusters = clusters != 0;
  return nullptr;
}

}  // namespace kdk
