// The row operators for CUDA; what they compute is stated in distill_kernel.h, shard_row.h
// and reduce_kernels.h.
// Plain types only: callers need no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/args.h"

namespace kdk {

struct CudaCall {
  int device;
  void* stream;
  void* scratch;            // cuda_scratch_bytes() of device memory; the call's own
  std::int64_t* bad_label;  // page-locked host memory; gets 1 + a row whose label is out of range
};

std::size_t cuda_scratch_bytes();

// These four return nullptr, or CUDA's own words for what is wrong, in static text. They only put
// work on the stream: no allocation, no wait, and after a first call, for which CUDA loads a
// kernel, a stream that is being captured is as good as any.
const char* distill_rows_cuda(const DistillArgs& args, const CudaCall& call);
const char* shard_rows_cuda(const ShardArgs& args, Phase phase, const CudaCall& call);
const char* scale_rows_cuda(const ScaleArgs& args, const CudaCall& call);
// Whether this build has code for the device.
const char* cuda_usable(int device);

}  // namespace kdk
