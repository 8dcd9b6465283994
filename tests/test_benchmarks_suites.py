"""What the benchmark takes for right: its problems, its float64 definitions, PyTorch's formulas."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdkernels import LinearHead, Sampled, kd_loss
from kdkernels.backends.registry import BACKENDS
from kdkernels.objective import DIVERGENCES

ROOT = Path(__file__).parent.parent
NO_NATIVE = BACKENDS["native"].unavailable("cpu")
near = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=0.0)


@pytest.fixture
def some_rows(bench, monkeypatch):
    """Definitions look at some rows, and compute few at a time."""
    monkeypatch.setattr(bench.case, "CHECKED_ROWS", 3)
    monkeypatch.setattr(bench.case, "CHECKED_ENTRIES", 10)
    monkeypatch.setattr(bench.case, "CHECKED_AT_ONCE", 3 * 70)


OBJECTIVES = [
    *((divergence, 2.0, 0.3) for divergence in DIVERGENCES),
    ("forward_kl", 1.0, 1.0),
    ("forward_kl", 1.0, 0.0),
]


def float64(tensors):
    return [x.detach().double() for x in tensors]


def gradients_of(loss, leaves):
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.usefixtures("some_rows")
@pytest.mark.parametrize("divergence, temperature, alpha", OBJECTIVES)
def test_definition_of_logits_is_that_of_all_rows(bench, divergence, temperature, alpha):
    case = bench.suites.Dense("cpu", "bfloat16", 17, 70, divergence, temperature, alpha)
    x = case.draw()
    (found,) = case.definitions(x)
    student, teacher = float64([x.student, x.teacher])
    student.requires_grad_()
    loss = kd_loss(student, teacher, x.labels, **case.options(backend="eager"))
    value, (gradient,) = gradients_of(loss, [student])
    (rows,) = found.rows
    assert {0, 16} <= set(rows.tolist()) and 4 <= len(rows) < 17
    near(found.loss, value)
    near(found.gradients[0], gradient[rows])
    # An entry is at most the two probabilities it is made of, the reverse KL but for a logarithm.
    most = 1 + 1e-9 if divergence in ("forward_kl", "jsd", "tvd") else 20.0
    assert (found.gradients[0].abs() <= most * found.sizes[0]).all()
    assert found.sizes[0].isfinite().all() or divergence == "tvd"
    (only_loss,) = case.loss_only().definitions(x)
    near(only_loss.loss, value)
    assert not only_loss.gradients


@pytest.mark.usefixtures("some_rows")
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("divergence, temperature, alpha", OBJECTIVES)
def test_definition_of_heads_is_that_of_all_rows(bench, divergence, temperature, alpha, dtype):
    case = bench.suites.Linear("cpu", dtype, 17, 70, divergence, temperature, alpha, hidden=8)
    x = case.draw()
    definitions = case.definitions(x)
    assert len(definitions) == (1 if dtype == "float32" else 2)
    tensors = x.hidden, x.weight, x.teacher_hidden, x.teacher_weight
    hidden, weight, teacher_hidden, teacher_weight = float64(tensors)
    hidden.requires_grad_(), weight.requires_grad_()
    for rounded, found in enumerate(definitions):
        student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        if rounded:
            student = student + (student.bfloat16().double() - student).detach()
            teacher = teacher.bfloat16().double()
        loss = kd_loss(student, teacher, x.labels, **case.options(backend="eager"))
        value, gradients = gradients_of(loss, [hidden, weight])
        near(found.loss, value)
        parts = found.gradients, gradients, found.sizes, found.rows
        for mine, gradient, size, rows in zip(*parts, strict=True):
            assert 4 <= len(rows) < len(gradient)
            assert ((mine - gradient[rows]).abs() <= 1e-12 * size).all()
        p = case.probabilities(student.detach(), teacher, x.labels)
        near(found.sizes[0], p[found.rows[0]] @ weight.detach().abs())
        near(found.sizes[1], p[:, found.rows[1]].sum(0)[:, None])


@pytest.mark.usefixtures("some_rows")
@pytest.mark.parametrize("tail", ("bucket", "renormalize", "sampled"))
@pytest.mark.parametrize("alpha", (0.0, 0.3, 1.0))
def test_definition_of_kept_classes_is_that_of_all_rows(bench, tail, alpha):
    case = bench.suites.Sparse("cpu", "bfloat16", 17, 70, alpha=alpha, k=6, tail=tail)
    x = case.draw()
    (found,) = case.definitions(x)
    student = x.student.detach().double().requires_grad_()
    loss = kd_loss(student, x.teacher, x.labels, **case.options(backend="eager"))
    value, (gradient,) = gradients_of(loss, [student])
    (rows,) = found.rows
    torch.testing.assert_close(found.loss, value, rtol=1e-6, atol=0.0)  # logprobs are float32
    torch.testing.assert_close(found.gradients[0], gradient[rows], rtol=1e-5, atol=0.0)
    assert (found.gradients[0].abs() <= (1 + 1e-9) * found.sizes[0]).all()
    if tail == "sampled":
        assert isinstance(x.teacher, Sampled) and (x.teacher.counts.sum(-1) == 6).all()
        for ids, counts in zip(x.teacher.ids, x.teacher.counts, strict=True):
            kept = ids[ids >= 0]
            assert len(kept.unique()) == len(kept) and ((counts > 0) == (ids >= 0)).all()


@pytest.mark.usefixtures("some_rows")
@pytest.mark.parametrize("divergence, temperature, alpha", [("forward_kl", 2.0, 0.3)])
def test_definition_of_a_training_step(bench, divergence, temperature, alpha):
    case = bench.suites.Loop("cpu", "float32", 128, 60, divergence, temperature, alpha, hidden=16)
    x = case.draw()
    (found,) = case.definitions(x)
    student, teacher = (model.double() for model in (x.student, x.teacher))
    hidden = student(x.tokens), teacher(x.tokens)
    heads = LinearHead(hidden[0], student.head.weight), LinearHead(hidden[1], teacher.head.weight)
    loss = kd_loss(*heads, x.labels, **case.options(backend="eager"))
    value, gradients = gradients_of(loss, list(student.parameters()))
    near(found.loss, value)
    for mine, gradient, size in zip(found.gradients, gradients, found.sizes, strict=True):
        assert size > 0 and ((mine - gradient).abs() <= 1e-9 * size).all()


@pytest.mark.parametrize("wrong", (False, True))
def test_probabilities_that_are_nothing(bench, wrong):
    """Where float64 has 0, an error is one of float32's smallest number."""
    case = bench.suites.Dense("cpu", "float32", 9, 300, "forward_kl", 0.01, 1.0)
    x = case.draw()
    step = bench.case.Step(case.variants["eager"].make(case), case, x)
    step.prepare()
    step.run()
    expected = case.definitions(x)
    assert (expected[0].sizes[0] == 0).any()
    if wrong:
        x.student.grad[expected[0].sizes[0] == 0] = 1e-20
    allowed = bench.definition.TOLERANCES["dense", "float32"]["float32"]
    found = bench.definition.verdict(bench.definition.errors(step, expected), allowed)
    assert (found == "ok") != wrong


def test_sign_that_rounding_decides_is_not_an_error(bench):
    case = bench.suites.Dense("cpu", "float32", 2, 300, "tvd", 1.0, 1.0)
    x = case.draw()
    with torch.no_grad():
        x.teacher[0] = x.student[0] * (1 + 1e-8)
    step = bench.case.Step(case.variants["eager"].make(case), case, x)
    step.prepare()
    step.run()
    expected = case.definitions(x)
    (sizes,) = expected[0].sizes
    assert sizes[0].isinf().any() and sizes[1].isfinite().all()
    x.student.grad[sizes.isinf()] *= -1
    assert bench.definition.errors(step, expected)[1] < 1e-4
    x.student.grad[1, 5] *= -1
    assert bench.definition.errors(step, expected)[1] > 0.1


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_training_in_every_dtype(bench, dtype):
    """The optimiser's steps leave the weights as they are, without a NaN."""
    case = bench.suites.Loop("cpu", dtype, 128, 60, "jsd", 1.0, 1.0, hidden=16)
    x = case.draw()
    assert all(x.optimizer.state[leaf] for leaf in x.leaves())
    weights = [leaf.detach().clone() for leaf in x.leaves()]
    step = bench.case.Step(case.variants["pytorch-heads"].make(case), case, x)
    for _ in range(3):
        step.prepare()
        step.run()
    assert all(map(torch.equal, weights, x.leaves()))


def test_a_step_of_training_is_all_of_it(bench):
    case = bench.suites.PUBLISHED["loop"]("cpu", 1)[0][0].small()
    x = case.draw()
    steps = []
    x.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    weights = [leaf.detach().clone() for leaf in x.leaves()]
    step = bench.case.Step(case.variants["pytorch-heads"].make(case), case, x)
    step.prepare()
    step.run()
    step.run()
    assert len(steps) == 2 and all(leaf.grad.abs().sum() > 0 for leaf in x.leaves())
    assert all(map(torch.equal, weights, x.leaves())), "every call computes the same"
    assert all(leaf.grad is None for leaf in x.teacher.parameters())


# Those who are always there


def status_of(bench, case, *names):
    measuring = bench.measure.Run(bench.devices.Cpu(), 1, 60.0, memory=False)
    lines = {line["variant"]: line for line in measuring.measure(case, names)}
    return [lines[name]["status"].partition(":")[0] for name in names]


@pytest.mark.parametrize("divergence, temperature, alpha", OBJECTIVES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_logits_by_everybody(bench, divergence, temperature, alpha, dtype):
    case = bench.suites.Dense("cpu", dtype, 9, 300, divergence, temperature, alpha)
    names = ["native", "inplace", "eager", "pytorch-float32", "triton"]
    ours = "missing" if NO_NATIVE else "ok"
    cast = "missing" if dtype == "float32" else "ok"
    assert status_of(bench, case, *names) == [ours, ours, "ok", cast, "missing"]
    if dtype != "float16":  # in which the probabilities of most classes are 0
        assert status_of(bench, case, "pytorch") == ["ok"]
    assert status_of(bench, case.loss_only(), *names)[:3] == [ours, ours, "ok"]


@pytest.mark.parametrize("divergence, temperature, alpha", OBJECTIVES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_heads_by_everybody(bench, divergence, temperature, alpha, dtype):
    case = bench.suites.Linear("cpu", dtype, 40, 300, divergence, temperature, alpha, hidden=32)
    ours = "missing" if NO_NATIVE else "ok"
    names = ["native", "eager", "pytorch", "triton"]
    assert status_of(bench, case, *names) == [ours, "ok", "ok", "missing"]


@pytest.mark.parametrize("alpha, status", [(0.0, "ok"), (0.5, "lacks"), (1.0, "lacks")])
def test_linear_cross_entropy_of_torch(bench, alpha, status):
    if status == "ok" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        status = "missing"
    case = bench.suites.Linear("cpu", "float32", 40, 300, alpha=alpha, hidden=32)
    assert status_of(bench, case, "linear-ce") == [status]


@pytest.mark.parametrize("tail", ("bucket", "renormalize", "sampled"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("alpha", (0.0, 0.5, 1.0))
def test_kept_classes_by_everybody(bench, tail, dtype, alpha):
    case = bench.suites.Sparse("cpu", dtype, 9, 300, alpha=alpha, k=20, tail=tail)
    ours = "missing" if NO_NATIVE else "ok"
    names = ["native", "eager", "pytorch", "pytorch-shared", "triton"]
    assert status_of(bench, case, *names) == [ours, "ok", "ok", "ok", "missing"]


def test_kept_classes_at_another_temperature(bench):
    case = bench.suites.Sparse(
        "cpu", "float32", 9, 300, "forward_kl", 2.0, k=20, tail="renormalize"
    )
    assert status_of(bench, case, "eager", "pytorch", "pytorch-shared") == ["ok"] * 3


def test_compiled_formula_is_one_graph(bench, monkeypatch):
    """`aot_eager` stands in for the compiler, which would take long: the graph is the same."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for divergence in DIVERGENCES:
        case = bench.suites.Dense("cpu", "float32", 9, 300, divergence, 2.0)
        assert status_of(bench, case, "compiled") == ["ok"]
    case = bench.suites.Linear("cpu", "float32", 40, 300, "jsd", hidden=32)
    assert status_of(bench, case, "compiled") == ["ok"]
    case = bench.suites.Sparse("cpu", "float32", 9, 300, k=20)
    assert status_of(bench, case, "compiled") == ["ok"]
    torch.compiler.reset()


def test_overwritten_logits_are_renewed(bench):
    """And those of the problem stay as they are."""
    if NO_NATIVE:
        pytest.skip(f"native: {NO_NATIVE}")
    case = bench.suites.Dense("cpu", "float32", 9, 300)
    x = case.draw()
    before = x.student.detach().clone()
    step = bench.case.Step(case.variants["inplace"].make(case), case, x, overwrites=True)
    values = []
    for _ in range(2):
        step.prepare()
        step.run()
        values.append(step.value.detach())
    assert torch.equal(values[0], values[1]) and torch.equal(x.student, before)
    assert step.gradient_bytes() == 0
    (gradient,) = step.gradients()
    assert gradient.data_ptr() == step.buffer.data_ptr() and not torch.equal(gradient, before)


def test_problems_are_the_same_every_time(bench):
    for name, published in bench.suites.PUBLISHED.items():
        case = published("cpu", 1)[0][0].small()
        first, second = case.draw(), case.draw()
        assert all(map(torch.equal, first.leaves(), second.leaves())), name


def test_published_cases(bench):
    """The sizes that the project promises something of, on both devices."""
    shapes = {
        (name, device): {(case.rows, case.hidden, case.vocab) for case in published(device, 2)[0]}
        for name, published in bench.suites.PUBLISHED.items()
        for device in ("cpu", "cuda")
    }
    vocabs = 32000, 128256, 151936, 262144
    cases, only = bench.suites.PUBLISHED["dense"]("cuda", 1)
    first = [case.vocab for case in cases[:4]]
    assert sorted(first) == sorted(vocabs) and not any(
        "pytorch" not in only.get(c, "pytorch") for c in cases
    )
    assert shapes["dense", "cuda"] == {(8192, None, vocab) for vocab in vocabs}
    assert shapes["dense", "cpu"] == {(256, None, 128256), (4, None, 16)}
    assert shapes["linear", "cuda"] == {(8192, 4096, 128256)}
    assert shapes["linear", "cpu"] == {(2048, 1024, 65536), (1024, 512, 32000)}
    assert shapes["sparse", "cuda"] == {(8192, None, 151936)}
    assert shapes["sparse", "cpu"] == {(1024, None, 32000), (256, None, 128256)}
    for published in bench.suites.PUBLISHED.values():
        cases, only = published("cpu", 2)
        assert len(set(cases)) == len(cases) and set(only) <= set(cases)
        titles = [case.title for case in cases]
        assert len(set(titles)) == len(titles)


def test_needed_exponentials(bench):
    dense = functools.partial(bench.suites.Dense, "cpu", "float32", 2, 10)
    assert dense("forward_kl", 2.0, 0.5).exponentials == 2 * 20
    assert dense("forward_kl", 2.5, 0.5).exponentials == 3 * 20
    assert dense("forward_kl", 2.5, 1.0).exponentials == 2 * 20
    assert dense("forward_kl", 2.5, 0.0).exponentials == 20
    assert dense("jsd", 1.0, 0.5).exponentials == 3 * 20
    assert replace(dense("jsd"), divergence="tvd").exponentials == 2 * 20
