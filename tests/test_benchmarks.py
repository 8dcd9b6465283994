"""The benchmark runs end to end, and times nothing that is wrong. Nothing here is about speed."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from kdkernels import TopK, kd_loss
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


@pytest.fixture
def sources(dense):
    return importlib.import_module("sources")


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


def rows_of(folder, part):
    """What a run of sources.py wrote of a part: {variant: line}, of one problem and dtype."""
    document = json.loads(next(folder.glob("sources-*.json")).read_text())
    return {line["variant"]: line for line in document["rows"] if line["part"] == part}


@pytest.fixture
def no_peers(monkeypatch):
    """TRL and Liger cannot be imported, whether they are there or not."""
    for name in ("trl", "liger_kernel"):
        for module in [x for x in sys.modules if x.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


def test_quick_run_of_sources_writes_what_it_measured(sources, no_peers, tmp_path):
    assert sources.main(["--quick", "--out", str(tmp_path)]) == 0
    (document,) = (json.loads(path.read_text()) for path in tmp_path.glob("sources-*.json"))
    with next(tmp_path.glob("sources-*.csv")).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["ms"] for line in lines] == [str(row["ms"] or "") for row in document["rows"]]
    assert {"cpu", "torch", "commit", "trl", "liger-kernel"} <= lines[0].keys()
    peers = ("trl", "liger")
    for row in document["rows"]:
        absent = row["variant"] in peers or (NO_NATIVE and row["variant"] == "native")
        assert row["status"].partition(":")[0] == ("missing" if absent else "ok")
        assert absent or row["ms_min"] <= row["ms"] <= row["ms_max"]
    measured = {target["part"] for target in document["targets"]}
    assert measured == (set() if NO_NATIVE else {"heads", "topk"})
    page = next(tmp_path.glob("sources-*.md")).read_text()
    for variant in (sources.HEADS["naive"], sources.Products, sources.TOPK["naive"], sources.Order):
        assert f"| {variant.title} |" in page
    for name in peers:
        assert f"- {sources.HEADS[name].title}: missing: " in page


def of_a_row_less(loss):
    def wrong(x):
        hidden = torch.cat([x.hidden[:-1], x.hidden[-1:].detach()])
        return loss(type(x)(hidden, x.weight, x.teacher_hidden, x.teacher_weight))

    return wrong


def of_a_class_less(loss):
    def wrong(x):
        weight = torch.cat([x.weight[:-1], x.weight[-1:].detach()])
        return loss(type(x)(x.hidden, weight, x.teacher_hidden, x.teacher_weight))

    return wrong


@pytest.mark.parametrize("wrong", (of_a_row_less, of_a_class_less))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_head_gradient_that_lacks_a_row_is_not_timed(
    sources, no_peers, monkeypatch, tmp_path, wrong, dtype
):
    loss = wrong(sources.naive_heads("jsd"))
    variant = sources.Variant("wrong", lambda _: loss, ours=True)
    monkeypatch.setitem(sources.HEADS, "native", variant)
    options = ["--quick", "--parts", "heads", "--dtypes", dtype, "--out", str(tmp_path)]
    assert sources.main(options) == 1
    rows = rows_of(tmp_path, "heads")
    assert "gradient off by" in rows["native"]["status"] and rows["native"]["ms"] is None
    assert rows["naive"]["status"] == "ok" and rows["naive"]["ms"] > 0
    assert "- wrong: wrong: " in next(tmp_path.glob("*.md")).read_text()


def test_topk_without_the_tail_is_not_timed(sources, monkeypatch, tmp_path):
    def loss(student, teacher, labels):
        teacher = TopK(teacher.ids, teacher.logprobs, tail="renormalize")
        return kd_loss(student, teacher, labels, alpha=sources.ALPHA, backend="eager")

    monkeypatch.setitem(sources.TOPK, "native", sources.Variant("wrong", lambda _: loss, ours=True))
    options = ["--quick", "--parts", "topk", "--dtypes", "float32", "--out", str(tmp_path)]
    assert sources.main(options) == 1
    rows = rows_of(tmp_path, "topk")
    assert rows["native"]["status"].startswith("wrong: loss") and rows["native"]["ms"] is None
    assert {rows[name]["status"] for name in ("naive", "shared", "order")} == {"ok"}


def test_peer_that_fails_is_said_to(sources, monkeypatch, tmp_path):
    def loss(x):
        raise RuntimeError("not on this machine")

    monkeypatch.setitem(sources.HEADS, "trl", sources.Variant("TRL", lambda _: loss))
    options = ["--quick", "--parts", "heads", "--dtypes", "float32", "--variants", "trl", "naive"]
    assert sources.main([*options, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "heads")
    assert rows["trl"]["status"] == "failed: RuntimeError: not on this machine"
    assert rows["naive"]["status"] == "ok"


def test_slow_variants_are_called_once(sources, monkeypatch, tmp_path):
    calls = {"naive": 0, "trl": 0}

    def counted(name):
        naive = sources.naive_heads("jsd")

        def loss(x):
            calls[name] += 1
            return naive(x)

        return sources.Variant(name, lambda _: loss, compiled=name == "trl")

    for name in calls:
        monkeypatch.setitem(sources.HEADS, name, counted(name))
    options = ["--quick", "--parts", "heads", "--dtypes", "float32", "--variants", *calls]
    assert sources.main([*options, "--patience", "0", "--out", str(tmp_path)]) == 0
    assert calls == {"naive": 1, "trl": 2}  # the first of these compiles
    assert {line["calls"] for line in rows_of(tmp_path, "heads").values()} == {1}


@pytest.mark.parametrize("times, verdict", ((1.1, "met"), (0.9, "not met")))
def test_targets_are_judged_by_what_was_right(sources, times, verdict):
    case = sources.Heads((8, 8, 100), "float32", "jsd")
    ours = dict(status="ok", times_native=1.0, times_products=1.35 / times, peak_mb=10.0)
    right = dict(status="ok", times_native=times, peak_mb=times * 10.0)
    wrong = dict(status="wrong: loss", times_native=0.5, peak_mb=5.0)
    lines = {"native": ours, "naive": right, "trl": wrong}
    judged = sources.judge([sources.record(case, name, **line) for name, line in lines.items()])
    assert [target["verdict"] for target in judged] == [verdict] * 3
    assert [target["by"] for target in judged] == ["naive", "", "naive"]


def test_only_a_full_run_of_sources_replaces_the_published_results(sources, harness):
    assert sources.parse([]).out == harness.RESULTS
    for option in (
        ["--quick"],
        ["--shapes", "8x8x100"],
        ["--divergences", "forward_kl"],
        ["--patience", "1"],
        ["--rounds", "3"],
    ):
        assert sources.parse(option).out is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ("native", "naive"))
def test_peak_memory_of_heads(sources, harness, name):
    """Chunks of 256 rows take half of a matrix of 256 MiB."""
    if name == "native" and NO_NATIVE:
        pytest.skip(f"native: {NO_NATIVE}")
    rows, vocab = 1024, 65536
    matrix = 4 * rows * vocab
    case = sources.Heads((rows, 16, vocab), "float32", "jsd")
    peak, gradients = harness.in_fresh_process(sources.peak_of, case, name, 1)
    assert gradients == 4 * 16 * (rows + vocab)
    assert peak < 0.75 * matrix if name == "native" else peak > 3 * matrix
