// The Python module: pointers, shapes and strides in, C++ types on.
#include "bind_args.h"
#include "build_info.h"
#include "cpu/cpu.h"
#ifdef KDK_WITH_CUDA
#include "cuda/bind_cuda.h"
#endif

namespace py = pybind11;

namespace {

std::int64_t distill_rows_cpu(const kdk::PySizes& sizes, const kdk::PyRows& student,
                              const std::optional<kdk::PyRows>& teacher,
                              const std::optional<kdk::PyKept>& kept,
                              const std::optional<kdk::PyRows>& grad, const kdk::PyPointers& inputs,
                              const kdk::PyPointers& outputs, bool want_terms,
                              const kdk::PyOptions& options, int threads) {
  const kdk::DistillArgs args =
      kdk::distill_args(sizes, student, teacher, kept, grad, inputs, outputs, want_terms, options);
  const std::int64_t bad_label = kdk::find_bad_label(args);
  if (bad_label < 0) {
    py::gil_scoped_release release;
    kdk::distill_rows(args, threads);
  }
  return bad_label;
}

void scale_rows_cpu(const kdk::PySizes& sizes, const kdk::PyRows& grad, std::uintptr_t upstream,
                    bool per_row, const kdk::PyPointers& inputs, std::int64_t ignore_index,
                    std::int64_t vocab_size, int threads) {
  const kdk::ScaleArgs args =
      kdk::scale_args(sizes, grad, upstream, per_row, inputs, ignore_index, vocab_size);
  py::gil_scoped_release release;
  kdk::scale_rows(args, threads);
}

void shard_rows_cpu(int phase, const kdk::PySizes& sizes, const kdk::PyRows& student,
                    const std::optional<kdk::PyRows>& teacher,
                    const std::optional<kdk::PyKept>& kept, const std::optional<kdk::PyRows>& grad,
                    const kdk::PyShardInputs& inputs, const kdk::PyShardOutputs& outputs,
                    bool want_terms, bool leads, std::int64_t classes,
                    const kdk::PyOptions& options, int threads) {
  const kdk::ShardArgs args = kdk::shard_args(sizes, student, teacher, kept, grad, inputs, outputs,
                                              want_terms, leads, classes, options);
  py::gil_scoped_release release;
  kdk::shard_rows(static_cast<kdk::Phase>(phase), args, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled row operators of kdkernels. Their tensors come as addresses; see native.py.";
  m.def("distill_rows_cpu", &distill_rows_cpu,
        "Row losses and gradient (csrc/common/args.h: DistillArgs). Returns the first row whose "
        "label is out of range, having written nothing, or -1.");
  m.def("scale_rows_cpu", &scale_rows_cpu,
        "Multiplies the rows of a gradient in place (csrc/common/args.h: ScaleArgs).");
  m.def("shard_rows_cpu", &shard_rows_cpu,
        "One phase of rows of which only some columns are here (csrc/common/args.h: ShardArgs).");
  m.def("isa_level", &kdk::isa_level,
        "The instruction-set level the kernels of this process run at.");
  kdk::bind_build_info(m);
#ifdef KDK_WITH_CUDA
  kdk::bind_cuda(m);
#endif
}
