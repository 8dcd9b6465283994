"""Builds and runs the C++ tests of csrc/tests under AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from kdkernels.backends import native

ROOT = Path(__file__).resolve().parent.parent
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
MISSING = [
    tool
    for tool in ("cmake", "ninja", os.environ.get("CXX", "c++"))
    if shutil.which(tool, path=PATH) is None
]


def run(*command):
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": PATH, "CTEST_OUTPUT_ON_FAILURE": "1"},
    )
    print(result.stdout)
    assert result.returncode == 0, f"{' '.join(map(str, command))} failed, see its output"
    return result.stdout


@pytest.mark.skipif(bool(MISSING), reason=f"cannot compile here, missing: {', '.join(MISSING)}")
def test_csrc(tmp_path):
    settings = [
        "-DKDK_BUILD_PYTHON=OFF",
        "-DKDK_BUILD_TESTS=ON",
        "-DKDK_SANITIZE=address,undefined",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1",
    ]
    if native._C is not None and native._C.build_info()["cuda_version"]:
        home = os.environ.get("CUDA_HOME")
        nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc", path=PATH)
        settings += ["-DKDK_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DKDK_CUDA_ARCHS=90"]
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *settings)
    run("cmake", "--build", tmp_path)
    output = run("ctest", "--test-dir", tmp_path, "--verbose")
    assert "No tests were found" not in output
