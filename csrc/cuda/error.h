// CUDA's errors, in its own words.
#pragma once

#include <cuda_runtime_api.h>

namespace kdk {

// Null on success. Takes the error off CUDA's record too, or the next launch check, torch's or
// ours, would report it as its own. The text is static.
inline const char* words(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace kdk
