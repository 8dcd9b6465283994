// The dense distillation loss on a GPU: one read of student and teacher, one write of the gradient.
//
//   p = softmax(t/T), q = softmax(s/T)
//   row loss = distill_weight · D(p, q) + hard_weight · CE(s, y)
//   gradient = weight / denominator · ∂(row loss)/∂s
//
// A row belongs to a team of thread blocks, which hold it in their shared memory, a slice of the
// columns each: 3 · N · V elements of traffic, 2 · N · V without a gradient. As on the CPU
// (cpu/kernels.cpp, which says why the fusion is legal) all that an element's gradient needs of the
// other columns is a handful of sums (statistics.h). The gradient is written over the student's
// slice in shared memory and stored from there. While a row is computed the copy engine brings the
// next one.
// Rows that are too long for shared memory (Plan::stages is 0) are read from memory in every sweep,
// from the L2 cache where the plan fits it.
#pragma once

#include "cuda/kept_row.h"

namespace kdk {
namespace gpu {

// What `prepare` leaves in the scratch memory.
struct Mean {
  TwoFloats inverse;
  bool empty;
};

// What a row is to come to, from its label and weight.
struct Wanted {
  bool counts, bad_label;
  bool main;  // it has a share in loss and gradient
  bool read;
  float weight;
  std::int64_t label;
};

KDK_DEVICE Wanted wanted_of(const RowTask& task, const Mean& mean, std::int64_t row) {
  Wanted wanted{};
  wanted.label = task.labels == nullptr ? -1 : task.labels[row];
  wanted.weight = task.weights == nullptr ? 1.0f : task.weights[row];
  wanted.counts = task.labels == nullptr || wanted.label != task.ignore_index;
  wanted.bad_label =
      task.labels != nullptr && wanted.counts && (wanted.label < 0 || wanted.label >= task.columns);
  if (wanted.bad_label) wanted.label = -1;
  wanted.main = task.main && wanted.counts && wanted.weight != 0 && !mean.empty;
  wanted.read = !wanted.bad_label && (wanted.main || (wanted.counts && task.want_terms));
  return wanted;
}

// A block's place in the columns, and the tensors' rows there.
struct Slice {
  std::int64_t first;
  int columns;

  KDK_DEVICE_METHOD Side of(const RowTask& task, const Rows& rows, std::int64_t row) const {
    char* begin = static_cast<char*>(row_pointer(rows, row / task.length, row % task.length));
    return {begin + first * size_of(rows.dtype), rows.dtype};
  }
};

KDK_DEVICE Slice slice_of(const RowTask& task, const Team& team) {
  const std::int64_t first = static_cast<std::int64_t>(team.rank) * task.plan.slice;
  const std::int64_t left = task.columns - first;
  if (left <= 0) return {task.columns, 0};
  return {first, left < task.plan.slice ? static_cast<int>(left) : task.plan.slice};
}

template <typename K>
KDK_DEVICE Side teacher_of(const RowTask& task, const Slice& slice, std::int64_t row) {
  if constexpr (K::kDistill) return slice.of(task, task.teacher, row);
  return {nullptr, task.teacher.dtype};
}

// ---- Rows in shared memory --------------------------------------------------------------------

// A row in one of the stages, as far from a 16-byte boundary as it is in memory.
struct Stage {
  Side student, teacher;
};

template <typename K>
KDK_DEVICE Stage stage_of(const RowTask& task, int stage, const Side& student,
                          const Side& teacher) {
  const auto room = [&](DType dtype) {
    return task.plan.slice * static_cast<int>(size_of(dtype)) + 16;
  };
  const int rooms = room(student.dtype) + (K::kDistill ? room(teacher.dtype) : 0);
  char* begin = shared_memory() + static_cast<int>(sizeof(Exchange)) + stage * rooms;
  return {{begin + misalignment(student), student.dtype},
          {begin + room(student.dtype) + misalignment(teacher), teacher.dtype}};
}

// A warp brings what bulk copies cannot take, and the end of a row's last chunk.
template <bool kWhole>
KDK_DEVICE void fetch_edges(const Side& memory, const Side& shared, Interior interior,
                            int columns) {
  for (int i = thread_rank(); i < interior.edges(columns); i += 32) {
    const int column = interior.edge(i);
    store_one(shared, column, load_one(memory, column));
  }
  if constexpr (kWhole) {
    const int end = (columns + kChunk - 1) / kChunk * kChunk;
    for (int column = columns + thread_rank(); column < end; column += 32) {
      store_one(shared, column, -kInfinity);
    }
  }
}

// One warp.
template <typename K>
KDK_DEVICE void fetch_row(const RowTask& task, const Slice& slice, std::int64_t row, int stage,
                          Exchange& exchange) {
  const Side student = slice.of(task, task.student, row);
  const Side teacher = teacher_of<K>(task, slice, row);
  const Stage room = stage_of<K>(task, stage, student, teacher);
  const Interior of_student = interior_of(student, slice.columns);
  const Interior of_teacher = interior_of(teacher, K::kDistill ? slice.columns : 0);
  if (thread_rank() == 0) {
    Barrier* arrived = &exchange.arrived[stage];
    const std::uint32_t student_bytes = bulk_bytes(student, of_student);
    const std::uint32_t teacher_bytes = bulk_bytes(teacher, of_teacher);
    barrier_expect(arrived, student_bytes + teacher_bytes);
    if (student_bytes > 0) {
      bulk_load(room.student.at(of_student.begin), student.at(of_student.begin), student_bytes,
                arrived);
    }
    if (teacher_bytes > 0) {
      bulk_load(room.teacher.at(of_teacher.begin), teacher.at(of_teacher.begin), teacher_bytes,
                arrived);
    }
  }
  fetch_edges<K::kWhole>(student, room.student, of_student, slice.columns);
  if constexpr (K::kDistill) {
    fetch_edges<K::kWhole>(teacher, room.teacher, of_teacher, slice.columns);
  }
}

// The gradient goes to memory: by a bulk copy what lies there as it does here, the rest by hand.
KDK_DEVICE void store_row(const Side& memory, const Side& shared, int columns) {
  const bool alike = misalignment(memory) == misalignment(shared);
  const Interior interior = alike ? interior_of(memory, columns) : Interior{0, 0};
  if (thread_rank() == 0 && interior.begin < interior.end) {
    bulk_store(memory.at(interior.begin), shared.at(interior.begin), bulk_bytes(memory, interior));
  }
  for (int i = thread_rank(); i < interior.edges(columns); i += block_threads()) {
    const int column = interior.edge(i);
    store_one(memory, column, load_one(shared, column));
  }
}

// ---- The rows in turn -------------------------------------------------------------------------

// compute(row, wanted, mean, team, loaded) for each of the team's rows, whose gradient it leaves in
// row.grad; it calls `loaded()` once, see evaluate(). Rows that it is not to read get theirs here.
template <typename K, typename Task, typename Compute>
KDK_DEVICE void for_each_row(const Task& task, const Compute& compute) {
  Team team = join_team(task.plan.team_blocks, task.plan.clusters ? nullptr : task.scratch);
  Exchange& exchange = *team.exchange;
  const Slice slice = slice_of(task, team);
  const Mean mean{{task.scratch->inverse[0], task.scratch->inverse[1]}, task.scratch->empty != 0};
  const bool want_grad = task.grad.data != nullptr;
  const int stages = task.plan.stages;
  const bool staged = K::kWhole || stages > 0;

  const auto fetch = [&](std::int64_t index, const Wanted& wanted, int stage) {
    if (!staged || thread_rank() >= 32) return;
    bulk_wait_read();  // what this stage held before is stored
    sync_warp();
    if (index < task.rows && wanted.read) fetch_row<K>(task, slice, index, stage, exchange);
  };
  const auto look_at = [&](std::int64_t index) {
    return index < task.rows ? wanted_of(task, mean, index) : Wanted{};
  };
  // Loaded a row ahead, for no row to begin with a wait for memory.
  float s_label = 0, t_label = 0;
  const auto load_labels = [&](std::int64_t index, const Wanted& wanted) {
    if (!K::kHard || !wanted.read) return;
    // A sparse teacher's row without a label, or one whose label is in another shard.
    if ((!K::kDistill || Task::kShard) && wanted.label < 0) return;
    const Slice from{wanted.label, 1};
    s_label = load_one(from.of(task, task.student, index), 0);
    if constexpr (K::kDistill) t_label = load_one(from.of(task, task.teacher, index), 0);
  };

  if (staged && thread_rank() == 0) {
    barrier_init(&exchange.arrived[0]);
    barrier_init(&exchange.arrived[1]);
  }
  Wanted coming = look_at(team.index);
  load_labels(team.index, coming);
  fetch(team.index, coming, 0);
  sync_block();

  int stage = 0, parities = 0;
  KDK_ROLLED
  for (std::int64_t index = team.index; index < task.rows; index += team.teams) {
    const Wanted wanted = coming;
    const std::int64_t next = index + team.teams;
    const int next_stage = stages == 2 ? stage ^ 1 : 0;
    bool fetched = stages != 2;
    Row row{};
    row.index = index;
    row.columns = slice.columns;
    row.first = slice.first;
    row.s_label = s_label;
    row.t_label = K::kDistill ? t_label : -kInfinity;
    row.student_cap = &task.student_cap;
    row.teacher_cap = &task.teacher_cap;
    if constexpr (!K::kWhole) {
      row.s_label = capped(s_label, *row.student_cap);
      row.t_label = capped(t_label, *row.teacher_cap);
    }
    const std::int64_t label = wanted.label - slice.first;
    row.label = label >= 0 && label < slice.columns ? static_cast<int>(label) : -kChunk;
    row.student = slice.of(task, task.student, index);
    row.teacher = teacher_of<K>(task, slice, index);
    const Side memory = want_grad ? slice.of(task, task.grad, index) : Side{};
    row.grad = memory;
    if (staged) {
      const Stage room = stage_of<K>(task, stage, row.student, row.teacher);
      row.student = room.student;
      row.teacher = room.teacher;
      row.grad = room.student;
      if (wanted.read) {
        barrier_wait(&exchange.arrived[stage], parities >> stage & 1);
        parities ^= 1 << stage;
      }
    }
    coming = look_at(next);
    const auto loaded = [&] {
      load_labels(next, coming);
      if (!fetched) fetch(next, coming, next_stage);
      fetched = true;
    };

    compute(row, wanted, mean, team, loaded);
    if (want_grad) {
      // Stored zeros, not products with 0: whatever the logits held, they change nothing.
      if (!wanted.main || wanted.bad_label) fill_row<K>(row, wanted.bad_label ? kNaN : 0.0f);
      const Side padding = Slice{0, 0}.of(task, task.grad, index);
      for (std::int64_t column = task.columns + team.rank * block_threads() + thread_rank();
           column < task.width; column += team.blocks * block_threads()) {
        store_one(padding, static_cast<int>(column), 0);
      }
    }
    if (staged) {
      fence_async();
      sync_block();
      if (want_grad) store_row(memory, row.grad, slice.columns);
      if (stages == 1) {
        sync_block();  // the edges are stored
        fetch(next, coming, 0);
      }
      sync_block();
    }
    stage = next_stage;
  }
  if (staged && thread_rank() == 0) bulk_wait_read();
  if (task.plan.clusters) sync_cluster();  // others may still read this block's shared memory
}

// ---- The kernel -------------------------------------------------------------------------------

KDK_DEVICE void write_losses(const RowTask& task, std::int64_t row, const Wanted& wanted,
                             RowLoss terms) {
  if (task.main) {
    float loss = 0;
    if (task.distill) loss += task.distill_weight * terms.distill;
    if (task.hard) loss += task.hard_weight * terms.hard;
    task.row_losses[row] = wanted.bad_label ? kNaN : wanted.main ? wanted.weight * loss : 0.0f;
  }
  if (task.distill || !task.others) {
    task.row_losses[task.rows + row] = terms.distill * task.distill_scale;
  }
  if (task.hard || !task.others) task.row_losses[2 * task.rows + row] = terms.hard;
}

template <typename K>
KDK_DEVICE void distill_rows(const RowTask& task) {
  const bool want_grad = task.grad.data != nullptr;
  for_each_row<K>(task, [&](const Row& row, const Wanted& wanted, const Mean& mean, Team& team,
                            const auto& loaded) {
    if (leads(team) && task.main && task.student.dtype == DType::kFloat16) {
      task.unscale[row.index] = mean.empty ? 0.0f : 1.0f;
    }
    RowLoss terms{0, 0};
    if (wanted.read) {
      const Pass pass{want_grad && wanted.main, multiply({wanted.weight, 0}, mean.inverse)};
      if constexpr (K::kDivergence == Divergence::kKept) {
        terms = evaluate_kept<K>(task, row, pass, team, loaded);
      } else {
        terms = evaluate<K>(task, row, pass, team, loaded);
      }
    } else {
      loaded();
    }
    if (wanted.bad_label) {
      terms = {kNaN, kNaN};
      if (leads(team)) *task.bad_label = row.index + 1;
    }
    if (leads(team)) write_losses(task, row.index, wanted, terms);
  });
}

}  // namespace gpu
}  // namespace kdk
