"""`LinearHead`: hidden states and weight in the place of logits that never exist in full.

Hidden states and weights are small integers over a power of 2, so that every dtype projects them
without rounding: the loss then has to be that of the logits, bit for bit, and the gradients those
of the logits' gradient by the chain rule, as exact as a sum of their terms can be.
"""

import pytest
import torch
from conftest import INF, NAN, assert_plus_zero, assert_same_bits, random_like
from oracle import assert_loss_close, gradient_bound, reference, ulp

from kdkernels import Ensemble, LinearHead, TopK, chunked, kd_loss

IGNORE = -100
H, V = 6, 90
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def whole(*shape, scale, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, shape, generator=generator) * scale).to(dtype)


def heads(*lead, dtype=torch.float32, columns=V):
    """student, teacher: (hidden (…, H), weight (V, H)), and labels with an ignored one."""
    sides = []
    for seed in (1, 3):
        hidden = whole(*lead, H, scale=0.5, seed=seed, dtype=dtype)
        sides.append((hidden, whole(columns, H, scale=0.5, seed=seed + 1, dtype=dtype)))
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(columns, lead, generator=generator)
    labels.view(-1)[1::4] = IGNORE
    return *sides, labels


def logits_of(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    """(…, V), exact but for scale and cap, which are those of float64 rounded to float32."""
    x = hidden.double() @ weight.double().T
    x = (x if bias is None else x + bias.double()) * logit_scale
    return x if softcap is None else softcap * (x / softcap).tanh()


def run(student, teacher, labels, *, upstream=None, bias=None, head=None, frozen=(), **options):
    """loss, and the gradients of hidden states, weight and bias, None for those that are frozen."""
    leaves = {"hidden": student[0], "weight": student[1], "bias": bias}
    leaves = {name: x.detach().clone() for name, x in leaves.items() if x is not None}
    for name, x in leaves.items():
        x.requires_grad_(name not in frozen)
    loss = kd_loss(LinearHead(**leaves, **(head or {})), teacher, labels, **options)
    upstream = random_like(loss) if upstream is None else upstream
    wanted = [x for x in leaves.values() if x.requires_grad]
    grads = iter(torch.autograd.grad(loss, wanted, upstream))
    return loss.detach(), [next(grads) if x.requires_grad else None for x in leaves.values()]


def assert_gradients_close(grads, student, ref, slope=None, bias=False):
    """By the chain rule from the exact gradient of the logits (N, V), each entry within what
    rounding the terms of its sum can cause."""
    hidden, weight = (x.double().flatten(0, -2) for x in student)
    g, bound = ref.grad.flatten(0, -2), gradient_bound(ref).flatten(0, -2)
    if slope is not None:
        g, bound = g * slope.flatten(0, -2), bound * slope.flatten(0, -2).abs()
    dtype = student[0].dtype
    bound = bound + 3 * UNIT[dtype] * g.abs()
    rounding = 2.0**-24 * (g.shape[0] + g.shape[1])
    ones = torch.ones(len(g), 1, dtype=torch.float64)
    for grad, a, b, left in (
        *([(grads[0], g, weight, bound)] if grads[0] is not None else []),
        (grads[1], g.T, hidden, bound.T),
        *([(grads[2], g.T, ones, bound.T)] if bias else []),
    ):
        exact, terms = a @ b, a.abs() @ b.abs()
        allowed = left @ b.abs() + (rounding + 3 * UNIT[dtype]) * terms + 0.5 * ulp(exact, dtype)
        assert grad.dtype == dtype
        error = (grad.double().reshape(exact.shape) - exact).abs()
        assert (error <= allowed).all(), f"{(error / allowed).max():.3g} of what is allowed"


def test_rows_of_a_head_without_its_teacher(backend):
    """A term of weight 0 is not computed, nor what its gradient would need."""
    student, _, labels = heads(4)
    source = TopK(torch.tensor([[1, 2]]).expand(4, 2), torch.full((4, 2), -2.0))
    options = dict(alpha=0.0, reduction="none", backend=backend)
    loss, grads = run(student, source, labels, **options)
    alone, alone_grads = run(student, torch.zeros(4, V), labels, **options)
    assert_same_bits((loss, alone), *zip(grads[:2], alone_grads[:2], strict=True))


OPTIONS = [
    dict(),
    dict(divergence="reverse_kl", temperature=2.0, reduction="sum"),
    dict(divergence="jsd", alpha=0.3, label_smoothing=0.1, num_items=5),
    dict(divergence="skew_forward_kl", temperature=1.5, t_squared=False),
    dict(divergence="skew_reverse_kl", reduction="none"),
    dict(divergence="tvd", alpha=0.0),
    dict(alpha=1.0, reduction="none"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: x.get("divergence", "forward_kl"))
@pytest.mark.parametrize("lead", [(9,), (2, 5)], ids=["rows", "sequences"])
def test_is_the_loss_of_the_logits(compiled, dtype, lead, options):
    student, teacher, labels = heads(*lead, dtype=dtype)
    options = dict(options, backend=compiled)
    loss, grads = run(student, LinearHead(*teacher), labels, **options)
    s, t = (logits_of(*x).to(dtype) for x in (student, teacher))
    assert torch.equal(s.double(), logits_of(*student))
    s, t = s.float(), t.float()
    ref = reference(s, t, labels, upstream=random_like(loss), **options)
    assert_loss_close(loss, ref, 2e-5)
    assert_gradients_close(grads, student, ref)
    if dtype != torch.float16 and options.get("reduction") == "none":
        assert_same_bits((loss, kd_loss(s, t, labels, **options)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_in_bfloat16(compiled, monkeypatch, reduction):
    """As on a CPU that has instructions for them."""
    monkeypatch.setattr(chunked, "CPU_HAS_BFLOAT16", True)
    student, teacher, labels = heads(2, 5, dtype=torch.bfloat16)
    options = dict(reduction=reduction, temperature=2.0, backend=compiled)
    head = dict(chunk_rows=3)
    loss, grads = run(student, LinearHead(*teacher), labels, head=head, **options)
    s, t = (logits_of(*x).float() for x in (student, teacher))
    ref = reference(s, t, labels, upstream=random_like(loss), **options)
    assert_loss_close(loss, ref, 2e-5)
    assert_gradients_close(grads, student, ref)


def test_a_weight_of_several_blocks(compiled):
    """bfloat16 is made float32 a block of rows at a time, where that is faster."""
    student, teacher, labels = heads(3, dtype=torch.bfloat16, columns=2 * chunked.BLOCK + 7)
    labels[0] = chunked.BLOCK
    bias = whole(len(student[1]), scale=0.25, seed=9, dtype=torch.bfloat16)
    loss, grads = run(student, LinearHead(*teacher), labels, bias=bias, backend=compiled)
    s, t = logits_of(*student, bias).float(), logits_of(*teacher).float()
    ref = reference(s, t, labels, upstream=random_like(loss))
    assert_loss_close(loss, ref, 2e-5)
    assert_gradients_close(grads, student, ref, bias=True)


@pytest.mark.parametrize(
    "chunk_rows",
    [(1, 1), (2, 2), (3, None), (5, 2), (8, 3), (9, 100), (None, 4), (100, 1)],
    ids=str,
)
@pytest.mark.parametrize("lead", [(9,), (3, 4), (2, 2, 3)], ids=str)
def test_chunks_change_no_loss(compiled, chunk_rows, lead):
    of_student, of_teacher = chunk_rows
    student, teacher, labels = heads(*lead)
    options = dict(divergence="jsd", temperature=2.0, reduction="none", backend=compiled)
    whole_rows = run(student, LinearHead(*teacher), labels, **options)
    options["head"] = dict(chunk_rows=of_student)
    loss, grads = run(student, LinearHead(*teacher, chunk_rows=of_teacher), labels, **options)
    assert_same_bits((loss, whole_rows[0]))
    s, t = (logits_of(*x).float() for x in (student, teacher))
    del options["head"]
    ref = reference(s, t, labels, upstream=random_like(loss), **options)
    assert_gradients_close(grads, student, ref)


def test_a_dense_student_and_a_head_of_a_teacher(compiled, dtype):
    student, teacher, labels = heads(2, 5, dtype=dtype)
    s, t = (logits_of(*x).to(dtype) for x in (student, teacher))
    for head, reduction in ((LinearHead(*teacher, chunk_rows=3), "mean"), (t, "mean")):
        leaf = s.clone().requires_grad_()
        loss = kd_loss(leaf, head, labels, reduction=reduction, temperature=2.0, backend=compiled)
        (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(0.3))
        if head is not t:
            ours = loss.detach(), grad
    assert_same_bits((ours[0], loss.detach()), (ours[1], grad))


@pytest.mark.parametrize("inplace", [False, True])
def test_dense_student_of_two_strides(compiled, inplace):
    student, teacher, labels = heads(3, 7)
    s = logits_of(*student).float()
    leaf = torch.zeros(3, 9, V).requires_grad_()
    logits = (leaf + 0)[:, 1:8]
    with torch.no_grad():
        logits.copy_(s)
    head = LinearHead(*teacher, chunk_rows=4)
    loss = kd_loss(logits, head, labels, inplace=inplace, backend=compiled)
    (grad,) = torch.autograd.grad(loss, leaf)
    expected = s.clone().requires_grad_()
    (want,) = torch.autograd.grad(
        kd_loss(expected, logits_of(*teacher).float(), labels, backend=compiled), expected
    )
    assert_same_bits((grad[:, 1:8], want))
    assert_plus_zero(grad[:, [0, 8]])


@pytest.mark.parametrize(
    "extra",
    [dict(logit_scale=0.7), dict(softcap=1.5), dict(logit_scale=-2.0, softcap=3.0)],
    ids=["scale", "cap", "both"],
)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_scale_and_cap(compiled, dtype, extra, who):
    student, teacher, labels = heads(2, 5, dtype=dtype)
    bias = whole(V, scale=0.25, seed=9, dtype=dtype)
    options = dict(temperature=2.0, divergence="jsd", reduction="sum", backend=compiled)
    of_student = extra if who != "teacher" else {}
    of_teacher = extra if who != "student" else {}
    head = dict(of_student, chunk_rows=3)
    loss, grads = run(
        student, LinearHead(*teacher, **of_teacher), labels, bias=bias, head=head, **options
    )
    s = logits_of(*student, bias, **of_student)
    t = logits_of(*teacher, **of_teacher)
    ref = reference(s.float(), t.float(), labels, upstream=random_like(loss), **options)
    assert_loss_close(loss, ref, 2e-4)
    raw = logits_of(*student, bias).requires_grad_()
    scale, cap = of_student.get("logit_scale", 1.0), of_student.get("softcap")
    z = raw * scale if cap is None else cap * (raw * scale / cap).tanh()
    (slope,) = torch.autograd.grad(z.sum(), raw)
    assert_gradients_close(grads, student, ref, slope, bias=True)


@pytest.mark.parametrize(
    "frozen", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts(compiled, frozen, reduction):
    student, teacher, labels = heads(7)
    bias = whole(V, scale=0.25, seed=9)
    options = dict(bias=bias, reduction=reduction, backend=compiled)
    loss, grads = run(student, LinearHead(*teacher), labels, **options)
    partly, some = run(student, LinearHead(*teacher), labels, frozen=frozen, **options)
    for name, grad, of_all in zip(("hidden", "weight", "bias"), some, grads, strict=True):
        if name in frozen:
            assert grad is None
        else:
            assert_same_bits((grad, of_all))
    assert_same_bits((partly, loss))
    with torch.no_grad():
        assert_same_bits((run_frozen(student, teacher, labels, bias, reduction, compiled), loss))


def run_frozen(student, teacher, labels, bias, reduction, backend):
    head = LinearHead(*student, bias)
    return kd_loss(head, LinearHead(*teacher), labels, reduction=reduction, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [0.0, -3.0, 2.0**-20, NAN, INF])
def test_upstream_of_any_value(compiled, dtype, reduction, upstream):
    student, teacher, labels = heads(8, dtype=dtype)
    shape = (8,) if reduction == "none" else ()
    options = dict(reduction=reduction, backend=compiled, head=dict(chunk_rows=3))
    loss, grads = run(
        student, LinearHead(*teacher), labels, upstream=torch.full(shape, upstream), **options
    )
    ignored = labels == IGNORE
    assert_plus_zero(grads[0][ignored])
    if upstream != upstream:
        assert grads[0][~ignored].isnan().all() and grads[1].isnan().all()
    elif abs(upstream) < INF:
        s, t = (logits_of(*x).float() for x in (student, teacher))
        ref = reference(s, t, labels, upstream=torch.full(shape, upstream), reduction=reduction)
        assert_gradients_close(grads, student, ref)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("why", ["ignored", "weight 0"])
def test_content_of_rows_that_do_not_count(compiled, dtype, reduction, why):
    student, teacher, labels = heads(6, dtype=dtype)
    labels = labels.clamp(min=0)
    weights = torch.ones(6)
    (labels if why == "ignored" else weights)[2] = IGNORE if why == "ignored" else 0
    options = dict(token_weights=weights, reduction=reduction, backend=compiled)
    options["head"] = dict(chunk_rows=4)
    sound = run(student, LinearHead(*teacher), labels, **options)
    student[0][2], teacher[0][2] = NAN, INF
    loss, grads = run(student, LinearHead(*teacher), labels, **options)
    assert_same_bits((loss, sound[0]), *zip(grads, sound[1], strict=True))
    assert_plus_zero(grads[0][2])


@pytest.mark.parametrize("num_items", [None, 0])
def test_nothing_counts(compiled, dtype, num_items):
    student, teacher, labels = heads(5, dtype=dtype)
    labels = torch.full_like(labels, IGNORE) if num_items is None else labels.clamp(min=0)
    student[0][3] = NAN
    loss, grads = run(student, LinearHead(*teacher), labels, num_items=num_items, backend=compiled)
    for x in (loss, *grads):
        assert_plus_zero(x)


def test_no_rows(compiled):
    student, teacher, labels = heads(0)
    loss, grads = run(student, LinearHead(*teacher), labels, backend=compiled)
    for x in (loss, *grads):
        assert_plus_zero(x)


def test_a_bad_row_is_nan_alone(compiled, dtype):
    student, teacher, labels = heads(6, dtype=dtype)
    options = dict(reduction="none", backend=compiled)
    sound = run(student, LinearHead(*teacher), labels.clamp(min=0), **options)
    student[0][2, 0] = NAN
    loss, grads = run(student, LinearHead(*teacher), labels.clamp(min=0), **options)
    rest = [0, 1, 3, 4, 5]
    assert loss[2].isnan() and grads[0][2].isnan().all()
    assert_same_bits((loss[rest], sound[0][rest]), (grads[0][rest], sound[1][0][rest]))


def test_rows_of_the_weight_beyond_vocab_size_are_not_used(compiled, dtype):
    student, teacher, labels = heads(5, dtype=dtype)
    sound = run(student, LinearHead(*teacher), labels, backend=compiled)
    wide = [torch.full((V + 7, H), NAN, dtype=dtype), torch.full((V + 3, H), NAN, dtype=dtype)]
    wide[0][:V], wide[1][:V] = student[1], teacher[1]
    head = LinearHead(teacher[0], wide[1])
    loss, grads = run((student[0], wide[0]), head, labels, vocab_size=V, backend=compiled)
    assert_same_bits((loss, sound[0]), (grads[0], sound[1][0]), (grads[1][:V], sound[1][1]))
    assert_plus_zero(grads[1][V:])


def test_shift(compiled):
    student, teacher, labels = heads(2, 6)
    options = dict(reduction="none", backend=compiled)
    loss, grads = run(student, LinearHead(*teacher), labels, shift=True, **options)
    later = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    expected = run(student, LinearHead(*teacher), later, **options)
    assert_same_bits((loss, expected[0]), *zip(grads, expected[1], strict=True))


def test_terms(compiled):
    student, teacher, labels = heads(7)
    options = dict(return_terms=True, backend=compiled, alpha=1.0)
    ours = kd_loss(LinearHead(*student), LinearHead(*teacher), labels, **options)
    s, t = (logits_of(*x).float() for x in (student, teacher))
    expected = kd_loss(s, t, labels, **options)
    assert ours.num_items == expected.num_items
    assert_same_bits((ours.distill, expected.distill), (ours.hard, expected.hard))


def test_labels_out_of_range(compiled):
    student, teacher, labels = heads(5)
    labels[4] = V
    with pytest.raises(IndexError, match=rf"\[0, {V}\).*got {V} at row 4"):
        head = LinearHead(*student, chunk_rows=2)
        kd_loss(head, LinearHead(*teacher), labels, backend=compiled)


def test_second_derivative_is_refused(compiled):
    student, teacher, labels = heads(3)
    hidden, weight = (x.requires_grad_() for x in student)
    loss = kd_loss(LinearHead(hidden, weight), LinearHead(*teacher), labels, backend=compiled)
    grads = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="second derivative.*eager"):
            grad.sum().backward(retain_graph=True)


def test_backward_twice(compiled):
    student, teacher, labels = heads(6)
    hidden, weight = (x.requires_grad_() for x in student)
    loss = kd_loss(LinearHead(hidden, weight), LinearHead(*teacher), labels, backend=compiled)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert_same_bits(*zip(torch.autograd.grad(loss, (hidden, weight)), first, strict=True))


@pytest.mark.parametrize("columns", [1, 2, 63, 130, 515])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_gradient_that_takes_over_its_sums(compiled, dtype, columns, padding):
    """Where the graph is kept they are left as they are, and the gradient is the same."""
    (hidden, weight), teacher, labels = heads(6, dtype=dtype, columns=columns)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, padding), value=NAN).requires_grad_()
    labels[0] = 0
    head = LinearHead(hidden, weight, chunk_rows=2)
    options = dict(temperature=2.0, vocab_size=columns, backend=compiled)
    loss = kd_loss(head, LinearHead(*teacher), labels, **options)
    (kept,) = torch.autograd.grad(loss, weight, torch.tensor(0.7), retain_graph=True)
    again = [torch.autograd.grad(loss, weight, torch.tensor(0.7), retain_graph=x) for x in (1, 0)]
    assert_same_bits(*((grad, kept) for (grad,) in again))
    assert_plus_zero(kept[columns:])
    s, t = logits_of(hidden, weight[:columns]).float(), logits_of(*teacher).float()
    ref = reference(s, t, labels, upstream=torch.tensor(0.7), temperature=2.0)
    assert_gradients_close([None, kept[:columns]], (hidden, weight[:columns]), ref)


def test_sums_in_the_dtype_of_the_weight_lose_digits(compiled):
    student, teacher, labels = heads(64, dtype=torch.bfloat16)
    errors = []
    for grad_dtype in (None, torch.float32, torch.bfloat16):
        head = dict(chunk_rows=1, grad_dtype=grad_dtype)
        _, (_, grad) = run(student, LinearHead(*teacher), labels, head=head, backend=compiled)
        exact = run(
            [x.double() for x in student], LinearHead(*(x.double() for x in teacher)), labels
        )[1][1]
        errors.append((grad.double() - exact).norm() / exact.norm())
    assert errors[0] == errors[1] < errors[2] < 0.1


@pytest.mark.parametrize(
    "of_weight, grad_dtype",
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float32, "float32"),
    ],
    ids=str,
)
def test_sums_in_other_dtypes_are_refused(backend, of_weight, grad_dtype):
    student, teacher, _ = heads(3, dtype=of_weight)
    with pytest.raises(TypeError, match="student.grad_dtype.*float32.*got"):
        kd_loss(LinearHead(*student, grad_dtype=grad_dtype), LinearHead(*teacher), backend=backend)


def test_a_teacher_changed_before_the_backward_pass(compiled):
    student, teacher, labels = heads(4)
    hidden = student[0].requires_grad_()
    head = LinearHead(hidden, student[1])
    loss = kd_loss(head, LinearHead(*teacher), labels, reduction="none", backend=compiled)
    teacher[0].add_(1)
    with pytest.raises(RuntimeError, match="teacher was modified in place"):
        loss.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_eager_is_differentiable_twice(reduction):
    student, teacher, labels = heads(3, dtype=torch.float64, columns=7)
    bias = torch.zeros(7, dtype=torch.float64).requires_grad_()
    leaves = *(x.requires_grad_() for x in student), bias

    def loss(*leaves):
        head = LinearHead(*leaves, logit_scale=0.8, softcap=2.0)
        other = LinearHead(*teacher, softcap=1.5)
        options = dict(divergence="jsd", temperature=2.0, reduction=reduction)
        return kd_loss(head, other, labels, backend="eager", **options)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_rows_that_exist_at_a_time():
    """By a budget in bytes; for large vocabularies by rows, which are no more than a quarter."""

    def rows(n, v, dtype=torch.float32):
        head = LinearHead(torch.empty(n, 2, dtype=dtype), torch.empty(v, 2, dtype=dtype))
        chunk, step = chunked.chunk_rows(head, v), chunked.step_rows(head, head, v)
        assert chunk % chunked.ROWS == 0 and step % chunked.ROWS == 0
        return chunk, step

    chunk, step = rows(10**4, 1000)
    assert 4000 * chunk <= chunked.CHUNK_BYTES["cpu"] < 4000 * (chunk + chunked.ROWS)
    assert 4000 * step <= chunked.STEP_BYTES["cpu"] < 4000 * (step + chunked.ROWS)
    assert rows(10**4, 2**18) == rows(2048, 2**18) == (512, 512)
    assert rows(1024, 2**18) == (256, 256)
    assert rows(100, 2**18) == (128, 128)
    mean = Ensemble([torch.empty(2048, 2**18, device="meta")])
    student = torch.empty(2048, 2**18, device="meta")
    assert chunked.step_rows(student, mean, 2**18) == chunked.ROWS  # there is no product
