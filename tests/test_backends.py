"""Which backend computes a call: `backend=`, then `KDKERNELS_BACKEND`, then the first usable."""

import importlib.util
import math
import subprocess
import sys

import pytest
import torch
from conftest import INF, ROOT, UNAVAILABLE, assert_same_bits, problem, run

from kdkernels import KDLoss, kd_loss
from kdkernels.backends import marks, native, registry
from kdkernels.backends.registry import BACKENDS, ENVIRONMENT_VARIABLE, Backend, resolve


@pytest.fixture
def used(monkeypatch):
    """The names of the backends that `kd_loss` resolves to, call by call."""
    names = []
    monkeypatch.setattr(
        registry, "resolve", lambda *args: names.append(resolve(*args)) or names[-1]
    )
    return names


@pytest.fixture
def broken(monkeypatch):
    """A registry whose first backend takes no tensor of any device, and says why."""
    reason = "it was built for another planet"
    backends = {"broken": Backend("broken", lambda device: reason, takes_float64=True), **BACKENDS}
    monkeypatch.setattr(registry, "BACKENDS", backends)
    return reason


def test_the_variable_is_the_documented_one():
    assert ENVIRONMENT_VARIABLE == "KDKERNELS_BACKEND"


def test_automatic_choice_on_the_cpu(used):
    kd_loss(*problem(2, 5))
    assert used == ["eager" if UNAVAILABLE["native"] else "native"]


def test_automatic_choice_is_the_first_usable(broken):
    assert resolve("cpu", torch.float32) == ("eager" if UNAVAILABLE["native"] else "native")


def test_automatic_choice_on_other_devices():
    assert resolve("meta", torch.float32) == "eager"


def test_argument_is_honoured(backend, used):
    kd_loss(*problem(2, 5), backend=backend)
    assert used == [backend]


def test_variable_is_honoured(backend, used, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    kd_loss(*problem(2, 5))
    KDLoss()(*problem(2, 5))
    assert used == [backend, backend]


def test_argument_comes_before_the_variable(used, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    kd_loss(*problem(2, 5), backend="eager")
    assert used == ["eager"]


def test_variable_is_read_at_each_call(used, monkeypatch):
    criterion = KDLoss()
    default = "eager" if UNAVAILABLE["native"] else "native"
    for value, expected in (("eager", "eager"), ("", default), ("eager", "eager")):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)
        criterion(*problem(2, 5))
        assert used.pop() == expected
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        criterion(*problem(2, 5))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    criterion(*problem(2, 5))
    assert used == [default]


@pytest.mark.parametrize("name", ["nonsense", "Eager", "cpu", ""])
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError) as caught:
        kd_loss(*problem(2, 5), backend=name)
    for word in ("backend", repr(name), *BACKENDS):
        assert word in str(caught.value)


def test_unknown_name_in_the_variable_says_so(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    with pytest.raises(ValueError) as caught:
        kd_loss(*problem(2, 5))
    for word in (ENVIRONMENT_VARIABLE, "'nonsense'", *BACKENDS):
        assert word in str(caught.value)


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_an_unusable_choice_raises_and_says_why(broken, by, monkeypatch):
    """It never falls back: the message has the reason, and what could be used instead."""
    options = {}
    if by == "argument":
        options["backend"] = "broken"
    else:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "broken")
    with pytest.raises(RuntimeError) as caught:
        kd_loss(*problem(2, 5), **options)
    source = "backend" if by == "argument" else ENVIRONMENT_VARIABLE
    for word in (source, "'broken'", "cpu", broken, "eager"):
        assert word in str(caught.value)


def test_an_unusable_choice_names_every_reason(monkeypatch):
    """What is there, and why the rest is not."""
    backends = {
        "first": Backend("first", lambda device: "no licence", takes_float64=True),
        "second": Backend("second", lambda device: "no electricity", takes_float64=True),
        **BACKENDS,
    }
    monkeypatch.setattr(registry, "BACKENDS", backends)
    with pytest.raises(RuntimeError) as caught:
        kd_loss(*problem(2, 5), backend="first")
    for word in ("no licence", "second", "no electricity", "eager"):
        assert word in str(caught.value)


def test_reasons_of_this_machine_are_sentences():
    for reason in UNAVAILABLE.values():
        assert reason is None or ("circular" not in reason and len(reason) > 20)
    assert UNAVAILABLE["eager"] is None


def test_float64_falls_back_to_eager(used):
    student, teacher, labels = problem(2, 5, dtype=torch.float64)
    ours = run(student, teacher, labels)
    assert used == ["eager"] and ours[0].dtype == ours[1].dtype == torch.float64
    eager = run(student, teacher, labels, backend="eager")
    assert_same_bits(*zip(ours, eager, strict=True))


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_float64_on_a_chosen_float32_backend_is_an_error(compiled, by, monkeypatch):
    options = {}
    if by == "argument":
        options["backend"] = compiled
    else:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, compiled)
    with pytest.raises(TypeError) as caught:
        kd_loss(*problem(2, 5, dtype=torch.float64), **options)
    for word in ("float64", compiled, "eager"):
        assert word in str(caught.value)


def test_backends_agree(compiled):
    """Not by their bits, but much closer than any mistake would be."""
    student, teacher, labels = problem(6, 40)
    options = dict(temperature=2.0, label_smoothing=0.1)
    ours = run(student, teacher, labels, backend=compiled, **options)
    eager = run(student, teacher, labels, backend="eager", **options)
    torch.testing.assert_close(ours[0], eager[0], rtol=1e-5, atol=0)
    error = (ours[1] - eager[1]).abs().amax() / eager[1].abs().amax()
    assert 0 < error < 1e-5  # exactly 0 would mean that one of them was compared with itself


@pytest.mark.parametrize("beta", [1e-4, 1e-8, 1e-12, 1e-16, 1e-20])
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eager_mixture_of_little_weight_is_not_lost(beta, divergence, dtype):
    # a = (1/2, 1/2), b = (1, 0), m = βa + (1−β)b: KL(a ‖ m) = −½ log(β/2 (2 − β)) − log 2 + …
    a, b = torch.zeros(1, 2, dtype=dtype), torch.tensor([[0.0, -INF]], dtype=dtype)
    student, teacher = (a, b) if divergence == "skew_reverse_kl" else (b, a)
    loss = kd_loss(student, teacher, divergence=divergence, beta=beta, backend="eager")
    exact = -math.log(2) - 0.5 * (math.log(beta / 2) + math.log1p(-beta / 2))
    if divergence == "jsd":
        exact = beta * exact - (1 - beta) * math.log1p(-beta / 2)  # and KL(b ‖ m)
    assert abs(loss.item() / exact - 1) < 8 * torch.finfo(dtype).eps


def test_what_is_constant_breaks_no_compiled_graph():
    calls = []

    @marks.constant
    def asked():
        calls.append(importlib.util.find_spec("torch"))  # torch.compile cannot look into it
        return 2.0

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return x * asked()

    assert [compiled(torch.ones(())).item() for _ in range(3)] == [2.0] * 3
    assert len(calls) == 1


def test_the_import_brings_no_compiler():
    """Which takes as long as torch itself."""
    code = "import sys, torch; before = set(sys.modules); import kdkernels; "
    code += "print('torch._dynamo' in set(sys.modules) - before)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.stdout == "False\n", child.stderr


@pytest.mark.skipif(not hasattr(native._C, "cuda_usable"), reason="built without CUDA")
def test_asking_for_a_gpus_code_breaks_no_compiled_graph():
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return x + (native._no_code_for(0) is None)

    usable = native._no_code_for(0) is None
    assert compiled(torch.ones(())).item() == 1 + usable
