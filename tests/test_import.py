"""`import kdkernels` brings what every call needs and no more; the rest comes when asked for."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import kdkernels

ROOT = Path(__file__).parent.parent
NEEDED = {
    "kdkernels",
    "kdkernels._C",  # mapped, not read
    "kdkernels.autograd",
    "kdkernels.backends",
    "kdkernels.backends.bad_labels",
    "kdkernels.backends.eager",
    "kdkernels.backends.marks",
    "kdkernels.backends.native",
    "kdkernels.backends.registry",
    "kdkernels.backends.triton",
    "kdkernels.checks",
    "kdkernels.chunked",
    "kdkernels.functional",
    "kdkernels.kept",
    "kdkernels.loops",  # operators, by whose names a program that was exported calls them
    "kdkernels.modules",
    "kdkernels.objective",
    "kdkernels.ops",
    "kdkernels.pages",
    "kdkernels.source_checks",
    "kdkernels.sources",
}


def in_a_new_process(code):
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def modules_of(code, after):
    """Those that `code` imports beyond what the code before it did."""
    code = f"import sys\n{after}\nbefore = set(sys.modules)\n{code}\n"
    return set(in_a_new_process(code + "print(*set(sys.modules) - before)").split())


def test_import_loads_what_every_call_needs():
    found = modules_of("import kdkernels", after="import torch")
    ours = {name for name in found if name.partition(".")[0] == "kdkernels"}
    others = {name for name in found - ours if not name.startswith("__editable__")}
    assert ours <= NEEDED
    assert {name.partition(".")[0] for name in others} <= sys.stdlib_module_names


def test_a_call_on_the_cpu_loads_no_other_backend():
    call = "x = torch.randn(3, 5, requires_grad=True)\nkdkernels.kd_loss(x, x.detach()).backward()"
    found = modules_of(call, after="import torch, kdkernels")
    assert not {name for name in found if name.startswith(("kdkernels", "triton", "torch._dynamo"))}


def test_operators_of_every_backend_are_there():
    """What torch.export saved names them, and is loaded before the first call."""
    code = """
import torch, kdkernels
print(*(name for name in ("native", "triton") if hasattr(torch.ops.kdkernels.distill_rows, name)))
"""
    expected = ["native", "triton"]
    if kdkernels.backends.native._C is None:
        expected.remove("native")
    assert in_a_new_process(code).split() == expected


@pytest.mark.parametrize(
    "code",
    [
        "import kdkernels\nprint(kdkernels.cache.open.__name__)",
        "from kdkernels import cache\nprint(cache.open.__name__)",
        "import kdkernels.cache\nprint(kdkernels.cache.open.__name__)",
        "from kdkernels import *\nprint(cache.open.__name__)",
    ],
)
def test_the_cache_comes_when_it_is_named(code):
    assert in_a_new_process(code).split()[-1] == "TeacherCache"


def test_everything_public_is_listed():
    listed = in_a_new_process("import kdkernels\nprint(*dir(kdkernels))").split()
    assert set(kdkernels.__all__) <= set(listed)


def test_another_name_is_the_usual_error():
    with pytest.raises(AttributeError, match="module 'kdkernels' has no attribute 'caches'"):
        _ = kdkernels.caches


def test_the_benchmark_measures_both_ways(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    importing = importlib.import_module("benchmarks.importing")
    for bytecode in ("with", "without"):
        wall, cpu = importing.fastest(1, bytecode)
        assert 0 < cpu and 0 < wall < 60_000
