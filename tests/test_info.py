"""`python -m kdkernels.info` tells what was built, what is used, and why the rest is not."""

import subprocess
import sys

import cuda_for_cpu
import cuda_on_cpu
import pytest
import torch

import kdkernels
from kdkernels import info
from kdkernels.backends import native, registry


def test_command_prints_the_facts():
    result = subprocess.run(
        [sys.executable, "-m", "kdkernels.info"], capture_output=True, text=True, check=True
    )
    names = [line.split(":")[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
    ours = tuple(f"{backend} on " for backend in (cuda_on_cpu.NAME, *cuda_for_cpu.NAMES))
    assert names == [name for name in info.info() if not name.startswith(ours)]
    assert result.stderr == ""


def test_facts(monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "eager")
    facts = info.info()
    assert facts["kdkernels"].startswith(kdkernels.__version__)
    assert torch.__version__.startswith(facts["torch"])
    assert facts["KDKERNELS_BACKEND"] == "eager"
    assert facts["a cpu tensor"] == "gets 'eager'"


def test_every_backend_has_a_line():
    facts = info.info()
    for name in registry.BACKENDS:
        assert facts[f"{name} on cpu"] == "usable" or facts[f"{name} on cpu"].startswith("no: ")


def test_unknown_backend_is_told_not_raised(monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "fortran")
    assert "fortran" in info.info()["a cpu tensor"]


@pytest.mark.skipif(native._C is None, reason="the native part was not built")
def test_level_in_use_is_one_of_those_built():
    assert native._C.isa_level() in native._C.build_info()["isa_levels"]


@pytest.mark.skipif(not hasattr(native._C, "cuda_devices"), reason="built without CUDA")
def test_cuda_devices():
    if torch.cuda.is_available():
        devices = native._C.cuda_devices()
        assert len(devices) == torch.cuda.device_count()
        for index, device in enumerate(devices):
            expected = torch.cuda.get_device_properties(index)
            assert device["name"] == expected.name
            assert device["compute_capability"] == (expected.major, expected.minor)
            assert device["multiprocessors"] == expected.multi_processor_count
            assert device["memory_bytes"] == expected.total_memory
    else:
        with pytest.raises(RuntimeError, match="^CUDA: "):
            native._C.cuda_devices()
