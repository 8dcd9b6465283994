"""Memory that is about to be written comes in huge pages, where there are any."""

import pathlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdkernels import LinearHead, kd_loss, ops, pages

SMAPS = pathlib.Path("/proc/self/smaps")
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage")


def advised(x):
    """Whether the system was asked for huge pages in the middle of x."""
    address, inside = x.data_ptr() + x.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("no such mapping")


pytestmark = pytest.mark.skipif(
    not (SMAPS.exists() and HUGE_PAGES.exists()), reason="no huge pages on this system"
)


def test_of_a_gradient(compiled):
    student = torch.randn(64, 2**16, requires_grad=True)
    if compiled == "triton":
        grad = ops.new_grad(student.detach(), True)  # what it writes to; the interpreter is slow
    else:
        kd_loss(student, torch.randn(64, 2**16), backend=compiled).backward()
        grad = student.grad
    assert advised(grad)


def test_of_what_heads_work_in(monkeypatch):
    seen = []
    advise = pages.advise_huge
    monkeypatch.setattr(pages, "advise_huge", lambda x: seen.append(x) or advise(x))
    hidden, weight = torch.randn(64, 256), torch.randn(2**15, 256, requires_grad=True)
    teacher = LinearHead(torch.randn(64, 256), torch.randn(2**15, 256))
    kd_loss(LinearHead(hidden, weight), teacher).backward()
    shapes = sorted(tuple(x.shape) for x in seen if x.numel())
    assert shapes == [(64, 2**15), (64, 2**15), (2**15, 256)]
    assert all(map(advised, (x for x in seen if x.numel())))


def test_small_and_fake_tensors_are_left_alone():
    small = torch.zeros(1000)
    assert pages.advise_huge(small) is small
    with FakeTensorMode():
        fake = torch.empty(2**24)
        assert pages.advise_huge(fake) is fake
    meta = torch.empty(2**24, device="meta")
    assert pages.advise_huge(meta) is meta
