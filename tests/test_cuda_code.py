"""The machine code of the CUDA kernels, read without a GPU: what they use, and what they do not."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.machine_code import cuobjdump, instructions, resources, tool
from kdkernels.backends import native

ROOT = Path(__file__).resolve().parent.parent


def nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


WITHOUT_CUDA = native._C is None or not native._C.build_info()["cuda_version"]
pytestmark = [
    pytest.mark.skipif(WITHOUT_CUDA, reason="kdkernels._C was built without CUDA"),
    pytest.mark.skipif(tool("cuobjdump") is None, reason="no cuobjdump: pip install triton"),
]


def check_resources(found):
    assert found
    for key, usage in found.items():
        # Spilled registers and arrays with an index that is no constant are both on the stack.
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, (key, usage)
        # distill.cu promises two blocks of 256 threads on a multiprocessor of 65,536 registers.
        assert usage["REG"] <= 128, (key, usage)


def of_kept_classes(kernel):
    """Whether it is one for sparse teachers, whose classes it computes in double."""
    return "DivergenceE6E" in kernel  # csrc/common/divergence.h: kKept


def of_statistics(kernel):
    """Whether it is one that leaves doubles for other devices: csrc/cuda/shard_row.h."""
    return re.search(r"PhaseE[01]", kernel) is not None


# What makes a double of two floats, once for a row.
WIDENING = {"cvt.f64.f32", "add.f64", "mov.f64", "selp.f64", "st.global.f64"}


def check_hopper(kernels):
    """What the one pass is made of: see csrc/cuda/distill_kernel.h."""
    # Terms of kept classes look at these alone.
    swept = re.compile(r"distill_kernel|PhaseE[02]|PhaseE1.*DivergenceE[0-5]")
    rows = {name: code for name, code in kernels.items() if swept.search(name)}
    assert rows
    for name, code in rows.items():
        total = sum(code.values())
        whole = re.search(r"ELb1E+vNS0_\d+(Row|Shard)TaskE$", name) is not None
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
        if of_statistics(name) and not of_kept_classes(name):
            assert all(re.match(r"DADD|F2F.F64.F32", key) for key in doubles), (name, doubles)
        else:
            assert bool(doubles) == of_kept_classes(name), (name, doubles)


def test_every_kernel_of_the_module():
    found = resources(native._C.__file__)
    built = {arch for arch in native._C.build_info()["cuda_archs"] if not arch.endswith("PTX")}
    assert {arch.removeprefix("sm_") for arch, _ in found} == built
    check_resources(found)
    entries = cuobjdump("-ptx", native._C.__file__).split(".entry ")[1:]
    assert len(entries) > 50
    for entry in entries:
        name = entry.partition("(")[0]
        doubles = set(re.findall(r"\s([a-z][\w.]*\.f64[\w.]*)\s", entry))
        if of_statistics(name) and not of_kept_classes(name):
            assert doubles <= WIDENING, (name, doubles)
        else:
            assert bool(doubles) == of_kept_classes(name), name


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize(
    "source, divergence, kernels",
    [
        ("distill", "ForwardKL", 6),
        ("distill", "JSD", 4),
        ("distill", "Kept", 2),
        ("shard", "JSD", 3),
    ],
)
def test_architectures_by_name(tmp_path, source, divergence, kernels):
    """Code for one kind of GPU alone, which the module does not contain."""
    archs = ("90a", "100a")
    output = tmp_path / f"{source}.o"
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
            ROOT / "csrc" / "cuda" / f"{source}.cu",
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
