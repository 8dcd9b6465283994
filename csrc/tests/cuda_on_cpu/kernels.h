// The kernels of csrc/cuda over rows, compiled by divergence, from kernels.cpp.
#pragma once

#include "cuda/task.h"

namespace kdk::gpu {

template <Divergence kDivergence>
void run_rows(const RowTask& task);

}  // namespace kdk::gpu
