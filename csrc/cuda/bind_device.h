// Python's view of cuda/device.h.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace kdk {

inline pybind11::list cuda_devices() {
  using namespace pybind11::literals;
  const auto check = [](const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
  };
  int count = 0;
  check(cuda_device_count(&count));
  pybind11::list devices;
  for (int index = 0; index < count; ++index) {
    CudaDevice device;
    check(cuda_device(index, &device));
    devices.append(pybind11::dict(
        "name"_a = device.name,
        "compute_capability"_a = pybind11::make_tuple(device.compute_major, device.compute_minor),
        "multiprocessors"_a = device.multiprocessors, "memory_bytes"_a = device.memory_bytes,
        "l2_bytes"_a = device.l2_bytes, "shared_bytes_per_block"_a = device.shared_bytes_per_block,
        "clusters"_a = device.clusters));
  }
  return devices;
}

inline void bind_cuda_device(pybind11::module_& m) {
  m.def(
      "cuda_devices", &cuda_devices,
      "cuda_devices() -> list[dict]\n\n"
      "The CUDA devices of this machine; RuntimeError with CUDA's own words if it has no driver or "
      "no device.\nStarts the CUDA driver in this process, after which a fork cannot use CUDA.");
}

}  // namespace kdk
