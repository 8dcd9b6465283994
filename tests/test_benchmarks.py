"""The benchmark runs end to end, and times nothing that is wrong. Nothing here is about speed."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch

from kdkernels import kd_loss
from kdkernels.backends.registry import BACKENDS

NO_NATIVE = BACKENDS["native"].unavailable("cpu")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def dense(monkeypatch):
    """The benchmark's module, imported as its script sees it; torch's threads are put back."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    yield importlib.import_module("dense")
    torch.set_num_threads(threads)


@pytest.fixture
def harness(dense):
    return dense.harness


def test_quick_run_writes_what_it_measured(dense, tmp_path):
    assert dense.main(["--quick", "--out", str(tmp_path)]) == 0
    (document,) = (json.loads(path.read_text()) for path in tmp_path.glob("dense-*.json"))
    with next(tmp_path.glob("dense-*.csv")).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["ms"] for line in lines] == [str(row["ms"] or "") for row in document["rows"]]
    assert {"cpu", "torch", "kdkernels", "commit", "date"} <= lines[0].keys()
    for row in document["rows"]:
        absent = NO_NATIVE and row["variant"] not in ("eager", "pytorch", "pytorch-float32", "copy")
        assert row["status"].partition(":")[0] == ("missing" if absent else "ok")
        assert absent or row["ms_min"] <= row["ms"] <= row["ms_max"]
    table = next(tmp_path.glob("dense-*.md")).read_text()
    assert all(f"| {dense.VARIANTS[name].title} |" in table for name in dense.QUICK_VARIANTS)


def without_t_squared(student, teacher, labels):
    return kd_loss(student, teacher, labels, temperature=2.0, t_squared=False, backend="eager")


def with_roles_swapped(student, teacher, labels):
    options = dict(divergence="reverse_kl", temperature=2.0, backend="eager")
    return kd_loss(student, teacher, labels, **options)


def without_teacher(student, teacher, labels):
    return kd_loss(student, teacher, labels, alpha=0.0, backend="eager")


@pytest.mark.parametrize("loss", (without_t_squared, with_roles_swapped, without_teacher))
@pytest.mark.parametrize("in_own_dtype", (False, True))
def test_wrong_variant_is_marked_and_not_timed(dense, monkeypatch, tmp_path, loss, in_own_dtype):
    variant = dense.Variant("wrong", lambda: loss, in_own_dtype=in_own_dtype)
    monkeypatch.setitem(dense.VARIANTS, "wrong", variant)
    options = ["--quick", "--variants", "wrong", "pytorch", "--parts", "backward", "forward"]
    assert dense.main([*options, "--out", str(tmp_path)]) == 1
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    for row in rows:
        if row["variant"] == "wrong":
            assert row["status"].startswith("wrong: ") and row["ms"] is None
        else:
            assert row["status"] == "ok" and row["ms"] > 0
    assert "| wrong | wrong |" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize("wrong", (0.0, float("nan")))
def test_one_wrong_gradient_entry_is_seen(dense, harness, wrong):
    """Even one that is tiny beside the row's largest, in the last column of the last row."""
    problem = harness.make_problem(20, 1000, torch.float32)
    step = harness.Step(dense.VARIANTS["eager"].make(), problem)
    step.prepare()
    step.run()
    broken = step.gradient().clone()
    broken[-1, -1] = wrong
    outputs = {
        "right": (step.value.detach(), step.gradient()),
        "wrong": (step.value.detach(), broken),
        "nan": (torch.tensor(float("nan")), step.gradient()),
    }
    found = harness.errors(
        outputs,
        problem,
        divergence="forward_kl",
        temperature=dense.TEMPERATURE,
        alpha=dense.ALPHA,
    )
    allowed = dense.TOLERANCES["float32", "float32"]
    assert harness.verdict(found["right"], allowed) == "ok"
    assert harness.verdict(found["wrong"], allowed).startswith("wrong: gradient")
    assert harness.verdict(found["nan"], allowed).startswith("wrong: loss")


def test_variants_take_turns(harness):
    class Recorded:
        def __init__(self, name):
            self.name = name

        def prepare(self):
            order.append(self.name.lower())

        def run(self):
            order.append(self.name)

    order = []
    seconds = harness.interleave({name: Recorded(name) for name in "AB"}, 2, repeat=2)
    assert "".join(order) == 2 * "aAAbBB"
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_only_a_full_run_replaces_the_published_results(dense, harness):
    assert dense.parse([]).out == harness.RESULTS
    for option in (["--quick"], ["--rows", "8"], ["--variants", "native"], ["--rounds", "3"]):
        assert dense.parse(option).out is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ("inplace", "pytorch"))
def test_peak_memory(dense, harness, name):
    """A matrix of 16 MiB cannot hide, and does not appear where there is none."""
    if name == "inplace" and NO_NATIVE:
        pytest.skip(f"native: {NO_NATIVE}")
    rows, vocab = 64, 65536
    matrix = 4 * rows * vocab
    peak, gradient = harness.in_fresh_process(dense.peak_of, name, "float32", rows, vocab, 1)
    if name == "inplace":
        assert gradient == 0 and peak < matrix / 4
    else:
        assert gradient == matrix and peak > 3 * matrix
