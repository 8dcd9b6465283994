"""What every test shares: the backends and dtypes to run on, and exact comparisons."""

import gc
import importlib
import signal
from pathlib import Path

import triton_on_cpu  # isort: skip - before anything that looks at its setting
import cuda_for_cpu
import cuda_on_cpu
import pytest
import torch
from oracle import assert_gradient_close, assert_loss_close, gradient_bound, reference

from kdkernels import kd_loss
from kdkernels.backends.registry import BACKENDS, ENVIRONMENT_VARIABLE

# Every divergence at its default beta, at the ends of beta and at one lopsided value.
DIVERGENCES = (
    ("forward_kl", None),
    ("reverse_kl", None),
    ("jsd", None),
    ("jsd", 0.0),
    ("jsd", 0.2),
    ("jsd", 1.0),
    ("skew_forward_kl", None),
    ("skew_forward_kl", 0.6),
    ("skew_reverse_kl", None),
    ("skew_reverse_kl", 0.6),
    ("tvd", None),
)
NAMES = tuple(dict.fromkeys(name for name, _ in DIVERGENCES))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAN, INF = float("nan"), float("inf")
ROOT = Path(__file__).parent.parent

cuda_on_cpu.register()
cuda_for_cpu.register()
triton_on_cpu.speed_up()

EXACT_EAGER = ("eager", torch.float64)
UNAVAILABLE = {name: backend.unavailable("cpu") for name, backend in BACKENDS.items()}


def pytest_generate_tests(metafunc):
    """Run a test on what its arguments ask for, alone or together with `dtype`.

    `backend`: every backend; `compiled`: every one but eager; `exact`: those that meet the bars of
    hazards.md, the compiled ones and eager in float64. One that is not usable here is skipped by
    name.
    """
    compiled = [name for name in BACKENDS if name != "eager"]
    pairs = {
        "backend": [(name, dtype) for name in BACKENDS for dtype in _dtypes(name)],
        "compiled": [(name, dtype) for name in compiled for dtype in _dtypes(name)],
        "exact": [*((name, dtype) for name in compiled for dtype in DTYPES), EXACT_EAGER],
    }
    for fixture in pairs.keys() & set(metafunc.fixturenames):
        if "dtype" in metafunc.fixturenames:
            params = [_param(name, dtype) for name, dtype in pairs[fixture]]
            metafunc.parametrize((fixture, "dtype"), params)
        else:
            names = dict.fromkeys(name for name, _ in pairs[fixture])
            metafunc.parametrize(fixture, [_param(name) for name in names])


def _dtypes(name):
    return (*DTYPES, torch.float64) if BACKENDS[name].takes_float64 else DTYPES


def _param(name, *dtype):
    label = "-".join([name, *(str(x).removeprefix("torch.") for x in dtype)])
    reason = UNAVAILABLE[name]
    marks = pytest.mark.skip(reason=f"{name}: {reason}") if reason else ()
    return pytest.param(name, *dtype, marks=marks, id=label)


def pytest_sessionstart():
    gc.disable()  # nothing becomes garbage while tests are collected


def pytest_collection_finish():
    """What is there now stays: no search for garbage looks through all of the tests again."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()  # nanobind's modules count what is left at the end


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """What a shell starts in the background ignores Ctrl-C, and so do the children of that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_trained_alike(found, wanted, before, bound):
    """Weights (N,) after two trainings from the weights `before` (N,) differ by at most this share
    of how far the one that is wanted went."""
    error, way = ((x.double() - wanted.double()).norm() for x in (found, before))
    assert way > 0 and error <= bound * way, f"{error / way:.3g} of the way"


@pytest.fixture
def bench(monkeypatch):
    """The package as `python -m kdkernels bench` sees it, on one thread; torch's are put back."""
    monkeypatch.syspath_prepend(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    package = importlib.import_module("benchmarks")
    modules = "case command definition devices measure plots report results scaling suites targets"
    for name in modules.split():
        importlib.import_module(f"benchmarks.{name}")
    gc.freeze()  # it collects garbage often, and need not look through what others have left
    yield package
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def isolated(monkeypatch):
    """The environment chooses no backend, and random numbers start anew."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    torch.default_generator.manual_seed(0)  # the CPU alone: `torch.manual_seed` asks every device


def problem(*shape, dtype=torch.float32, teacher_dtype=None, spread=3.0):
    """Random student and teacher logits and labels, all different and none too far apart."""
    student = (torch.randn(shape) * spread).to(dtype)
    teacher = (torch.randn(shape) * spread).to(teacher_dtype or dtype)
    return student, teacher, torch.randint(shape[-1], shape[:-1])


def run(student, teacher, labels=None, *, upstream=None, **options):
    """(loss, gradient) of `kd_loss`, the student's own autograd state untouched.

    `upstream` is the gradient of the loss, random by default: 1 hides what backward does with it.
    """
    student = student.detach().requires_grad_()
    loss = kd_loss(student, teacher, labels, **options)
    (grad,) = torch.autograd.grad(
        loss, student, random_like(loss) if upstream is None else upstream
    )
    return loss.detach(), grad


def random_like(loss):
    """Upstream gradients, the same ones each time, of both signs and about 1."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(loss.shape, generator=generator, dtype=loss.dtype) + 0.1


def bits(x):
    return x.detach().contiguous().view(INTEGER[x.element_size()])


def assert_same_bits(*pairs):
    """Each actual equals its expected bit for bit: the sign of 0 counts, and NaN equals itself."""
    for actual, expected in pairs:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        if not torch.equal(bits(actual), bits(expected)):
            differ = (bits(actual) != bits(expected)).nonzero()
            where = tuple(differ[0].tolist())
            raise AssertionError(
                f"{len(differ)} of {actual.numel()} differ, first at {where}: "
                f"{actual[where].item()!r}, expected {expected[where].item()!r}"
            )


def assert_plus_zero(x):
    """Every element is +0, not merely equal to 0."""
    assert_same_bits((x, torch.zeros_like(x)))


def assert_right(
    backend,
    loss,
    grad,
    student,
    teacher,
    labels=None,
    *,
    upstream=None,
    check_blind=True,
    **options,
):
    """Loss and gradient of a generic problem against the oracle, componentwise.

    Compiled backends and float64 meet the bars of `oracle.assert_gradient_close`. Eager in float32
    need not: it is PyTorch's softmax, whose entries are a few roundings of the probabilities off.
    """
    upstream = random_like(loss) if upstream is None else upstream
    ref = reference(student, teacher, labels, upstream=upstream, **options)
    if backend != "eager" or grad.dtype == torch.float64:
        assert_loss_close(loss, ref, 2e-5)
        assert_gradient_close(grad, ref, check_blind=check_blind)
        return
    assert_loss_close(loss, ref, 2e-4)

    width, temperature = options.get("vocab_size"), options.get("temperature", 1.0)
    mass = torch.zeros_like(ref.grad)
    for x, at in ((student, temperature), (teacher, temperature), (student, 1.0)):
        mass[..., :width] += (x[..., :width].double() / at).softmax(-1)
    if labels is not None:
        mass.scatter_add_(-1, labels.clamp(min=0)[..., None], torch.ones_like(mass))
    assert torch.equal(grad.isfinite(), ref.grad.isfinite())
    off = (grad - ref.grad).abs() > 2.0**-15 * ref.scale[..., None] * mass + gradient_bound(ref)
    assert not off.any(), (
        f"{int(off.sum())} gradients are off, first at {tuple(off.nonzero()[0].tolist())}: "
        f"{grad[off][0].item()}, exact {ref.grad[off][0].item()}"
    )
