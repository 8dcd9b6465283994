// The entry points of cuda.h.
#include "cuda/cuda.h"
#include "cuda/error.h"
#include "cuda/launch.h"
#include "cuda/reduce_kernels.h"

namespace kdk {
namespace gpu {
namespace {

constexpr int kThreads = 256;  // of the kernels over rows

__global__ void __launch_bounds__(kMaxThreads)
    prepare_kernel(const __grid_constant__ MeanTask task) {
  prepare(task);
}

__global__ void __launch_bounds__(kMaxThreads)
    finish_kernel(const __grid_constant__ FinishTask task) {
  finish(task);
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleArgs args) {
  scale_rows(args);
}

// The caller's device is current again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) status_ = cudaSetDevice(device);
    changed_ = status_ == cudaSuccess && previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

template <typename Task>
const void* kernel_for(const Task& task) {
  return with_divergence(task, [&](auto divergence) { return kernel_of<divergence()>(task); });
}

// The plan decides which kernel computes the task, and the kernel how many teams of the plan fit.
// Rows of which little is read stay in memory.
template <typename Task>
cudaError_t plan_for(const DistillArgs& args, int device, bool sweeps, Task* task) {
  Limits limits;
  cudaError_t status = limits_of(kernel_for(*task), device, &limits);
  if (status != cudaSuccess) return status;
  if (!sweeps) limits.cluster_blocks = 0;
  task->plan = make_plan(args, limits, [&](const Plan& plan) {
    Task planned = *task;
    planned.plan = plan;
    const void* kernel = kernel_for(planned);
    Limits own;
    int teams = 0;
    // For what it does: it lets the kernel use all that there is.
    if (status == cudaSuccess) status = limits_of(kernel, device, &own);
    if (status == cudaSuccess) status = resident_teams(kernel, device, plan, &teams);
    return teams;
  });
  return status;
}

template <typename Task>
cudaError_t launch_one_block(void (*kernel)(Task), const Task& task, cudaStream_t stream) {
  kernel<<<1, kMaxThreads, sizeof(Exchange), stream>>>(task);
  return cudaGetLastError();
}

cudaError_t enqueue(const DistillArgs& args, const CudaCall& call) {
  const DeviceGuard guard(call.device);
  cudaError_t status = args.width < kMaxColumns ? guard.status() : cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(call.stream);
  auto* scratch = static_cast<Scratch*>(call.scratch);
  const std::int64_t rows = args.batch * args.length;
  const MeanTask mean = make_mean_task(args, args.objective.mean, scratch);
  for_each_launch(make_row_task(args, scratch, call.bad_label), [&](RowTask task) {
    if (status == cudaSuccess) status = launch_one_block(prepare_kernel, mean, stream);
    if (rows == 0) return;
    if (status == cudaSuccess) status = plan_for(args, call.device, true, &task);
    void* arguments[] = {&task};
    if (status == cudaSuccess) status = launch(kernel_for(task), task.plan, stream, arguments);
  });
  const bool per_row = args.student.dtype == DType::kFloat16;
  const FinishTask last{rows, args.rows, scratch, args.loss, per_row ? nullptr : args.unscale};
  if (status == cudaSuccess) status = launch_one_block(finish_kernel, last, stream);
  return status;
}

cudaError_t enqueue(const ShardArgs& args, Phase phase, const CudaCall& call) {
  const DistillArgs& rows = args.rows;
  const DeviceGuard guard(call.device);
  cudaError_t status = rows.width < kMaxColumns ? guard.status() : cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(call.stream);
  auto* scratch = static_cast<Scratch*>(call.scratch);
  const MeanTask mean = make_mean_task(rows, rows.num_items != nullptr, scratch);
  ShardTask task = make_shard_task(args, phase, scratch, call.bad_label);
  if (status == cudaSuccess) status = launch_one_block(prepare_kernel, mean, stream);
  if (status == cudaSuccess) status = plan_for(rows, call.device, sweeps(task), &task);
  void* arguments[] = {&task};
  if (status == cudaSuccess) status = launch(kernel_for(task), task.plan, stream, arguments);
  return status;
}

cudaError_t enqueue(const ScaleArgs& args, const CudaCall& call) {
  const DeviceGuard guard(call.device);
  if (guard.status() != cudaSuccess) return guard.status();
  const std::int64_t rows = args.batch * args.length;
  if (rows == 0) return cudaSuccess;
  constexpr std::int64_t kBlocks = 4096;  // more than run at a time, so that none idles for long
  const auto blocks = static_cast<unsigned>(std::min(rows, kBlocks));
  scale_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(call.stream)>>>(args);
  return cudaGetLastError();
}

cudaError_t usable(int device) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  cudaFuncAttributes code;
  return cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(&scale_kernel));
}

}  // namespace
}  // namespace gpu

std::size_t cuda_scratch_bytes() { return sizeof(gpu::Scratch); }

const char* distill_rows_cuda(const DistillArgs& args, const CudaCall& call) {
  return words(gpu::enqueue(args, call));
}

const char* shard_rows_cuda(const ShardArgs& args, Phase phase, const CudaCall& call) {
  return words(gpu::enqueue(args, phase, call));
}

const char* scale_rows_cuda(const ScaleArgs& args, const CudaCall& call) {
  return words(gpu::enqueue(args, call));
}

const char* cuda_usable(int device) { return words(gpu::usable(device)); }

}  // namespace kdk
