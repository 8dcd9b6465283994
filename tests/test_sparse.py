"""`TopK` and `Sampled`: teachers that know some classes of each row."""

import pytest
import torch
from conftest import (
    DIVERGENCES,
    INF,
    NAMES,
    NAN,
    assert_plus_zero,
    assert_same_bits,
    problem,
    random_like,
)
from oracle import assert_gradient_close, assert_loss_close, reference
from oracle_sparse import probabilities, sparse_reference

from kdkernels import LinearHead, Sampled, TopK, kd_loss

IGNORE = -100
V, K = 150, 12


def top(teacher, k):
    """ids and log-probabilities (N, k) of the most probable classes, in any order."""
    logprobs, ids = teacher.double().log_softmax(-1).topk(k, -1)
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return ids.gather(-1, order), logprobs.gather(-1, order)


def run(student, source, labels=None, *, upstream=None, **options):
    leaf = student.detach().requires_grad_()
    loss = kd_loss(leaf, source, labels, **options)
    upstream = random_like(loss) if upstream is None else upstream
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), grad


def expected(student, source, labels=None, **options):
    sampled = isinstance(source, Sampled)
    values, kind = (source.counts, "counts") if sampled else (source.logprobs, source.tail)
    temperature = options.get("temperature", 1.0)
    p = probabilities(source.ids, values, kind, student.shape[1], temperature)
    return sparse_reference(student, source.ids, p, labels, **options)


def check(backend, student, source, labels=None, *, check_blind=True, **options):
    loss, grad = run(student, source, labels, backend=backend, **options)
    if labels is None:
        options["alpha"] = 1.0
    ref = expected(student, source, labels, upstream=random_like(loss), **options)
    assert_loss_close(loss, ref, 2e-5)
    assert_gradient_close(grad, ref, check_blind=check_blind)
    return loss, grad


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
@pytest.mark.parametrize("alpha", [None, 0.3, 1.0])
def test_bucket(exact, dtype, divergence, beta, alpha):
    student, teacher, labels = problem(5, V, dtype=dtype)
    options = dict(divergence=divergence, beta=beta, reduction="none")
    if alpha is None:
        labels = None
    else:
        options.update(alpha=alpha, label_smoothing=0.1)
    check(exact, student, TopK(*top(teacher, K)), labels, **options)


# A jsd of beta 1 is the reverse KL, which is infinite there.
REVERSE = ("reverse_kl", None), ("jsd", 1.0)


@pytest.mark.parametrize("divergence, beta", [x for x in DIVERGENCES if x not in REVERSE])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_renormalize(exact, dtype, divergence, beta, temperature):
    student, teacher, labels = problem(5, V, dtype=dtype)
    options = dict(divergence=divergence, beta=beta, temperature=temperature)
    source = TopK(*top(teacher, K), tail="renormalize")
    check(exact, student, source, labels, reduction="sum", **options)


@pytest.mark.parametrize("integers", [torch.int64, torch.uint8, torch.float16])
def test_sampled(exact, dtype, integers):
    student, _, labels = problem(5, V, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (5, 40), generator=generator).int()  # with duplicates
    counts = torch.randint(6, (5, 40), generator=generator).to(integers)
    ids[2, 7:], ids[4] = -1, -1
    check(exact, student, Sampled(ids, counts), labels, t_squared=False)


@pytest.mark.parametrize("name", NAMES)
def test_all_classes_are_a_dense_teacher(exact, dtype, name):
    student, teacher, labels = problem(4, 40, dtype=dtype)
    options = dict(divergence=name, reduction="none")
    source = TopK(*top(teacher, 40))
    loss, grad = run(student, source, labels, backend=exact, **options)
    ref = reference(student, teacher, labels, upstream=random_like(loss), **options)
    assert_loss_close(loss, ref, 2e-5)
    assert_gradient_close(grad, ref)


@pytest.mark.parametrize("name", NAMES)
def test_value_grows_with_k(backend, name):
    """hazards.md, P15."""
    student, teacher, _ = problem(6, 60)
    options = dict(divergence=name, reduction="none", backend=backend)
    full = kd_loss(student, teacher, **options)
    so_far = torch.zeros(6)
    for k in (0, 1, 2, 7, 30, 59, 60):
        loss = kd_loss(student, TopK(*top(teacher, k)), **options)
        assert (loss >= so_far * (1 - 1e-5)).all() and (loss <= full * (1 + 1e-5)).all()
        so_far = loss


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_order_and_padding_change_nothing(compiled, dtype, tail):
    student, teacher, labels = problem(5, V, dtype=dtype)
    ids, logprobs = top(teacher, K)
    plain = run(student, TopK(ids, logprobs, tail), labels, backend=compiled)
    ids, logprobs = ids.flip(1), logprobs.flip(1)
    hole, anything = torch.full((5, 2), -1), torch.full((5, 2), NAN)
    ids = torch.cat([hole, ids[:, :5], hole, ids[:, 5:]], 1).to(torch.int16)
    logprobs = torch.cat([anything, logprobs[:, :5], anything, logprobs[:, 5:]], 1)
    padded = run(student, TopK(ids, logprobs, tail), labels, backend=compiled)
    assert_same_bits(*zip(padded, plain, strict=True))


@pytest.mark.parametrize(
    "integers", [torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32]
)
def test_ids_of_any_integers(backend, integers):
    student, teacher, labels = problem(5, V)
    ids, logprobs = top(teacher, K)
    plain = run(student, TopK(ids, logprobs), labels, backend=backend)
    others = run(student, TopK(ids.to(integers), logprobs), labels, backend=backend)
    assert_same_bits(*zip(others, plain, strict=True))


@pytest.mark.parametrize("source", [TopK, Sampled])
@pytest.mark.parametrize("k", [0, 3])
def test_a_row_without_ids_keeps_its_cross_entropy(backend, dtype, source, k):
    student, _, labels = problem(4, 30, dtype=dtype)
    source = source(torch.full((4, k), -1), torch.zeros(4, k))
    options = dict(reduction="none", return_terms=True, backend=backend)
    terms = kd_loss(student, source, labels, **options)
    assert_plus_zero(terms.distill)
    assert (terms.loss == 0.5 * terms.hard).all() if terms.hard.dim() else True
    loss, grad = run(student, source, backend=backend)
    assert_plus_zero(loss)
    assert not grad.any()


@pytest.mark.parametrize("margin", [20.0, 80.0, 120.0, 600.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_tail_without_cancellation(exact, dtype, name, margin):
    """The student's mass beyond the kept classes is far below what 1 − Σ holds."""
    student, teacher, labels = problem(4, 50, dtype=dtype)
    ids, logprobs = top(teacher, 5)
    student = student.scatter(1, ids, student.gather(1, ids) + margin)
    check(exact, student, TopK(ids, logprobs), labels, divergence=name, check_blind=False)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("step", [3.0, 100.0, 260.0, -30.0])
def test_classes_of_any_height(exact, dtype, step, temperature):
    """A row's highest logit may come late, and what came before it was nothing beside it."""
    student, teacher, labels = problem(4, 2600)
    student = (student + step * (torch.arange(2600) // 500)).to(dtype)
    source = TopK(*top(teacher, K), tail="bucket" if temperature == 1 else "renormalize")
    options = dict(temperature=temperature, alpha=0.4, reduction="none", check_blind=False)
    check(exact, student, source, labels, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 100])
@pytest.mark.parametrize("noise", [1e-2, 3e-4])
def test_a_student_that_nearly_equals_the_teacher(exact, name, k, noise):
    """D is so small that it shows every digit that the mass of the rest has lost."""
    student, _, _ = problem(6, 513)
    teacher = student.double() + noise * torch.randn(6, 513, dtype=torch.float64)
    source = TopK(*top(teacher, k))
    options = dict(divergence=name, reduction="none")
    loss, grad = run(student, source, backend=exact, **options)
    ref = expected(student, source, upstream=random_like(loss), alpha=1.0, **options)
    seen = ref.rows > 1e-8
    if exact != "eager":
        assert_loss_close(loss[seen], ref.loss[seen], 1e-5)
        assert_gradient_close(grad, ref, check_blind=False)


@pytest.mark.parametrize("k", [1024, 1000])
def test_many_classes(exact, k):
    student, teacher, labels = problem(2, 1500)
    check(exact, student, TopK(*top(teacher, k)), labels, divergence="jsd")


@pytest.mark.parametrize("name", NAMES)
def test_absent_classes(exact, dtype, name):
    """−inf among kept and other classes of the student, and among the teacher's."""
    student, teacher, _ = problem(5, V, dtype=dtype)
    ids, logprobs = top(teacher, K)
    student[0, ids[0, 2]] = -INF
    student[1].scatter_(0, (torch.arange(V) + 7) % V, student[1].clone())
    others = torch.ones(5, V, dtype=torch.bool).scatter(1, ids, False)
    student[2].masked_fill_(others[2] & (torch.arange(V) % 2 == 0), -INF)
    student[3].masked_fill_(others[3], -INF)
    logprobs[4, 3] = -INF
    source = TopK(ids, logprobs)
    loss, grad = run(student, source, divergence=name, reduction="none", backend=exact)
    ref = expected(student, source, divergence=name, reduction="none", alpha=1.0)
    infinite = {"forward_kl": [0, 3], "reverse_kl": [4]}.get(name, [])
    assert torch.isinf(loss).nonzero().flatten().tolist() == infinite
    finite = [row for row in range(5) if row not in infinite]
    assert_loss_close(loss[finite], ref.loss[finite], 2e-5)
    assert grad[finite].isfinite().all()
    assert grad[3][others[3]].eq(0).all() or name == "reverse_kl" or 3 in infinite
    if name == "reverse_kl":
        assert grad[4].isnan().all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["kept", "others", "label"])
def test_a_bad_logit_is_nan_in_its_row_alone(backend, dtype, bad, where):
    student, teacher, labels = problem(5, V, dtype=dtype)
    labels = labels.clamp(min=0)
    ids, logprobs = top(teacher, K)
    options = dict(reduction="none", backend=backend)
    sound = run(student, TopK(ids, logprobs), labels, **options)
    other = next(x for x in range(V) if x not in ids[2].tolist() and x != labels[2])
    student[2, {"kept": ids[2, 0], "others": other, "label": labels[2]}[where]] = bad
    loss, grad = run(student, TopK(ids, logprobs), labels, **options)
    assert loss[2].isnan() and grad[2].isnan().all()
    rest = [0, 1, 3, 4]
    assert_same_bits((loss[rest], sound[0][rest]), (grad[rest], sound[1][rest]))


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_bad_log_probability_is_nan_in_its_row_alone(backend, tail):
    student, teacher, labels = problem(5, V)
    ids, logprobs = top(teacher, K)
    options = dict(reduction="none", backend=backend)
    sound = run(student, TopK(ids, logprobs, tail), labels.clamp(min=0), **options)
    logprobs[2, 4] = NAN
    loss, grad = run(student, TopK(ids, logprobs, tail), labels.clamp(min=0), **options)
    assert loss[2].isnan() and grad[2].isnan().all()
    rest = [0, 1, 3, 4]
    assert_same_bits((loss[rest], sound[0][rest]), (grad[rest], sound[1][rest]))


def test_content_of_ignored_rows(backend, dtype):
    student, teacher, labels = problem(5, V, dtype=dtype)
    labels[2] = IGNORE
    ids, logprobs = top(teacher, K)
    sound = run(student, TopK(ids, logprobs), labels, backend=backend)
    ids[2], logprobs[2], student[2] = 10**6, NAN, NAN
    assert_same_bits(
        *zip(run(student, TopK(ids, logprobs), labels, backend=backend), sound, strict=True)
    )
    assert_plus_zero(sound[1][2])


def test_a_teacher_of_weight_0_is_not_read(backend):
    student, teacher, labels = problem(5, V)
    ids, logprobs = top(teacher, K)
    sound = run(student, TopK(ids, logprobs), labels, alpha=0.0, backend=backend)
    bad = TopK(ids + 10**6, logprobs + NAN)
    assert_same_bits(
        *zip(run(student, bad, labels, alpha=0.0, backend=backend), sound, strict=True)
    )


REFUSED = [
    (
        IndexError,
        ["ids", "[0, 150)", "150", "row 1"],
        lambda ids, x: TopK(ids + (ids == 7) * 143, x),
    ),
    (IndexError, ["ids", "-2"], lambda ids, x: TopK(ids - (ids == 7) * 9, x)),
    (ValueError, ["ids", "differ", "6"], lambda ids, x: TopK(ids.clamp(max=6), x)),
    (ValueError, ["sum to 1"], lambda ids, x: TopK(ids, x * 0 - 0.5)),
    (ValueError, ["counts", "-1"], lambda ids, x: Sampled(ids, torch.full_like(ids, -1))),
    (ValueError, ["counts", "nan"], lambda ids, x: Sampled(ids, x * NAN)),
    (TypeError, ["teacher.ids", "float32"], lambda ids, x: TopK(x, x)),
    (TypeError, ["teacher.ids", "list"], lambda ids, x: TopK([[1]], x)),
    (TypeError, ["teacher.logprobs", "int64"], lambda ids, x: TopK(ids, ids)),
    (TypeError, ["teacher.counts", "bool"], lambda ids, x: Sampled(ids, ids > 0)),
    (ValueError, ["teacher.logprobs", "(2, 8)", "(2, 7)"], lambda ids, x: TopK(ids, x[:, 1:])),
    (ValueError, ["leading dimensions", "(1, 8)"], lambda ids, x: TopK(ids[:1], x[:1])),
    (ValueError, ["teacher.tail", "'zero'", "bucket"], lambda ids, x: TopK(ids, x, "zero")),
    (ValueError, ["teacher.logprobs", "detach"], lambda ids, x: TopK(ids, x.requires_grad_())),
]


@pytest.mark.parametrize("error, words, source", REFUSED)
def test_refused(backend, error, words, source):
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 8], [0, 1, 2, 3, 4, 5, 6, 7]])
    logprobs = torch.full((2, 8), -4.0)
    student = torch.zeros(2, 150)
    with pytest.raises(error) as caught:
        kd_loss(student, source(ids, logprobs), backend=backend)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize(
    "words, kind, options",
    [
        (["temperature", "bucket", "2.0"], "bucket", dict(temperature=2.0)),
        (["temperature", "Sampled"], "sampled", dict(temperature=0.5)),
        (["reverse_kl", "renormalize"], "renormalize", dict(divergence="reverse_kl")),
        (["'jsd' is 'reverse_kl'"], "renormalize", dict(divergence="jsd", beta=1)),
        (["forward_kl", "Sampled", "jsd"], "sampled", dict(divergence="jsd")),
    ],
)
def test_what_cannot_be_asked_of_it(backend, words, kind, options):
    ids, values = torch.tensor([[0, 1]]), torch.full((1, 2), -2.0)
    source = Sampled(ids, ids) if kind == "sampled" else TopK(ids, values, kind)
    with pytest.raises(ValueError) as caught:
        kd_loss(torch.zeros(1, 5), source, backend=backend, **options)
    for word in words:
        assert word in str(caught.value)


def test_sampled_jsd_of_beta_0_is_the_forward_kl(backend):
    student, _, labels = problem(3, 20)
    source = Sampled(torch.arange(6).view(3, 2), torch.ones(3, 2))
    options = dict(backend=backend)
    ours = run(student, source, labels, divergence="jsd", beta=0, **options)
    assert_same_bits(*zip(ours, run(student, source, labels, **options), strict=True))


def test_sampled_is_unbiased(compiled):
    """The mean of n gradients goes to the dense teacher's as 1/√n."""
    student, teacher, _ = problem(1, 20)
    _, exact = run(student, teacher, upstream=torch.ones(()), backend=compiled)
    generator = torch.Generator().manual_seed(0)
    p = teacher.softmax(-1)
    errors = []
    for n in (25, 2_500):
        ids = p.expand(n, -1).multinomial(8, replacement=True, generator=generator)
        source = Sampled(ids, torch.ones_like(ids))
        _, grad = run(
            student.expand(n, -1).clone(), source, upstream=torch.ones(()), backend=compiled
        )
        errors.append((grad.sum(0) - exact[0]).norm().item())
    # Each gradient's standard deviation is at most that of 8 draws, √(1/8).
    assert errors[0] < 4 * (1 / 200) ** 0.5 and errors[1] < 4 * (1 / 20_000) ** 0.5
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_vocabulary_and_shift(exact, reduction):
    student, teacher, labels = problem(2, 5, V)
    weights = torch.rand(2, 5)
    weights[1, 2] = 0
    ids, logprobs = (x.view(2, 5, K) for x in top(teacher.flatten(0, 1), K))
    wide = torch.cat([student, torch.full((2, 5, 3), NAN)], -1)
    options = dict(token_weights=weights, reduction=reduction)
    source = TopK(ids, logprobs)
    loss, grad = run(wide, source, labels, shift=True, vocab_size=V, backend=exact, **options)
    later = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    options["token_weights"] = torch.nn.functional.pad(weights[:, 1:], (0, 1)).flatten()
    upstream = random_like(loss)
    flat = TopK(ids.flatten(0, 1), logprobs.flatten(0, 1))
    ref = (
        expected(
            student.flatten(0, 1), flat, later.flatten(), upstream=upstream.flatten(), **options
        )
        if reduction == "none"
        else expected(student.flatten(0, 1), flat, later.flatten(), upstream=upstream, **options)
    )
    assert_loss_close(loss.flatten() if loss.dim() else loss, ref, 2e-5)
    assert_gradient_close(grad[..., :V].flatten(0, 1), ref)
    assert_plus_zero(grad[..., V:])


def test_in_place(compiled, dtype):
    student, teacher, labels = problem(5, V, dtype=dtype)
    source = TopK(*top(teacher, K))
    plain = run(student, source, labels, backend=compiled)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    loss = kd_loss(logits, source, labels, inplace=True, backend=compiled)
    (grad,) = torch.autograd.grad(loss, leaf, random_like(loss))
    assert_same_bits((loss.detach(), plain[0]), (grad, plain[1]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states_and_a_file_of_a_teacher(compiled, reduction):
    """The offline case: no logits on either side."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (7, 6), generator=generator) * 0.5
    weight = torch.randint(-2, 3, (V, 6), generator=generator) * 0.5
    _, teacher, labels = problem(7, V)
    source = TopK(*top(teacher, K))
    options = dict(reduction=reduction, backend=compiled, divergence="jsd")
    loss = kd_loss(LinearHead(hidden, weight, chunk_rows=3), source, labels, **options)
    dense = kd_loss(hidden @ weight.T, source, labels, **options)
    torch.testing.assert_close(loss, dense, rtol=1e-6, atol=0)
