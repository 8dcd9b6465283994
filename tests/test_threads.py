"""The compiled rows on a CPU run in the threads that torch has, with no library of their own."""

import subprocess
import sys

import pytest

from kdkernels.backends import native

CODE = """
import os
import torch
import kdkernels as kdk

def openmp():
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if line.endswith(".so") or ".so." in line}
    return sorted(path for path in paths if "omp" in os.path.basename(path))

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
student, teacher = torch.randn(2, 64, 4096)
before = threads()
loss = kdk.kd_loss(student, teacher, backend="native")
of_rows = threads()
torch.set_num_threads(1)
assert torch.equal(kdk.kd_loss(student, teacher, backend="native"), loss)
torch.set_num_threads(3)
student.exp()
print(of_rows - before, threads() - of_rows, len(openmp()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(native._C is None, reason="the native part was not built")
def test_rows_run_in_the_threads_of_torch():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    started_for_rows, started_for_torch, libraries = map(int, result.stdout.split())
    assert (started_for_rows, started_for_torch, libraries) == (2, 0, 1)
