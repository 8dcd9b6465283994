// The Python module: pointers, shapes and strides in, C++ types on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "build_info.h"
#include "cpu/cpu.h"
#ifdef KDK_WITH_CUDA
#include "cuda/bind_device.h"
#endif

namespace py = pybind11;

namespace {

using PyRows = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t>;  // see common/rows.h

kdk::Rows rows_from(const PyRows& rows) {
  const auto& [data, dtype, stride_b, stride_l] = rows;
  return {reinterpret_cast<void*>(data), static_cast<kdk::DType>(dtype), stride_b, stride_l};
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

kdk::Divergence divergence_from(const std::string& name) {
  if (name == "forward_kl") return kdk::Divergence::kForwardKL;
  if (name == "reverse_kl") return kdk::Divergence::kReverseKL;
  if (name == "jsd") return kdk::Divergence::kJSD;
  if (name == "skew_forward_kl") return kdk::Divergence::kSkewForwardKL;
  if (name == "skew_reverse_kl") return kdk::Divergence::kSkewReverseKL;
  if (name == "tvd") return kdk::Divergence::kTVD;
  throw py::value_error("unknown divergence '" + name + "'");
}

std::int64_t distill_rows_cpu(std::int64_t batch, std::int64_t length, std::int64_t width,
                              const PyRows& student, const PyRows& teacher,
                              const std::optional<PyRows>& grad, std::uintptr_t labels,
                              std::uintptr_t weights, std::uintptr_t num_items, std::uintptr_t loss,
                              std::uintptr_t unscale, std::uintptr_t rows, bool want_terms,
                              const std::string& divergence, double beta, double temperature,
                              double distill_weight, double hard_weight, double distill_scale,
                              double label_smoothing, std::int64_t ignore_index,
                              std::int64_t vocab_size, const std::string& reduction, int threads) {
  kdk::DistillArgs args;
  args.batch = batch;
  args.length = length;
  args.width = width;
  args.student = rows_from(student);
  args.teacher = rows_from(teacher);
  args.grad = grad ? rows_from(*grad) : kdk::Rows{};
  args.labels = pointer<const std::int64_t>(labels);
  args.weights = pointer<const float>(weights);
  args.num_items = pointer<const double>(num_items);
  args.loss = pointer<float>(loss);
  args.unscale = pointer<float>(unscale);
  args.rows = pointer<float>(rows);
  args.objective = {divergence_from(divergence),
                    beta,
                    temperature,
                    distill_weight,
                    hard_weight,
                    distill_scale,
                    label_smoothing,
                    ignore_index,
                    vocab_size,
                    reduction == "mean",
                    want_terms};
  args.threads = threads;
  const std::int64_t bad_label = kdk::find_bad_label(args);
  if (bad_label < 0) {
    py::gil_scoped_release release;
    kdk::distill_rows(args);
  }
  return bad_label;
}

void scale_rows_cpu(std::int64_t batch, std::int64_t length, const PyRows& grad,
                    std::uintptr_t upstream, bool per_row, std::uintptr_t unscale,
                    std::uintptr_t labels, std::uintptr_t weights, std::int64_t ignore_index,
                    std::int64_t vocab_size, int threads) {
  kdk::ScaleArgs args;
  args.batch = batch;
  args.length = length;
  args.grad = rows_from(grad);
  args.upstream = pointer<const float>(upstream);
  args.per_row = per_row;
  args.unscale = pointer<const float>(unscale);
  args.labels = pointer<const std::int64_t>(labels);
  args.weights = pointer<const float>(weights);
  args.ignore_index = ignore_index;
  args.vocab_size = vocab_size;
  args.threads = threads;
  py::gil_scoped_release release;
  kdk::scale_rows(args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled row operators of kdkernels. Their tensors come as addresses; see native.py.";
  m.def(
      "distill_rows_cpu", &distill_rows_cpu,
      "Row losses and gradient (csrc/cpu/cpu.h: DistillArgs). Returns the first row whose label is "
      "out of range, having written nothing, or -1.");
  m.def("scale_rows_cpu", &scale_rows_cpu,
        "Multiplies the rows of a gradient in place (csrc/cpu/cpu.h: ScaleArgs).");
  m.def("isa_level", &kdk::isa_level,
        "The instruction-set level the kernels of this process run at.");
  kdk::bind_build_info(m);
#ifdef KDK_WITH_CUDA
  kdk::bind_cuda_device(m);
#endif
}
