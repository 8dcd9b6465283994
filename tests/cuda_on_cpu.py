"""The backend "cuda_on_cpu": the CUDA kernels of csrc/cuda, run on CPU tensors by csrc/tests.

For tests only, and built by them, into build/cuda-on-cpu-*. It imitates a device whose blocks are
so small that short rows already take several of them, with two rows, one row or none in shared
memory, by the number of columns.
"""

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

from kdkernels import ops
from kdkernels.backends import native
from kdkernels.backends.registry import BACKENDS, Backend

NAME = "cuda_on_cpu"
SWITCH = "KDKERNELS_TEST_CUDA_ON_CPU"
# csrc/cuda/plan.h: Limits.
DEVICE, SCHEDULE = (8192, 4096, 4, 8, 65536), 0

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / f"cuda-on-cpu-{sys.implementation.cache_tag}"
SETTINGS = [
    "-DKDK_BUILD_PYTHON=OFF",
    "-DKDK_CUDA_ON_CPU=ON",
    "-DCMAKE_BUILD_TYPE=Release",
    f"-DPython_EXECUTABLE={sys.executable}",
    f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
]


@functools.cache
def build():
    """Compiles the module, or what of it changed -> (module, None), or (None, why it cannot)."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0"
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    tools = ("cmake", "ninja", os.environ.get("CXX", "c++"))
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    if missing:
        return None, f"cannot compile here, missing: {', '.join(missing)}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # another run of the tests may build it too
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Configured once; from then on the build sees by itself whether that has to happen again.
        if not (BUILD / "build.ninja").exists():
            _run(["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *SETTINGS], path)
        _run(["cmake", "--build", BUILD, "--target", "_cuda_on_cpu"], path)
    file = BUILD / f"_cuda_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, None


def _run(command, path):
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{NAME} does not build:\n{done.stdout}{done.stderr}")


def register():
    """Adds the backend to those of the package; unavailable, with the reason, where it must be."""
    module, reason = build()
    if module is not None:
        operators = native.operators(
            lambda device, *args: module.distill_rows(*args, DEVICE, SCHEDULE),
            lambda device, *args: module.scale_rows(*args),
            lambda device, *args: module.shard_rows(*args, DEVICE, SCHEDULE),
        )
        ops.register(NAME, {"CPU": operators})
    BACKENDS[NAME] = Backend(
        NAME,
        lambda device_type: reason if device_type == "cpu" else "it runs on CPU tensors",
        takes_float64=False,
    )
