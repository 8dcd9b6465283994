"""The benchmark that has the hardware count bytes: what it makes of the profiler's words."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# As ncu prints it, after the words of the program and its own.
HEAD = '"ID","Process Name","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
LINE = '"{}","python3.12","void kdk::gpu::{}(…)","{}","{}","{}"\n'


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.traffic")


def test_the_launches_of_the_kernel_are_found(traffic):
    lines = [
        LINE.format(0, "prepare_kernel", traffic.READ, "byte", "320"),
        LINE.format(0, "prepare_kernel", traffic.WRITTEN, "byte", "0"),
        LINE.format(1, "distill_kernel", traffic.READ, "Mbyte", "1,131.25"),
        LINE.format(1, "distill_kernel", traffic.WRITTEN, "Kbyte", "65.5"),
        LINE.format(2, "distill_kernel", traffic.READ, "Gbyte", "2"),
        LINE.format(2, "distill_kernel", traffic.WRITTEN, "byte", "7"),
    ]
    text = "==PROF== Connected to process 17\nsomething else\n" + HEAD + "".join(lines)
    assert traffic.parse(text) == [(1131.25e6, 65.5e3), (2e9, 7.0)]


def test_table_says_what_share_of_one_pass_moved(traffic):
    matrix = 2 * traffic.ROWS * 1000
    assert traffic.table({1000: (2 * matrix, matrix), 2000: (4 * matrix, 4 * matrix)}) == [
        ["1,000", "2.000", "1.000", "1.000"],
        ["2,000", "2.000", "2.000", "1.333"],
    ]


def test_without_the_profiler_it_says_so(traffic, monkeypatch, capsys):
    monkeypatch.setattr(traffic.shutil, "which", lambda name: None)
    monkeypatch.setattr(traffic.torch.cuda, "is_available", lambda: True)
    traffic.main([])
    assert capsys.readouterr().out == "bytes not counted: no ncu on this machine\n"


def test_without_a_gpu_it_is_an_error(traffic, monkeypatch):
    monkeypatch.setattr(traffic.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        traffic.main([])
