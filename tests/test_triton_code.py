"""The machine code of the Triton kernels, for GPUs that are not here: what the compiler reports."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels.backends import triton_launch
from kdkernels.objective import DIVERGENCES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100")
CACHE = ROOT / "build" / "triton"
REGISTERS = 65536  # of an NVIDIA multiprocessor


LONG = dict(rows=8192, columns=128256, dtype="bfloat16")
CALLS = (
    *(dict(LONG, divergence=name) for name in DIVERGENCES),
    dict(LONG, columns=4096, alpha=0.0, has_weights=True),
    dict(LONG, columns=1000, dtype="float16", has_labels=False, num_items=7.0),
    dict(LONG, kept=64, divergence="jsd"),
    dict(LONG, rows=100, softcap=30.0),
)

# What a value of an argument may not compile anew.
VALUES = (
    dict(),
    dict(temperature=2.0),
    dict(temperature=2.5, alpha=0.1, label_smoothing=0.1),
    dict(alpha=0.9, t_squared=False, ignore_index=1),
    dict(rows=1),
    dict(rows=16),
    dict(rows=3),
)


def launches(target, calls):
    """Of each call its launches, as tests/launch_triton.py tells them. It compiles what has changed
    since it was last compiled."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(CACHE)}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "launch_triton.py"), target, json.dumps(calls)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def of_the_rows(launched):
    (launch,) = (x for x in launched if x["kernel"] in ("distill_rows", "distill_kept_rows"))
    return launch


def test_no_value_compiles_anew():
    found = launches("sm_90", [dict(LONG, **options) for options in VALUES])
    codes = {}
    for launch in itertools.chain(*found):
        codes.setdefault(launch["kernel"], set()).add(launch["code"])
    assert sorted(codes) == ["distill_rows", "finish", "prepare", "scale_rows"]
    assert {kernel: len(found) for kernel, found in codes.items()} == dict.fromkeys(codes, 1)
    shared = [of_the_rows(launched)["programs"] for launched in found]
    assert shared == [132, 132, 132, 132, 4, 64, 12]


def test_programs():
    """A program takes many short rows, several share a long one; those that do run at once."""
    calls = [dict(rows=3, columns=columns) for columns in (1, 7, 1000, 40000)]
    found = [of_the_rows(launched) for launched in launches("sm_90", calls)]
    assert [(x["programs"], x["cooperative"]) for x in found] == [
        (1, False),
        (1, False),
        (3, False),
        (12, True),
    ]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_machine_code_for_shards(target):
    """As that of whole rows."""
    calls = [
        dict(LONG, shards=True, divergence="forward_kl"),
        dict(LONG, shards=True, columns=1000, dtype="float16"),
        dict(LONG, shards=True, kept=64),
    ]
    for options, launched in zip(calls, launches(target, calls), strict=True):
        phases = [x for x in launched if x["kernel"] != "prepare"]
        assert len(phases) == 3 and len(launched) == 6
        for launch in launched:
            assert not launch["spills"] and not launch["local"] and not launch["doubles"]
            threads = launch["threads"] * triton_launch.PROGRAMS_PER_MULTIPROCESSOR
            assert threads <= 1024
            if launch["cooperative"] and target.startswith("sm_"):
                assert launch["registers"] * threads <= REGISTERS
        assert phases[0]["wide"] and phases[2]["wide"]
        assert phases[0]["cooperative"] == (options["columns"] > 4096)


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target):
    """Nothing spills or is a double; logits are read 16 bytes at a time; programs that wait for
    each other run at the same time."""
    for options, launched in zip(CALLS, launches(target, CALLS), strict=True):
        print(options)
        for launch in launched:
            print("   ", launch)
            assert not launch["spills"] and not launch["local"] and not launch["doubles"]
            assert launch["wide"] or launch["kernel"] in ("prepare", "finish")
        rows = of_the_rows(launched)
        assert rows["cooperative"] == (options["columns"] > 4096)
        if rows["cooperative"]:
            threads = rows["threads"] * triton_launch.PROGRAMS_PER_MULTIPROCESSOR
            assert threads <= 1024
            if target.startswith("sm_"):
                assert rows["registers"] * threads <= REGISTERS
