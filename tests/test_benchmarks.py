"""The benchmark runs end to end, and times nothing that is wrong. Nothing here is about speed."""

import csv
import functools
import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdkernels import kd_loss
from kdkernels.backends.registry import BACKENDS

ROOT = Path(__file__).parent.parent
NO_NATIVE = BACKENDS["native"].unavailable("cpu")
OURS = [] if NO_NATIVE else ["native"]
PEERS = ("trl", "liger_kernel", "fla", "speculators", "quack")
PEAK = 10**6


@pytest.fixture(autouse=True)
def no_peers(monkeypatch):
    """Nobody else can be imported, whether they are there or not."""
    for name in PEERS:
        for module in [x for x in sys.modules if x.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def dense(bench):
    """A small case of its own."""
    return bench.suites.Dense("cpu", "float32", 20, 1000, temperature=2.0)


def add(monkeypatch, bench, suite, name, loss, **options):
    """One more variant: loss(inputs)."""
    suite = bench.suites.SUITES[suite]
    made = importlib.import_module("benchmarks.peers.base").Variant(
        **{"title": f"the {name} one", "make": lambda case: loss, "accuracy": "exact", **options}
    )
    monkeypatch.setattr(suite, "variants", {**suite.variants, name: made})


def run(bench, folder, *options):
    """(exit status, {suite: document}) of a small run."""
    arguments = [*options, "--device", "cpu", "--quick", "--rounds", "2", "--threads", "1"]
    status = bench.command.main([*arguments, "--out", str(folder)])
    documents = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return status, {document["suite"]: document for document in documents}


ONE = ["--dtypes", "float32", "--divergences", "forward_kl", "--alphas", "0.5"]


def right(x):
    return kd_loss(x.student, x.teacher, x.labels, temperature=2.0, backend="eager")


# What a run does


@pytest.mark.parametrize("suite", ("dense", "linear", "sparse", "loop"))
def test_run_writes_what_it_measured(bench, tmp_path, capsys, suite):
    status, documents = run(bench, tmp_path, suite, *ONE, "--temperatures", "1")
    assert status == 0
    document = documents[suite]
    slug = bench.results.file_name(document["machine"], suite, "some")
    with (tmp_path / f"{slug}.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["ms"] for line in lines] == [str(row["ms"] or "") for row in document["rows"]]
    assert {"cpu", "torch", "trl", "liger-kernel", "kdkernels", "commit", "date"} <= lines[0].keys()
    printed = capsys.readouterr().out
    pages = [(tmp_path / f"{slug}.{page}.md").read_text() for page in ("all", "summary")]
    timed = set()
    for row in document["rows"]:
        kind = row["status"].partition(":")[0]
        assert kind in ("ok", "missing", "lacks"), row["status"]
        if kind == "ok":
            timed.add(row["variant"].partition("-")[0])
            assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        else:
            assert row["ms"] is None
        assert row["title"] in printed and row["title"] in pages[0]
        assert row["case"] in printed and row["case"] in pages[0]
    yardsticks = dict(dense="copy", linear="products", sparse="order", loop="models")
    assert {"pytorch", yardsticks[suite], *OURS} <= timed
    assert "| PyTorch" in pages[1]
    for block in [block for page in pages for block in page.split("\n\n") if block[:2] == "| "]:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_rates(bench, dense):
    seconds = {"native": [1.0, 2.0, 4.0], "pytorch": [2.0, 8.0, 8.0], "copy": [0.5, 0.5, 1.0]}
    speed = bench.measure.speed(dense, "pytorch", seconds)
    assert (speed["ms"], speed["ms_min"], speed["ms_max"], speed["calls"]) == (8e3, 2e3, 8e3, 3)
    assert (speed["times_native"], speed["times_native_min"]) == (2.0, 2.0)  # 2, 4, 2
    assert speed["times_native_max"] == 4.0
    assert speed["share_of_copy"] == 0.125 and speed["share_of_copy_max"] == 0.25
    assert speed["bytes"] == 3 * 20 * 1000 * 4
    assert speed["gb_per_s"] == pytest.approx(speed["bytes"] / 8 / 1e9)
    once = bench.measure.speed(dense, "slow", {**seconds, "slow": [10.0]})
    assert (once["calls"], once["times_native"] if "times_native" in once else None) == (1, None)
    assert bench.measure.ratios([10.0], [1.0, 2.0, 4.0]) == [5.0]
    assert bench.measure.ratios([2.0, 4.0], [4.0]) == [0.5, 1.0]


@pytest.mark.parametrize("backward", (True, False))
@pytest.mark.parametrize("alpha", (0.0, 0.5, 1.0))
def test_copy_moves_as_many_bytes_as_the_pass(bench, dense, backward, alpha):
    case = replace(dense, dtype="bfloat16", backward=backward, alpha=alpha)
    inputs = case.draw()
    copy = bench.case.Copy(case, inputs)
    copy.run()
    read, written = (sum(x.nbytes for x in side) for side in zip(*copy.pairs, strict=True))
    assert read == written and read + written == (1 + (alpha > 0) + backward) * 20 * 1000 * 2
    assert all(torch.equal(target, source) for target, source in copy.pairs)


def test_variants_take_turns(bench, dense):
    class Recorded:
        def __init__(self, name):
            self.name = name

        def prepare(self):
            order.append(self.name.lower())

        def run(self):
            order.append(self.name)

        def drop(self):
            pass

    order = []
    makers = {name: functools.partial(Recorded, name) for name in "AB"}
    measuring = bench.measure.Run(bench.devices.Cpu(), rounds=2, patience=60.0)
    lines = {name: {"status": "ok"} for name in makers}
    timed = measuring.take_turns(makers, {"A": [60.0], "B": [60.0]}, dense, lines)
    assert "".join(order) == 2 * "aAbB" and [len(times) for times in timed.values()] == [2, 2]
    order.clear()
    timed = measuring.take_turns(makers, {"A": [1e-3], "B": [10.0]}, dense, lines)
    assert "".join(order) == 2 * "aAaAAbB", "what is short is called before, and several times"


def test_short_cases_get_more_rounds(bench, dense):
    rounds = {}
    for total in (1e-3, 1.0, 60.0):
        measuring = bench.measure.Run(bench.devices.Cpu(), rounds=5, patience=60.0)
        measuring.turn = lambda maker, repeat, expected: 1.0
        lines = {"A": {"status": "ok"}}
        rounds[total] = len(measuring.take_turns({"A": None}, {"A": [total]}, dense, lines)["A"])
    assert rounds == {1e-3: 25, 1.0: 10, 60.0: 5}


def test_slow_variants_are_called_once(bench, monkeypatch, tmp_path):
    calls = {"slow": 0, "compiled": 0}

    def counted(name):
        def loss(x):
            calls[name] += 1
            return right(x)

        return loss

    for name in calls:
        options = dict(accuracy="float32", compiled=name == "compiled")
        add(monkeypatch, bench, "dense", name, counted(name), **options)
    options = [*ONE, "--temperatures", "2", "--patience", "1e-9", "--variants", *calls]
    status, documents = run(bench, tmp_path, "dense", *options)
    rows = {row["variant"]: row for row in documents["dense"]["rows"] if row["backward"]}
    backward = [row for row in documents["dense"]["rows"] if row["variant"] == "slow"]
    assert calls == {"slow": len(backward), "compiled": 2 * len(backward)}
    assert status == 0 and rows["slow"]["calls"] == rows["compiled"]["calls"] == 1


# Whether what is timed is right


def without_t_squared(x):
    return kd_loss(x.student, x.teacher, x.labels, temperature=2.0, t_squared=False)


def with_roles_swapped(x):
    return kd_loss(x.student, x.teacher, x.labels, temperature=2.0, divergence="reverse_kl")


def without_teacher(x):
    return kd_loss(x.student, x.teacher, x.labels, alpha=0.0)


def of_a_row_less(x):
    student = torch.cat([x.student[:-1], x.student[-1:].detach()])
    return right(replace(x, student=student))


WRONG = (without_t_squared, with_roles_swapped, without_teacher, of_a_row_less)


@pytest.mark.parametrize("loss", WRONG)
@pytest.mark.parametrize("accuracy", ("exact", "own"))
@pytest.mark.parametrize("ours", (True, False))
def test_wrong_variant_is_marked_and_not_timed(bench, monkeypatch, tmp_path, loss, accuracy, ours):
    add(monkeypatch, bench, "dense", "wrong", loss, ours=ours, accuracy=accuracy)
    options = [*ONE, "--temperatures", "2", "--variants", "wrong", "pytorch"]
    status, documents = run(bench, tmp_path, "dense", *options)
    assert status == int(ours)
    rows = [row for row in documents["dense"]["rows"] if row["vocab"] > 16]
    assert {row["backward"] for row in rows} == {True, False}
    for row in rows:
        if row["variant"] == "wrong":
            assert row["status"].startswith("wrong: ") and row["ms"] is None
        elif row["variant"] == "pytorch":
            assert row["status"] == "ok" and row["ms"] > 0
    assert "the wrong one: wrong: " in next(tmp_path.glob("dense*.all.md")).read_text()


@pytest.mark.parametrize("suite", ("linear", "sparse", "loop"))
@pytest.mark.parametrize("factor", (1.01, 0.99))
def test_loss_that_is_off_is_not_timed(bench, monkeypatch, tmp_path, suite, factor):
    form = "heads" if suite == "loop" else None
    name = "pytorch-heads" if form else "pytorch"
    made = bench.suites.SUITES[suite].variants[name].make

    def make(case):
        loss = made(case)
        return lambda x: factor * loss(x)

    add(monkeypatch, bench, suite, "off", None, make=make, accuracy="float32", ours=True)
    options = [*ONE, "--temperatures", "1", "--variants", "off", name]
    status, documents = run(bench, tmp_path, suite, *options)
    found = {row["variant"]: row for row in documents[suite]["rows"]}
    assert status == 1 and found["off"]["status"].startswith("wrong: loss off by 1.0e-02")
    assert found["off"]["ms"] is None and found[name]["status"] == "ok"


@pytest.mark.parametrize("wrong", (0.0, float("nan")))
@pytest.mark.parametrize("at", ((-1, -1), (0, 0), (7, 500)))
def test_one_wrong_gradient_entry_is_seen(bench, dense, wrong, at):
    """Even one that is tiny beside the row's largest."""
    inputs = dense.draw()
    expected = dense.definitions(inputs)
    step = bench.case.Step(right, dense, inputs)
    step.prepare()
    step.run()
    allowed = bench.definition.TOLERANCES["dense", "float32"]["exact"]
    assert bench.definition.verdict(bench.definition.errors(step, expected), allowed) == "ok"
    inputs.student.grad[at] = wrong
    found = bench.definition.errors(step, expected)
    assert bench.definition.verdict(found, allowed).startswith("wrong: gradient")
    step.value = step.value * float("nan")
    found = bench.definition.errors(step, expected)
    assert bench.definition.verdict(found, allowed).startswith("wrong: loss")


def test_unwritten_row_is_seen_wherever_it_is(bench, monkeypatch, dense):
    """Of many rows some are compared; the gradient's memory is NaN before."""
    monkeypatch.setattr(bench.case, "CHECKED_ENTRIES", 1000)
    monkeypatch.setattr(bench.case, "CHECKED_ROWS", 2)
    unchecked = sorted(set(range(20)) - set(dense.checked().tolist()))
    assert len(unchecked) >= 16

    def loss(x):
        return right(x)

    add(monkeypatch, bench, "dense", "tested", loss)
    fresh = torch.empty_like

    class Lazy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student, value, gradient):
            ctx.gradient = gradient
            return value.clone()

        @staticmethod
        def backward(ctx, upstream):
            unwritten = fresh(ctx.gradient).fill_(float("nan"))
            written = torch.ones(20, dtype=torch.bool)
            written[unchecked[5]] = False
            unwritten[written] = ctx.gradient[written]
            return unwritten, None, None

    def lazy(x):
        student = x.student.detach().requires_grad_()
        value = right(replace(x, student=student))
        (gradient,) = torch.autograd.grad(value, student)
        return Lazy.apply(x.student, value.detach(), gradient)

    add(monkeypatch, bench, "dense", "lazy", lazy)
    measuring = bench.measure.Run(bench.devices.Cpu(), 1, 60.0, memory=False)
    found = {line["variant"]: line for line in measuring.measure(dense, ["tested", "lazy"])}
    assert found["tested"]["status"] == "ok"
    assert found["lazy"]["status"].startswith("wrong: gradient off by nan")


def test_gradient_memory_holds_nan_before_the_checked_call(bench, monkeypatch, dense):
    seen = []

    def loss(x):
        if x.student.grad is not None:
            seen.append(x.student.grad)
        return right(x)

    kept = []

    class Watched(bench.case.Step):
        def drop(self):
            gradient = self.inputs.student.grad
            if gradient is not None:
                kept.append(bool(gradient.isnan().all()))
            super().drop()

    monkeypatch.setattr(bench.measure, "Step", Watched)
    add(monkeypatch, bench, "dense", "watched", loss)
    bench.measure.Run(bench.devices.Cpu(), 1, 60.0, memory=False).measure(dense, ["watched"])
    assert not seen and kept[0] is True


# What keeps a variant from being measured


def test_failure_of_others_is_theirs(bench, monkeypatch, tmp_path):
    def loss(x):
        raise RuntimeError("\nnot on this machine\nand more")

    for ours, status in ((False, 0), (True, 1)):
        add(monkeypatch, bench, "dense", "broken", loss, ours=ours)
        options = ["dense", *ONE, "--temperatures", "2", "--variants", "broken", "pytorch"]
        found, documents = run(bench, tmp_path, *options)
        rows = {row["variant"]: row for row in documents["dense"]["rows"]}
        assert found == status and rows["pytorch"]["status"] == "ok"
        assert rows["broken"]["status"] == "failed: RuntimeError: not on this machine"


NO_MEMORY = (
    torch.OutOfMemoryError("no"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
)


@pytest.mark.parametrize("after", (0, 1, 2, 3))
@pytest.mark.parametrize("error", NO_MEMORY)
def test_out_of_memory_ends_no_run(bench, monkeypatch, dense, after, error):
    calls = []

    def loss(x):
        calls.append(1)
        if len(calls) > after:
            raise error
        return right(x)

    add(monkeypatch, bench, "dense", "greedy", loss)
    measuring = bench.measure.Run(bench.devices.Cpu(), 2, 60.0, memory=False)
    found = {line["variant"]: line for line in measuring.measure(dense, ["greedy", "pytorch"])}
    assert found["greedy"]["status"] == "out of memory" and found["greedy"]["ms"] is None
    assert found["pytorch"]["status"] == "ok" and found["copy"]["ms"] > 0


@pytest.mark.parametrize("error", NO_MEMORY)
def test_inputs_that_do_not_fit_end_no_run(bench, monkeypatch, dense, error):
    def draw(case):
        raise error

    monkeypatch.setattr(bench.suites.Dense, "draw", draw)
    measuring = bench.measure.Run(bench.devices.Cpu(), 2, 60.0)
    (line,) = measuring.measure(dense, ["pytorch"])
    assert line["status"].startswith("out of memory: the inputs")


@pytest.mark.parametrize("suite, dtype", [("dense", "float32"), ("linear", "bfloat16")])
def test_peers_that_are_not_there_say_why(bench, tmp_path, capsys, suite, dtype):
    options = [suite, "--dtypes", dtype, "--divergences", "jsd", "--alphas", "1"]
    status, documents = run(bench, tmp_path, *options, "--temperatures", "1")
    found = {row["variant"]: row["status"] for row in documents[suite]["rows"]}
    assert status == 0 and found["trl"].startswith("missing: trl.")
    assert found["triton"] == "missing: needs a CUDA device"
    assert "TRL" in capsys.readouterr().out and documents[suite]["machine"]["packages"]


def test_failure_in_a_round_is_of_its_variant(bench, monkeypatch, dense):
    calls = []

    def loss(x):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("an illegal memory access")
        return right(x)

    add(monkeypatch, bench, "dense", "late", loss)
    measuring = bench.measure.Run(bench.devices.Cpu(), 3, 60.0, memory=False)
    found = {line["variant"]: line for line in measuring.measure(dense, ["late", "pytorch"])}
    assert found["late"]["status"] == "failed: RuntimeError: an illegal memory access"
    assert found["late"]["ms"] is None and found["pytorch"]["ms"] > 0


@pytest.mark.parametrize("backward", (True, False))
def test_nobody_is_there(bench, backward):
    """And no yardstick either."""
    case = bench.suites.Linear("cpu", "float32", 8, 300, hidden=8, backward=backward)
    lines = bench.measure.Run(bench.devices.Cpu(), 1, 60.0).measure(case, ["triton"])
    assert lines[0]["status"] == "missing: needs a CUDA device"
    case = bench.suites.Dense("cpu", "float32", 4, 16, backward=backward)
    (line,) = bench.measure.Run(bench.devices.Cpu(), 1, 60.0).measure(case, ["triton"])
    assert line["ms"] is None


def test_peak_that_cannot_be_measured_leaves_the_time(bench, monkeypatch, dense):
    def broken(*args):
        raise RuntimeError("no memory for the inputs")

    monkeypatch.setattr(bench.devices.Cpu, "peak", broken)
    (line, *_) = bench.measure.Run(bench.devices.Cpu(), 1, 60.0).measure(dense, ["pytorch"])
    assert line["status"] == "ok" and line["ms"] > 0 and line["peak_mb"] is None


# Memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ("inplace", "pytorch"))
def test_peak_memory(bench, name):
    """A matrix of 16 MiB cannot hide, and does not appear where there is none."""
    if name == "inplace" and NO_NATIVE:
        pytest.skip(f"native: {NO_NATIVE}")
    case = bench.suites.Dense("cpu", "float32", 64, 65536, temperature=2.0)
    peak, gradient = bench.devices.Cpu().peak(case, name)
    if name == "inplace":
        assert gradient == 0 and peak < case.matrix / 4
    else:
        assert gradient == case.matrix and peak > 3 * case.matrix


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ("native", "pytorch"))
def test_peak_memory_of_heads(bench, name):
    """Chunks of 256 rows take half of a matrix of 256 MiB."""
    if name == "native" and NO_NATIVE:
        pytest.skip(f"native: {NO_NATIVE}")
    case = bench.suites.Linear("cpu", "float32", 1024, 65536, "jsd", 1.0, 1.0, hidden=16)
    peak, gradients = bench.devices.Cpu().peak(case, name)
    assert gradients == 4 * 16 * (1024 + 65536)
    assert peak < 0.75 * case.matrix if name == "native" else peak > 3 * case.matrix


def test_process_that_dies_is_said_to(bench):
    with pytest.raises(bench.peers.base.Missing, match="ended without an answer"):
        bench.devices.in_fresh_process(__import__("os")._exit, 1)


# A GPU, for which a CPU stands in but for its events


class CpuAsGpu:
    name, compiles, warm, more_rounds = "cuda", True, float("inf"), 1

    def __init__(self):
        self.calls = []

    def seconds(self, step, repeat=1):
        start = time.perf_counter()
        step.run()
        assert repeat == 1
        return time.perf_counter() - start

    def observed(self, run):
        return run(), PEAK

    def release(self):
        pass


@pytest.mark.parametrize("suite", ("dense", "linear", "sparse", "loop"))
def test_run_on_a_gpu(bench, suite):
    """Peaks come from the allocator, and a call that is not timed goes before each that is."""
    case = bench.suites.PUBLISHED[suite]("cpu", 1)[0][0].small()
    names = ["pytorch"] if suite != "loop" else ["pytorch-heads"]
    lines = bench.measure.Run(CpuAsGpu(), 2, 60.0).measure(case, names)
    peer, *yardsticks = lines
    assert peer["status"] == "ok" and peer["calls"] == 2
    assert peer["peak_mb"] + peer["gradient_mb"] == pytest.approx(PEAK / 1e6)
    assert yardsticks and all(line["status"] == "ok" for line in yardsticks)


def test_first_call_on_a_gpu_compiles(bench, monkeypatch, dense):
    """However long it takes: what counts is the second."""
    calls = []

    def loss(x):
        calls.append(1)
        time.sleep(0.2 if len(calls) == 1 else 0.0)
        return right(x)

    add(monkeypatch, bench, "dense", "triton", loss)
    (line, *_) = bench.measure.Run(CpuAsGpu(), 2, 0.15).measure(dense, ["triton"])
    assert line["status"] == "ok" and line["calls"] == 2 and line["ms_max"] < 150


def test_turn_on_a_gpu(bench, dense):
    order = []

    class Recorded:
        def prepare(self):
            order.append("prepare")

        def run(self):
            order.append("run")

        def drop(self):
            order.append("drop")

    measuring = bench.measure.Run(CpuAsGpu(), 1, 60.0)
    measuring.turn(Recorded)
    assert order == ["prepare", "run", "prepare", "run", "drop"]


@pytest.mark.parametrize(
    "answer, driver, clocks",
    [
        (
            "GPU-a, 580.1, 1980, 1980, 3201, 3201\nGPU-b, 570.0, 345, 1980, 2619, 3201\n",
            "570.0",
            "SM 345 of 1980 MHz, memory 2619 of 3201 MHz",
        ),
        ("MIG-x, 580.1, 1, 2, 3, 4", "580.1", "SM 1 of 2 MHz, memory 3 of 4 MHz"),
        ("No devices were found", "unknown", "unknown"),
        ("", "unknown", "unknown"),
    ],
)
def test_driver_and_clocks(bench, answer, driver, clocks):
    assert bench.devices.smi_facts(answer, "b") == {"driver": driver, "clocks": clocks}


def test_no_gpu_is_said_in_one_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as status:
        bench.command.main(["dense", "--device", "cuda"])
    assert status.value.code == 2
    assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err
