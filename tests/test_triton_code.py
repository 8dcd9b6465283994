"""The machine code of the Triton kernels, for GPUs that are not here: what the compiler reports."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels.backends import triton

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100")
CACHE = ROOT / "build" / "triton"
REGISTERS = 65536  # of an NVIDIA multiprocessor


def run(script, *args):
    """What a script of tests/ prints. It compiles what has changed since it was last compiled."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(CACHE)}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), *args],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def test_no_value_compiles_anew():
    launched, of_widths = run("launch_triton.py")
    codes = {}
    for kernel, code, _, cooperative in launched:
        codes.setdefault(kernel, set()).add(code)
        assert cooperative == (kernel == "distill_rows")
    assert [programs for kernel, _, programs, _ in launched if kernel == "distill_rows"] == [
        *[12] * 4,
        *(4, 64, 132),
    ]
    # A program takes many rows of 1 or 7 columns.
    programs = [x[2:] for x in of_widths if x[0] == "distill_rows"]
    assert programs == [[1, False], [1, False], [3, False]]
    assert sorted(codes) == ["distill_rows", "finish", "prepare", "scale_rows"]
    assert {kernel: len(found) for kernel, found in codes.items()} == dict.fromkeys(codes, 1)


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target):
    """Nothing spills or is a double; logits are read 16 bytes at a time; programs that wait for
    each other run at the same time."""
    reports = run("compile_triton.py", target)
    assert len(reports) == 11
    for report in reports:
        print(report)
    assert not [x for x in reports if x["spills"] or x["local"] or x["doubles"]]
    for report in reports:
        plan = report["plan"]
        assert report["wide"] or plan is None, report
        if report["kernel"].endswith("long rows") and plan["programs"] > 1:
            threads = 32 * plan["warps"] * triton.PROGRAMS_PER_MULTIPROCESSOR
            assert threads <= 1024
            if target.startswith("sm_"):
                assert report["registers"] * threads <= REGISTERS, report
