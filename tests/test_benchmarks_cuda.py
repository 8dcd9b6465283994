"""The GPU benchmarks but for their CUDA events: what they run, check, count and say.

A CPU stands in for the GPU, and for the packages of others modules with the same interface.
"""

import csv
import functools
import importlib
import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdkernels import TopK, kd_loss
from kdkernels.backends.registry import BACKENDS

NO_NATIVE = BACKENDS["native"].unavailable("cpu")
ABSENT = {
    "native": NO_NATIVE,
    "inplace": NO_NATIVE,
    "triton": BACKENDS["triton"].unavailable("cpu"),
}
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS, VOCAB = 6, 50
SMALL = ["--rows", str(ROWS), "--vocabs", str(VOCAB), "--rounds", "2"]
PEAK = 10**6


@pytest.fixture
def dense_cuda(monkeypatch):
    """The benchmark's module, imported as its script sees it, with a CPU for a GPU."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("dense_cuda")
    monkeypatch.setattr(module.harness, "gpu", CpuAsGpu)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking a second one takes longer than anything here
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def sources_cuda(dense_cuda):
    return importlib.import_module("sources_cuda")


@pytest.fixture
def harness(dense_cuda):
    return dense_cuda.harness


class CpuAsGpu:
    device = "cpu"

    def seconds(self, run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def peak(self, run):
        run()
        return PEAK

    def release(self):
        pass

    def facts(self):
        return {
            "gpu": "NVIDIA H200",
            "driver": "580.1",
            "clocks": "SM 1980 of 1980 MHz",
            "torch built for": "CUDA 13.0",
            "triton": "3.6.0",
        }


class LigerCrossEntropy(torch.autograd.Function):
    """Writes the gradient over the logits where they require grad, as Liger's kernel does."""

    @staticmethod
    def forward(ctx, logits, labels):
        loss = F.cross_entropy(logits, labels)
        if logits.requires_grad:
            gradient = logits.softmax(-1)
            gradient[torch.arange(len(labels)), labels] -= 1
            logits.data.copy_(gradient / len(labels))  # autograd does not hear of it
            ctx.gradient = logits.detach()
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient * upstream, None


class LigerJSD(torch.nn.Module):
    def __init__(self, beta):
        super().__init__()
        self.beta = beta

    def forward(self, log_q, log_p):
        log_m = torch.log(self.beta * log_p.exp() + (1 - self.beta) * log_q.exp())
        kl = (F.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q))
        return self.beta * next(kl) + (1 - self.beta) * next(kl)


class GKDTrainer:
    @staticmethod
    def generalized_jsd_loss(
        student_logits,
        teacher_logits,
        labels=None,
        beta=0.5,
        temperature=1.0,
        reduction="batchmean",
        num_items_in_batch=None,
    ):
        assert reduction == "batchmean" and labels is None
        log_q = F.log_softmax(student_logits / temperature, -1)
        log_p = F.log_softmax(teacher_logits / temperature, -1)
        if beta == 0:
            return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)
        return LigerJSD(beta)(log_q, log_p)


class LigerFusedLinearJSD(torch.nn.Module):
    def __init__(self, jsd_beta):
        super().__init__()
        self.beta = jsd_beta

    def forward(self, hidden, weight, teacher_hidden, teacher_weight, shift_labels):
        assert shift_labels is None
        logits = [hidden.float() @ weight.T.float()]
        logits.append(teacher_hidden.float() @ teacher_weight.T.float())
        return GKDTrainer.generalized_jsd_loss(*logits, beta=self.beta)


def chunked_divergence(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, beta):
    assert bias is None and teacher_bias is None
    heads = hidden, weight, teacher_hidden, teacher_weight
    return LigerFusedLinearJSD(beta)(*heads, None).expand(len(hidden)), torch.zeros(len(hidden))


@pytest.fixture
def peers(monkeypatch):
    """liger_kernel and trl as their documentation has them."""
    cross_entropy = types.SimpleNamespace(LigerCrossEntropyLoss=lambda: LigerCrossEntropy.apply)
    liger = types.SimpleNamespace(
        **vars(cross_entropy),
        LigerJSD=LigerJSD,
        LigerKLDIVLoss=torch.nn.KLDivLoss,
        LigerFusedLinearJSD=LigerFusedLinearJSD,
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    for name in ("trl", "trl.experimental", "trl.kernels"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    gkd = types.SimpleNamespace(GKDTrainer=GKDTrainer)
    monkeypatch.setitem(sys.modules, "trl.experimental.gkd", gkd)
    function = types.SimpleNamespace(apply=chunked_divergence)
    divergence = types.SimpleNamespace(ChunkedDivergenceFunction=function)
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_divergence", divergence)


@pytest.fixture
def no_peers(monkeypatch):
    for name in ("liger_kernel", "liger_kernel.transformers", "trl", "trl.experimental.gkd"):
        monkeypatch.setitem(sys.modules, name, None)


def run(dense_cuda, folder, *options):
    """The exit status, the JSON and the Markdown of a small run."""
    status = dense_cuda.main([*SMALL, *options, "--out", str(folder)])
    document = json.loads((folder / "dense-cuda-nvidia-h200.json").read_text())
    return status, document, (folder / "dense-cuda-nvidia-h200.md").read_text()


def add(dense_cuda, monkeypatch, name, loss, **options):
    """One more variant."""
    options = {"ours": True, "accuracy": "float32", **options}
    variant = dense_cuda.Variant(f"the {name} one", lambda case, device: loss, **options)
    monkeypatch.setitem(dense_cuda.VARIANTS, name, variant)


def right(student, teacher, labels):
    options = dict(temperature=2.0, alpha=0.5, backend="eager")
    return kd_loss(student, teacher, labels, **options)


# What is computed


def test_cases(dense_cuda):
    definitions = {
        name: (case.divergence, case.temperature, case.alpha, case.backward)
        for name, case in dense_cuda.CASES.items()
    }
    assert definitions == {
        "kl-ce": ("forward_kl", 2.0, 0.5, True),
        "kl-ce-t1": ("forward_kl", 1.0, 0.5, True),
        "kl": ("forward_kl", 2.0, 1.0, True),
        "jsd": ("jsd", 1.0, 0.5, True),
        "kl-ce-loss": ("forward_kl", 2.0, 0.5, False),
    }
    assert dense_cuda.VOCABS == (32000, 128256, 151936, 262144) and dense_cuda.ROWS == 8192


@pytest.mark.parametrize("name", ("kl-ce", "kl-ce-loss"))
def test_copy_moves_as_many_bytes_as_the_pass(dense_cuda, harness, name):
    case = dense_cuda.CASES[name]
    problem = harness.make_problem(ROWS, VOCAB, torch.bfloat16)
    copy = dense_cuda.Copy(problem, case)
    copy.prepare()
    copy.run()
    read, written = (sum(x.nbytes for x in side) for side in zip(*copy.pairs, strict=True))
    assert read == written and read + written == (3 if case.backward else 2) * ROWS * VOCAB * 2
    assert all(torch.equal(target, source) for target, source in copy.pairs)
    inputs = problem.student.data_ptr(), problem.teacher.data_ptr()
    assert all(target.data_ptr() not in inputs for target, _ in copy.pairs)


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("in_float32", (False, True))
def test_every_variant_computes_the_same_loss(dense_cuda, harness, in_float32):
    """In float32 almost exactly; in bfloat16 within what is tolerated of it."""
    dtype = torch.float32 if in_float32 else torch.bfloat16
    problem = harness.make_problem(ROWS, VOCAB, dtype)
    student = problem.student.detach().clone()
    for case_name, case in dense_cuda.CASES.items():
        outputs = {}
        for name in dense_cuda.QUICK_VARIANTS:
            variant = dense_cuda.VARIANTS[name]
            if case_name not in variant.cases or ABSENT.get(name):
                continue
            inplace = variant.overwrites and case.backward
            loss = variant.make(case, "cpu")
            step = harness.Step(loss, problem, backward=case.backward, inplace=inplace)
            step.prepare()
            step.run()
            outputs[name] = step.value.detach(), step.gradient()
            assert (step.gradient() is not None) == case.backward
            assert torch.equal(problem.student, student), f"{name} overwrote the problem"
        options = dict(divergence=case.divergence, temperature=case.temperature)
        for name, found in harness.errors(outputs, problem, alpha=case.alpha, **options).items():
            allowed = dense_cuda.TOLERANCES[dense_cuda.VARIANTS[name].accuracy]
            allowed = (1e-5, 1e-4) if in_float32 else allowed
            assert harness.verdict(found, allowed) == "ok", (case_name, name)


def test_compiled_formula_is_one_graph(dense_cuda, harness, monkeypatch):
    """`aot_eager` stands in for the compiler, which would take long: the graph is the same."""
    compile = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile)
    for case in (dense_cuda.CASES[name] for name in ("kl-ce", "jsd")):
        problem = harness.make_problem(ROWS, VOCAB, torch.float32)
        inputs = problem.student, problem.teacher, problem.labels
        loss = dense_cuda.VARIANTS["compiled"].make(case, "cpu")
        torch.testing.assert_close(loss(*inputs), dense_cuda.formula(case)(*inputs))
    torch.compiler.reset()


# What is measured


@pytest.mark.usefixtures("peers")
def test_run_writes_what_it_measured(dense_cuda, tmp_path, capsys):
    status, document, page = run(dense_cuda, tmp_path, "--variants", *dense_cuda.QUICK_VARIANTS)
    assert status == 0
    expected = [
        (case, name)
        for case in dense_cuda.CASES
        for name in [*dense_cuda.QUICK_VARIANTS, "copy"]
        if name != "inplace" or case == "kl-ce"
    ]
    rows = document["rows"]
    assert [(row["case"], row["variant"]) for row in rows] == expected
    for row in rows:
        case, size = dense_cuda.CASES[row["case"]], ROWS * VOCAB * 2
        assert (row["rows"], row["vocab"]) == (ROWS, VOCAB)
        if ABSENT.get(row["variant"]):
            assert row["status"].startswith("missing: ") and row["ms"] is None
            continue
        assert row["status"] == "ok" and row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["bytes"] == (3 if case.backward else 2) * size
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["share_of_copy_min"] <= row["share_of_copy"] <= row["share_of_copy_max"]
        if row["variant"] == "copy":
            assert row["share_of_copy"] == 1 and row["peak_mb"] is None
            continue
        assert (row["times_native"] is None) == bool(NO_NATIVE)
        gradient = size if case.backward and row["variant"] != "inplace" else 0
        assert row["gradient_mb"] == (gradient / 1e6 if case.backward else None)
        assert row["peak_mb"] == (PEAK - gradient) / 1e6
        assert row["loss_error"] is not None
        assert (row["gradient_error"] is not None) == case.backward

    machine = document["machine"]
    facts = {"gpu", "driver", "clocks", "torch", "torch built for", "triton", "commit", "date"}
    assert facts <= machine.keys() and document["settings"]["rounds"] == 2
    with (tmp_path / "dense-cuda-nvidia-h200.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["ms"] for line in lines] == [str(row["ms"] or "") for row in rows]
    assert facts <= lines[0].keys()

    printed = capsys.readouterr().out
    for text in (page, printed):
        assert all(f"{ROWS} × {VOCAB}, {case.title}" in text for case in dense_cuda.CASES.values())
        for name in dense_cuda.QUICK_VARIANTS:
            assert dense_cuda.VARIANTS[name].title in text
    assert "NVIDIA H200 (driver 580.1, SM 1980 of 1980 MHz" in page and "kdkernels" in page
    tables = [block for block in page.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 1 + len(dense_cuda.CASES)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_what_a_line_shows(dense_cuda):
    line = dense_cuda.record(
        *("kl-ce", 128256, 8192, "native"),
        **dict(status="ok", ms=1.6234, ms_min=1.6, ms_max=1.7, gb_per_s=3882.4),
        **dict(share_of_copy=0.9123, share_of_copy_min=0.9, share_of_copy_max=0.92),
        **dict(times_native=1.0, times_native_min=1.0, times_native_max=1.0),
        **dict(peak_mb=0.1234, gradient_mb=2101.3, loss_error=3e-8, gradient_error=0.0035),
    )
    shown = dict(zip(enumerate(dense_cuda.HEADER), dense_cuda.cells(line), strict=True))
    assert [text for _, text in shown.items()] == (
        "kdkernels 1.623 1.600 1.700 3,882 91% 90% 92% 1.00 1.00 1.00 0.1 2,101.3 3.0e-08 3.5e-03"
    ).split()
    heading, timed, others = next(dense_cuda.tables([line]))
    assert heading == "8,192 × 128,256, forward KL and cross-entropy, T = 2, α = 0.5"
    assert timed == [dense_cuda.cells(line)] and others == []


@pytest.mark.usefixtures("no_peers")
def test_missing_peers_say_why(dense_cuda, tmp_path, capsys):
    names = ["pytorch", "liger", "liger-float32", "trl"]
    status, document, page = run(dense_cuda, tmp_path, "--variants", *names)
    assert status == 0
    for row in document["rows"]:
        there = row["variant"] in ("pytorch", "copy")
        assert row["status"].startswith("ok" if there else "missing: ") and there == bool(row["ms"])
    for text in (page, capsys.readouterr().out):
        for name, module in (("liger", "liger_kernel.transformers"), ("trl", "trl.experimental")):
            reason = f"{dense_cuda.VARIANTS[name].title}: missing: {module}"
            assert text.count(reason) == 1 and "ModuleNotFoundError" in text


def without_t_squared(student, teacher, labels):
    return kd_loss(student, teacher, labels, temperature=2.0, t_squared=False, backend="eager")


def with_roles_swapped(student, teacher, labels):
    options = dict(divergence="reverse_kl", temperature=2.0, backend="eager")
    return kd_loss(student, teacher, labels, **options)


class LeftUnwritten(torch.autograd.Function):
    """The right gradient but for one row, which holds what was there before."""

    row = None

    @staticmethod
    def forward(ctx, student, teacher, labels):
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            loss = right(leaf, teacher, labels)
        (ctx.gradient,) = torch.autograd.grad(loss, leaf)
        ctx.gradient[LeftUnwritten.row] = float("nan")
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient, None, None


@pytest.mark.parametrize("accuracy", ("float32", "bfloat16"))
@pytest.mark.parametrize("loss", (without_t_squared, with_roles_swapped))
def test_wrong_variant_is_not_timed(dense_cuda, monkeypatch, tmp_path, loss, accuracy):
    """Not for the loss only either, and only our own make the exit status 1."""
    add(dense_cuda, monkeypatch, "wrong", loss, accuracy=accuracy)
    options = ["--variants", "wrong", "pytorch", "--cases", "kl-ce", "kl-ce-loss"]
    status, document, page = run(dense_cuda, tmp_path, *options)
    assert status == 1 and "- the wrong one: wrong: " in page
    for row in document["rows"]:
        if row["variant"] == "wrong":
            assert row["status"].startswith("wrong: ") and row["ms"] is None
        else:
            assert row["status"] == "ok" and row["ms"] > 0
    add(dense_cuda, monkeypatch, "wrong", loss, accuracy=accuracy, ours=False)
    assert run(dense_cuda, tmp_path, *options)[0] == 0


@pytest.mark.parametrize(
    ("factor", "tolerant"),
    ((1 + 1e-3, ["bfloat16"]), (1 + 1e-4, ["float32", "bfloat16"]), (1.5, [])),
)
def test_accuracy_is_that_of_the_arithmetic(dense_cuda, monkeypatch, tmp_path, factor, tolerant):
    for name in dense_cuda.TOLERANCES:
        loss = functools.partial(scaled, factor)
        add(dense_cuda, monkeypatch, f"of {name}", loss, accuracy=name)
    names = [f"of {name}" for name in dense_cuda.TOLERANCES]
    _, document, _ = run(dense_cuda, tmp_path, "--cases", "kl-ce", "--variants", *names)
    timed = [row["variant"] for row in document["rows"] if row["status"] == "ok"]
    assert timed == [*(f"of {name}" for name in tolerant), "copy"]
    accuracy = {name: variant.accuracy for name, variant in dense_cuda.VARIANTS.items()}
    assert accuracy["native"] == accuracy["triton"] == accuracy["inplace"] == "exact"


def scaled(factor, *inputs):
    return factor * right(*inputs)


def test_unwritten_row_is_seen_wherever_it_is(dense_cuda, harness, monkeypatch):
    count = 4 * dense_cuda.CHECKED_ROWS
    checked = dense_cuda.checked_rows(count)
    assert {0, count - 1} <= set(checked.tolist()) and len(checked) < count / 2
    LeftUnwritten.row = next(row for row in range(count) if row not in checked)
    add(dense_cuda, monkeypatch, "partial", LeftUnwritten.apply)
    add(dense_cuda, monkeypatch, "whole", right)
    problem = harness.make_problem(count, VOCAB, dense_cuda.DTYPE)
    settings = types.SimpleNamespace(variants=["partial", "whole"], rounds=1)
    lines = dense_cuda.measure("kl-ce", problem, settings, CpuAsGpu())
    assert [line["status"].partition(":")[0] for line in lines] == ["wrong", "ok", "ok"]


def test_errors_on_some_rows(dense_cuda, harness):
    """The loss is that of all rows, the gradients are those of the rows that were asked for."""
    problem = harness.make_problem(40, VOCAB, torch.float32)
    step = harness.Step(right, problem)
    step.prepare()
    step.run()
    loss, gradient = step.value.detach(), step.gradient()
    rows = torch.tensor([0, 17, 18, 39])
    broken = gradient[rows].clone()
    broken[-1, -1] = 0
    outputs = {
        "right": (loss, gradient[rows]),
        "broken": (loss, broken),
        "of other rows": (loss, gradient[rows + 1 - 2 * (rows == 39)]),
        "loss of these rows": (right(*problem_rows(problem, rows)).detach(), gradient[rows]),
    }
    options = dict(divergence="forward_kl", temperature=2.0, alpha=0.5)
    found = harness.errors(outputs, problem, rows=rows, chunk=3, **options)
    verdicts = {name: harness.verdict(errors, (1e-5, 1e-4)) for name, errors in found.items()}
    assert verdicts["right"] == "ok"
    assert verdicts["broken"].startswith("wrong: gradient")
    assert verdicts["of other rows"].startswith("wrong: gradient")
    assert verdicts["loss of these rows"].startswith("wrong: loss")


def problem_rows(problem, rows):
    return problem.student.detach()[rows], problem.teacher[rows], problem.labels[rows]


def failing(error, after=0):
    calls = 0

    def loss(student, teacher, labels):
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return right(student, teacher, labels)

    return loss


@pytest.mark.parametrize("after", (0, 1, 2, 5))  # the check makes two calls, a turn two
def test_out_of_memory_ends_no_run(dense_cuda, monkeypatch, tmp_path, after):
    add(dense_cuda, monkeypatch, "huge", failing(torch.OutOfMemoryError("CUDA"), after))
    options = ["--variants", "huge", "pytorch", "--cases", "kl-ce"]
    status, document, page = run(dense_cuda, tmp_path, *options)
    huge, pytorch, copy = document["rows"]
    assert status == 0 and huge["status"] == "out of memory" and huge["ms"] is None
    assert pytorch["ms"] > 0 and copy["ms"] > 0
    assert "- the huge one: out of memory" in page


def test_logits_that_do_not_fit_end_no_run(dense_cuda, harness, monkeypatch, tmp_path):
    def make_problem(*args, **options):
        raise torch.OutOfMemoryError("CUDA")

    monkeypatch.setattr(harness, "make_problem", make_problem)
    status, document, page = run(dense_cuda, tmp_path, "--variants", "inplace", "pytorch")
    assert status == 0 and len(document["rows"]) == 1 + len(dense_cuda.CASES)
    assert {row["status"].partition(":")[0] for row in document["rows"]} == {"out of memory"}


def test_failure_of_others_is_theirs(dense_cuda, monkeypatch, tmp_path):
    for ours in (True, False):
        loss = failing(ValueError("no such kernel\nand more"))
        add(dense_cuda, monkeypatch, "broken", loss, ours=ours)
        options = ["--variants", "broken", "pytorch", "--cases", "kl-ce"]
        status, document, page = run(dense_cuda, tmp_path, *options)
        assert status == ours
        assert document["rows"][0]["status"] == "failed: ValueError: no such kernel"
        assert "- the broken one: failed: ValueError: no such kernel\n" in page + "\n"
        assert document["rows"][1]["ms"] > 0


def test_turns(dense_cuda):
    """One after the other, each after a call that is not timed, and nothing stays between them."""

    class Recorded:
        alive = 0

        def __init__(self, name):
            self.name = name
            Recorded.alive += 1
            assert Recorded.alive == 1

        def __del__(self):
            Recorded.alive -= 1

        def prepare(self):
            order.append(self.name.lower())

        def run(self):
            order.append(self.name)

    class Clock(CpuAsGpu):
        def seconds(self, run):
            order.append("(")
            run()
            order.append(")")
            return 1.0

    order = []
    makers = {name: lambda name=name: Recorded(name) for name in "AB"}
    assert dense_cuda.take_turns(makers, 2, Clock()) == {"A": [1.0, 1.0], "B": [1.0, 1.0]}
    assert "".join(order) == 2 * "aAa(A)bBb(B)"


def test_ratios_are_taken_within_rounds(dense_cuda):
    seconds = {"native": [1.0, 2.0, 4.0], "copy": [0.5, 1.6, 3.6], "pytorch": [3.0, 8.0, 8.0]}
    fields = dense_cuda.rates(seconds, "pytorch", 6e9)
    assert fields["ms"] == 8000 and fields["gb_per_s"] == 0.75
    names = "share_of_copy", "times_native"
    shown = [fields[f"{name}{which}"] for name in names for which in ("", "_min", "_max")]
    assert shown == pytest.approx([0.2, 0.5 / 3, 0.45, 3.0, 2.0, 4.0])


# What is wanted


def line(dense_cuda, case, vocab, variant, **measured):
    measured = {"status": "ok", **measured}
    return dense_cuda.record(case, vocab, 8192, variant, **measured)


def test_targets(dense_cuda):
    wanted = {
        (target.case, target.vocab, target.variant, target.what): (target.limit, target.gpu)
        for target in dense_cuda.TARGETS
    }
    assert len(wanted) == len(dense_cuda.TARGETS)
    for vocab, limit in ((32000, 0.45), (128256, 1.75), (262144, 3.6)):
        assert wanted["kl-ce", vocab, "native", "ms"] == (limit, "H200")
    assert wanted["jsd", 128256, "native", "ms"] == (2.2, "H200")
    assert wanted["kl-ce", 32000, "triton", "ms"] == (0.45, "H200")
    assert wanted["kl-ce", 128256, "triton", "ms"] == (2.7, "H200")
    for vocab in dense_cuda.VOCABS:
        for case in ("kl-ce", "kl-ce-t1", "kl"):
            assert wanted[case, vocab, "native", "% of copy"] == (0.85, "")
        assert wanted["kl-ce", vocab, "native", "MB beyond gradient"] == (1.0, "")
        assert wanted["kl-ce", vocab, "inplace", "MB in all"] == (1.0, "")
    assert not any(name == "ms" and not gpu for (*_, name), (_, gpu) in wanted.items())


@pytest.mark.parametrize(
    ("gpu", "measured", "verdicts"),
    (
        ("NVIDIA H200", dict(ms=1.75, share_of_copy=0.85, peak_mb=1.0), ["met"] * 3),
        ("NVIDIA H200", dict(ms=1.76, share_of_copy=0.849, peak_mb=1.1), ["not met"] * 3),
        (
            "NVIDIA H100 80GB HBM3",
            dict(ms=1.76, share_of_copy=0.9, peak_mb=0.1),
            ["for H200 only", "met", "met"],
        ),
        ("NVIDIA H200", dict(status="wrong: loss", ms=1.0), ["not measured"] * 3),
        (
            "NVIDIA H200",
            dict(ms=1.0, share_of_copy=None, peak_mb=0),
            ["met", "not measured", "met"],
        ),
    ),
)
def test_verdicts(dense_cuda, gpu, measured, verdicts):
    records = [line(dense_cuda, "kl-ce", 128256, "native", **measured)]
    judged = dense_cuda.judge(records, gpu)
    here = {t["what"]: t["verdict"] for t in judged if target_of(t) == ("kl-ce", 128256, "native")}
    names = "ms", "% of copy", "MB beyond gradient"
    assert [here[name] for name in names] == verdicts
    elsewhere = {t["verdict"] for t in judged if target_of(t) != ("kl-ce", 128256, "native")}
    assert elsewhere <= {"not measured", "for H200 only"}


def target_of(judged):
    return judged["case"], judged["vocab"], judged["variant"]


def test_inplace_has_to_take_no_gradient_either(dense_cuda):
    for gradient, verdict in ((0.0, "met"), (524.3, "not met")):
        memory = dict(peak_mb=0.1, gradient_mb=gradient)
        judged = dense_cuda.judge([line(dense_cuda, "kl-ce", 32000, "inplace", **memory)], "any")
        assert [t["verdict"] for t in judged if t["measured"] is not None] == [verdict]


def test_target_table(dense_cuda):
    records = [
        line(dense_cuda, "kl-ce", 32000, "native", ms=0.4012, share_of_copy=0.8765, peak_mb=0.1)
    ]
    rows = dense_cuda.target_rows(dense_cuda.judge(records, "NVIDIA H200"))
    assert len(rows) == len(dense_cuda.TARGETS)
    case = dense_cuda.CASES["kl-ce"].title
    assert [case, "32,000", "kdkernels", "ms", "≤ 0.45", "0.40", "met"] in rows
    assert [case, "32,000", "kdkernels", "% of copy", "≥ 85%", "88%", "met"] in rows
    assert [case, "128,256", "kdkernels", "ms", "≤ 1.75", "", "not measured"] in rows


# The command


def test_only_a_full_run_replaces_the_published_results(dense_cuda, harness):
    assert dense_cuda.parse([]).out == harness.RESULTS
    options = (["--quick"], ["--rows", "8"], ["--vocabs", "32000"], ["--cases", "jsd"])
    for option in (*options, ["--variants", "native"], ["--rounds", "3"]):
        assert dense_cuda.parse(option).out is None


def test_no_gpu_is_said_in_one_line(dense_cuda, harness, monkeypatch, tmp_path, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dense_cuda.main(["--quick", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and not list(tmp_path.iterdir())
    assert said.err == (
        "dense_cuda.py measures on a GPU, and there is none: torch sees no CUDA device\n"
    )


SMI = """\
GPU-aaaa, 580.159.03, 345, 1980, 3201, 3201
GPU-bbbb, 580.159.03, 1965, 1980, 2619, 2619
"""


@pytest.mark.parametrize(
    ("answer", "driver", "clocks"),
    (
        (SMI, "580.159.03", "SM 1965 of 1980 MHz, memory 2619 of 2619 MHz"),
        (SMI.splitlines()[0], "580.159.03", "SM 345 of 1980 MHz, memory 3201 of 3201 MHz"),
        (SMI.replace("bbbb", "cccc"), "unknown", "unknown"),
        ("No devices were found", "unknown", "unknown"),
        ("", "unknown", "unknown"),
    ),
)
def test_driver_and_clocks(harness, answer, driver, clocks):
    assert harness.smi_facts(answer, "bbbb") == {"driver": driver, "clocks": clocks}


def test_facts_without_nvidia_smi(harness, monkeypatch):
    def run(*args, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(harness.subprocess, "run", run)
    gpu = object.__new__(harness.Gpu)
    gpu.properties = types.SimpleNamespace(name="NVIDIA H200", uuid="bbbb")
    facts = gpu.facts()
    assert facts["gpu"] == "NVIDIA H200" and facts["driver"] == facts["clocks"] == "unknown"
    assert {"torch built for", "triton"} <= facts.keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_quick_run_on_a_gpu(dense_cuda, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert dense_cuda.main(["--quick", "--out", str(tmp_path)]) == 0
    (document,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    there = {"eager", "pytorch", "pytorch-float32", "copy"}
    if not BACKENDS["native"].unavailable("cuda"):
        there |= {"native", "inplace"}
    if not BACKENDS["triton"].unavailable("cuda"):
        there |= {"triton"}
    for row in document["rows"]:
        if row["variant"] in there:
            assert row["status"] == "ok" and 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]


# Hidden states and top-k

SMALL_SOURCES = ["--shapes", "80x6x90", "--topk-shapes", "70x80", "--rounds", "2"]
SMALL_SOURCES += ["--patience", "60"]


def run_sources(sources_cuda, folder, *options):
    """The exit status, the lines by (part, divergence, variant), the JSON, and the Markdown."""
    status = sources_cuda.main([*SMALL_SOURCES, *options, "--out", str(folder)])
    document = json.loads((folder / "sources-cuda-nvidia-h200.json").read_text())
    lines = {(line["part"], line["divergence"], line["variant"]): line for line in document["rows"]}
    return status, lines, document, (folder / "sources-cuda-nvidia-h200.md").read_text()


def add_head(sources_cuda, monkeypatch, name, loss, **options):
    """One more variant of heads in the place of another."""
    options = {"ours": True, "accuracy": "float32", **options}
    variant = sources_cuda.Variant(f"the {name} one", lambda case, device: loss, **options)
    monkeypatch.setitem(sources_cuda.HEADS, name, variant)


def of_logits(x, change=lambda logits: logits):
    """The JSD of heads from float32 logits, or from what `change` makes of them."""
    student = x.hidden.float() @ x.weight.T.float()
    teacher = x.teacher_hidden.float() @ x.teacher_weight.T.float()
    return kd_loss(change(student), change(teacher), divergence="jsd", backend="eager")


@pytest.mark.usefixtures("peers")
def test_sources_run_writes_what_it_measured(sources_cuda, monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sources_cuda.TOPK, "triton")  # many seconds in the interpreter
    status, lines, document, page = run_sources(sources_cuda, tmp_path)
    assert status == 0
    heads, topk = [*sources_cuda.HEADS, "products"], [*sources_cuda.TOPK, "copy", "order"]
    problems = ("heads", "jsd"), ("heads", "forward_kl"), ("topk", "forward_kl")
    assert list(lines) == [
        (*problem, name)
        for problem in problems
        for name in (heads if problem[0] == "heads" else topk)
    ]
    size = {"heads": 2 * 6 * (80 + 90), "topk": 2 * 70 * 80}  # of the gradients
    for (part, _, name), line in lines.items():
        if ABSENT.get(name):
            assert line["status"].startswith("missing: ") and line["ms"] is None
            continue
        assert line["status"] == "ok" and line["calls"] == 2
        assert line["ms_min"] <= line["ms"] <= line["ms_max"]
        is_yardstick = name in ("products", "copy", "order")
        assert (line["times_products"] is not None) == (part == "heads")
        assert (line["share_of_copy"] is not None) == (part == "topk" and name != "order")
        assert (line["peak_mb"] is None) == (line["loss_error"] is None) == is_yardstick
        if not is_yardstick:
            assert line["peak_mb"] == (PEAK - size[part]) / 1e6
            assert line["gradient_mb"] == size[part] / 1e6
            assert (line["rounded_loss_error"] is not None) == (part == "heads")
        if part == "heads":
            flops = 8 * 80 * 6 * 90
            assert line["tflop_per_s"] == pytest.approx(flops / line["ms"] / 1e9)
    assert lines["heads", "jsd", "products"]["times_products"] == 1
    assert lines["topk", "forward_kl", "copy"]["share_of_copy"] == 1

    facts = {"gpu", "driver", "clocks", "torch", "triton", "commit", "date", "trl", "liger-kernel"}
    assert facts <= document["machine"].keys() and document["settings"]["rounds"] == 2
    with (tmp_path / "sources-cuda-nvidia-h200.csv").open(newline="") as file:
        assert [x["ms"] for x in csv.DictReader(file)] == [
            str(line["ms"] or "") for line in lines.values()
        ]
    for text in (page, capsys.readouterr().out):
        for kind in (sources_cuda.HEADS, sources_cuda.TOPK):
            assert all(variant.title in text for variant in kind.values())
        for yardstick in (*sources_cuda.Heads.yardsticks.values(), sources_cuda.Copy):
            assert yardstick.title in text
    for table in (block for block in page.split("\n\n") if block.startswith("| ")):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.usefixtures("no_peers")
def test_missing_peers_of_heads_say_why(sources_cuda, tmp_path):
    names = ["naive", "trl", "liger"]
    status, lines, _, page = run_sources(
        sources_cuda, tmp_path, "--parts", "heads", "--divergences", "jsd", "--variants", *names
    )
    assert status == 0 and lines["heads", "jsd", "naive"]["ms"] > 0
    for name in names[1:]:
        reason = lines["heads", "jsd", name]["status"]
        assert reason.startswith("missing: ") and "ModuleNotFoundError" in reason
        assert f"- {sources_cuda.HEADS[name].title}: {reason}" in page


@pytest.mark.parametrize("divergence", ("jsd", "forward_kl"))
def test_definition_of_heads_is_that_of_all_rows(sources_cuda, monkeypatch, divergence):
    monkeypatch.setattr(sources_cuda, "CHECKED_AT_ONCE", 7 * 110)  # chunks of 7 tokens
    case = sources_cuda.Heads((100, 6, 110), divergence=divergence)
    problem = case.problem("cpu")
    whole = sources_cuda.sources.Heads(case.shape, case.dtype, divergence).definition(problem)
    definitions = case.definitions(problem)
    assert list(definitions) == ["", "rounded_"]
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=0.0)
    close(definitions[""][0], whole[0])
    for found, size, expected, rows in zip(
        *definitions[""][1:], whole[1], case.checked(), strict=True
    ):
        assert len(rows) < len(expected)
        close(found, expected[rows])
        close(size, found.abs().amax(-1, keepdim=True))
    exact, rounded = (definitions[name][0] for name in ("", "rounded_"))
    assert 1e-7 < abs(rounded - exact) / exact < 0.05


def test_definition_of_topk_is_that_of_all_rows(sources_cuda, monkeypatch):
    monkeypatch.setattr(sources_cuda, "CHECKED_AT_ONCE", 7 * 90)
    case = sources_cuda.Topk((100, 90))
    problem = case.problem("cpu")
    whole = sources_cuda.sources.Topk(case.shape, case.dtype).definition(problem)
    found = case.definitions(problem)[""]
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=0.0)
    close(found[0], whole[0])
    (rows,) = case.checked()
    for kind in (1, 2):
        close(found[kind][0], whole[kind][0][rows])


def test_copy_of_topk_moves_as_many_bytes(sources_cuda):
    case = sources_cuda.Topk((6, 70))
    ((target, source),) = sources_cuda.Copy(case.problem("cpu")).pairs
    assert source.nbytes + target.nbytes == case.bytes == 2 * 6 * 70 * 2


HEAD_OPTIONS = ["--parts", "heads", "--divergences", "jsd", "--variants", "native", "naive"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    (
        (lambda logits: logits, "ok"),
        (lambda logits: logits.bfloat16().float(), "ok"),
        (lambda logits: 1.02 * logits, "wrong"),
        (lambda logits: logits.to(torch.float8_e4m3fn).float(), "wrong"),
    ),
)
def test_logits_are_exact_or_rounded_once(sources_cuda, monkeypatch, tmp_path, change, verdict):
    add_head(sources_cuda, monkeypatch, "native", functools.partial(of_logits, change=change))
    status, lines, *_ = run_sources(sources_cuda, tmp_path, *HEAD_OPTIONS)
    line = lines["heads", "jsd", "native"]
    assert status == (verdict == "wrong") and line["status"].partition(":")[0] == verdict
    assert (line["ms"] is None) == (verdict == "wrong")


class OneRowUnwritten(torch.autograd.Function):
    """The right gradients, but for a row nobody compares, which holds what was there before."""

    which, row = 0, 0

    @staticmethod
    def forward(ctx, hidden, weight, *teacher):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        with torch.enable_grad():
            loss = of_logits(
                types.SimpleNamespace(
                    hidden=leaves[0],
                    weight=leaves[1],
                    teacher_hidden=teacher[0],
                    teacher_weight=teacher[1],
                )
            )
        ctx.gradients = torch.autograd.grad(loss, leaves)
        ctx.gradients[OneRowUnwritten.which][OneRowUnwritten.row] = float("nan")
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return *ctx.gradients, None, None


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("ours", (True, False))
def test_unwritten_row_of_a_head_is_seen(sources_cuda, monkeypatch, tmp_path, which, ours):
    checked = sources_cuda.Heads((80, 6, 90)).checked()[which].tolist()
    monkeypatch.setattr(OneRowUnwritten, "which", which)
    monkeypatch.setattr(OneRowUnwritten, "row", next(i for i in range(80) if i not in checked))
    name = "native" if ours else "liger"

    def loss(x):
        heads = x.hidden, x.weight, x.teacher_hidden, x.teacher_weight
        return OneRowUnwritten.apply(*heads)

    add_head(sources_cuda, monkeypatch, name, loss, ours=ours, accuracy="bfloat16")
    options = ["--parts", "heads", "--divergences", "jsd", "--variants", name, "naive"]
    status, lines, _, page = run_sources(sources_cuda, tmp_path, *options)
    assert status == ours and lines["heads", "jsd", "naive"]["status"] == "ok"
    line = lines["heads", "jsd", name]
    assert line["status"].startswith("wrong: gradient off by nan") and line["ms"] is None
    assert f"- the {name} one: wrong: gradient off by nan" in page


def test_memory_of_a_gradient_holds_nan_before(sources_cuda):
    class Step:
        """Its gradient is always in the same memory, and only the first call writes all of it."""

        gradient, value = torch.zeros(4, 2), torch.zeros(())
        calls = 0

        def prepare(self):
            pass

        def run(self):
            self.gradient[: 4 - self.calls] = 1
            self.calls += 1

        def gradients(self):
            return [self.gradient]

    (_, (found,)), memory, _ = sources_cuda.first_calls(Step(), [torch.tensor([1])], CpuAsGpu())
    assert found.shape == (1, 2) and found.isnan().all()
    assert memory == {"peak_mb": (PEAK - 32) / 1e6, "gradient_mb": 32 / 1e6}


def test_topk_without_its_tail_is_not_timed(sources_cuda, monkeypatch, tmp_path):
    def loss(student, teacher, labels):
        teacher = TopK(teacher.ids, teacher.logprobs, tail="renormalize")
        return kd_loss(student, teacher, labels, alpha=0.5, backend="eager")

    variant = sources_cuda.Variant("wrong", lambda *_: loss, ours=True, accuracy="float32")
    monkeypatch.setitem(sources_cuda.TOPK, "native", variant)
    options = ["--parts", "topk", "--variants", "native", "naive"]
    status, lines, *_ = run_sources(sources_cuda, tmp_path, *options)
    line = lines["topk", "forward_kl", "native"]
    assert status == 1 and line["status"].startswith("wrong: loss") and line["ms"] is None
    assert lines["topk", "forward_kl", "naive"]["share_of_copy"] is not None


@pytest.mark.parametrize("after", (0, 1, 3))  # the check makes two calls, a turn two
def test_head_that_does_not_fit_ends_no_run(sources_cuda, monkeypatch, tmp_path, after):
    calls = []

    def loss(x):
        calls.append(x)
        if len(calls) > after:
            raise torch.OutOfMemoryError("CUDA")
        return of_logits(x)

    add_head(sources_cuda, monkeypatch, "native", loss)
    status, lines, _, page = run_sources(sources_cuda, tmp_path, *HEAD_OPTIONS)
    line = lines["heads", "jsd", "native"]
    assert status == 0 and line["status"] == "out of memory" and line["ms"] is None
    assert lines["heads", "jsd", "naive"]["times_products"] > 0
    assert "- the native one: out of memory" in page


def test_heads_that_do_not_fit_end_no_run(sources_cuda, monkeypatch, tmp_path):
    def definitions(self, x):
        raise torch.OutOfMemoryError("CUDA")

    monkeypatch.setattr(sources_cuda.Heads, "definitions", definitions)
    status, lines, *_ = run_sources(sources_cuda, tmp_path, "--variants", "naive")
    heads = [line for (part, *_), line in lines.items() if part == "heads"]
    assert status == 0 and len(heads) == 2 and lines["topk", "forward_kl", "naive"]["ms"] > 0
    assert all(line["status"].startswith("out of memory: ") for line in heads)


def test_failure_of_kdkernels_is_an_error(sources_cuda, monkeypatch, tmp_path):
    def loss(x):
        raise ValueError("no such kernel\nand more")

    for name, status in (("native", 1), ("trl", 0)):
        add_head(sources_cuda, monkeypatch, name, loss)
        options = ["--parts", "heads", "--divergences", "jsd", "--variants", name, "naive"]
        found, lines, *_ = run_sources(sources_cuda, tmp_path, *options)
        assert found == status
        assert lines["heads", "jsd", name]["status"] == "failed: ValueError: no such kernel"


def test_slow_heads_are_called_twice(sources_cuda, monkeypatch, tmp_path):
    calls = []

    def loss(x):
        calls.append(x)
        return of_logits(x)

    add_head(sources_cuda, monkeypatch, "native", loss)
    options = [*HEAD_OPTIONS, "--patience", "0"]
    _, lines, *_ = run_sources(sources_cuda, tmp_path, *options)
    assert len(calls) == 2 and {line["calls"] for line in lines.values()} == {1}


def test_rates_of_sources(sources_cuda):
    """Within each round, and to the median of what had more of them."""
    seconds = {"native": [0.001, 0.002, 0.004], "copy": [0.0005, 0.0016, 0.0036], "naive": [0.032]}
    case = sources_cuda.Topk((8192, 151936))
    fields = sources_cuda.rates(case, "native", seconds)
    shares = [fields[f"share_of_copy{which}"] for which in ("", "_min", "_max")]
    assert shares == pytest.approx([0.8, 0.5, 0.9])
    assert fields["gb_per_s"] == pytest.approx(4 * 8192 * 151936 / 0.002 / 1e9)
    fields = sources_cuda.rates(case, "naive", seconds)
    assert fields["times_native"] == pytest.approx(16)
    assert fields["share_of_copy"] == pytest.approx(0.05)
    heads = sources_cuda.Heads((8192, 4096, 128256))
    fields = sources_cuda.rates(heads, "native", {"native": [0.06], "products": [0.05]})
    assert fields["tflop_per_s"] == pytest.approx(8 * 8192 * 4096 * 128256 / 0.06 / 1e12)
    assert fields["times_products"] == pytest.approx(1.2) and "share_of_copy" not in fields


def source_targets(sources_cuda, gpu, heads, topk):
    """{(part, divergence, what): verdict} of records with these fields."""
    shape = sources_cuda.shape_of(sources_cuda.SHAPES[0])
    cases = [sources_cuda.Heads(shape, divergence=name) for name in ("jsd", "forward_kl")]
    records = [sources_cuda.record(case, "native", **{"status": "ok", **heads}) for case in cases]
    case = sources_cuda.Topk(sources_cuda.shape_of(sources_cuda.TOPK_SHAPES[0]))
    records.append(sources_cuda.record(case, "native", **{"status": "ok", **topk}))
    judged = sources_cuda.judge(records, gpu)
    assert len(sources_cuda.target_rows(judged)) == len(judged) == 8
    return {(x["part"], x["divergence"], x["what"]): x["verdict"] for x in judged}


def test_targets_of_sources(sources_cuda):
    assert sources_cuda.SHAPES == ("8192x4096x128256",)
    assert sources_cuda.TOPK_SHAPES == ("8192x151936",)
    met = dict(ms=56.3, times_products=1.15, peak_mb=2000.0), dict(ms=1.4, share_of_copy=0.8)
    missed = dict(ms=56.4, times_products=1.16, peak_mb=2001.0), dict(ms=1.41, share_of_copy=0.79)
    for gpu in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        for fields, verdict in ((met, "met"), (missed, "not met")):
            found = source_targets(sources_cuda, gpu, *fields)
            for (_, _, what), text in found.items():
                only = what == "ms" and "H200" not in gpu
                assert text == ("for H200 only" if only else verdict)
    wrong = dict(status="wrong: loss", ms=1.0, times_products=1.0)
    found = source_targets(sources_cuda, "NVIDIA H200", wrong, wrong)
    assert set(found.values()) == {"not measured"}


def test_target_table_of_sources(sources_cuda):
    case = sources_cuda.Topk(sources_cuda.shape_of(sources_cuda.TOPK_SHAPES[0]))
    measured = dict(status="ok", ms=1.321, share_of_copy=0.8712)
    judged = sources_cuda.judge([sources_cuda.record(case, "native", **measured)], "NVIDIA H200")
    rows = sources_cuda.target_rows(judged)
    assert rows[-2:] == [
        [case.title, "ms", "≤ 1.40", "1.32", "met"],
        [case.title, "% of copy", "≥ 80%", "87%", "met"],
    ]
    assert {row[-1] for row in rows[:-2]} == {"not measured"}


def test_only_a_full_run_of_sources_replaces_the_published_results(sources_cuda, harness):
    assert sources_cuda.parse([]).out == harness.RESULTS
    for option in (
        ["--quick"],
        ["--shapes", "8x8x100"],
        ["--topk-shapes", "8x100"],
        ["--divergences", "jsd"],
        ["--variants", "native"],
        ["--parts", "heads"],
        ["--patience", "1"],
        ["--rounds", "3"],
    ):
        assert sources_cuda.parse(option).out is None


def test_no_gpu_for_sources_is_said_in_one_line(sources_cuda, monkeypatch, tmp_path, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sources_cuda.main(["--quick", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and not list(tmp_path.iterdir())
    assert said.err == (
        "sources_cuda.py measures on a GPU, and there is none: torch sees no CUDA device\n"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_quick_run_of_sources_on_a_gpu(sources_cuda, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert sources_cuda.main(["--quick", "--out", str(tmp_path)]) == 0
    (document,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    there = {"naive", "shared", "products", "copy", "order"}
    there |= {name for name in ("native", "triton") if not BACKENDS[name].unavailable("cuda")}
    for row in document["rows"]:
        if row["variant"] in there:
            assert row["status"] == "ok" and 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
