"""What only the Triton backend has: its table, programs that share a row, when it is chosen."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import NAMES, assert_right, assert_same_bits, problem, run
from oracle import assert_gradient_close, reference
from oracle_sparse import probabilities, sparse_reference

from kdkernels import TopK, kd_loss, ops
from kdkernels.backends import registry, triton, triton_launch
from kdkernels.kept import keep
from kdkernels.objective import make_objective

UNAVAILABLE = triton.unavailable("cpu")
interpreted = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"triton: {UNAVAILABLE}")
H200 = triton_launch.Device(lanes=32, multiprocessors=132, l2_bytes=60 << 20, nvidia=True)
MI300 = triton_launch.Device(lanes=64, multiprocessors=304, l2_bytes=4 << 20)
SMALL = (  # an A100's seventh, an RTX 3060, an A2
    triton_launch.Device(lanes=32, multiprocessors=14, l2_bytes=5 << 20, nvidia=True),
    triton_launch.Device(lanes=32, multiprocessors=28, l2_bytes=3 << 20, nvidia=True),
    triton_launch.Device(lanes=32, multiprocessors=10, l2_bytes=2 << 20, nvidia=True),
)
ARC = triton_launch.Device(lanes=32, multiprocessors=0, l2_bytes=0)


def test_importing_the_package_does_not_import_the_kernels():
    """Nor Triton with them, though `torch._dynamo` may."""
    code = "import sys, kdkernels; sys.exit(any('triton_kernels' in x for x in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_on_cpus_it_is_there_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(registry.native, "_C", None)
    assert registry.resolve("cpu", torch.float32) == "eager"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="triton: .*TRITON_INTERPRET=1.*eager: usable"):
        registry.resolve("cpu", torch.float32, "triton")
    monkeypatch.setattr(triton, "INSTALLED", False)
    with pytest.raises(RuntimeError, match="triton: triton is not installed"):
        registry.resolve("cpu", torch.float32, "triton")


def test_on_gpus_it_comes_after_compiled_kernels_and_before_pytorch(monkeypatch):
    order = [name for name in registry.BACKENDS if name in ("native", "triton", "eager")]
    assert order == ["native", "triton", "eager"]
    usable = registry.Backend("triton", lambda device_type: None, False, triton.DEVICE_TYPES)
    monkeypatch.setitem(registry.BACKENDS, "triton", usable)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert registry.resolve("cuda", torch.bfloat16) == "triton"  # ROCm
    assert registry.resolve("xpu", torch.bfloat16) == "triton"
    assert registry.resolve("cuda", torch.float64) == "eager"
    with pytest.raises(TypeError, match="backend='triton'.*no float64"):
        registry.resolve("cuda", torch.float64, "triton")


def test_a_gpu_that_triton_does_not_compile_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert "7.0 or newer" in triton.unavailable("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton.unavailable("cuda") is None


# ---- The table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [H200, MI300, ARC, *SMALL])
@pytest.mark.parametrize("columns", [1, 2, 8, 10, 1000, 4096, 4097, 32000, 128256, 262144])
def test_every_row_is_somebodys(device, columns):
    plan = triton_launch.make_plan(device, 8192, columns, 6 * columns)
    assert not plan.held or (8 * plan.chunks >= columns and plan.programs == 1)
    assert plan.rows == 1 or plan.held
    assert plan.teams * plan.rows >= 8192 or (plan.programs > 1 and plan.teams >= 1)
    assert all(x & (x - 1) == 0 for x in (plan.rows, plan.chunks, plan.programs, plan.warps))
    assert plan.warps <= 16  # what a group of 64-wide waves may have
    if not device.multiprocessors:
        assert plan.programs == 1


@pytest.mark.parametrize("device", [H200, MI300, *SMALL])
@pytest.mark.parametrize("columns", [32000, 128256, 262144])
def test_rows_in_work_fit_the_cache_and_the_device(device, columns):
    plan = triton_launch.make_plan(device, 8192, columns, 6 * columns)
    resident = device.multiprocessors * triton_launch.PROGRAMS_PER_MULTIPROCESSOR
    assert plan.teams * plan.programs <= resident or plan.programs == 1
    in_work = min(plan.teams, resident // plan.programs) * 6 * columns
    tiles = columns // (8 * plan.chunks)
    most = min(triton_launch.MAX_PROGRAMS, tiles, resident)
    assert in_work <= device.l2_bytes // 2 or 2 * plan.programs > most


def test_the_interpreter_has_no_programs_that_wait_for_others(monkeypatch):
    """Of CUDA tensors too, which is how Triton's kernels are debugged."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = triton_launch.device_of(torch.device("cuda", 0))
    assert triton_launch.make_plan(device, 8192, 262144, 6 * 262144).programs == 1


# ---- Programs that share a row -------------------------------------------------------------------


@pytest.fixture(params=[2, 4])
def shared_rows(request, monkeypatch):
    """Rows shared by programs that run at the same time, in threads, as a GPU runs them."""
    from triton.runtime import interpreter

    def plan(rows, columns):
        return triton_launch.Plan(1, 4, False, request.param, min(rows, 3), 1)

    class Here(threading.local):
        index = None

    here, builder = Here(), interpreter.interpreter_builder
    index = property(lambda _: here.index, lambda _, index: setattr(here, "index", index))
    atomic_add = builder.create_atomic_rmw

    def add_and_let_others_go_on(*args):
        time.sleep(0)
        return atomic_add(*args)

    def together(executor, *args, **kwargs):
        function, errors = executor.fn, []
        interpreter._patch_lang(function)
        arguments = {
            name: x if name in executor.constexprs else interpreter._implicit_cvt(x)
            for name, x in zip(executor.arg_names, args, strict=False)
        } | {name: x for name, x in kwargs.items() if name in executor.arg_names}

        def run_at(index):
            builder.set_grid_idx(index, 0, 0)
            try:
                function(**arguments)
            except BaseException as error:
                errors.append(error)

        (programs,) = executor.grid
        builder.set_grid_dim(programs, 1, 1)
        threads = [threading.Thread(target=run_at, args=(i,), daemon=True) for i in range(programs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "programs wait for each other"
        assert not errors, errors

    monkeypatch.setattr(triton_launch, "_interpreted", plan)
    monkeypatch.setattr(type(builder), "grid_idx", index, raising=False)
    monkeypatch.setattr(builder, "create_atomic_rmw", add_and_let_others_go_on)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", together)
    return request.param


@interpreted
@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_shared_by_programs(shared_rows, divergence, dtype):
    student, teacher, labels = problem(5, 150, dtype=dtype)
    labels[2] = -100
    options = dict(divergence=divergence, temperature=2.0)
    loss, grad = run(student, teacher, labels, backend="triton", **options)
    assert_right("triton", loss, grad, student, teacher, labels, **options)
    again = run(student, teacher, labels, backend="triton", **options)
    assert_same_bits(*zip(again, (loss, grad), strict=True))


@interpreted
def test_shared_rows_of_every_path(shared_rows):
    """Near rows, confident rows, smoothed labels, padding; both terms where one is wanted."""
    student, teacher, labels = problem(4, 90)
    teacher[0] = student[0] + 1e-3 * torch.randn(90)
    student[1, labels[1]] += 60.0
    options = dict(vocab_size=77, label_smoothing=0.1)
    labels %= 77
    for divergence in ("forward_kl", "jsd"):
        extra = dict(options, divergence=divergence)
        loss, grad = run(student, teacher, labels, backend="triton", **extra)
        assert_right("triton", loss, grad, student, teacher, labels, **extra)
        assert not grad[:, 77:].any()
    terms = kd_loss(student, teacher, labels, alpha=1.0, return_terms=True, backend="triton")
    alone = kd_loss(student, teacher, labels, alpha=0.0, backend="triton")
    assert terms.hard.item() == pytest.approx(alone.item(), rel=1e-6)


def of_one_shard(student, teacher, labels, objective):
    """The gradient by a shard that has all columns: nothing has to be merged."""
    inputs, options = (student, ops.as_list(teacher, student), labels, None), objective.options()
    found = torch.ops.kdkernels.shard_statistics.triton(*inputs, False, *options)
    merged = torch.cat([found, torch.zeros_like(found[:1])])
    if objective.divergence != "forward_kl":
        terms = torch.ops.kdkernels.shard_terms.triton
        _, mass, slope = terms(*inputs, merged, False, True, *options)
        merged[-1] = slope / mass
    grad = torch.empty_like(student)
    rest = None, merged, grad, objective.vocab_size
    unscale = torch.ops.kdkernels.shard_gradient_.triton(*inputs, *rest, *options)
    return (grad.double() * unscale.view(-1, 1)).to(grad.dtype)


@interpreted
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shards_whose_rows_programs_share(shared_rows, divergence, dtype):
    """Dense and sparse teachers; a near row, a confident one, and one that does not count."""
    student, teacher, labels = problem(5, 150, dtype=dtype)
    teacher[0] = student[0] + 1e-3 * torch.randn(150)
    student[1, labels[1]] += 60.0
    labels[2] = -100
    log_p, ids = teacher.double().log_softmax(-1).topk(9, -1)
    common = dict(divergence=divergence, label_smoothing=0.1, alpha=0.5)
    fixed = dict(beta=None, temperature=1.0, t_squared=True, ignore_index=-100, reduction="sum")
    objective = make_objective(vocab_size=150, has_labels=True, **common, **fixed)
    kept = keep(TopK(ids, log_p), labels, objective)
    common["reduction"] = "sum"
    grad = of_one_shard(student, teacher, labels, objective)
    assert_gradient_close(grad, reference(student, teacher, labels, **common), check_blind=False)
    p = probabilities(ids, log_p, "bucket", 150, 1.0)
    grad = of_one_shard(student, kept, labels, objective)
    exact = sparse_reference(student, ids, p, labels, **common)
    assert_gradient_close(grad, exact, check_blind=False)


@interpreted
def test_more_columns_than_32_bits_count():
    # Memory that nobody touches.
    logits = torch.empty(2**30, dtype=torch.bfloat16).view(1, -1)
    with pytest.raises(ValueError, match="less than 2\\^30 columns, got .* 1073741824"):
        kd_loss(logits, logits, backend="triton")


@interpreted
def test_bfloat16_gradients_are_rounded_although_the_interpreter_truncates():
    student, teacher, labels = problem(3, 40, dtype=torch.bfloat16)
    _, grad = run(student, teacher, labels, backend="triton", upstream=torch.tensor(1.0))
    wide = run(
        student.float(), teacher.float(), labels, backend="triton", upstream=torch.tensor(1.0)
    )[1]
    assert_same_bits((grad, wide.bfloat16()))


@interpreted
def test_the_short_ways_of_the_suite_change_no_bit():
    """triton_on_cpu.speed_up: the interpreter as it is computes the same."""
    code = (
        "import torch, sys; sys.path.insert(0, 'tests'); import triton_on_cpu\n"
        "if sys.argv[1] == 'short': triton_on_cpu.speed_up()\n"
        "from kdkernels import kd_loss\n"
        "torch.manual_seed(0)\n"
        "for divergence in ('forward_kl', 'jsd', 'skew_reverse_kl', 'tvd'):\n"
        "  s, t = (torch.randn(5, 99) * 4 for _ in range(2))\n"
        "  s[0] = t[0] + 1e-3; s[1, 3] = -torch.inf; s.requires_grad_()\n"
        "  y = torch.tensor([1, 2, -100, 4, 98])\n"
        "  loss = kd_loss(s, t, y, divergence=divergence, backend='triton')\n"
        "  loss.backward()\n"
        "  print(loss.item().hex(), *(x.hex() for x in s.grad.flatten().tolist()))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, way],
            capture_output=True,
            text=True,
            check=True,
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        ).stdout
        for way in ("short", "long")
    ]
    assert outputs[0] == outputs[1] and outputs[0].count("\n") == 4
