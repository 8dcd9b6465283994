"""`kd_loss` on dense logits: what each keyword means."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DIVERGENCES,
    DTYPES,
    INF,
    NAMES,
    NAN,
    assert_plus_zero,
    assert_right,
    assert_same_bits,
    problem,
    run,
)
from oracle import assert_loss_close

from kdkernels import KDTerms, kd_loss

IGNORE = -100


def textbook(student, teacher, divergence, beta, temperature=1.0):
    """The table of definitions, word for word and in float64: logits (N, V) -> (N,)."""

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    q = (student.double() / temperature).softmax(-1)
    p = (teacher.double() / temperature).softmax(-1)
    b = {"jsd": 0.5}.get(divergence, 0.1) if beta is None else beta
    if divergence == "forward_kl" or (divergence, b) == ("jsd", 0):
        return kl(p, q)
    if divergence == "reverse_kl" or (divergence, b) == ("jsd", 1):
        return kl(q, p)
    if divergence == "jsd":
        m = b * p + (1 - b) * q
        return b * kl(p, m) + (1 - b) * kl(q, m)
    if divergence == "skew_forward_kl":
        return kl(p, b * p + (1 - b) * q)
    if divergence == "skew_reverse_kl":
        return kl(q, b * q + (1 - b) * p)
    return 0.5 * (p - q).abs().sum(-1)


def row_losses(student, teacher, labels, divergence, beta=None, temperature=1.0, alpha=0.5):
    distill = temperature**2 * textbook(student, teacher, divergence, beta, temperature)
    hard = F.cross_entropy(student.double(), labels, reduction="none")
    return alpha * distill + (1 - alpha) * hard


# --- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
@pytest.mark.parametrize("temperature, alpha", [(1.0, 0.5), (2.0, 0.3), (0.6, 0.9), (2.7, 1.0)])
def test_a_row_is_the_formula(backend, divergence, beta, temperature, alpha):
    student, teacher, labels = problem(9, 37)
    options = dict(divergence=divergence, beta=beta, temperature=temperature, alpha=alpha)
    loss, grad = run(student, teacher, labels, reduction="none", backend=backend, **options)

    expected = row_losses(student, teacher, labels, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_right(backend, loss, grad, student, teacher, labels, reduction="none", **options)


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_every_dtype_against_float64(backend, dtype, divergence, beta):
    student, teacher, labels = problem(6, 130, dtype=dtype)
    options = dict(divergence=divergence, beta=beta, temperature=1.5, label_smoothing=0.1)
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_right(backend, loss, grad, student, teacher, labels, **options)


@pytest.mark.parametrize("ours, theirs", [*itertools.product(DTYPES, DTYPES)])
def test_dtypes_pair_freely(backend, ours, theirs):
    student, teacher, labels = problem(6, 130, dtype=ours, teacher_dtype=theirs)
    loss, grad = run(student, teacher, labels, backend=backend, reduction="none")
    assert loss.dtype == torch.float32 and grad.dtype == ours
    assert_right(backend, loss, grad, student, teacher, labels, reduction="none")


def test_t_squared_is_a_factor_of_the_divergence_only(backend):
    student, teacher, labels = problem(5, 12)
    options = dict(temperature=3.0, reduction="none", backend=backend)
    loss = kd_loss(student, teacher, labels, alpha=0.4, t_squared=False, **options)
    distill = textbook(student, teacher, "forward_kl", None, 3.0)
    hard = F.cross_entropy(student.double(), labels, reduction="none")
    torch.testing.assert_close(loss.double(), 0.4 * distill + 0.6 * hard, rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_without_labels_alpha_does_not_count(backend, alpha):
    student, teacher, _ = problem(5, 12)
    loss = kd_loss(
        student, teacher, temperature=3.0, alpha=alpha, reduction="none", backend=backend
    )
    distill = 9.0 * textbook(student, teacher, "forward_kl", None, 3.0)
    torch.testing.assert_close(loss.double(), distill, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "divergence, beta, same",
    [
        ("jsd", 0, dict(divergence="forward_kl")),
        ("jsd", 1, dict(divergence="reverse_kl")),
        ("jsd", None, dict(divergence="jsd", beta=0.5)),
        ("skew_forward_kl", None, dict(divergence="skew_forward_kl", beta=0.1)),
        ("skew_reverse_kl", None, dict(divergence="skew_reverse_kl", beta=0.1)),
        ("skew_forward_kl", 0.0, dict(divergence="forward_kl")),
        ("skew_reverse_kl", 0.0, dict(divergence="reverse_kl")),
    ],
)
def test_beta_defaults_and_ends(backend, divergence, beta, same):
    inputs = problem(5, 12)
    ours = run(*inputs, divergence=divergence, beta=beta, backend=backend)
    assert_same_bits(*zip(ours, run(*inputs, **same, backend=backend), strict=True))


@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("beta", [5e-324, 1e-40])
def test_beta_below_what_float32_can_mix(exact, dtype, divergence, beta):
    student, teacher, _ = problem(5, 12, dtype=dtype)
    student[1, 3] = teacher[2, 4] = -INF
    options = dict(divergence=divergence, reduction="none")
    ours = run(student, teacher, beta=beta, backend=exact, **options)
    smallest = run(student, teacher, beta=2.0**-100, backend=exact, **options)
    assert_same_bits(*zip(ours, smallest, strict=True))
    if divergence != "jsd":  # 2^-100 times another value
        wide, _ = run(student.double(), teacher.double(), beta=beta, backend="eager", **options)
        assert_loss_close(ours[0], wide, 2e-5)


@pytest.mark.parametrize("divergence", ["skew_forward_kl", "skew_reverse_kl"])
def test_a_mixture_without_the_other_side_is_no_divergence(backend, divergence):
    student, teacher, _ = problem(5, 12)
    options = dict(divergence=divergence, beta=1, reduction="none", backend=backend)
    loss, grad = run(student, teacher, **options)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_pytorchs(backend, smoothing):
    student, teacher, labels = problem(7, 33)
    options = dict(alpha=0.0, label_smoothing=smoothing, reduction="none")
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    expected = F.cross_entropy(
        student.double(), labels, label_smoothing=smoothing, reduction="none"
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_right(backend, loss, grad, student, teacher, labels, **options)


def test_temperatures_at_both_ends(backend):
    student, teacher, labels = problem(5, 12)
    for temperature in (2.0**-20, 2.0**20):
        loss, grad = run(student, teacher, labels, temperature=temperature, backend=backend)
        assert loss.isfinite() and grad.isfinite().all() and grad.any()


# --- rows: which count, and what for -------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, 3, -1])
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32])
def test_ignored_rows_do_not_count(backend, ignore_index, label_dtype):
    student, teacher, labels = problem(8, 12)
    labels[labels == 3] = 4
    labels[[1, 4, 5]] = ignore_index
    keep = labels != ignore_index
    labels = labels.to(label_dtype)
    options = dict(ignore_index=ignore_index, temperature=2.0, backend=backend)
    loss, grad = run(student, teacher, labels, **options)
    fewer = run(student[keep], teacher[keep], labels[keep], **options)
    assert_same_bits((grad[keep], fewer[1]))
    torch.testing.assert_close(loss, fewer[0], rtol=1e-6, atol=0)
    assert_plus_zero(grad[~keep])
    rows = kd_loss(student, teacher, labels, reduction="none", **options)
    assert_plus_zero(rows[~keep])


@pytest.mark.parametrize("weighted", [False, True])
def test_reductions(backend, weighted):
    student, teacher, labels = problem(2, 4, 12)
    labels[0, 1] = labels[1, 3] = IGNORE
    valid = labels != IGNORE
    weights = torch.rand(2, 4) * 3 if weighted else torch.ones(2, 4)
    options = dict(temperature=2.0, backend=backend, token_weights=weights if weighted else None)
    unit = kd_loss(student, teacher, labels, temperature=2.0, reduction="none", backend=backend)
    none, mean, total = (
        kd_loss(student, teacher, labels, reduction=name, **options)
        for name in ("none", "mean", "sum")
    )
    assert none.shape == (2, 4) and mean.shape == total.shape == ()
    torch.testing.assert_close(none, unit * weights, rtol=2e-7, atol=0)
    exact = (unit.double() * weights).sum()
    torch.testing.assert_close(total.double(), exact, rtol=2e-7, atol=0)
    torch.testing.assert_close(mean.double(), exact / weights[valid].sum(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labelled", [True, False])
def test_weighted_gradient(backend, dtype, reduction, labelled):
    student, teacher, labels = problem(6, 19, dtype=dtype)
    labels[2] = IGNORE
    labels = labels if labelled else None
    weights = torch.tensor([0.5, 0.0, 3.0, -1.25, 2.0, 7.0])
    options = dict(reduction=reduction, temperature=1.3, token_weights=weights)
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    assert_right(backend, loss, grad, student, teacher, labels, **options)
    assert_plus_zero(grad[[1, 2] if labelled else [1]])


@pytest.mark.parametrize(
    "weights",
    [torch.tensor([1, 0, 2, 3]), torch.tensor([True, False, True, True])],
    ids=["int", "bool"],
)
@pytest.mark.parametrize("shift", [False, True])
def test_weights_of_integers(backend, weights, shift):
    inputs = problem(4, 12)
    ours = run(*inputs, token_weights=weights, shift=shift, backend=backend)
    floats = run(*inputs, token_weights=weights.float(), shift=shift, backend=backend)
    assert_same_bits(*zip(ours, floats, strict=True))


NUM_ITEMS = (
    24,
    24.0,
    torch.tensor(24),
    torch.tensor(24.0),
    torch.tensor([24], dtype=torch.int32),
    torch.tensor([[24.0]], dtype=torch.float64),
)


@pytest.mark.parametrize("num_items", NUM_ITEMS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_num_items_is_the_denominator(backend, num_items, weighted):
    student, teacher, labels = problem(6, 12)
    labels[3] = IGNORE
    weights = torch.rand(6) + 0.5 if weighted else None
    options = dict(token_weights=weights, backend=backend)
    loss, grad = run(student, teacher, labels, num_items=num_items, **options)
    total = kd_loss(student, teacher, labels, reduction="sum", **options)
    torch.testing.assert_close(loss, total / 24, rtol=2e-7, atol=0)
    assert_right(backend, loss, grad, student, teacher, labels, num_items=24, token_weights=weights)


def test_accumulation_with_num_items_is_one_big_batch(backend, dtype):
    student, teacher, labels = problem(12, 40, dtype=dtype)
    labels[[0, 1, 2, 7]] = IGNORE
    upstream = torch.tensor(1.7, dtype=torch.promote_types(dtype, torch.float32))
    options = dict(temperature=2.0, backend=backend, upstream=upstream)
    loss, grad = run(student, teacher, labels, **options)
    parts = [
        run(student[part], teacher[part], labels[part], num_items=8, **options)
        for part in (slice(0, 3), slice(3, 5), slice(5, 12))  # the first holds no valid row
    ]
    assert_same_bits((torch.cat([part_grad for _, part_grad in parts]), grad))
    torch.testing.assert_close(sum(part_loss for part_loss, _ in parts), loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("why", ["ignored", "weights", "both"])
def test_no_row_that_counts(backend, dtype, reduction, why):
    student, teacher, labels = problem(4, 12, dtype=dtype)
    weights = None
    if why != "weights":
        labels[:] = IGNORE
        student[1] = NAN
    if why != "ignored":
        weights = torch.zeros(4) if why == "weights" else torch.rand(4)
    options = dict(token_weights=weights, reduction=reduction, backend=backend)
    loss, grad = run(student, teacher, labels, **options)
    assert_plus_zero(loss)
    assert_plus_zero(grad)


def test_weights_that_cancel_count_as_no_valid_row(backend):
    student, teacher, labels = problem(2, 5)
    student[0, labels[0]] = -INF  # a loss of +inf: 0 times it would be NaN
    loss, grad = run(
        student, teacher, labels, token_weights=torch.tensor([1.0, -1.0]), backend=backend
    )
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 4, 5), (2, 3, 0, 5), (0, 0), (2, 0, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_at_all(backend, shape, reduction):
    student, teacher = torch.randn(shape), torch.randn(shape)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    loss, grad = run(student, teacher, labels, reduction=reduction, backend=backend)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert_plus_zero(loss)
    assert grad.shape == shape


@pytest.mark.parametrize("leading", [(4, 6), (2, 3, 4), (2, 2, 3, 2), (1, 24), (24, 1)])
def test_leading_dimensions_are_rows(backend, leading):
    student, teacher, labels = problem(24, 12)
    weights, upstream = torch.rand(24), torch.randn(24)

    def reshaped(*shape):
        return run(
            student.view(*shape, 12),
            teacher.view(*shape, 12),
            labels.view(shape),
            token_weights=weights.view(shape),
            upstream=upstream.view(shape),
            reduction="none",
            backend=backend,
        )

    loss, grad = reshaped(*leading)
    flat_loss, flat_grad = reshaped(24)
    assert loss.shape == leading and grad.shape == (*leading, 12)
    assert_same_bits((loss.view(24), flat_loss), (grad.view(24, 12), flat_grad))


# --- terms of weight 0 ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_alpha_0_does_not_read_the_teacher(backend, dtype, name):
    student, teacher, labels = problem(5, 12, dtype=dtype)
    options = dict(divergence=name, alpha=0.0, temperature=2.0, backend=backend)
    sound = run(student, teacher, labels, **options)
    poisoned = run(student, torch.full_like(teacher, NAN), labels, **options)
    assert_same_bits(*zip(poisoned, sound, strict=True))
    expected = F.cross_entropy(student.double(), labels)
    torch.testing.assert_close(sound[0].double(), expected, rtol=1e-5, atol=0)


def test_alpha_1_uses_labels_as_a_mask_only(backend, dtype):
    student, teacher, labels = problem(5, 12, dtype=dtype)
    student[0, 3] = teacher[0, 3] = -INF  # a cross-entropy of +inf if it were computed
    labels[0] = 3
    options = dict(alpha=1.0, temperature=2.0, backend=backend)
    masked = run(student, teacher, labels, label_smoothing=0.2, **options)
    assert_same_bits(*zip(masked, run(student, teacher, **options), strict=True))
    assert masked[0].isfinite()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_terms_report_what_the_loss_does_not_use(backend, alpha):
    student, teacher, labels = problem(5, 12)
    options = dict(alpha=alpha, temperature=2.0, backend=backend)
    terms = kd_loss(student, teacher, labels, return_terms=True, **options)
    distill = 4 * textbook(student, teacher, "forward_kl", None, 2.0).mean()
    hard = F.cross_entropy(student.double(), labels)
    torch.testing.assert_close(terms.distill.double(), distill, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.hard.double(), hard, rtol=1e-5, atol=0)

    # A term that is NaN is reported and kept out of the loss and of its gradient.
    if alpha == 0:
        teacher[2] = NAN
    else:
        student[2, 3] = teacher[2, 3] = -INF
        labels[2] = 3
    leaf = student.clone().requires_grad_()
    terms = kd_loss(leaf, teacher, labels, return_terms=True, **options)
    terms.loss.backward()
    bad = terms.distill if alpha == 0 else terms.hard
    assert not bad.isfinite() and terms.loss.isfinite() and leaf.grad.isfinite().all()
    plain = run(student, teacher, labels, upstream=torch.ones(()), **options)
    assert_same_bits((terms.loss.detach(), plain[0]), (leaf.grad, plain[1]))


# --- return_terms --------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("t_squared", [True, False])
def test_terms_are_unweighted_means_over_valid_rows(backend, reduction, t_squared):
    student, teacher, labels = problem(2, 4, 12)
    labels[0, 2] = IGNORE
    student[0, 2] = NAN
    weights = torch.rand(2, 4) + 0.5
    weights[1, 1] = 0  # a row of no weight is valid: the means are unweighted
    options = dict(
        temperature=2.0,
        t_squared=t_squared,
        token_weights=weights,
        reduction=reduction,
        backend=backend,
    )
    leaf = student.clone().requires_grad_()
    terms = kd_loss(leaf, teacher, labels, return_terms=True, **options)
    assert isinstance(terms, KDTerms) and terms._fields == ("loss", "distill", "hard", "num_items")
    assert terms.loss.requires_grad
    assert not (terms.distill.requires_grad or terms.hard.requires_grad)
    assert terms.num_items.shape == terms.distill.shape == terms.hard.shape == ()
    assert_same_bits((terms.loss, kd_loss(student, teacher, labels, **options)))

    keep = labels != IGNORE
    distill = textbook(student[keep], teacher[keep], "forward_kl", None, 2.0).mean()
    hard = F.cross_entropy(student[keep].double(), labels[keep])
    factor = 4 if t_squared else 1
    torch.testing.assert_close(terms.distill.double(), distill * factor, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.hard.double(), hard, rtol=1e-5, atol=0)
    assert isinstance(terms.num_items, torch.Tensor) and terms.num_items == 7


def test_terms_without_labels_or_valid_rows(backend):
    student, teacher, labels = problem(4, 12)
    terms = kd_loss(student, teacher, return_terms=True, backend=backend)
    assert terms.hard == 0 and terms.distill > 0 and terms.num_items == 4
    terms = kd_loss(student, teacher, labels * 0 + IGNORE, return_terms=True, backend=backend)
    assert [float(x) for x in terms] == [0, 0, 0, 0]
