"""The machine code of the CUDA kernels, read without a GPU: what they use, and what they do not."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from kdkernels.backends import native

ROOT = Path(__file__).resolve().parent.parent


def nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def tool(name):
    """A program of the CUDA toolkit, from there or from the triton wheel, which carries it."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton else []
    return shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)


WITHOUT_CUDA = native._C is None or not native._C.build_info()["cuda_version"]
pytestmark = [
    pytest.mark.skipif(WITHOUT_CUDA, reason="kdkernels._C was built without CUDA"),
    pytest.mark.skipif(tool("cuobjdump") is None, reason="no cuobjdump: pip install triton"),
]


def cuobjdump(*arguments):
    folder = os.path.dirname(tool("nvdisasm") or "")  # which cuobjdump calls
    result = subprocess.run(
        [tool("cuobjdump"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": os.pathsep.join([folder, os.environ["PATH"]])},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def resources(module):
    """{(architecture, kernel): {"REG": …, "STACK": …, …}} of all machine code in a file."""
    found, arch, kernel = {}, None, None
    for line in cuobjdump("-res-usage", module).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif kernel and "REG:" in line:
            usage = re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", line)
            found[arch, kernel] = {name: int(value) for name, value in usage}
            kernel = None
    return found


def check_resources(found):
    assert found
    for key, usage in found.items():
        # Spilled registers and arrays with an index that is no constant are both on the stack.
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, (key, usage)
        # distill.cu promises two blocks of 256 threads on a multiprocessor of 65,536 registers.
        assert usage["REG"] <= 128, (key, usage)


def instructions(module, arch):
    """How often each instruction occurs in a file's code for an architecture, per kernel."""
    kernels, kernel = {}, None
    for line in cuobjdump("-sass", "-arch", arch, module).splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            kernel = kernels.setdefault(match[1], Counter())
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line):
            kernel[match[1]] += 1
    return kernels


def of_kept_classes(kernel):
    """Whether it is one for sparse teachers, whose classes it computes in double."""
    return "DivergenceE6E" in kernel  # csrc/common/divergence.h: kKept


def check_hopper(kernels):
    """What the one pass is made of: see csrc/cuda/distill_kernel.h."""
    distill = {name: code for name, code in kernels.items() if "distill_kernel" in name}
    assert distill
    for name, code in distill.items():
        total = sum(code.values())
        whole = name.endswith("ELb1EEEEEvNS0_7RowTaskE")
        # Those that take rows as they lie also make logits of projections: see cap.h.
        assert 1_000 < total < (20_000 if whole else 24_000), (name, total)
        for prefix in (
            "UCGABAR_ARV",  # the blocks of a cluster meet
            "UCGABAR_WAIT",
            "UBLKCP.S.G",  # bulk copies in
            "UBLKCP.G.S",  # and out
            "MUFU.EX2",
        ):
            assert any(key.startswith(prefix) for key in code), (name, prefix)
        # Shared memory 16 bytes at a time: by name where the kernel knows that all is there.
        loads, stores = ("LDS.128", "STS.128") if whole else ("LD.E.128", "ST.E.128")
        assert code[loads] >= 4 and code[stores] >= 1, (name, code)
    for name, code in kernels.items():
        doubles = [key for key in code if re.match(r"(D(ADD|MUL|FMA|SETP|MNMX)|.*F64)", key)]
        assert bool(doubles) == of_kept_classes(name), (name, doubles)


def test_every_kernel_of_the_module():
    found = resources(native._C.__file__)
    built = {arch for arch in native._C.build_info()["cuda_archs"] if not arch.endswith("PTX")}
    assert {arch.removeprefix("sm_") for arch, _ in found} == built
    check_resources(found)
    entries = cuobjdump("-ptx", native._C.__file__).split(".entry ")[1:]
    assert len(entries) > 26
    for entry in entries:
        name = entry.partition("(")[0]
        assert (".f64" in entry) == of_kept_classes(name), name


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("divergence, kernels", [("ForwardKL", 6), ("JSD", 4), ("Kept", 2)])
def test_architectures_by_name(tmp_path, divergence, kernels):
    """Code for one kind of GPU alone, which the module does not contain."""
    archs = ("90a", "100a")
    output = tmp_path / "distill.o"
    subprocess.run(
        [
            nvcc(),
            "-std=c++17",
            "-O3",
            "-Xptxas=--register-usage-level=3",  # as CMakeLists.txt has it
            f"-I{ROOT / 'csrc'}",
            f"-DKDK_DIVERGENCE=k{divergence}",
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
            "-c",
            ROOT / "csrc" / "cuda" / "distill.cu",
            "-o",
            output,
        ],
        check=True,
    )
    found = resources(output)
    assert {arch for arch, _ in found} == {f"sm_{arch}" for arch in archs}
    assert len(found) == len(archs) * kernels
    check_resources(found)
    check_hopper(instructions(output, "sm_90a"))
