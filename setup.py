"""Builds kdkernels. CMakeLists.txt says what is compiled; this file says whether, or why not.

    KDKERNELS_BUILD_NATIVE=auto|1|0   auto: a pure wheel if compiling fails; 1: an error; 0: don't
    KDKERNELS_BUILD_CUDA=auto|1|0     auto: with CUDA if an nvcc is there and works; 1: or an error
    KDKERNELS_CUDA_ARCHS="80;90a"     GPU architectures, instead of CMakeLists.txt's default list
    CUDA_HOME                         the toolkit to use, instead of the nvcc on PATH
    CMAKE_ARGS                        more arguments for CMake, which also reads CXX, CXXFLAGS, ...

Nothing is linked against torch or includes it, so one build serves every torch version and plain
`pip install .` works in build isolation. What was left out is written to kdkernels/_build.py, from
where `python -m kdkernels.info` shows it: pip hides whatever a build prints.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The cmake and ninja that pip installed come before the system's, activated environment or not.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])

BUILD_RECORD = '''"""Written by setup.py: why a part was not built, or None."""

NATIVE_MISSING = {native!r}
CUDA_MISSING = {cuda!r}
'''


class BuildError(Exception):
    """Something could not be compiled; the text says why."""


def switch(name):
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{name}={value}: expected auto, 1 or 0")
    return value


def find_nvcc():
    """Path of nvcc. If CUDA_HOME has none that is an error: another would be a surprise."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if nvcc is None:
        where = (
            f"CUDA_HOME={home} has no bin/nvcc" if home else "no nvcc on PATH, CUDA_HOME is not set"
        )
        raise BuildError(f"nvcc was not found: {where}")
    return nvcc


def run(command):
    """Runs a command, its output passed on; a failure raises with the last of it."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PATH": PATH},
    )
    tail = deque(maxlen=40)
    for line in process.stdout:
        sys.stdout.write(line)
        if line.strip() and not line.startswith("-- "):  # CMake's progress
            tail.append(line)
    if process.wait():
        raise BuildError(f"{Path(command[0]).name} {command[1]} failed:\n{''.join(tail).rstrip()}")


def compile_module(nvcc):
    """Path of the compiled module, with CUDA if there is an nvcc."""
    cmake = shutil.which("cmake", path=PATH)
    if cmake is None or shutil.which("ninja", path=PATH) is None:
        raise BuildError("cmake and ninja are needed to compile: pip install cmake ninja")
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("pybind11 is needed to compile: pip install pybind11") from error

    settings = ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    if nvcc is not None:
        archs = os.environ.get("KDKERNELS_CUDA_ARCHS", "")
        settings += ["-DKDK_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DKDK_CUDA_ARCHS={archs}"]
    settings += shlex.split(os.environ.get("CMAKE_ARGS", ""))

    # CMake reads some of these only once per folder, so each combination has its own. Folders stay,
    # which makes the next build incremental. pybind11's path is not in the name: it differs in each
    # isolated build.
    names = ("CC", "CXX", "CXXFLAGS", "CUDA_HOME", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")
    key = repr([settings, [os.environ.get(name) for name in names]])
    folder = ROOT / "build" / f"cmake-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    settings.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    run([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *settings])
    run([cmake, "--build", str(folder)])
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def build():
    """(module, why native is missing, why CUDA is missing), each None where it does not apply."""
    native, cuda = switch("KDKERNELS_BUILD_NATIVE"), switch("KDKERNELS_BUILD_CUDA")
    if native == "0":
        if cuda == "1":
            raise SystemExit("KDKERNELS_BUILD_CUDA=1 contradicts KDKERNELS_BUILD_NATIVE=0")
        return None, "KDKERNELS_BUILD_NATIVE=0 when it was built", None

    cuda_missing = None
    if cuda == "0":
        cuda_missing = "KDKERNELS_BUILD_CUDA=0 when it was built"
    else:
        try:
            return compile_module(find_nvcc()), None, None
        except BuildError as error:
            if cuda == "1":
                raise SystemExit(f"KDKERNELS_BUILD_CUDA=1, but {error}") from None
            cuda_missing = str(error)
    try:
        return compile_module(None), None, cuda_missing
    except BuildError as error:
        if native == "1":
            raise SystemExit(f"KDKERNELS_BUILD_NATIVE=1, but {error}") from None
        return None, str(error), None


class BuildExt(build_ext):
    def run(self):
        module, native_missing, cuda_missing = build()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "kdkernels"
        package.mkdir(parents=True, exist_ok=True)
        # A module of an earlier build must not outlive it: this one may be pure.
        for stale in package.glob("_C.*"):
            stale.unlink()
        if module is not None:
            shutil.copy2(module, package)
        else:
            self.distribution.ext_modules = self.extensions = []
        record = BUILD_RECORD.format(native=native_missing, cuda=cuda_missing)
        (package / "_build.py").write_text(record, encoding="utf-8")


class BdistWheel(bdist_wheel):
    def run(self):
        # Modules deleted since the last build must not ship.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        # Only after the build is it known whether the wheel is pure.
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[Extension("kdkernels._C", sources=[])],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
