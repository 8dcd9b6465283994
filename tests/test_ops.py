"""The operators as PyTorch's compiler sees them: schemas, fakes, and `torch.compile`."""

import pytest
import torch
from conftest import NAMES, UNAVAILABLE, assert_same_bits, problem, random_like, run

from kdkernels import Ensemble, KDTerms, LinearHead, Sampled, TopK, kd_loss, ops
from kdkernels.objective import make_objective

IGNORE = -100
OPTIONS = dict(
    divergence="jsd",
    beta=0.3,
    temperature=2.0,
    alpha=0.4,
    t_squared=True,
    label_smoothing=0.1,
    ignore_index=IGNORE,
    reduction="mean",
    has_labels=True,
)


KEPT = torch.tensor([0.5, 0.2, 0.1, 0.0], dtype=torch.float64)
REST = torch.full((2, 3), 0.2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def rows_problem(kept=False, **kinds):
    """student (B, L, 12), teacher [(B, L, 15)] or [ids, log p (B, L, 4), log p of the rest (B, L)],
    labels, weights, num_items: an operator's inputs."""
    student, teacher, labels = problem(2, 3, 15, **kinds)
    labels %= 12
    labels[1, 0] = IGNORE
    return (
        student[..., :12].contiguous(),
        [torch.tensor([0, 3, 7, 12]).repeat(2, 3, 1), KEPT.log().repeat(2, 3, 1), REST.log()]
        if kept
        else [teacher],
        labels,
        torch.rand(2, 3),
        torch.tensor(3.5, dtype=torch.float64),
    )


def test_every_operator_is_registered():
    overloads = {
        f"{name}.{backend}"
        for name in ops.SCHEMAS
        for backend, reason in UNAVAILABLE.items()
        if backend != "eager" and not reason
    }
    names = {"check_labels.default", *overloads}
    for name in names:
        packet, overload = name.split(".")
        assert getattr(getattr(torch.ops.kdkernels, packet), overload).tags == [
            torch.Tag.pt2_compliant_tag
        ]


def test_opcheck_labels():
    labels = torch.tensor([[0, 11, IGNORE]])
    torch.library.opcheck(torch.ops.kdkernels.check_labels.default, (labels, IGNORE, 12))


@pytest.mark.parametrize("optional", ["all", "none", "strided"])
@pytest.mark.parametrize("want_grad", [True, False])
@pytest.mark.parametrize("kept", [False, True])
def test_opcheck_distill_rows(compiled, dtype, optional, want_grad, kept):
    options = make_objective(**OPTIONS, vocab_size=12).options()
    student, teacher, *rest = rows_problem(kept, dtype=dtype)
    if optional == "none":
        rest = [None] * 3
    if optional == "strided":
        student = torch.randn(3, 2, 20).to(dtype).transpose(0, 1)[..., 2:14]
    arguments = (student, teacher, *rest, True, want_grad, *options)
    torch.library.opcheck(ops.get("distill_rows", compiled), arguments)


def test_opcheck_distill_rows_inplace(compiled, dtype):
    options = make_objective(**OPTIONS, vocab_size=12).options()
    student, *rest = rows_problem(dtype=dtype)
    arguments = (student, *rest, torch.zeros_like(student), False, *options)
    torch.library.opcheck(ops.get("distill_rows_", compiled), arguments)


@pytest.mark.parametrize("per_row", [True, False])
def test_opcheck_scale_rows(compiled, dtype, per_row):
    grad, _, labels, weights, _ = rows_problem(dtype=dtype)
    upstream = torch.rand((2, 3) if per_row else ())
    unscale = torch.full((2, 3) if dtype == torch.float16 else (), 0.5)
    arguments = (grad, upstream, unscale, labels, weights, IGNORE, 12)
    torch.library.opcheck(ops.get("scale_rows_", compiled), arguments)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("want_grad", [True, False])
def test_fakes_promise_what_the_kernels_return(compiled, dtype, layout, want_grad):
    student, (teacher,), *rest = rows_problem(dtype=dtype)
    if layout == "sliced":
        student = torch.randn(2, 7, 20).to(dtype)[:, 2:5, 3:15]
    if layout == "transposed":
        student = torch.randn(3, 2, 12).to(dtype).transpose(0, 1)
    options = make_objective(**OPTIONS, vocab_size=12).options()
    operator = ops.get("distill_rows", compiled)
    real = operator(student, [teacher], *rest, True, want_grad, *options)
    with torch._subclasses.FakeTensorMode() as mode:
        student, teacher, *rest = (mode.from_tensor(x) for x in (student, teacher, *rest))
        fake = operator(student, [teacher], *rest, True, want_grad, *options)
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)


# --- torch.compile -------------------------------------------------------------------------------


def compiled_run(student, teacher, labels=None, **options):
    """`run` through torch.compile, without a graph break."""
    names = [name for name, x in options.items() if isinstance(x, torch.Tensor)]
    tensors = [options.pop(name) for name in names]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(student, teacher, labels, *tensors):
        return kd_loss(
            student, teacher, labels, **dict(zip(names, tensors, strict=True)), **options
        )

    leaf = student.clone().requires_grad_()
    loss = function(leaf, teacher, labels, *tensors)
    (grad,) = torch.autograd.grad(loss, leaf, random_like(loss))
    return loss.detach(), grad


@pytest.mark.parametrize("divergence, beta", [*((name, None) for name in NAMES), ("jsd", 0.2)])
def test_compiled_divergences_are_the_same_bits(compiled, divergence, beta):
    student, teacher, labels = problem(6, 19)
    labels[[1, 4]] = IGNORE  # Liger#1338: compiled and wrong with ignored rows only
    options = dict(divergence=divergence, beta=beta, temperature=2.0, backend=compiled)
    ours = compiled_run(student, teacher, labels, **options)
    assert_same_bits(*zip(ours, run(student, teacher, labels, **options), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        dict(reduction="sum", alpha=0.0),
        dict(reduction="none", alpha=1.0, token_weights=torch.tensor([0.5, 2.0, 0.0, 1.0])),
        dict(num_items=torch.tensor(9), shift=True, label_smoothing=0.1),
        dict(num_items=9, vocab_size=17, t_squared=False),
    ],
    ids=lambda options: "-".join(options),
)
def test_compiled_options_are_the_same_bits(compiled, options):
    student, teacher, labels = problem(4, 19)
    labels %= 17
    labels[1] = IGNORE
    ours = compiled_run(student, teacher, labels, **options, backend=compiled)
    expected = run(student, teacher, labels, **options, backend=compiled)
    assert_same_bits(*zip(ours, expected, strict=True))


def test_compiled_dtypes_are_the_same_bits(compiled, dtype):
    student, teacher, _ = problem(2, 4, 19, dtype=dtype)
    ours = compiled_run(student, teacher, backend=compiled)
    assert_same_bits(*zip(ours, run(student, teacher, backend=compiled), strict=True))


def test_compiled_terms(compiled):
    student, teacher, labels = problem(6, 19)
    labels[2] = IGNORE

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(student):
        return kd_loss(student, teacher, labels, return_terms=True, backend=compiled)

    ours = function(student.clone().requires_grad_())
    assert isinstance(ours, KDTerms)
    expected = kd_loss(student, teacher, labels, return_terms=True, backend=compiled)
    assert_same_bits(*zip(ours, expected, strict=True))


def test_compiled_once_for_every_number_of_rows(backend):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def function(student, teacher, labels):
        return kd_loss(student, teacher, labels, temperature=2.0, backend=backend)

    for rows in (4, 5, 9, 3):
        student, teacher, labels = problem(rows, 19)
        leaf = student.clone().requires_grad_()
        loss = function(leaf, teacher, labels)
        (grad,) = torch.autograd.grad(loss, leaf, random_like(loss))
        options = dict(temperature=2.0, backend=backend)
        expected = run(student, teacher, labels, **options)
        assert_same_bits((loss, expected[0]), (grad, expected[1]))
    assert len(graphs) == 1


def test_compiled_inplace_is_the_same_bits(backend):
    student, teacher, labels = problem(6, 19)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(student):
        return kd_loss(student * 1, teacher, labels, inplace=True, backend=backend)

    leaf = student.clone().requires_grad_()
    loss = function(leaf)
    (grad,) = torch.autograd.grad(loss, leaf, random_like(loss))
    expected = run(student, teacher, labels, backend=backend)
    assert_same_bits((loss, expected[0]), (grad, expected[1]))


def test_compiled_inplace_spares_what_is_used_later(backend):
    student, teacher, labels = problem(6, 19)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(leaf):
        logits = leaf * 1
        loss = kd_loss(logits, teacher, labels, inplace=True, backend=backend)
        return loss + logits.pow(2).sum()

    leaf, same = (student.clone().requires_grad_() for _ in range(2))
    loss = function(leaf)
    expected = kd_loss(same, teacher, labels, backend=backend) + same.pow(2).sum()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(leaf.grad, same.grad, atol=0, rtol=1e-6)


def test_compiled_inplace_on_a_leaf_is_an_error(backend):
    student, teacher, labels = problem(6, 19)
    leaf = student.clone().requires_grad_()
    function = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        function(leaf, teacher, labels, inplace=True, backend=backend)
    assert_same_bits((leaf, student))


def test_compiled_errors_are_raised(backend):
    student, teacher, labels = problem(4, 19)
    labels[1] = 19
    function = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="19"):
        function(student, teacher, labels, backend=backend)


def test_functional_grad(backend):
    """`torch.func.grad` works or says that it does not; it never returns another gradient."""
    student, teacher, labels = problem(4, 19)
    try:
        grad = torch.func.grad(lambda x: kd_loss(x, teacher, labels, backend=backend))(student)
    except RuntimeError as error:
        assert "autograd.Function" in str(error)
        return
    one = torch.ones(())
    assert_same_bits((grad, run(student, teacher, labels, upstream=one, backend=backend)[1]))


SOURCES = {
    "heads": lambda x: (
        LinearHead(x, WEIGHT, chunk_rows=4),
        LinearHead(x.detach(), WEIGHT.flip(0)),
    ),
    "file": lambda x: (LinearHead(x, WEIGHT), TopK(IDS, torch.full((6, 3), -2.0))),
    "samples": lambda x: (x @ WEIGHT.T, Sampled(IDS, torch.ones(6, 3))),
    "ensemble": lambda x: (x @ WEIGHT.T, Ensemble([x.detach() @ WEIGHT.T, torch.zeros(6, 12)])),
}
WEIGHT = torch.arange(12 * 5).view(12, 5) % 7 / 4
IDS = torch.tensor([[0, 7, 3]] * 6)


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_sources_are_the_same_bits(compiled, sources, reduction):
    hidden, _, labels = problem(6, 5)

    def function(hidden):
        options = dict(reduction=reduction, backend=compiled)
        return kd_loss(*SOURCES[sources](hidden), labels, **options)

    found = []
    for run_it in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = hidden.clone().requires_grad_()
        loss = run_it(leaf)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf, random_like(loss))))
    assert_same_bits(*zip(*found, strict=True))
