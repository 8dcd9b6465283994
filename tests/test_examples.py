"""Every example runs as a user runs it, from anywhere, and what it trains gets better."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"tiny.py"}  # by the examples, and none itself
EXAMPLES = sorted({path.name for path in ROOT.glob("examples/*.py")} - SHARED)


def test_the_examples_are_found():
    assert len(EXAMPLES) >= 4  # no example is no failure to pytest


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(tmp_path, name):
    # One thread: other tests run on the other cores.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / name]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    first, last = re.fullmatch(r"loss: (\S+) at step 1, (\S+) at step \d+\n", run.stdout).groups()
    assert 0 < float(last) < 0.8 * float(first)
    assert not list(tmp_path.iterdir())
