// Python's view of cuda/device.h and cuda/cuda.h.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "bind_args.h"
#include "cuda/cuda.h"
#include "cuda/device.h"

namespace kdk {

inline void check_cuda(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

inline pybind11::list cuda_devices() {
  using namespace pybind11::literals;
  int count = 0;
  check_cuda(cuda_device_count(&count));
  pybind11::list devices;
  for (int index = 0; index < count; ++index) {
    CudaDevice device;
    check_cuda(cuda_device(index, &device));
    devices.append(pybind11::dict(
        "name"_a = device.name,
        "compute_capability"_a = pybind11::make_tuple(device.compute_major, device.compute_minor),
        "multiprocessors"_a = device.multiprocessors, "memory_bytes"_a = device.memory_bytes,
        "l2_bytes"_a = device.l2_bytes, "shared_bytes_per_block"_a = device.shared_bytes_per_block,
        "clusters"_a = device.clusters));
  }
  return devices;
}

// Device, stream, scratch, bad_label.
using PyCudaCall = std::tuple<int, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

inline CudaCall cuda_call(const PyCudaCall& call) {
  const auto& [device, stream, scratch, bad_label] = call;
  return {device, pointer<void>(stream), pointer<void>(scratch), pointer<std::int64_t>(bad_label)};
}

inline void py_distill_rows_cuda(const PySizes& sizes, const PyRows& student,
                                 const std::optional<PyRows>& teacher,
                                 const std::optional<PyKept>& kept,
                                 const std::optional<PyRows>& grad, const PyPointers& inputs,
                                 const PyPointers& outputs, bool want_terms,
                                 const PyOptions& options, const PyCudaCall& call) {
  check_cuda(distill_rows_cuda(
      distill_args(sizes, student, teacher, kept, grad, inputs, outputs, want_terms, options),
      cuda_call(call)));
}

inline void py_shard_rows_cuda(int phase, const PySizes& sizes, const PyRows& student,
                               const std::optional<PyRows>& teacher,
                               const std::optional<PyKept>& kept, const std::optional<PyRows>& grad,
                               const PyShardInputs& inputs, const PyShardOutputs& outputs,
                               bool want_terms, bool leads, std::int64_t classes,
                               const PyOptions& options, const PyCudaCall& call) {
  check_cuda(shard_rows_cuda(shard_args(sizes, student, teacher, kept, grad, inputs, outputs,
                                        want_terms, leads, classes, options),
                             static_cast<Phase>(phase), cuda_call(call)));
}

inline void py_scale_rows_cuda(const PySizes& sizes, const PyRows& grad, std::uintptr_t upstream,
                               bool per_row, const PyPointers& inputs, std::int64_t ignore_index,
                               std::int64_t vocab_size, const PyCudaCall& call) {
  check_cuda(
      scale_rows_cuda(scale_args(sizes, grad, upstream, per_row, inputs, ignore_index, vocab_size),
                      cuda_call(call)));
}

inline void bind_cuda(pybind11::module_& m) {
  m.def(
      "cuda_devices", &cuda_devices,
      "cuda_devices() -> list[dict]\n\n"
      "The CUDA devices of this machine; RuntimeError with CUDA's own words if it has no driver or "
      "no device.\nStarts the CUDA driver in this process, after which a fork cannot use CUDA.");
  m.def("cuda_usable", &cuda_usable,
        "cuda_usable(device) -> str | None\n\n"
        "None where this build has code for the device, else CUDA's own words.");
  m.attr("CUDA_SCRATCH_BYTES") = cuda_scratch_bytes();
  m.def("distill_rows_cuda", &py_distill_rows_cuda,
        "Row losses and gradient (csrc/cuda/cuda.h), put on the call's stream.");
  m.def("shard_rows_cuda", &py_shard_rows_cuda,
        "A phase of the rows of a shard (csrc/cuda/cuda.h), put on the call's stream.");
  m.def("scale_rows_cuda", &py_scale_rows_cuda,
        "Multiplies the rows of a gradient in place (csrc/cuda/cuda.h), put on the call's stream.");
}

}  // namespace kdk
