// What the CUDA devices of this machine are. Plain types only: callers need no CUDA header.
#pragma once

#include <cstdint>

namespace kdk {

struct CudaDevice {
  char name[256];
  int compute_major;
  int compute_minor;
  int multiprocessors;
  std::int64_t memory_bytes;
  std::int64_t l2_bytes;
  std::int64_t shared_bytes_per_block;  // the most a block may opt in to
  bool clusters;                        // thread-block clusters can be launched
};

// Both return nullptr, or CUDA's own words for what is wrong (no driver, no device, ...): such a
// machine is ordinary, not an error of ours. The text is static. Neither creates a context.
const char* cuda_device_count(int* count);
const char* cuda_device(int index, CudaDevice* device);

}  // namespace kdk
