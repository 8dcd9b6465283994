// The dense distillation loss on a GPU: one read of student and teacher, one write of the gradient.
//
//   p = softmax(t/T), q = softmax(s/T)
//   row loss = distill_weight · D(p, q) + hard_weight · CE(s, y)
//   gradient = weight / denominator · ∂(row loss)/∂s
//
// A row belongs to a cluster of thread blocks, which hold it in their shared memory, a slice of the
// columns each: 3 · N · V elements of traffic. As on the CPU (cpu/kernels.cpp, which says why the
// fusion is legal) all that an element's gradient needs of the other columns is a handful of sums
// (row.h). The gradient is written over the student's slice in shared memory and stored from there.
// While a row is computed the copy engine brings the next one. Rows that are too long for shared
// memory (Plan::stages is 0) are read from memory in every sweep, which the L2 cache may serve.
#pragma once

#include "cuda/row.h"

namespace kdk {
namespace gpu {

// What `prepare` (reduce_kernels.h) leaves: 1 / the denominator of the mean in two floats, and
// whether it is 0.
struct Mean {
  TwoFloats inverse;
  bool empty;
};

// Which of a row's terms are wanted, from its label and weight.
struct Wanted {
  bool labelled, counts, computed, bad_label;
  float weight;
  std::int64_t label;

  KDK_DEVICE_METHOD bool reads(const RowTask& task) const {
    return !bad_label && (computed || (counts && task.want_terms));
  }
};

KDK_DEVICE Wanted wanted_of(const RowTask& task, const Mean& mean, std::int64_t row) {
  Wanted wanted{};
  wanted.labelled = task.labels != nullptr;
  wanted.label = wanted.labelled ? task.labels[row] : -1;
  wanted.counts = !wanted.labelled || wanted.label != task.ignore_index;
  wanted.bad_label =
      wanted.labelled && wanted.counts && (wanted.label < 0 || wanted.label >= task.columns);
  wanted.weight = task.weights == nullptr ? 1.0f : task.weights[row];
  wanted.computed = wanted.counts && wanted.weight != 0 && !mean.empty;
  return wanted;
}

// A row in one of the stages of shared memory.
struct Stage {
  char* student;
  char* teacher;
};

KDK_DEVICE Stage stage_of(const RowTask& task, char* memory, int stage) {
  const auto room = [&](DType dtype) {
    return static_cast<std::int64_t>(task.plan.slice) * size_of(dtype) + 16;
  };
  const std::int64_t student = room(task.student.dtype), teacher = room(task.teacher.dtype);
  char* begin = memory + sizeof(Exchange) + stage * (student + teacher);
  return {begin, begin + student};
}

// One thread brings [begin, end) of a tensor's row; returns the bytes that the barrier waits for.
KDK_DEVICE std::uint32_t bulk_bytes(const Side& memory, std::int64_t begin, std::int64_t end) {
  const Interior interior = interior_of(memory, begin, end);
  return static_cast<std::uint32_t>((interior.end - interior.begin) * size_of(memory.dtype));
}

KDK_DEVICE void fetch(const Side& memory, char* room, std::int64_t begin, std::int64_t end,
                      Barrier* arrived) {
  const Side shared = shared_side(memory, room, begin);
  const Interior interior = interior_of(memory, begin, end);
  const std::uint32_t bytes = bulk_bytes(memory, begin, end);
  if (bytes > 0) bulk_load(shared.at(interior.begin), memory.at(interior.begin), bytes, arrived);
  for (std::int64_t column = begin; column < end; ++column) {
    if (column == interior.begin) column = interior.end;
    if (column < end) store_one(shared, column, load_one(memory, column));
  }
}

template <Divergence kDivergence>
KDK_DEVICE void distill_rows(const RowTask& task) {
  char* memory = shared_memory();
  Exchange& exchange = *reinterpret_cast<Exchange*>(memory);
  const bool leader = thread_rank() == 0;
  const Mean mean{{task.mean[0], task.mean[1]}, task.mean[2] != 0};
  const bool reads_teacher = task.distill || task.want_terms;
  const std::int64_t begin_of = static_cast<std::int64_t>(block_rank()) * task.plan.slice;
  const std::int64_t begin = begin_of < task.columns ? begin_of : task.columns;
  const std::int64_t end =
      begin + task.plan.slice < task.columns ? begin + task.plan.slice : task.columns;
  const int stages = task.plan.stages;
  int turn = 0;
  int parity[2] = {0, 0};

  const auto side_in_memory = [&](const Rows& rows, std::int64_t index) {
    return side_of(row_pointer(rows, index / task.length, index % task.length), rows.dtype, begin);
  };
  const auto expected = [&](std::int64_t index) {
    std::uint32_t bytes = bulk_bytes(side_in_memory(task.student, index), begin, end);
    if (reads_teacher) bytes += bulk_bytes(side_in_memory(task.teacher, index), begin, end);
    return bytes;
  };
  const auto prefetch = [&](std::int64_t index, int stage) {
    if (!leader || stages == 0 || index >= task.rows) return;
    bulk_wait_read();  // what this stage held before is stored
    if (!wanted_of(task, mean, index).reads(task)) return;
    const Stage room = stage_of(task, memory, stage);
    Barrier* arrived = &exchange.arrived[stage];
    const std::uint32_t bytes = expected(index);
    if (bytes > 0) barrier_expect(arrived, bytes);
    fetch(side_in_memory(task.student, index), room.student, begin, end, arrived);
    if (reads_teacher)
      fetch(side_in_memory(task.teacher, index), room.teacher, begin, end, arrived);
  };

  if (stages > 0 && leader) {
    barrier_init(&exchange.arrived[0]);
    barrier_init(&exchange.arrived[1]);
  }
  prefetch(cluster_index(), 0);
  sync_block();

  int stage = 0;
  for (std::int64_t index = cluster_index(); index < task.rows; index += grid_clusters()) {
    const Wanted wanted = wanted_of(task, mean, index);
    const std::int64_t next = index + grid_clusters();
    const int next_stage = stages == 2 ? stage ^ 1 : 0;
    bool fetched = stages != 2;
    const auto loaded = [&] {
      if (!fetched) prefetch(next, next_stage);
      fetched = true;
    };

    Row row{};
    row.index = index;
    row.begin = begin;
    row.end = end;
    row.label = wanted.counts ? wanted.label : -1;
    row.student = side_in_memory(task.student, index);
    row.teacher = side_in_memory(task.teacher, index);
    const bool want_grad = task.grad.data != nullptr;
    if (want_grad) row.memory = side_in_memory(task.grad, index);
    if (wanted.reads(task) && wanted.labelled) {
      row.s_label = load_one(row.student, wanted.label);
      row.t_label = reads_teacher ? load_one(row.teacher, wanted.label) : -kInfinity;
    }
    if (stages > 0) {
      const Stage room = stage_of(task, memory, stage);
      const bool alike =
          want_grad && (reinterpret_cast<std::uintptr_t>(row.memory.at(begin)) & 15) ==
                           (reinterpret_cast<std::uintptr_t>(row.student.at(begin)) & 15);
      if (alike) {
        row.interior = interior_of(row.memory, begin, end);
        row.staged = shared_side(row.memory, room.student, begin);
      }
      if (wanted.reads(task)) {
        if (expected(index) > 0) {
          barrier_wait(&exchange.arrived[stage], parity[stage]);
          parity[stage] ^= 1;
        }
        row.student = shared_side(row.student, room.student, begin);
        if (reads_teacher) row.teacher = shared_side(row.teacher, room.teacher, begin);
      }
    }

    RowLoss values{0, 0};
    float loss = 0;
    if (leader && block_rank() == 0 && task.student.dtype == DType::kFloat16) {
      task.unscale[index] = mean.empty ? 0.0f : 1.0f;
    }
    if (wanted.bad_label) {
      values = {kNaN, kNaN};
      loss = kNaN;
      if (leader && block_rank() == 0) *task.bad_label = index + 1;
      if (want_grad) fill_row(row, kNaN);
    } else {
      // The terms that do not enter the loss first: the gradient may replace the logits.
      for (int pass = 0; pass < 3; ++pass) {
        const bool main = pass == 2;
        if (main ? !wanted.computed
                 : !(wanted.counts && task.want_terms) ||
                       (pass == 0 ? wanted.computed && task.distill
                                  : !wanted.labelled || (wanted.computed && task.hard))) {
          continue;
        }
        Pass what{pass == 0, pass == 1, false, {0, 0}};
        if (main) {
          what = {task.distill, task.hard, want_grad, multiply({wanted.weight, 0}, mean.inverse)};
        }
        const RowLoss terms = evaluate<kDivergence>(task, row, what, exchange, turn, loaded);
        if (what.distill) values.distill = terms.distill;
        if (what.hard) values.hard = terms.hard;
        if (main) {
          float sum = 0;
          if (task.distill) sum += task.distill_weight * terms.distill;
          if (task.hard) sum += task.hard_weight * terms.hard;
          loss = wanted.weight * sum;
        }
      }
      // Stored zeros, not products with 0: whatever the logits held, they change nothing.
      if (want_grad && !wanted.computed) fill_row(row, 0);
    }
    if (leader && block_rank() == 0) {
      task.row_losses[index] = loss;
      task.row_losses[task.rows + index] = values.distill * task.distill_scale;
      task.row_losses[2 * task.rows + index] = values.hard;
    }
    if (want_grad) {
      const std::int64_t threads = static_cast<std::int64_t>(cluster_blocks()) * block_threads();
      for (std::int64_t column = task.columns + block_rank() * block_threads() + thread_rank();
           column < task.width; column += threads) {
        store_one(row.memory, column, 0);
      }
    }

    fence_async();
    sync_block();
    if (leader && row.interior.begin < row.interior.end) {
      const auto bytes = (row.interior.end - row.interior.begin) * size_of(row.memory.dtype);
      bulk_store(row.memory.at(row.interior.begin), row.staged.at(row.interior.begin),
                 static_cast<std::uint32_t>(bytes));
    }
    loaded();
    if (stages == 1) prefetch(next, 0);
    sync_block();
    stage = next_stage;
  }
  if (stages > 0 && leader) bulk_wait_read();
  sync_cluster();  // others may still read this block's shared memory
}

}  // namespace gpu
}  // namespace kdk
