"""Every example runs as a user runs it, from anywhere, and what it trains gets better."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"tiny.py", "small.py"}  # by the examples, and none themselves
# What an example needs: of the extra `train`, or the library it is for.
NEEDS = {
    "checkpoint_and_resume.py": "safetensors",
    "distill_offline_teacher.py": "zstandard",
    "distill_specialists.py": "scipy",
    "hf_trainer.py": "transformers",
    "keras_distiller.py": "keras",
    "lightning_module.py": "lightning",
    "modelopt_criterion.py": "modelopt",
    "nemo_kd_loss.py": "nemo_automodel",
    "teacher_topk_file.py": "zstandard",
    "trl_distillation.py": "trl",
}
EXAMPLES = sorted({path.name for path in ROOT.glob("examples/*.py")} - SHARED)


def test_the_examples_are_found():
    assert len(EXAMPLES) >= 15 and NEEDS.keys() < set(
        EXAMPLES
    )  # no example is no failure to pytest


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(tmp_path, name):
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    # One thread: other tests run on the other cores.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / name]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    # One line, of what there was to begin with, and of what is better.
    numbers = r"[\w ,'-]+: (\d\S*) [^,]+, (\d\S*) .+\n"
    first, last = re.fullmatch(numbers, run.stdout).groups()
    assert 0 <= float(last) < 0.97 * float(first)
    assert not list(tmp_path.iterdir())
