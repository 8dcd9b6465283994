"""Does the suite notice when the CUDA kernels are wrong? `make mutants`, most of an hour.

Edits a copy of the tree, one mistake at a time, and runs on it what needs no GPU: test_kernels of
csrc/tests/cuda_on_cpu, then a part of the Python tests on the backend "cuda_on_cpu". At least 95 %
of the mistakes have to be caught. Names, or parts of them, as arguments: only these.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cuda_on_cpu

ROOT = cuda_on_cpu.ROOT
BUILD = cuda_on_cpu.BUILD.relative_to(ROOT)
COPIED = ("csrc", "kdkernels", "tests", "CMakeLists.txt", "pyproject.toml")
# Most of the time goes into compiling; what the optimiser makes of a mistake is not the question.
# Of what GPUs do not let pass, x86 does not complain about addresses by itself.
SETTINGS = (
    *cuda_on_cpu.SETTINGS,
    "-DKDK_BUILD_TESTS=ON",
    "-DKDK_SANITIZE=alignment",
    "-DCMAKE_BUILD_TYPE=Debug",
    "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
)
# Those that catch most come first; a survivor costs all of them.
PYTHON_TESTS = (
    "tests/test_hazards_use.py",
    "tests/test_hazards.py",
    "tests/test_padding_and_shift.py",
    "tests/test_functional.py",
    "tests/test_autograd.py",
    "tests/test_regressions_objective.py",
    "tests/test_exactness.py::test_n7_gradient_row_sum_where_the_slopes_are_large",
    "tests/test_exactness.py::test_n5_float16_mean_under_a_loss_scale[cuda_on_cpu-forward_kl-1000]",
)
SLOW = "h26_large or h27_more or h31 or whole_leading or regression_70"
BUILD_LIMIT, TEST_LIMIT = 900, 600  # seconds
REQUIRED = 0.95


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in csrc
    old: str  # there exactly once
    new: str
    why: str
    survives: str = ""  # why no test can catch it


MUTANTS = (
    # ---- Barriers and asynchronous copies --------------------------------------------------------
    Mutant(
        "dropped barrier: warps of a reduction",
        "cuda/team.h",
        "  }\n  sync_block();\n  const int warps",
        "  }\n  const int warps",
        "a warp reads the others' sums before they are there",
    ),
    Mutant(
        "dropped barrier: blocks of a cluster",
        "cuda/team.h",
        "    sync_cluster();\n    return;",
        "    return;",
        "a block reads another one's sums before they are there",
    ),
    Mutant(
        "dropped barrier: the last one of a cluster",
        "cuda/distill_kernel.h",
        "  if (task.plan.clusters) sync_cluster();",
        "",
        "a block ends while others still read its shared memory",
    ),
    Mutant(
        "dropped barrier: memory team, the block's other threads",
        "cuda/team.h",
        "team.met);\n  }\n  sync_block();",
        "team.met);\n  }",
        "only the first thread has waited for the other blocks",
    ),
    Mutant(
        "dropped wait: memory team",
        "cuda/team.h",
        "    memory_await(&team.scratch->arrivals[team.index], team.met);\n",
        "",
        "a block reads another one's sums before they are there",
    ),
    Mutant(
        "dropped barrier: after a row",
        "cuda/distill_kernel.h",
        "      sync_block();\n    }\n    stage = next_stage;",
        "    }\n    stage = next_stage;",
        "a warp fetches into a stage from which others still store the edges",
    ),
    Mutant(
        "dropped barrier: edges stored, one stage",
        "cuda/distill_kernel.h",
        "        sync_block();  // the edges are stored\n",
        "",
        "with one stage the next row arrives over this one's gradient",
    ),
    Mutant(
        "dropped barrier: before the gradient is stored",
        "cuda/distill_kernel.h",
        "      fence_async();\n      sync_block();",
        "      fence_async();",
        "the copy engine stores what other threads have not written yet",
    ),
    Mutant(
        "dropped barrier: before the first row",
        "cuda/distill_kernel.h",
        "  fetch(team.index, coming, 0);\n  sync_block();",
        "  fetch(team.index, coming, 0);",
        "other warps wait on a barrier that is not initialised yet",
    ),
    Mutant(
        "missing fence_async",
        "cuda/distill_kernel.h",
        "      fence_async();\n",
        "",
        "the copy engine does not see what was written by ordinary stores",
    ),
    Mutant(
        "missing wait on the bulk copy",
        "cuda/distill_kernel.h",
        "        barrier_wait(&exchange.arrived[stage], parities >> stage & 1);\n",
        "",
        "the row is read before it has arrived",
    ),
    Mutant(
        "wrong stage parity",
        "cuda/distill_kernel.h",
        "        parities ^= 1 << stage;\n",
        "",
        "from a stage's second row on nobody waits",
    ),
    Mutant(
        "wrong stage's parity",
        "cuda/distill_kernel.h",
        "parities ^= 1 << stage;",
        "parities ^= 1;",
        "the second stage's parity never flips",
    ),
    Mutant(
        "bulk store without wait before reuse",
        "cuda/distill_kernel.h",
        "    bulk_wait_read();  // what this stage held before is stored\n",
        "",
        "the next row overwrites a gradient that is still being stored",
    ),
    Mutant(
        "bulk store without wait at the end",
        "cuda/distill_kernel.h",
        "  if (staged && thread_rank() == 0) bulk_wait_read();\n",
        "",
        "the block's shared memory is gone while it is still being stored",
    ),
    Mutant(
        "too few bytes expected",
        "cuda/distill_kernel.h",
        "barrier_expect(arrived, student_bytes + teacher_bytes);",
        "barrier_expect(arrived, student_bytes);",
        "nobody waits for the teacher's row",
    ),
    Mutant(
        "next row fetched into the stage in use",
        "cuda/distill_kernel.h",
        "stages == 2 ? stage ^ 1 : 0;",
        "0;",
        "two stages are there for one to be computed while the other is filled",
    ),
    # ---- Teams -----------------------------------------------------------------------------------
    Mutant(
        "exchange slots not double-buffered",
        "cuda/team.h",
        "  team.turn ^= 1;\n",
        "",
        "a reduction overwrites what slower warps still read of the one before",
    ),
    Mutant(
        "wrong cluster rank: sums",
        "cuda/team.h",
        "return load_remote(&team.exchange->blocks[team.turn][field], rank);",
        "return load_remote(&team.exchange->blocks[team.turn][field], team.rank);",
        "every block adds up its own sums only",
    ),
    Mutant(
        "wrong cluster rank: columns",
        "cuda/distill_kernel.h",
        "static_cast<std::int64_t>(team.rank) * task.plan.slice;",
        "static_cast<std::int64_t>(team.index) * task.plan.slice;",
        "a block's columns depend on its rank in the team, not on the team",
    ),
    Mutant(
        "wrong rank in a memory team",
        "cuda/team.h",
        "block_rank() : block_index() % blocks;",
        "block_rank() : block_index() / blocks;",
        "several blocks take the same columns",
    ),
    Mutant(
        "memory team: wrong number of arrivals",
        "cuda/team.h",
        "team.met += static_cast<std::uint32_t>(team.blocks);",
        "team.met += 1;",
        "every reduction has as many arrivals as the team has blocks",
    ),
    Mutant(
        "memory team: arrivals not reset",
        "cuda/reduce_kernels.h",
        "task.scratch->arrivals[i] = 0;",
        ";",
        "the scratch memory has been used before",
    ),
    Mutant(
        "wrong neutral element: a row without finite logits so far",
        "cuda/row.h",
        "  Sums sums{-kInfinity, -kInfinity, 0, 0, 0, 0};",
        "  Sums sums{0, 0, 0, 0, 0, 0};",
        "logits far below 0 underflow against a maximum that none of them has",
    ),
    Mutant(
        "wrong neutral element: lanes without a warp",
        "cuda/row.h",
        "  const float neutral[6] = {-kInfinity, -kInfinity, 0, 0, 0, 0};",
        "  const float neutral[6] = {0, 0, 0, 0, 0, 0};",
        "blocks whose warps are no power of 2, teams whose blocks are none",
        survives="every plan has powers of 2 of both, and then no lane is neutral",
    ),
    Mutant(
        "wrong neutral element: maximum",
        "cuda/row.h",
        "    float max_s = sums.max_s, max_t = sums.max_t;",
        "    float max_s = 0, max_t = 0;",
        "a maximum below 0",
    ),
    Mutant(
        "maxima not raised on merge",
        "cuda/row.h",
        "    raise_maxima<K>(task, maxima[0], maxima[1], raised);\n",
        "    raised.max_s = maxima[0];\n    raised.max_t = maxima[1];\n",
        "sums relative to different maxima cannot be added",
    ),
    Mutant(
        "maxima not raised within a thread",
        "cuda/row.h",
        "if (max_s > sums.max_s || max_t > sums.max_t) raise_maxima<K>(task, max_s, max_t, sums);",
        "sums.max_s = max_s, sums.max_t = max_t;",
        "a thread's second chunk may have a larger maximum than its first",
    ),
    # ---- Columns, edges and tails ----------------------------------------------------------------
    Mutant(
        "off-by-one tail: last column",
        "cuda/slice.h",
        "column < columns; column +=",
        "column + 1 < columns; column +=",
        "a last chunk of one column is left out",
    ),
    Mutant(
        "off-by-one tail: one column too many is read",
        "cuda/slice.h",
        "out[i] = i < n ? load_one",
        "out[i] = i <= n ? load_one",
        "behind a row lies its neighbour",
    ),
    Mutant(
        "off-by-one tail: one column too many is written",
        "cuda/slice.h",
        "if (i < n) store_one(side, column + i, values[i]);",
        "if (i <= n) store_one(side, column + i, values[i]);",
        "behind a row lies its neighbour",
    ),
    Mutant(
        "wrong edge columns",
        "cuda/slice.h",
        "return i < begin ? i : i + (end - begin);",
        "return i < begin ? i : i + end;",
        "columns before and behind what bulk copies take",
    ),
    Mutant(
        "wrong edge columns in fetch",
        "cuda/distill_kernel.h",
        "store_one(shared, column, load_one(memory, column));",
        "store_one(shared, column, load_one(memory, i));",
        "the columns behind the interior are not those before it",
    ),
    Mutant(
        "wrong edge columns in store",
        "cuda/distill_kernel.h",
        "store_one(memory, column, load_one(shared, column));",
        "store_one(memory, i, load_one(shared, i));",
        "the columns behind the interior are not those before it",
    ),
    Mutant(
        "interior ends a unit late",
        "cuda/slice.h",
        "      columns - static_cast<int>(",
        "      columns + 16 / size - static_cast<int>(",
        "a bulk copy reads beyond the row",
    ),
    Mutant(
        "end of the last chunk not padded",
        "cuda/distill_kernel.h",
        "      store_one(shared, column, -kInfinity);",
        "      store_one(shared, column, 0);",
        "what lies behind the columns must not count",
    ),
    Mutant(
        "rows in shared memory without their distance from 16 bytes",
        "cuda/distill_kernel.h",
        "  return {{begin + misalignment(student), student.dtype},",
        "  return {{begin, student.dtype},",
        "bulk copies take 16 bytes from 16 bytes",
    ),
    Mutant(
        "stage without room for a row that begins late",
        "cuda/distill_kernel.h",
        "static_cast<int>(size_of(dtype)) + 16;",
        "static_cast<int>(size_of(dtype));",
        "a row that begins within 16 bytes reaches into the next one's room",
    ),
    Mutant(
        "alignment of the first row only",
        "cuda/dispatch.h",
        " && rows.stride_b % unit == 0 &&\n         rows.stride_l % unit == 0;",
        ";",
        "later rows begin elsewhere",
    ),
    Mutant(
        "int32 offset",
        "common/rows.h",
        "(b * rows.stride_b + l * rows.stride_l) * size_of(rows.dtype)",
        "static_cast<std::int32_t>(b * rows.stride_b + l * rows.stride_l) * size_of(rows.dtype)",
        "rows that lie more than 2^31 elements from the first",
    ),
    Mutant(
        "teacher offset with the student's stride",
        "cuda/distill_kernel.h",
        "  const Side teacher = slice.of(task, task.teacher, row);",
        "  Rows strided = task.student;\n"
        "  strided.data = task.teacher.data;\n"
        "  strided.dtype = task.teacher.dtype;\n"
        "  const Side teacher = slice.of(task, strided, row);",
        "the teacher may have other strides",
    ),
    Mutant(
        "padding columns not zeroed",
        "cuda/distill_kernel.h",
        "column < task.width; column +=",
        "column < task.columns; column +=",
        "the gradient of padded columns is 0 and not what was there",
    ),
    Mutant(
        "padding columns zeroed by one block's threads only",
        "cuda/distill_kernel.h",
        "column < task.width; column += team.blocks * block_threads()",
        "column < task.width; column += task.width",
        "more padding than threads",
    ),
    # ---- Which rows, and how much of them --------------------------------------------------------
    Mutant(
        "label column counted twice",
        "cuda/row.h",
        "        if (column + i == row.label) s[i] = t[i] = -kInfinity;",
        "",
        "the label's share is added by itself",
    ),
    Mutant(
        "label column not replaced",
        "cuda/row.h",
        "        if (column + i == row.label) parts[i] = label_gradient;",
        "",
        "the label's gradient is -sum of the others, not q",
    ),
    Mutant(
        "label of another block",
        "cuda/distill_kernel.h",
        "const std::int64_t label = wanted.label - slice.first;",
        "const std::int64_t label = wanted.label;",
        "a label is a column of one block, not of all",
    ),
    Mutant(
        "label logits of the row before",
        "cuda/distill_kernel.h",
        "      load_labels(next, coming);\n",
        "",
        "they are loaded a row ahead",
    ),
    Mutant(
        "z_rest includes the label",
        "cuda/row.h",
        "    sums.gap += own.gap;",
        "    sums.gap += own.gap;\n    sums.z_rest += own.z_s;",
        "the cross-entropy adds the label to it once more",
    ),
    Mutant(
        "ignored rows read",
        "cuda/distill_kernel.h",
        "(wanted.main || (wanted.counts && task.want_terms));",
        "(wanted.main || task.want_terms);",
        "whatever an ignored row holds, it has no terms",
    ),
    Mutant(
        "ignored rows count in the mean",
        "cuda/reduce_kernels.h",
        "task.labels[row] == task.ignore_index) continue;",
        "false) continue;",
        "the mean is over the rows that count",
    ),
    Mutant(
        "row of weight 0 gets a gradient",
        "cuda/distill_kernel.h",
        "wanted.counts && wanted.weight != 0 && !mean.empty;",
        "wanted.counts && !mean.empty;",
        "0 times what the row holds may be NaN or -0",
    ),
    Mutant(
        "rows without a share not filled",
        "cuda/distill_kernel.h",
        "if (!wanted.main || wanted.bad_label) fill_row",
        "if (wanted.bad_label) fill_row",
        "their gradient is 0, and in place they hold logits",
    ),
    Mutant(
        "label check <= instead of <",
        "cuda/distill_kernel.h",
        "wanted.label >= task.columns);",
        "wanted.label > task.columns);",
        "the first label that is out of range",
    ),
    Mutant(
        "gradient without 1 / denominator",
        "cuda/distill_kernel.h",
        "multiply({wanted.weight, 0}, mean.inverse)};",
        "TwoFloats{wanted.weight, 0}};",
        "the mean divides the gradient too",
    ),
    Mutant(
        "gradient without the row's weight",
        "cuda/distill_kernel.h",
        "multiply({wanted.weight, 0}, mean.inverse)};",
        "mean.inverse};",
        "a row's weight is in its gradient",
    ),
    Mutant(
        "num_items ignored",
        "cuda/reduce_kernels.h",
        "if (task.mean && task.num_items != nullptr) {",
        "if (false) {",
        "the caller says what the mean divides by",
    ),
    Mutant(
        "unscale inverted for float16",
        "cuda/row.h",
        "task.unscale[row.index] = 1 / prescale;",
        "task.unscale[row.index] = prescale;",
        "backward divides by what the forward pass multiplied with",
    ),
    Mutant(
        "unscale of the first row for all",
        "cuda/reduce_kernels.h",
        "args.grad.dtype == DType::kFloat16 ? row : 0];",
        "0];",
        "every float16 row has its own",
    ),
    Mutant(
        "peak of each thread by itself",
        "cuda/row.h",
        "absolute(scale.hi) * team_max(swept.peak, team);",
        "absolute(scale.hi) * swept.peak;",
        "one scale for the whole row",
    ),
    Mutant(
        "peak without the row's scale",
        "cuda/row.h",
        "const float peak = absolute(scale.hi) * team_max",
        "const float peak = team_max",
        "what float16 has to hold is the scaled gradient",
    ),
    Mutant(
        "upstream gradient on rows of weight 0",
        "cuda/reduce_kernels.h",
        "    if (args.weights != nullptr && args.weights[row] == 0) continue;\n",
        "",
        "0 times NaN",
    ),
    Mutant(
        "terms of the other launch overwritten",
        "cuda/distill_kernel.h",
        "if (task.hard || !task.others) task.row_losses[2",
        "if (true) task.row_losses[2",
        "the launch before has computed the cross-entropy that the loss leaves out",
    ),
    Mutant(
        "the launch for the other term writes a gradient",
        "cuda/task.h",
        "    before.grad = {};\n",
        "",
        "in place it destroys the logits that the main launch reads",
    ),
    # ---- The mathematics -------------------------------------------------------------------------
    Mutant(
        "lost T: exponentials",
        "cuda/task.h",
        "split_rate(kLog2E / objective.temperature);",
        "split_rate(kLog2E);",
        "softmax of s / T",
    ),
    Mutant(
        "lost T: gradient",
        "cuda/task.h",
        "split(objective.distill_weight / objective.temperature);",
        "split(objective.distill_weight);",
        "the gradient with respect to s, not to s / T",
    ),
    Mutant(
        "lost T: far forward KL",
        "cuda/row.h",
        "sums.gap / (task.temperature.hi * sums.z_t)",
        "sums.gap / sums.z_t",
        "differences of logits count by 1 / T",
    ),
    Mutant(
        "lost T: log ratio of the normalisers",
        "cuda/row.h",
        "multiply(log_ratio, task.temperature);",
        "log_ratio;",
        "it is taken from differences of logits, not of logits / T",
    ),
    Mutant(
        "swapped p and q: gradient",
        "cuda/row.h",
        "      gradient.student = divide(distill, {sums.z_s, 0}).hi;\n"
        "      gradient.teacher = divide(distill, {sums.z_t, 0}).hi;",
        "      gradient.student = divide(distill, {sums.z_t, 0}).hi;\n"
        "      gradient.teacher = divide(distill, {sums.z_s, 0}).hi;",
        "each normaliser belongs to its own side",
    ),
    Mutant(
        "swapped p and q: probabilities",
        "cuda/row.h",
        "  frame.inv_z_s = 1 / sums.z_s;\n  frame.inv_z_t = 1 / sums.z_t;",
        "  frame.inv_z_s = 1 / sums.z_t;\n  frame.inv_z_t = 1 / sums.z_s;",
        "each normaliser belongs to its own side",
    ),
    Mutant(
        "swapped p and q: mixture",
        "cuda/task.h",
        "  task.w_p = static_cast<float>(mixture.teacher);\n"
        "  task.w_q = static_cast<float>(mixture.student);",
        "  task.w_p = static_cast<float>(mixture.student);\n"
        "  task.w_q = static_cast<float>(mixture.teacher);",
        "beta is the teacher's share",
    ),
    Mutant(
        "missing -inf guard: differences from the maximum",
        "cuda/row.h",
        "return maximum == -kInfinity ? 0.0f : maximum;",
        "return maximum;",
        "-inf - -inf, where a whole chunk or block is -inf",
    ),
    Mutant(
        "missing -inf guard: the first maximum",
        "cuda/row.h",
        "if (!(to > from) || from == -kInfinity) return {0, 0};",
        "if (!(to > from)) return {0, 0};",
        "0 times e^{-inf} is fine, 0 times an infinite difference is not",
    ),
    Mutant(
        "missing -inf guard: a logit of -inf on both sides",
        "common/objective.h",
        "terms.gap = !kUnderflow || y > -kInfinity ? e_t * (x.hi - y) : 0.0f;",
        "terms.gap = e_t * (x.hi - y);",
        "0 times infinity, for classes that the teacher rules out",
    ),
    Mutant(
        "mean slope not divided",
        "cuda/row.h",
        "divide({fields[2], fields[3]}, {fields[0], fields[1]})",
        "TwoFloats{fields[2], fields[3]}",
        "rounded probabilities do not add up to 1",
    ),
    Mutant(
        "mean slope of the block only",
        "cuda/row.h",
        "  team_sum_pairs<2>(fields, team);",
        "",
        "the mean is over the row",
    ),
    Mutant(
        "far misuse: every forward KL",
        "cuda/row.h",
        "kl >= static_cast<float>(kFarKL) * (1 + absolute(log.hi)) && kl",
        "kl",
        "below the threshold q - p has to be taken by series",
    ),
    Mutant(
        "far misuse: float16",
        "cuda/row.h",
        "if (far && task.student.dtype != DType::kFloat16) {",
        "if (far) {",
        "float16 shows more of a gradient's bits than the far form has",
    ),
    Mutant(
        "near misuse: difference of the normalisers",
        "cuda/row.h",
        "  if (kl < static_cast<float>(kNearKL)) {",
        "  if (false) {",
        "of nearly equal rows the log of the rounded normalisers' ratio is noise",
    ),
    Mutant(
        "confident rows: no second sweep",
        "cuda/row.h",
        "add_chunks<K, true>(task, row)",
        "add_chunks<K, false>(task, row)",
        "a confident row's loss is as exact as its smallest terms",
        survives="on a CPU exp_of loses nothing that shows without its low part, on a GPU it does",
    ),
    Mutant(
        "confident rows: q - 1 at the label",
        "cuda/row.h",
        "((0 - sums.z_rest / normaliser) + task.smoothed_label);",
        "((exp_of(row.s_label - sums.max_s, kUnitRate) / normaliser - 1) + task.smoothed_label);",
        "it is lost to rounding there",
    ),
    Mutant(
        "distillation lost at the label",
        "cuda/row.h",
        "        label += visit<",
        "        visit<",
        "the label's column has both shares",
    ),
    Mutant(
        "label smoothing: sum over the padded chunk",
        "cuda/row.h",
        "offset[0] += i < n ? s[i] - sums.max_s : 0.0f;",
        "offset[0] += s[i] - sums.max_s;",
        "behind the last column lies -inf",
    ),
    Mutant(
        "label smoothing: sum of the block only",
        "cuda/row.h",
        "  team_sum(offset, team);",
        "",
        "the sum is over the row",
    ),
    Mutant(
        "label smoothing: label's share",
        "cuda/task.h",
        "static_cast<float>(objective.label_smoothing * (1 - 1 / columns));",
        "static_cast<float>(objective.label_smoothing);",
        "epsilon / V is the label's too",
    ),
    Mutant(
        "reverse KL of infinity",
        "cuda/row.h",
        "if (!(absolute(slope.value) < kInfinity)) {",
        "if (false) {",
        "where the teacher rules a class out the gradient is NaN as a whole",
    ),
    Mutant(
        "missing guard: no normaliser of the cross-entropy",
        "cuda/row.h",
        "const bool hard_ok = !K::kHard || hard_normaliser(row, sums) > 0;",
        "const bool hard_ok = true;",
        "a row of -inf, or with +inf or NaN, is NaN as a whole",
    ),
    Mutant(
        "wrong power of the exponential",
        "cuda/dispatch.h",
        "if (task.hard && task.power == 2)",
        "if (task.hard && task.power >= 2)",
        "e^s is the T-th power of e^{s/T}",
    ),
)


class Failed(Exception):
    """What a step of a mutant's trial said before it failed."""


def attempt(command, folder, limit):
    """Runs a command in a process group of its own -> its output, or Failed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"no end after {limit} s") from None
        raise
    if process.returncode:
        raise Failed(output or f"exit status {process.returncode}")
    return output


def make_copy(folder):
    """The tree and its built module, ready to be edited and built again and again."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    # Where the tests look for it: they find it configured and up to date.
    attempt(["cmake", "-S", ".", "-B", BUILD, "-G", "Ninja", *SETTINGS], folder, BUILD_LIMIT)
    where = "import kdkernels; print(kdkernels.__file__)"
    origin = attempt([sys.executable, "-c", where], folder, TEST_LIMIT).strip()
    assert Path(origin).is_relative_to(folder), f"the copy's tests would test {origin}"


def build(folder):
    targets = ["test_kernels", "_cuda_on_cpu"]
    attempt(["cmake", "--build", BUILD, "--target", *targets], folder, BUILD_LIMIT)


def failing_test(folder):
    """The first test that fails in the copy as it is built -> its name, or None."""
    try:
        attempt([folder / BUILD / "test_kernels"], folder, TEST_LIMIT)
    except Failed as failed:
        return "test_kernels: " + telling_part(
            str(failed), r"(?:what\(\)|failed|runtime error): *(.*)"
        )
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=no"]
    selection = ["-k", f"cuda_on_cpu and not ({SLOW})", *PYTHON_TESTS]
    try:
        attempt([*command, *selection], folder, TEST_LIMIT)
    except Failed as failed:
        reported, crashed = r"(?:FAILED|ERROR) tests/(.*?)(?: - |$)", r"(test_\w+\.py\", line .*)"
        return telling_part(str(failed), reported, crashed)
    return None


def telling_part(output, *patterns):
    """What the first pattern that is there has in its group; else the last line."""
    for pattern in patterns:
        if match := re.search(pattern, output, re.MULTILINE):
            return match[1][:100]
    return output.strip().splitlines()[-1][:100]


def trial(mutant, folder):
    """The first test that catches the mutant, or None."""
    path = folder / "csrc" / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        build(folder)
        return failing_test(folder)
    finally:
        path.write_text(text)


def main(wanted):
    os.nice(10)
    begin = time.monotonic()
    chosen = [m for m in MUTANTS if not wanted or any(name in m.name for name in wanted)]
    if not chosen:
        return f"none of the mutants is called {' or '.join(wanted)}"
    texts = {m.file: (ROOT / "csrc" / m.file).read_text() for m in chosen}
    stale = [m.name for m in chosen if texts[m.file].count(m.old) != 1 or m.old == m.new]
    if stale:
        return "the old text is not there exactly once: " + "; ".join(stale)

    caught = 0
    with tempfile.TemporaryDirectory(prefix="kdkernels-mutants-") as name:
        folder = Path(name).resolve()
        make_copy(folder)
        build(folder)
        if test := failing_test(folder):
            return f"without any edit: {test}"
        print(f"without any edit: passes, {time.monotonic() - begin:.0f} s", flush=True)
        for mutant in chosen:
            started = time.monotonic()
            try:
                test = trial(mutant, folder)
            except Failed as failed:
                return f"{mutant.name}: does not build\n{failed}"
            caught += test is not None
            verdict = "SURVIVED" if test is None else "caught"
            took = time.monotonic() - started
            what = test or mutant.survives or f"and should not: {mutant.why}"
            print(f"{verdict:8}  {took:4.0f} s  {mutant.name:60}  {what}", flush=True)
    share = caught / len(chosen)
    minutes = (time.monotonic() - begin) / 60
    print(f"{caught} of {len(chosen)} caught, {share:.1%}, in {minutes:.0f} minutes")
    return None if share >= REQUIRED else f"fewer than {REQUIRED:.0%} are caught"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
