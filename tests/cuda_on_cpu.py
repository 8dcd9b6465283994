"""The backend "cuda_on_cpu": the CUDA kernels of csrc/cuda, run on CPU tensors by csrc/tests.

For tests only, and built by them, into build/cuda-on-cpu. It imitates a device whose blocks are so
small that short rows already take several of them, with two rows, one row or none in shared memory,
by the number of columns.
"""

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
TOO_SLOW = "a hundred thousand rows take minutes there"
SHARED_BYTES, CLUSTER_BLOCKS = 8192, 4

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda-on-cpu"


def build():
    """Compiles the module, or what of it changed -> the module; None where nothing can compile."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    tools = ("cmake", "ninja", os.environ.get("CXX", "c++"))
    if not all(shutil.which(tool, path=path) for tool in tools):
        return None
    settings = [
        "-DKDK_BUILD_PYTHON=OFF",
        "-DKDK_CUDA_ON_CPU=ON",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    environment = {**os.environ, "PATH": path}
    for command in (
        ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *settings],
        ["cmake", "--build", BUILD, "--target", "_cuda_on_cpu"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(
                f"csrc/tests/cuda_on_cpu does not build:\n{done.stdout}{done.stderr}"
            )
    (file,) = BUILD.glob("_cuda_on_cpu*.so")
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register(module):
    """Registers the row operators of `module`, the compiled csrc/tests/cuda_on_cpu."""

    def compute(student, teacher, labels, weights, num_items, grad, want_terms, options):
        losses = ops.new_losses(student)
        bad_label = module.distill_rows(
            native._sizes(student),
            native._rows(student),
            native._rows(teacher),
            None if grad is None else native._rows(grad),
            tuple(map(native._pointer, (labels, weights, num_items))),
            tuple(map(native._pointer, losses)),
            want_terms,
            options,
            SHARED_BYTES,
            CLUSTER_BLOCKS,
            0,
        )
        if bad_label >= 0:
            *_, ignore_index, vocab_size, _ = options
            raise IndexError(ops.bad_label_message(labels, bad_label, ignore_index, vocab_size))
        return losses

    def distill_rows(student, teacher, labels, weights, num_items, terms, want_grad, *options):
        grad = ops.new_grad(student, want_grad)
        written = grad if want_grad else None
        inputs = student, teacher, labels, weights, num_items
        return *compute(*inputs, written, terms, options), grad

    def distill_rows_(student, teacher, labels, weights, num_items, terms, *options):
        inputs = student, teacher, labels, weights, num_items
        return compute(*inputs, student, terms, options)

    def scale_rows_(grad, upstream, unscale, labels, weights, ignore_index, vocab_size):
        module.scale_rows(
            native._sizes(grad),
            native._rows(grad),
            upstream.data_ptr(),
            upstream.numel() > 1,
            tuple(map(native._pointer, (labels, weights, unscale))),
            ignore_index,
            vocab_size,
        )

    operators = dict(
        distill_rows=distill_rows, distill_rows_=distill_rows_, scale_rows_=scale_rows_
    )
    ops.register(NAME, "CPU", **operators)
    BACKENDS[NAME] = Backend(
        NAME,
        lambda device_type: None if device_type == "cpu" else "runs on CPU tensors",
        takes_float64=False,
    )
