"""What the compiled CUDA kernels execute for each element of a row: `make kernel-report`, no GPU.

Instructions, exponentials and bytes are counted in the module's machine code: a kernel's sweeps
over a row are found as its loops, and of a loop's paths the shortest one that belongs to a dtype
and a temperature is counted. Results go to benchmarks/results/kernel-report.md and .csv.
"""

import argparse
import csv
import functools
import os
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kdkernels.backends import native

from . import machine_code

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"bfloat16": 2, "float32": 4}
WIDE = 16
NEAR = {"expm1_gap", "log1p_gap"}  # what a difference of near probabilities takes

# ---- Where in the source an instruction is from --------------------------------------------------


def source_of(file):
    """The file of csrc/ that the compiler saw under this name."""
    return machine_code.ROOT / "csrc" / file.rpartition("/csrc/")[2]


@functools.cache
def source_lines(file):
    try:
        return source_of(file).read_text().splitlines()
    except OSError:
        return []


@functools.cache
def function_around(file, line):
    """Functions begin in the first column, and nothing else there has a parenthesis."""
    for text in reversed(source_lines(file)[:line]):
        if match := re.match(r"(?:[A-Za-z_].*?[\s&*])?(\w+)\(", text):
            return match[1]
    return ""


def text_at(file, line):
    lines = source_lines(file)
    return lines[line - 1] if line <= len(lines) else ""


@functools.cache
def functions(frames):
    return {function_around(*frame) for frame in frames}


@functools.cache
def sweep_of(frames):
    """The function whose `for_each_chunk` or `for_each_logits` a place is in, with the one constant
    that it was called with, as in `add_chunks<true>`; None elsewhere."""
    inside = ("for_each_chunk", "for_each_logits")
    for i, frame in enumerate(frames):
        name = function_around(*frame)
        # The body of the loop is inlined into them, and belongs to the caller of the outer one.
        if name in inside or not set(inside) & functions(frames[:i]):
            continue
        for caller in frames[i:]:
            if match := re.search(r"\w+<K, (true|false|Care::\w+)>\(", text_at(*caller)):
                return f"{name}<{match[1]}>"
        return name
    return None


@functools.cache
def chunk():
    """Columns that a thread takes at a time, in each iteration of a sweep."""
    text = (machine_code.ROOT / "csrc" / "cuda" / "slice.h").read_text()
    return int(re.search(r"constexpr int kChunk = (\d+);", text)[1])


# ---- What an iteration executes ------------------------------------------------------------------


def is_wide(instruction, kind):
    """Logits and gradients move 16 bytes at a time, and nothing else in a sweep does."""
    opcode = instruction.opcode
    return machine_code.class_of(opcode) == kind and machine_code.width_of(opcode) == WIDE


def facts(instruction):
    """What tells the paths of a sweep's iteration apart."""
    kind = machine_code.class_of(instruction.opcode)
    if is_wide(instruction, "load"):
        return Counter(read=WIDE)
    if is_wide(instruction, "store"):
        return Counter(written=WIDE)
    if instruction.opcode == "HADD2.F32":
        return Counter(from_float16=1)
    if instruction.opcode.startswith("F2FP"):
        return Counter(["to_bfloat16" if ".BF16" in instruction.opcode else "to_float16"])
    if kind == "control" and piecewise(instruction.frames):
        return Counter(pieces=1)
    if kind not in ("ex2", "float"):
        return None
    if not NEAR.isdisjoint(functions(instruction.frames)):
        return Counter(near=1)
    for frame in instruction.frames:
        if function_around(*frame) == "hard_exponentials":
            if kind == "ex2":
                return Counter(exponentials=1)
            if "e_s[i]" in text_at(*frame):
                return Counter(powers=1)
    return None


@functools.cache
def piecewise(frames):
    return any(re.search(r"\b(load|store)_one\(", text_at(*frame)) for frame in frames)


def forbidden(instruction):
    """Chunks that are not whole are read and written element by element; and what a call executes
    is not in the loop."""
    if machine_code.class_of(instruction.opcode) in ("load", "store"):
        return piecewise(instruction.frames)
    return machine_code.is_call(instruction)


@functools.cache
def side_of(frames):
    """Which row a load reads: student, teacher or another."""
    for frame in reversed(frames):
        if match := re.search(r"\bload_(?:side|chunk)<.*?>\((?:row\.)?(\w+)", text_at(*frame)):
            return match[1]
    return None


def is_of(dtype, marks, sides):
    """Whether a path takes whole chunks, and student, teacher and gradient have this dtype."""
    size = chunk() * SIZES[dtype]
    if marks["read"] != sides * size or marks["written"] not in (0, size):
        return False
    if marks["from_float16"] or marks["to_float16"] or (size > WIDE and marks["to_bfloat16"]):
        return False
    return marks["pieces"] < chunk()  # threads meet once a tensor; else it asks for each element


def takes(temperature, marks):
    """How a path comes by e^s: at T = 1 it is e^{s/T}, at 2 its square, at others one more ex2."""
    powers, own = marks["powers"] >= chunk(), marks["exponentials"] >= chunk()
    return {"1": not powers and not own, "2": powers and not own, "other": own}[temperature]


@dataclass(frozen=True)
class Sweep:
    """A loop over a block's share of a row, and what a thread executes of it for one chunk."""

    name: str  # the function it is in
    address: int
    dtype: str
    temperature: str  # "1", "2", "other", or "any" where it makes no difference
    elements: int  # of each tensor
    read: int  # bytes
    written: int
    counts: Counter  # instructions by class
    loop: int  # instructions of all paths


def sweeps_of(code):
    """The sweeps that read rows, in the order of the code."""
    graph = machine_code.graph_of(code)
    reading = []
    for loop in machine_code.loops_of(graph):
        body = [one for block in sorted(loop.blocks) for one in graph.instructions(block)]
        loads = [one for one in body if is_wide(one, "load")]
        if loads:
            reading.append((loop, body, loads))
    found = []
    for loop, body, loads in reading:
        if any(other is not loop and other.header in loop.blocks for other, *_ in reading):
            continue  # the loop over rows, or over a gradient's sweeps
        names = Counter(filter(None, (sweep_of(one.frames) for one in body)))
        sides = len(set(filter(None, (side_of(one.frames) for one in loads))))
        if names and sides:
            name = names.most_common(1)[0][0]
            address = graph.instructions(loop.header)[0].address
            paths = machine_code.shortest_paths(graph, loop, facts, forbidden)
            for dtype, temperature, marks, counts in ways_through(paths, sides):
                bytes_moved = marks["read"], marks["written"]
                way = dtype, temperature, chunk(), *bytes_moved, counts, len(body)
                found.append(Sweep(name, address, *way))
    return found


def ways_through(paths, sides):
    """The path for each dtype and temperature: the shortest of those that compute differences as
    near rows need them, for all the elements that can. Where a sweep can write it does."""
    paths = [(Counter(dict(marks)), counts) for marks, counts in paths.items()]
    writes = any(marks["written"] for marks, _ in paths)
    paths = [(marks, counts) for marks, counts in paths if bool(marks["written"]) == writes]
    powers = any(takes("2", marks) for marks, _ in paths)

    def by_length(way):
        marks, counts = way
        return -marks["near"], counts.total()

    for dtype in SIZES:
        for temperature in ("1", "2", "other") if powers else ("any",):
            ways = [
                (marks, counts)
                for marks, counts in paths
                if is_of(dtype, marks, sides) and (not powers or takes(temperature, marks))
            ]
            if ways:
                yield dtype, temperature, *min(ways, key=by_length)


# ---- The kernels of a module ---------------------------------------------------------------------


@functools.cache
def divergences():
    text = (machine_code.ROOT / "csrc" / "common" / "divergence.h").read_text()
    return {number: name for name, number in re.findall(r"\bk(\w+) = (\d+),", text)}


PHASES = ("statistics", "terms", "gradient")  # csrc/common/args.h: Phase


@dataclass(frozen=True)
class Kernel:
    """Which one, by its template arguments (csrc/cuda/statistics.h: Kind)."""

    divergence: str  # or, of one that has none, its name
    distill: bool = False
    hard: bool = False
    whole: bool = False
    phase: str = ""  # of one for shards

    def __str__(self):
        terms = [term for term in ("distill", "hard") if getattr(self, term)]
        if not terms:
            return self.divergence
        name = f"{self.divergence} {'+'.join(terms)} {'whole' if self.whole else 'any'}"
        return f"{name} {self.phase}" if self.phase else name


def kernel_of(mangled):
    if match := re.search(r"DivergenceE(\d+)ELb([01])ELb([01])ELb([01])E", mangled):
        flags = (flag == "1" for flag in match.groups()[1:])
        phase = re.search(r"PhaseE(\d)", mangled)
        return Kernel(divergences()[match[1]], *flags, PHASES[int(phase[1])] if phase else "")
    match = re.search(r".*\d([a-z_]+_kernel)", mangled)
    return Kernel(match[1] if match else mangled)


@dataclass(frozen=True)
class Found:
    """A kernel for an architecture."""

    kernel: Kernel
    arch: str
    registers: int
    stack: int  # bytes
    shared: int  # bytes, beside what a launch asks for
    instructions: int
    sweeps: tuple


def number_of(arch):
    return int(re.search(r"\d+", arch)[0])


def of_cubin(cubin):
    """Everything in one cubin, {mangled name: (instructions, sweeps)}."""
    kernels = machine_code.parse(machine_code.listing(cubin))
    return {name: (len(code.instructions), sweeps_of(code)) for name, code in kernels.items()}


def kernels_of(module):
    """All kernels of a file that nvcc has compiled, sorted."""
    found = []
    usage = machine_code.resources(module)
    with tempfile.TemporaryDirectory() as folder:
        cubins = machine_code.cubins(module, folder)
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for cubin, kernels in zip(cubins, pool.map(of_cubin, cubins), strict=True):
                arch = machine_code.arch_of(cubin)
                for name, (instructions, sweeps) in kernels.items():
                    used = usage[arch, name]
                    memory = used["STACK"] + used["LOCAL"], used["SHARED"]
                    has = used["REG"], *memory, instructions, tuple(sweeps)
                    found.append(Found(kernel_of(name), arch, *has))
    if not any(one.sweeps for one in found):
        raise machine_code.Unreadable(
            f"{module}: no loop over a row can be told from the others: built without -lineinfo?"
        )
    return sorted(found, key=lambda one: (str(one.kernel), number_of(one.arch)))


def module_path():
    """The module's file, which has CUDA kernels."""
    if native._C is None:
        raise machine_code.Unreadable("kdkernels._C is not built: make, with a C++ compiler.")
    if not native._C.build_info()["cuda_version"]:
        raise machine_code.Unreadable(
            "kdkernels._C was built without CUDA: CONTRIBUTING.md says how to build with it."
        )
    return native._C.__file__


# ---- The report ----------------------------------------------------------------------------------

# Which sweeps a row takes, by how far its distributions are apart: see csrc/cuda/row.h.
WAYS = {
    "ForwardKL": {
        "far": ("add_chunks<false>", "gradient_sweep<Care::kFar>"),
        "near": ("add_chunks<false>", "gradient_sweep<Care::kNear>"),
    },
    "JSD": {
        "far": ("add_chunks<false>", "far_mean_slope", "gradient_sweep<Care::kFar>"),
        "near": ("add_chunks<false>", "mean_slope", "gradient_sweep<Care::kNear>"),
    },
}
UNITS = ("ex2", "lg2", "rcp")
KINDS = (*machine_code.CLASSES, *UNITS, "?")


def number(value):
    return f"{value:.4g}" if value else "–"


def per_element(sweeps):
    """Columns of the table for sweeps one after the other."""
    numbers = {unit: sum(s.counts[unit] / s.elements for s in sweeps) for unit in UNITS}
    numbers["read"] = sum(s.read / s.elements for s in sweeps)
    numbers["written"] = sum(s.written / s.elements for s in sweeps)
    return numbers, sum(s.counts.total() / s.elements for s in sweeps)


def main_kernels(found, divergence):
    """{architecture: its kernel for a teacher's logits and labels}. GPUs before 9.0 have none that
    holds whole rows in shared memory (csrc/cuda/dispatch.h), the kernel for all rows runs there."""
    chosen = {}
    for one in found:
        whole = number_of(one.arch) >= 90
        if one.kernel == Kernel(divergence, True, True, whole):
            chosen[one.arch] = one
    return chosen


def table(found, dtype="bfloat16", temperature="2"):
    """Markdown: what the sweeps of the main kernels execute for an element."""
    archs = sorted({one.arch for one in found}, key=number_of)
    lines = [
        f"| {dtype}, T = {temperature}, for an element | ex2 | lg2 | rcp | bytes read | written | "
        + " | ".join(f"{arch}, instructions" for arch in archs)
        + " |",
        "| --- |" + " ---: |" * (5 + len(archs)),
    ]
    for divergence, ways in WAYS.items():
        kernels = main_kernels(found, divergence)

        def add(title, names, kernels=kernels):
            cells, totals = {}, []
            for arch in archs:
                sweeps = [
                    sweep
                    for name in names
                    for sweep in kernels[arch].sweeps
                    if (sweep.name, sweep.dtype) == (name, dtype)
                    and sweep.temperature in (temperature, "any")
                ]
                if [sweep.name for sweep in sweeps] != list(names):
                    totals.append("?")  # not told from the other loops, or more than one of a name
                    continue
                numbers, total = per_element(sweeps)
                totals.append(f"{total:.1f}")
                for column, value in numbers.items():
                    cells.setdefault(column, {})[number(value)] = None
            columns = (
                " / ".join(cells.get(name, {"?": None})) for name in (*UNITS, "read", "written")
            )
            lines.append("| " + " | ".join([title, *columns, *totals]) + " |")

        for name in dict.fromkeys(name for names in ways.values() for name in names):
            add(f"{divergence}: `{name}`", (name,))
        for way, names in ways.items():
            add(f"{divergence}, a row that is {way}: {len(names)} sweeps", names)
        for title, cells in (
            ("registers of a thread", [str(kernels[arch].registers) for arch in archs]),
            ("instructions in all", [f"{kernels[arch].instructions:,}" for arch in archs]),
        ):
            lines.append(f"| {divergence}: {title} |" + " |" * 5 + f" {' | '.join(cells)} |")
    return "\n".join(lines)


def text(found, compiler=""):
    """The report in Markdown."""
    stack = max(one.stack for one in found)
    spilled = f"they have up to {stack} bytes of stack" if stack else "nothing is on the stack"
    return f"""\
# The CUDA kernels' machine code

`make kernel-report` counts this in the compiled module{compiler}, no GPU needed.
kernel-report.csv has all {len({one.kernel for one in found})} kernels; {spilled}.

{table(found)}

Of the kernels for a teacher's logits, labels and the gradient: on sm_80 the one that takes rows as
they lie in memory, on the others the one that has them in shared memory, whole and aligned. In an
iteration a thread takes {chunk()} elements of each row; counted is the shortest path through it,
without what happens seldom: a new maximum, the label, logits of −inf. Bytes are what threads load
and store, in memory on sm_80 and else in shared memory, to and from which bulk copies move each row
once more. A multiprocessor issues 128 of these instructions a clock, 16 of ex2, lg2 and rcp.

A row is *far* where D is more than 1/12 (JSD: between 1/24 and 0.8 of its largest), later where the
normalisers differ, and else *near*: then differences are taken before they are rounded, here those
of all elements, below D = 1e-3 in one more sweep, `normaliser_difference`. Rows whose student is
confident are read a second time, by `add_chunks<true>`. See csrc/cuda/row.h. float16 rows are
always near and sweep twice for their gradient; an iteration takes no more instructions than in
bfloat16. T = 1 saves the products of T = 2, T = 3 and 4 take one more an element and sweep, and
other T an ex2 instead: `other` in the CSV, which counts whole iterations.

The kernels for CPUs and Triton's are not in here; tests/test_triton_code.py reads the latter.
"""


COLUMNS = (
    "kernel arch registers stack_bytes shared_bytes code_instructions sweep address dtype "
    "temperature elements bytes_read bytes_written loop_instructions instructions"
).split()


def rows_of(found):
    """Of the CSV: a kernel's sweeps, what one iteration of a thread executes of each."""
    for one in found:
        has = one.kernel, one.arch, one.registers, one.stack, one.shared, one.instructions
        for s in one.sweeps:
            moved = s.elements, s.read, s.written, s.loop, s.counts.total()
            counts = (s.counts[kind] for kind in KINDS)
            yield *has, s.name, hex(s.address), s.dtype, s.temperature, *moved, *counts
        if not one.sweeps:
            yield has


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__)
    parser.add_argument("--module", help="another file that nvcc made (default: kdkernels._C)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.module:
            report = text(found := kernels_of(options.module))
        else:
            found = kernels_of(module_path())
            report = text(found, f" (nvcc {native._C.build_info()['cuda_version']})")
    except (machine_code.Unreadable, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "kernel-report.md").write_text(report)
    with (options.output / "kernel-report.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *KINDS])
        writer.writerows(rows_of(found))
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
