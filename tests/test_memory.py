"""What is read and what is allocated: logits stay where they are, with nothing of their size."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import cuda_for_cpu
import pytest
import torch
from conftest import DTYPES, problem, random_like
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkernels import Ensemble, LinearHead, Sampled, TopK, kd_loss

IGNORE = -100
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def memory_of_the_cpu(request):
    chosen = [x for x in request.node.callspec.params.values() if isinstance(x, str)]
    if any(name in chosen for name in cuda_for_cpu.NAMES):
        pytest.skip("its memory is the GPU's: test_cuda.py")


class Allocations(TorchDispatchMode):
    """The operators that make new storage of at least `size` bytes, and how much."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen, self.found = size, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)
        }
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if not torch.is_tensor(x) or x.untyped_storage()._cdata in known:
                continue
            if x.untyped_storage().nbytes() >= self.size:
                self.seen.append(x)  # kept, so that no later storage has its address
                self.found.append(str(function))
        return result


def allocations(student, teacher, labels=None, **options):
    """Which operators allocated as much as half the logits, in a whole forward and backward."""
    leaf = student.detach().requires_grad_()
    size = student.numel() * min(student.element_size(), teacher.element_size()) // 2
    with Allocations(size) as mode:
        loss = kd_loss(leaf, teacher, labels, **options)
        torch.autograd.grad(loss, leaf, random_like(loss))
    return mode.found


VIEWS = {
    "contiguous": lambda x: x,
    "columns": lambda x: x[..., 3:-2],
    "rows": lambda x: x[:, ::2],
    "sequences": lambda x: x[:, 1:-1],
    "both": lambda x: x[:, 1:-1, 5:],
    "batch": lambda x: x[1:],
    "transposed": lambda x: x.transpose(0, 1),
    "one sequence": lambda x: x[1],
    "one position": lambda x: x[:, 2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_with_unit_stride_are_not_copied(compiled, dtype, view, who):
    student, teacher, labels = problem(4, 6, 100, dtype=dtype)
    student, teacher, labels = view(student), view(teacher), view(student)[..., 0].long() * 0 + 3
    student = student if who in ("student", "both") else student.contiguous()
    teacher = teacher if who in ("teacher", "both") else teacher.contiguous()
    found = allocations(student, teacher, labels, temperature=2.0, backend=compiled)
    assert found == [f"kdkernels.distill_rows.{compiled}"]  # the gradient, and nothing else


@pytest.mark.parametrize(
    "options",
    [
        dict(shift=True),
        dict(vocab_size=90),
        dict(reduction="none"),
        dict(return_terms=False, label_smoothing=0.1),
        dict(token_weights=torch.rand(4, 6)),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_copy_no_logits(compiled, dtype, options):
    student, teacher, labels = problem(4, 6, 100, dtype=dtype)
    found = allocations(student, teacher, labels % 90, **options, backend=compiled)
    assert found == [f"kdkernels.distill_rows.{compiled}"]


def test_the_gradient_becomes_grad_without_a_copy(compiled, dtype):
    student, teacher, labels = problem(4, 6, 100, dtype=dtype)
    leaf = student.requires_grad_()
    with Allocations(student.numel() * student.element_size() // 2) as mode:
        kd_loss(leaf, teacher, labels, backend=compiled).backward()
    assert mode.found == [f"kdkernels.distill_rows.{compiled}"]
    assert leaf.grad.data_ptr() == mode.seen[0].data_ptr()


def test_other_strides_are_copied_once(compiled, dtype):
    student, teacher, labels = problem(4, 6, 200, dtype=dtype)
    found = allocations(
        student[..., ::2], teacher[..., ::2], labels // 2, temperature=2.0, backend=compiled
    )
    assert len(found) == 3 and found[2] == f"kdkernels.distill_rows.{compiled}"


def test_without_gradient_nothing_is_allocated(compiled, dtype):
    student, teacher, labels = problem(4, 6, 100, dtype=dtype)
    with Allocations(student.numel() * student.element_size() // 2) as mode:
        kd_loss(student[:, 1:], teacher[:, 1:], labels[:, 1:], backend=compiled)
    assert mode.found == []


def test_inplace_allocates_nothing(compiled, dtype):
    student, teacher, labels = problem(4, 6, 100, dtype=dtype)
    logits = student.requires_grad_() * 1
    with Allocations(student.numel() * student.element_size() // 2) as mode:
        loss = kd_loss(logits, teacher, labels, inplace=True, backend=compiled)
        torch.autograd.grad(loss, logits, random_like(loss), allow_unused=True)
    assert mode.found == []


# --- sources: logits that never exist in full -----------------------------------------------------

N, H, V = 64, 4, 512


def head(dtype=torch.float32, rows=N, columns=V, **options):
    return LinearHead(torch.randn(rows, H).to(dtype), torch.randn(columns, H).to(dtype), **options)


def made(student, teacher, size, labels, **options):
    """Which operators made storage of `size` bytes, with a head's or logits' gradients."""
    leaves = [student.hidden, student.weight] if isinstance(student, LinearHead) else [student]
    for x in leaves:
        x.requires_grad_()
    with Allocations(size) as mode:
        loss = kd_loss(student, teacher, labels, **options)
        torch.autograd.grad(loss, leaves, random_like(loss))
    return mode.found


def sparse(kind):
    logits = torch.randn(N, V)
    logprobs, ids = logits.log_softmax(-1).topk(3)
    return Sampled(ids, torch.ones(N, 3)) if kind == "counts" else TopK(ids, logprobs, kind)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("teacher", ["head", "bucket", "ensemble"])
def test_logits_of_a_head_exist_in_chunks(compiled, dtype, teacher, reduction):
    student = head(dtype, chunk_rows=8)
    if teacher == "head":
        teacher = head(dtype)
    elif teacher == "ensemble":
        teacher = Ensemble([head(dtype), head(dtype), sparse("renormalize")])
    else:
        teacher = sparse(teacher)
    labels = torch.randint(V, (N,))
    options = dict(reduction=reduction, backend=compiled)
    # A chunk in float32, and never more.
    assert made(student, teacher, 8 * (V + 1) * 4 + 1, labels, **options) == []


@pytest.mark.parametrize("kind", ["bucket", "renormalize", "counts"])
def test_a_sparse_teacher_takes_the_gradient_alone(compiled, dtype, kind):
    student, labels = torch.randn(N, V).to(dtype), torch.randint(V, (N,))
    found = made(student, sparse(kind), N * V, labels, backend=compiled)
    assert found == [f"kdkernels.distill_rows.{compiled}"]


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_a_mean_exists_in_chunks(compiled, mean):
    student, labels = torch.randn(N, V), torch.randint(V, (N,))
    members = [torch.randn(N, V), head(chunk_rows=8)]
    found = made(
        student, Ensemble(members, mean=mean), 8 * (V + 1) * 4 + 1, labels, backend=compiled
    )
    assert found == ["aten.new_empty.default"]  # the gradient


@pytest.mark.parametrize("grad_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_a_weight_takes_its_own_memory_and_as_much(compiled, grad_dtype):
    columns = 4096
    student, teacher = (
        head(torch.bfloat16, 2, columns, chunk_rows=1, grad_dtype=x) for x in (grad_dtype, None)
    )
    labels = torch.tensor([5, 4000])
    found = made(student, teacher, columns * H * 2, labels, backend=compiled)
    assert found == ["aten.new_empty.default"] * (1 if grad_dtype == torch.bfloat16 else 2)


def test_a_frozen_weight_has_no_gradient(compiled):
    student, teacher, labels = head(chunk_rows=1), head(), torch.randint(V, (N,))
    hidden = student.hidden.requires_grad_()
    with Allocations(V * H * 2) as mode:
        kd_loss(student, teacher, labels, backend=compiled).backward()
    assert mode.found == [] and hidden.grad is not None


# --- the process's own memory: what the kernels allocate is seen here too -------------------------


def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_of(function):
    """Bytes by which `function` raises the process's resident memory at its highest."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


measures_memory = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK) or "VmHWM" not in
    Path("/proc/self/status").read_text(),
    reason="needs Linux's /proc/self/clear_refs",
)  # fmt: skip


@measures_memory
@pytest.mark.parametrize("inplace", [False, True])
def test_peak_beyond_inputs_and_gradient(compiled, dtype, inplace):
    if compiled == "triton":
        pytest.skip("its memory is NumPy's, in Triton's interpreter")
    student, teacher, labels = problem(4, 33, 65_600, dtype=dtype)
    student, teacher, labels = (x[:, 1:] for x in (student, teacher, labels))  # two strides
    leaf = student.requires_grad_()
    logits = leaf.view_as(leaf)
    if inplace:
        base = torch.empty_strided(student.shape, student.stride(), dtype=dtype).fill_(0)
        logits = base.copy_(leaf)

    def step():
        loss = kd_loss(logits, teacher, labels, temperature=2.0, inplace=inplace, backend=compiled)
        return torch.autograd.grad(loss, logits, random_like(loss), allow_unused=True)

    gradient = 0 if inplace else student.numel() * student.element_size()
    matrix = student.numel() * 4
    kd_loss(student.detach()[:, :2], teacher[:, :2], labels[:, :2], backend=compiled)  # threads
    assert peak_of(step) <= gradient + 0.05 * matrix


# --- memory that must not be touched --------------------------------------------------------------

UNTOUCHABLE = """
import ctypes, mmap, sys
import torch
from kdkernels import kd_loss

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
backend = sys.argv[1]
if backend == "cuda_on_cpu":
    import cuda_on_cpu

    cuda_on_cpu.register()
if backend == "triton":
    import triton_on_cpu

    triton_on_cpu.speed_up()


def pages(count, dtype):
    memory = mmap.mmap(-1, count * PAGE)
    return torch.frombuffer(memory, dtype=dtype)


def forbid(x, first, count=1):
    address = x.untyped_storage().data_ptr() + first * PAGE
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(count * PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def step(student, teacher, labels=None, **options):
    student.requires_grad_()
    loss = kd_loss(student, teacher, labels, backend=backend, **options)
    if loss.requires_grad:
        loss.backward(torch.full_like(loss, 1.5))
        assert student.grad.isfinite().all()
    assert loss.isfinite().all()


def rows(count, width):
    x = pages(count * width // V, dtype).view(count, width)
    x.copy_(torch.randn(count, width))
    return x


def ignored_rows():
    for reduction in ("mean", "none"):
        student, teacher = rows(4, V), rows(4, V)
        for x in (student, teacher):
            forbid(x, 1), forbid(x, 3)
        step(student, teacher, torch.tensor([1, -100, 2, -100]), reduction=reduction)


def rows_without_weight():
    student, teacher = rows(4, V), rows(4, V)
    for x in (student, teacher):
        forbid(x, 0), forbid(x, 2)
    step(student, teacher, torch.tensor([1, 5, 2, 0]), token_weights=torch.tensor([0, 1., 0, 2]))


def last_position_of_a_shift():
    student, teacher = rows(4, V).view(2, 2, V), rows(4, V).view(2, 2, V)
    for x in (student, teacher):
        forbid(x, 1), forbid(x, 3)
    step(student, teacher, torch.tensor([[7, 1], [3, 2]]), shift=True)


def padding_columns():
    student, teacher = rows(3, 2 * V), rows(3, 3 * V)
    for row in range(3):
        forbid(student, 2 * row + 1)
        forbid(teacher, 3 * row + 1, 2)
    step(student, teacher, torch.tensor([0, 1, V - 1]), vocab_size=V, temperature=2.0)


def teacher_without_weight():
    student, teacher = rows(3, V), rows(3, V)
    forbid(teacher, 0, 3)
    step(student, teacher, torch.tensor([0, 1, 2]), alpha=0.0)


def beyond_the_end():
    # The last element of everything lies directly before a page that cannot be read.
    for width in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 130):
        def at_the_end(x):
            memory = pages(2, x.dtype)
            forbid(memory, 1)
            end = PAGE // x.itemsize
            return memory[end - x.numel() : end].view(x.shape).copy_(x)

        for count in (1, 3):
            student, teacher = (at_the_end(torch.randn(count, width).to(dtype)) for _ in "st")
            labels = at_the_end(torch.randint(width, (count,)))
            weights = at_the_end(torch.rand(count))
            step(student, teacher, labels, token_weights=weights, reduction="none")


for job in sys.argv[2:]:
    print(job, flush=True)
    name, scenario = job.split(":")
    dtype = getattr(torch, name)
    V = PAGE // dtype.itemsize  # a row of V columns fills one page
    globals()[scenario]()
print("untouched")
"""
NOT_COUNTED = (
    "ignored_rows",
    "rows_without_weight",
    "last_position_of_a_shift",
    "teacher_without_weight",
)


def untouched(backend, dtypes, scenarios):
    """Run in a process of its own, which dies where it touches a forbidden page."""
    jobs = [f"{str(dtype).removeprefix('torch.')}:{name}" for dtype in dtypes for name in scenarios]
    result = subprocess.run(
        [sys.executable, "-c", UNTOUCHABLE, backend, *jobs],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split()[-1:] == ["untouched"], result.stdout + result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_else_is_read(backend):
    """Not beyond the last column or row; and by compiled backends no row that does not count."""
    scenarios = ("padding_columns", "beyond_the_end")
    untouched(backend, DTYPES, scenarios if backend == "eager" else scenarios + NOT_COUNTED)
