// operators.h as a Python module for the tests.
#include "bind_args.h"
#include "tests/cuda_on_cpu/operators.h"

namespace {

// Limits, in their order.
using PyDevice = std::tuple<int, int, int, int, std::int64_t>;

kdk::gpu::Limits limits_from(const PyDevice& device) {
  const auto& [shared_bytes, of_two, cluster_blocks, multiprocessors, l2_bytes] = device;
  return {shared_bytes, of_two, cluster_blocks, multiprocessors, l2_bytes};
}

std::int64_t distill_rows(const kdk::PySizes& sizes, const kdk::PyRows& student,
                          const std::optional<kdk::PyRows>& teacher,
                          const std::optional<kdk::PyKept>& kept,
                          const std::optional<kdk::PyRows>& grad, const kdk::PyPointers& inputs,
                          const kdk::PyPointers& outputs, bool want_terms,
                          const kdk::PyOptions& options, const PyDevice& device,
                          std::uint64_t seed) {
  return kdk::gpu::distill_rows_on_cpu(
      kdk::distill_args(sizes, student, teacher, kept, grad, inputs, outputs, want_terms, options),
      limits_from(device), seed);
}

void shard_rows(int phase, const kdk::PySizes& sizes, const kdk::PyRows& student,
                const std::optional<kdk::PyRows>& teacher, const std::optional<kdk::PyKept>& kept,
                const std::optional<kdk::PyRows>& grad, const kdk::PyShardInputs& inputs,
                const kdk::PyShardOutputs& outputs, bool want_terms, bool leads,
                std::int64_t classes, const kdk::PyOptions& options, const PyDevice& device,
                std::uint64_t seed) {
  kdk::gpu::shard_rows_on_cpu(kdk::shard_args(sizes, student, teacher, kept, grad, inputs, outputs,
                                              want_terms, leads, classes, options),
                              static_cast<kdk::Phase>(phase), limits_from(device), seed);
}

void scale_rows(const kdk::PySizes& sizes, const kdk::PyRows& grad, std::uintptr_t upstream,
                bool per_row, const kdk::PyPointers& inputs, std::int64_t ignore_index,
                std::int64_t vocab_size) {
  kdk::gpu::scale_rows_on_cpu(
      kdk::scale_args(sizes, grad, upstream, per_row, inputs, ignore_index, vocab_size));
}

}  // namespace

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.def("distill_rows", &distill_rows);
  m.def("shard_rows", &shard_rows);
  m.def("scale_rows", &scale_rows);
}
