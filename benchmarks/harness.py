"""What the benchmarks share: a correctness gate, interleaved timing, peak memory, result files.

A number is published only with what makes it comparable: everything that it is compared with ran
in the same process, in turns with it, and was checked against the float64 definition first.
"""

import contextlib
import csv
import datetime
import gc
import io
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import kdkernels
from kdkernels import kd_loss
from kdkernels.backends import native
from kdkernels.info import info

RESULTS = Path(__file__).parent / "results"
START = time.perf_counter()


class Missing(Exception):
    """This cannot be measured here; the text says why."""


# What is computed


@dataclass
class Problem:
    student: torch.Tensor  # (N, V), a leaf that requires grad
    teacher: torch.Tensor  # (N, V)
    labels: torch.Tensor  # (N,) int64

    def head(self, rows):
        """The first rows as a problem of its own, in the same memory."""
        student = self.student.detach()[:rows].requires_grad_()
        return Problem(student, self.teacher[:rows], self.labels[:rows])


def make_problem(rows, vocab, dtype, distinct=16, device="cpu"):
    """Logits shaped like a language model's: a Zipfian bulk, peaks, a student near its teacher.

    All rows favour the same classes, as words do. Half of the labels are the teacher's choice.
    Only the first `distinct` rows are drawn, which takes long, and then repeated.
    """
    g = torch.Generator().manual_seed(0)
    drawn = min(rows, distinct)
    teacher = 0.8 * torch.randn(drawn, vocab, generator=g)
    teacher -= 1.1 * (torch.randperm(vocab, generator=g) + 1.0).log()
    peaks = torch.randint(vocab, (drawn, 4), generator=g)
    teacher.scatter_add_(-1, peaks, torch.rand(drawn, 4, generator=g) * 8)
    student = 0.8 * teacher + 1.2 * torch.randn(drawn, vocab, generator=g)
    labels = torch.randint(vocab, (rows,), generator=g)
    source = torch.arange(rows) % drawn
    labels[::2] = teacher.argmax(-1)[source[::2]]
    source = source.to(device)
    student, teacher = (x.to(device, dtype)[source] for x in (student, teacher))
    return Problem(student.requires_grad_(), teacher, labels.to(device))


class Produced(torch.autograd.Function):
    """The student's logits as a model would produce them: no leaf, and free to be overwritten."""

    @staticmethod
    def forward(ctx, anchor, logits, received):
        ctx.received = received
        return logits.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.received.append(grad)
        return torch.zeros(()), None, None


class Step:
    """One call of a loss, with its backward pass or without. `prepare` is not part of the time.

    The gradient is allocated anew in every call, as it is in training: the last one is dropped by
    `prepare`, and between repeated runs by `run` itself. With `inplace` the logits are a copy,
    renewed by `prepare`, that the gradient overwrites.
    """

    def __init__(self, loss, problem, *, backward=True, inplace=False):
        self.loss, self.problem, self.backward, self.inplace = loss, problem, backward, inplace
        self.value, self.received = None, []
        self.logits = problem.student
        if inplace:
            self.buffer = torch.empty_like(problem.student)
            self.anchor = torch.zeros((), requires_grad=True)

    def prepare(self):
        self.value = self.problem.student.grad = None
        if self.inplace:
            self.received.clear()
            self.buffer.copy_(self.problem.student.detach())
            self.logits = Produced.apply(self.anchor, self.buffer, self.received)

    def run(self):
        self.problem.student.grad = None
        with torch.set_grad_enabled(self.backward):
            self.value = self.loss(self.logits, self.problem.teacher, self.problem.labels)
            if self.backward:
                self.value.backward()

    def gradient(self):
        """(N, V), or None without a backward pass."""
        return self.received[0] if self.received else self.problem.student.grad


# Whether it is right


def errors(outputs, problem, *, divergence, temperature, alpha, rows=None, chunk=16):
    """How far losses and gradients are from the float64 definition.

    Args:
        outputs: {name: (loss, gradient (R, V) or None)} of the mean over all of the problem's rows.
        rows: (R,) int64 on the CPU, those of the gradients; all by default.

    Returns:
        {name: (relative error of the loss, largest error of a gradient entry)}, the latter relative
        to the probabilities of student and teacher whose difference the entry is, and 0 without a
        gradient. NaN where the output is NaN.
    """
    count, zero = len(problem.labels), problem.student.new_zeros((), dtype=torch.float64)
    rows = torch.arange(count) if rows is None else rows
    others = torch.ones(count, dtype=torch.bool).index_fill_(0, rows, False).nonzero()[:, 0]
    options = dict(divergence=divergence, temperature=temperature, alpha=alpha)
    options.update(num_items=count, backend="eager")

    def logits(part):
        s, t = problem.student.detach()[part].double(), problem.teacher[part].double()
        return s, t, problem.labels[part]

    total, worst = zero.clone(), {name: zero for name in outputs}
    for start in range(0, len(others), chunk):
        total += kd_loss(*logits(others[start : start + chunk]), **options)
    for start in range(0, len(rows), chunk):
        here = slice(start, start + chunk)
        s, t, labels = logits(rows[here])
        loss = kd_loss(s.requires_grad_(), t, labels, **options)
        loss.backward()
        total += loss.detach()
        with torch.no_grad():
            hard = s.softmax(-1).scatter_add_(-1, labels[:, None], torch.ones_like(s[:, :1]))
            distill = (s / temperature).softmax(-1) + (t / temperature).softmax(-1)
            size = (alpha * temperature * distill + (1 - alpha) * hard) / count
            size = torch.maximum(size, s.grad.abs())  # reverse KL has a logarithm on top
            for name, (_, grad) in outputs.items():
                if grad is None:
                    continue
                error = ((grad[here].double() - s.grad).abs() / size).max()
                worst[name] = torch.maximum(worst[name], error)
    return {
        name: (float((loss.double() - total).abs() / total.abs()), float(worst[name]))
        for name, (loss, _) in outputs.items()
    }


def verdict(found, allowed):
    """'ok', or what is wrong: errors and tolerances of (loss, gradient)."""
    wrong = [
        f"{what} off by {error:.1e}, {tolerance:.1e} allowed"
        for what, error, tolerance in zip(("loss", "gradient"), found, allowed, strict=True)
        if not error <= tolerance  # NaN is wrong
    ]
    return "wrong: " + "; ".join(wrong) if wrong else "ok"


@contextlib.contextmanager
def noting(line):
    """What keeps a variant from being measured becomes the status of its line, and ends no run."""
    try:
        yield
    except Missing as why:
        line["status"] = f"missing: {why}"
    except torch.OutOfMemoryError:
        line["status"] = "out of memory"
    except Exception as error:  # another library's, or its compiler's
        text = str(error).strip().partition("\n")[0]
        line["status"] = f"failed: {type(error).__name__}: {text}"


# How long it takes


def interleave(steps, rounds, *, repeat=1):
    """Run the steps in turns, so that what changes on the machine changes for all of them.

    Args:
        steps: {name: Step, or anything with `prepare` and `run`}, each run before (the check of
            what it computes is its warm-up).
        rounds: times each is measured.
        repeat: calls of `run` in one measurement.

    Returns:
        {name: [seconds of a call, one for each round]}.
    """
    seconds = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                step.prepare()
                start = time.perf_counter()
                for _ in range(repeat):
                    step.run()
                seconds[name].append((time.perf_counter() - start) / repeat)
    finally:
        gc.enable()
    return seconds


class Copy:
    """The yardstick: a copy into memory that is already there."""

    def __init__(self, elements):
        self.source, self.target = torch.ones(elements), torch.zeros(elements)
        self.bytes = 2 * self.source.nbytes

    def prepare(self):
        pass

    def run(self):
        self.target.copy_(self.source)


def spread(name, values):
    """The median, lowest and highest as fields of a record."""
    median, low, high = statistics.median(values), min(values), max(values)
    return {name: median, f"{name}_min": low, f"{name}_max": high}


class Gpu:
    """The current CUDA device: how long a call takes on it, and how much memory."""

    device = "cuda"

    def __init__(self):
        self.properties = torch.cuda.get_device_properties()
        self.ballast = torch.empty(2**30, dtype=torch.uint8, device=self.device)

    def seconds(self, run):
        """What `run` takes when it is queued behind other work, as in training.

        The writes before it take the GPU a millisecond. Meanwhile the CPU can queue the call, so
        that what Python takes for that shows only where the GPU would wait for it in training too.
        They also leave nothing of the call before in the L2 cache.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            self.ballast.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, run):
        """Bytes of tensors that `run` takes at its peak above what there is before it."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    def release(self):
        """Give back what nobody holds any more, for a call that may need all of it."""
        gc.collect()
        torch.cuda.empty_cache()

    def facts(self):
        """What a number depends on, for `machine`. The clocks are those of this moment."""
        fields = "uuid,driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            answer = ""
        software = info()
        return {
            "gpu": self.properties.name,
            **smi_facts(answer, str(self.properties.uuid)),
            "torch built for": software["torch built for"],
            "triton": software["triton"],
        }


def smi_facts(answer, uuid):
    """The driver and the clocks of a GPU in what nvidia-smi says of all of them."""
    lines = [fields for line in answer.splitlines() if len(fields := line.split(", ")) == 6]
    here = [fields for fields in lines if uuid in fields[0] or len(lines) == 1]
    if not here:
        return {"driver": "unknown", "clocks": "unknown"}
    _, driver, sm, sm_max, memory, memory_max = here[0]
    clocks = f"SM {sm} of {sm_max} MHz, memory {memory} of {memory_max} MHz"
    return {"driver": driver, "clocks": clocks}


def gpu():
    """The `Gpu` to measure on; raises Missing."""
    if not torch.cuda.is_available():
        raise Missing("torch sees no CUDA device")
    return Gpu()


# How much memory it takes


def in_fresh_process(function, *args):
    """What function(*args) returns in a process of its own.

    Its malloc gives freed buffers back to the system, and takes new ones from there: what the
    process was able to keep from before would not show in its peak.
    """
    context = multiprocessing.get_context("spawn")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # read by glibc when a process starts
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *args).result()
    except BrokenExecutor as error:
        raise Missing("the process ended without an answer, perhaps out of memory") from error
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def memory(matrix, function, *args):
    """What a call takes beyond inputs and gradients, as fields of a record; none if that fails.

    Args:
        matrix: bytes of what the peak is compared with.
        function: (*args) -> (bytes at the peak above the inputs, those that are the gradients').
    """
    try:
        peak, gradient = in_fresh_process(function, *args)
    except Missing as missing:
        say(str(missing))
        return {}
    beyond = peak - gradient
    return {
        "peak_mb": beyond / 1e6,
        "peak_percent": 100 * beyond / matrix,
        "gradient_mb": gradient / 1e6,
    }


def peak_above(step):
    """Bytes of resident memory that `step.run` takes at its peak above what there is before it."""
    step.prepare()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _status("VmRSS")
        step.run()
        return _status("VmHWM") - before
    except OSError as error:
        raise Missing(f"peak memory is read from Linux's /proc: {error}") from error


def _status(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


# What is said and kept


def say(text):
    print(f"[{time.perf_counter() - START:4.0f} s] {text}", file=sys.stderr, flush=True)


def machine():
    """What a number depends on that its benchmark does not choose."""
    return {
        "cpu": info()["cpu"],
        "instruction set": native._C.isa_level() if native._C else "native part not built",
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _commit():
    git = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def slug(cpu):
    """A file name for a processor: 'Intel(R) Xeon(R) …' -> 'intel-xeon-…'."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", cpu.lower())).strip("-")


def text_table(header, rows):
    """Aligned columns, the first to the left and the others to the right; no empty columns."""
    cells = [header, *rows]
    used = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    cells = [[row[i] for i in used] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(used))]
    lines = []
    for first, *others in cells:
        right = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)


def markdown_table(header, rows):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def write(folder, name, document, markdown):
    """Write name.json (all of it), name.csv (its "rows", with the machine) and name.md."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    rows = [{**row, **document["machine"]} for row in document["rows"]]
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / f"{name}.csv").write_text(text.getvalue(), encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown + "\n", encoding="utf-8")
