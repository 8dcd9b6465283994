// From Python's arguments to common/args.h: tensors come as addresses, see backends/native.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/args.h"

namespace kdk {

using PyRows = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t>;  // see common/rows.h
using PyKept = std::tuple<std::int64_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;
using PySizes = std::tuple<std::int64_t, std::int64_t, std::int64_t>;  // B, L, V_s
using PyPointers = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;
using PyShardInputs = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;
using PyShardOutputs = std::tuple<std::uintptr_t, std::uintptr_t>;
// objective.Objective, in its order: from divergence to reduction.
using PyOptions = std::tuple<std::string, double, double, double, double, double, double, double,
                             double, double, double, std::int64_t, std::int64_t, std::string>;

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Rows rows_from(const PyRows& rows) {
  const auto& [data, dtype, stride_b, stride_l] = rows;
  return {pointer<void>(data), static_cast<DType>(dtype), stride_b, stride_l};
}

inline Divergence divergence_from(const std::string& name) {
  if (name == "forward_kl") return Divergence::kForwardKL;
  if (name == "reverse_kl") return Divergence::kReverseKL;
  if (name == "jsd") return Divergence::kJSD;
  if (name == "skew_forward_kl") return Divergence::kSkewForwardKL;
  if (name == "skew_reverse_kl") return Divergence::kSkewReverseKL;
  if (name == "tvd") return Divergence::kTVD;
  throw pybind11::value_error("unknown divergence '" + name + "'");
}

inline Kept kept_from(const PyKept& kept) {
  const auto& [count, ids, log_p, log_rest] = kept;
  return {count, pointer<const std::int64_t>(ids), pointer<const double>(log_p),
          pointer<const double>(log_rest)};
}

// A teacher is dense or kept. `inputs`: labels, weights, num_items; `outputs`: loss, unscale, rows.
// An address may be 0.
inline DistillArgs distill_args(const PySizes& sizes, const PyRows& student,
                                const std::optional<PyRows>& teacher,
                                const std::optional<PyKept>& kept,
                                const std::optional<PyRows>& grad, const PyPointers& inputs,
                                const PyPointers& outputs, bool want_terms,
                                const PyOptions& options) {
  const auto& [divergence, beta, temperature, distill_weight, hard_weight, distill_scale,
               label_smoothing, student_scale, student_cap, teacher_scale, teacher_cap,
               ignore_index, vocab_size, reduction] = options;
  DistillArgs args;
  std::tie(args.batch, args.length, args.width) = sizes;
  args.student = rows_from(student);
  args.teacher = teacher ? rows_from(*teacher) : Rows{};
  args.kept = kept ? kept_from(*kept) : Kept{};
  args.grad = grad ? rows_from(*grad) : Rows{};
  args.labels = pointer<const std::int64_t>(std::get<0>(inputs));
  args.weights = pointer<const float>(std::get<1>(inputs));
  args.num_items = pointer<const double>(std::get<2>(inputs));
  args.loss = pointer<float>(std::get<0>(outputs));
  args.unscale = pointer<float>(std::get<1>(outputs));
  args.rows = pointer<float>(std::get<2>(outputs));
  args.objective = {divergence_from(divergence),
                    beta,
                    temperature,
                    distill_weight,
                    hard_weight,
                    distill_scale,
                    label_smoothing,
                    student_scale,
                    student_cap,
                    teacher_scale,
                    teacher_cap,
                    ignore_index,
                    vocab_size,
                    reduction == "mean",
                    want_terms};
  return args;
}

// `inputs`: labels, weights, num_items, merged; `outputs`: out, unscale. An address may be 0.
inline ShardArgs shard_args(const PySizes& sizes, const PyRows& student,
                            const std::optional<PyRows>& teacher, const std::optional<PyKept>& kept,
                            const std::optional<PyRows>& grad, const PyShardInputs& inputs,
                            const PyShardOutputs& outputs, bool want_terms, bool leads,
                            std::int64_t classes, const PyOptions& options) {
  const auto& [labels, weights, num_items, merged] = inputs;
  const auto& [out, unscale] = outputs;
  return {distill_args(sizes, student, teacher, kept, grad, {labels, weights, num_items},
                       {0, unscale, 0}, want_terms, options),
          classes, pointer<const double>(merged), pointer<double>(out), leads};
}

// `inputs`: labels, weights, unscale.
inline ScaleArgs scale_args(const PySizes& sizes, const PyRows& grad, std::uintptr_t upstream,
                            bool per_row, const PyPointers& inputs, std::int64_t ignore_index,
                            std::int64_t vocab_size) {
  ScaleArgs args;
  args.batch = std::get<0>(sizes);
  args.length = std::get<1>(sizes);
  args.grad = rows_from(grad);
  args.upstream = pointer<const float>(upstream);
  args.per_row = per_row;
  args.labels = pointer<const std::int64_t>(std::get<0>(inputs));
  args.weights = pointer<const float>(std::get<1>(inputs));
  args.unscale = pointer<const float>(std::get<2>(inputs));
  args.ignore_index = ignore_index;
  args.vocab_size = vocab_size;
  return args;
}

}  // namespace kdk
