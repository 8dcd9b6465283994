// What this module was built with. CMakeLists.txt defines the KDK_INFO_ strings for bindings.cpp
// alone.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/threads.h"

namespace kdk {

inline pybind11::dict build_info() {
  using namespace pybind11::literals;
  const auto words = [](const char* text) { return pybind11::str(text).attr("split")(); };
  const std::string pybind = std::to_string(PYBIND11_VERSION_MAJOR) + "." +
                             std::to_string(PYBIND11_VERSION_MINOR) + "." +
                             std::to_string(PYBIND11_VERSION_MICRO);
  return pybind11::dict("compiler"_a = KDK_INFO_COMPILER, "build_type"_a = KDK_INFO_BUILD_TYPE,
                        "flags"_a = KDK_INFO_FLAGS, "openmp"_a = has_threads(),
                        "pybind11"_a = pybind, "isa_levels"_a = words(KDK_INFO_LEVELS),
                        "cuda_version"_a = KDK_INFO_CUDA_VERSION,  // empty when built without CUDA
                        "cuda_archs"_a = words(KDK_INFO_CUDA_ARCHS));
}

inline void bind_build_info(pybind11::module_& m) {
  m.def("build_info", &build_info,
        "build_info() -> dict\n\nCompiler, flags, instruction-set levels and CUDA architectures of "
        "this module.");
}

}  // namespace kdk
