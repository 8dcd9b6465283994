"""What is installed, what was built, what is usable now, and why the rest is not.

`python -m kdkernels.info` prints it as a flat list, to be read first when something is slow or
missing and pasted into an issue.
"""

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from . import __version__
from .backends import native, registry

ENVIRONMENT = (
    "KDKERNELS_BACKEND",
    "KDKERNELS_BUILD_NATIVE",
    "KDKERNELS_BUILD_CUDA",
    "KDKERNELS_CUDA_ARCHS",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
)


def info() -> dict[str, str]:
    """The facts as a flat dict of strings, in the order in which they are printed."""
    return {**_versions(), **_machine(), **_native(), **_backends(), **_environment()}


def _versions() -> dict[str, str]:
    facts = {"kdkernels": f"{__version__} ({Path(__file__).parent})"}
    facts["python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    for package in ("torch", "triton", "numpy"):
        # The metadata, not the import: triton alone takes longer to import than all of this.
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["torch built for"] = (
        (torch.version.cuda and f"CUDA {torch.version.cuda}")
        or (torch.version.hip and f"ROCm {torch.version.hip}")
        or "CPU"
    )
    return facts


def _machine() -> dict[str, str]:
    return {
        "system": platform.platform(),
        "cpu": f"{_cpu_model()}, {os.cpu_count()} logical cores",
        "torch threads": str(torch.get_num_threads()),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _build_record() -> tuple[str | None, str | None]:
    """Why setup.py left out the native part and its CUDA part: text, or None where it did not."""
    try:
        _build = importlib.import_module("kdkernels._build")
    except ImportError:
        never = "setup.py never ran in this source tree: pip install -e ."
        return never, never
    return _build.NATIVE_MISSING, _build.CUDA_MISSING


def _native() -> dict[str, str]:
    native_missing, cuda_missing = _build_record()
    if native._C is None:
        if native_missing is not None:
            return {"native": f"not built: {native_missing}"}
        return {"native": f"built, but does not load: {native.LOAD_ERROR}"}

    built = native._C.build_info()
    openmp = "with OpenMP" if built["openmp"] else "without OpenMP, one thread"
    facts = {
        "native": f"built and loaded ({native._C.__file__})",
        "native compiler": f"{built['compiler']}, {built['build_type']}, {openmp}",
        "native flags": built["flags"],
        "native pybind11": built["pybind11"],
        "cpu levels": f"{' '.join(built['isa_levels'])}; in use: {native._C.isa_level()}",
    }
    if not built["cuda_version"]:
        facts["native cuda"] = f"not built: {cuda_missing}"
        return facts
    archs = " ".join(built["cuda_archs"])
    facts["native cuda"] = f"built with CUDA {built['cuda_version']} for {archs}"
    try:
        devices = native._C.cuda_devices()
    except RuntimeError as error:
        facts["cuda devices"] = f"none: {error}"
        return facts
    for index, device in enumerate(devices):
        major, minor = device["compute_capability"]
        facts[f"cuda device {index}"] = (
            f"{device['name']}, compute capability {major}.{minor}, "
            f"{device['multiprocessors']} multiprocessors, "
            f"{device['memory_bytes'] / 2**30:.1f} GiB, L2 {device['l2_bytes'] / 2**20:.0f} MiB, "
            f"{device['shared_bytes_per_block'] / 2**10:.0f} KiB shared memory per block, "
            f"clusters: {'yes' if device['clusters'] else 'no'}"
        )
    return facts


def _backends() -> dict[str, str]:
    facts = {}
    for device_type in ("cpu", "cuda"):
        if device_type == "cuda" and not torch.cuda.is_available():
            facts["a cuda tensor"] = "cannot exist here: torch sees no CUDA device"
            continue
        try:
            facts[f"a {device_type} tensor"] = (
                f"gets {registry.resolve(device_type, torch.float32)!r}"
            )
        except (RuntimeError, ValueError) as error:
            facts[f"a {device_type} tensor"] = f"gets an error: {error}"
        for name, backend in registry.BACKENDS.items():
            reason = backend.unavailable(device_type)
            facts[f"{name} on {device_type}"] = f"no: {reason}" if reason else "usable"
    return facts


def _environment() -> dict[str, str]:
    return {name: os.environ.get(name, "not set") for name in ENVIRONMENT}


def main() -> None:
    for name, value in info().items():
        # A reason may be the last lines of a compiler's output.
        print(f"{name + ':':<24}" + value.replace("\n", "\n" + " " * 24))


if __name__ == "__main__":
    main()
