"""The gradient as PyTorch's autograd sees it: upstream gradients, second derivatives, in place."""

import itertools
import weakref

import pytest
import torch
from conftest import (
    DIVERGENCES,
    NAMES,
    NAN,
    assert_plus_zero,
    assert_right,
    assert_same_bits,
    problem,
    random_like,
    run,
)

from kdkernels import kd_loss

IGNORE = -100


# --- upstream gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 4.0, -1.7, 12345.678])
def test_upstream_is_applied_once(backend, dtype, reduction, scale):
    student, teacher, labels = problem(5, 130, dtype=dtype)
    labels[3] = IGNORE
    options = dict(reduction=reduction, temperature=2.0)
    shape = (5,) if reduction == "none" else ()
    upstream = torch.full(shape, scale, dtype=torch.promote_types(dtype, torch.float32))
    loss, grad = run(student, teacher, labels, upstream=upstream, backend=backend, **options)
    assert_right(backend, loss, grad, student, teacher, labels, upstream=upstream, **options)


def test_upstream_of_each_row_is_its_own(backend, dtype):
    """Also with an ignored first row, whose upstream gradient must not stand for the others'."""
    student, teacher, labels = problem(5, 130, dtype=dtype)
    labels[0] = IGNORE
    upstream = torch.tensor(
        [9.0, -2.0, 0.0, 0.25, 3.0], dtype=torch.promote_types(dtype, torch.float32)
    )
    options = dict(reduction="none", temperature=2.0)
    loss, grad = run(student, teacher, labels, upstream=upstream, backend=backend, **options)
    assert_right(backend, loss, grad, student, teacher, labels, upstream=upstream, **options)
    assert not grad[2].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_of_zero(backend, dtype, reduction):
    student, teacher, labels = problem(5, 19, dtype=dtype)
    upstream = torch.zeros_like(run(student, teacher, labels, reduction=reduction)[0])
    _, grad = run(student, teacher, labels, upstream=upstream, reduction=reduction, backend=backend)
    assert not grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_of_nan(backend, dtype, reduction):
    """It reaches every row that counts, and none that does not."""
    student, teacher, labels = problem(5, 19, dtype=dtype)
    labels[1] = IGNORE
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0])
    options = dict(token_weights=weights, reduction=reduction, backend=backend)
    upstream = torch.full_like(run(student, teacher, labels, **options)[0], NAN)
    if reduction == "none":
        upstream[3] = 1.0
    _, grad = run(student, teacher, labels, upstream=upstream, **options)
    assert_plus_zero(grad[[1, 2]])
    assert grad[[0, 4]].isnan().all()
    assert grad[3].isnan().all() == (reduction == "mean")


def test_upstream_layouts(backend, dtype):
    student, teacher, labels = problem(2, 6, 19, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    base = torch.randn(6, 8, dtype=wide)
    for upstream in (
        base[:, 1:3].t(),  # transposed
        base[0, 0].expand(2, 6),  # stride 0 everywhere
        base[:, 0].expand(2, 6),  # stride 0 in one dimension
        base.flatten()[1::4].view(2, 6),  # every fourth
        base.flatten()[3:15].view(2, 6),  # unaligned
    ):
        options = dict(reduction="none", backend=backend)
        ours = run(student, teacher, labels, upstream=upstream, **options)
        plain = run(student, teacher, labels, upstream=upstream.clone(), **options)
        assert_same_bits(*zip(ours, plain, strict=True))


def test_row_losses_summed_are_the_sum(backend):
    """`sum` hands "none" an expanded gradient of stride 0: no copy, and no wrong row."""
    student, teacher, labels = problem(5, 19)
    leaf = student.clone().requires_grad_()
    rows = kd_loss(leaf, teacher, labels, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    one = torch.ones(())
    expected = run(student, teacher, labels, reduction="sum", upstream=one, backend=backend)[1]
    assert_same_bits((grad, expected))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_again_with_other_gradients(backend, dtype, reduction):
    """The saved gradient is not used up: neither repeated nor scaled calls see an earlier one."""
    student, teacher, labels = problem(5, 19, dtype=dtype)
    options = dict(reduction=reduction, backend=backend)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, labels, **options)
    first = random_like(loss)
    for index, upstream in enumerate((first, 2 * first, first * 0, 3 - first, first)):
        (grad,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=index < 4)
        assert_same_bits((grad, run(student, teacher, labels, upstream=upstream, **options)[1]))
        grad.fill_(NAN)  # what the caller does to a gradient is his own business
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf, first)


def test_gradients_accumulate(backend, dtype):
    """`.grad` belongs to the leaf: a second backward adds to it and does not alias it."""
    student, teacher, labels = problem(5, 19, dtype=dtype)
    leaf = student.clone().requires_grad_()
    parts = []
    for alpha in (0.2, 0.9):
        loss = kd_loss(leaf, teacher, labels, alpha=alpha, backend=backend)
        loss.backward()
        one = torch.ones_like(loss)
        options = dict(alpha=alpha, upstream=one, backend=backend)
        parts.append(run(student, teacher, labels, **options)[1])
        assert leaf.grad.data_ptr() != leaf.data_ptr()
    assert_same_bits((leaf.grad, parts[0] + parts[1]))


def test_one_loss_used_twice(backend):
    student, teacher, labels = problem(5, 19)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, labels, backend=backend)
    (grad,) = torch.autograd.grad(loss * 2 + loss.square(), leaf)
    upstream = 2 + 2 * loss.detach()
    expected = run(student, teacher, labels, upstream=upstream, backend=backend)[1]
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


def test_unused_loss_and_terms_have_no_gradient(backend):
    student, teacher, labels = problem(5, 19)
    leaf = student.clone().requires_grad_()
    kd_loss(leaf, teacher, labels, backend=backend)
    terms = kd_loss(leaf, teacher, labels, return_terms=True, backend=backend)
    assert leaf.grad is None and not terms.distill.requires_grad
    (grad,) = torch.autograd.grad(terms.loss + 0 * terms.distill, leaf)
    one = torch.ones(())
    assert_same_bits((grad, run(student, teacher, labels, upstream=one, backend=backend)[1]))


def test_nothing_outlives_the_loss(backend):
    """No cycle, cache or context keeps the logits alive once the loss is gone."""
    student, teacher, labels = problem(5, 19)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, labels, backend=backend)
    loss.backward()
    logits = weakref.ref(leaf)
    del loss, leaf, student
    assert logits() is None


# --- second derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_eager_is_differentiable_twice(divergence, beta):
    student, teacher, labels = problem(3, 4, dtype=torch.float64, spread=1.0)
    labels[1] = IGNORE
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def loss(student):
        return kd_loss(
            student,
            teacher,
            labels,
            divergence=divergence,
            beta=beta,
            temperature=1.4,
            label_smoothing=0.1,
            token_weights=weights,
            reduction="none",
            backend="eager",
        )

    student.requires_grad_()
    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


@pytest.fixture
def first_gradient(compiled):
    """(leaf, upstream, gradient with its graph) of a compiled backend."""
    student, teacher, labels = problem(4, 19)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, labels, backend=compiled)
    upstream = torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
    return leaf, upstream, grad


def test_compiled_second_derivative_is_an_error(first_gradient):
    leaf, _, grad = first_gradient
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(grad.square().sum(), leaf)


def test_compiled_second_derivative_is_not_skipped(first_gradient):
    leaf, _, grad = first_gradient
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(grad.square().sum(), leaf, allow_unused=True)


def test_compiled_second_derivative_by_backward(first_gradient):
    _, _, grad = first_gradient
    with pytest.raises(RuntimeError, match="backend='eager'"):
        grad.square().sum().backward()


def test_compiled_second_derivative_is_not_silently_zero_in_a_mixed_graph(first_gradient):
    """A gradient penalty beside a term that has a derivative: the penalty must not vanish."""
    leaf, _, grad = first_gradient
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(grad.square().sum() + leaf.square().sum(), leaf)


def test_compiled_derivative_with_respect_to_upstream_is_an_error(first_gradient):
    _, upstream, grad = first_gradient
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(grad.sum(), upstream)


def test_create_graph_alone_changes_nothing(backend):
    student, teacher, labels = problem(4, 19)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, labels, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, random_like(loss), create_graph=True)
    assert_same_bits((grad, run(student, teacher, labels, backend=backend)[1]))


# --- in place ------------------------------------------------------------------------------------


def run_inplace(student, teacher, labels=None, *, upstream=None, **options):
    """(loss, gradient of a leaf, the logits that were overwritten)."""
    leaf = student.clone().requires_grad_()
    logits = leaf.clone()
    loss = kd_loss(logits, teacher, labels, inplace=True, **options)
    upstream = random_like(loss) if upstream is None else upstream
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), grad, logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_is_the_same_gradient(backend, dtype, name, reduction):
    student, teacher, labels = problem(2, 4, 19, dtype=dtype)
    student[0, 2] = NAN
    labels[0, 2] = IGNORE
    options = dict(
        divergence=name,
        temperature=2.0,
        vocab_size=17,
        token_weights=torch.tensor([[1, 2, 3, 0.0], [1, 1, 0.5, 2]]),
        reduction=reduction,
        backend=backend,
    )
    labels[labels != IGNORE] %= 17
    loss, grad, _ = run_inplace(student, teacher, labels, **options)
    assert_same_bits(*zip((loss, grad), run(student, teacher, labels, **options), strict=True))


def test_inplace_writes_the_gradient_over_the_logits(compiled, dtype):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    kd_loss(logits, teacher, labels, inplace=True, backend=compiled).backward()
    assert seen == [logits.data_ptr()]


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[1:], lambda x: x.view(2, 2, 19)])
def test_inplace_on_a_leaf_is_pytorchs_error(backend, dtype, view):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    leaf = student.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        view(leaf).mul_(2)
    labels = view(labels[:, None]).squeeze(-1) if view(leaf).dim() == 2 else labels.view(2, 2)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        kd_loss(view(leaf), view(teacher), labels, inplace=True, backend=backend)
    assert_same_bits((leaf, student))


@pytest.mark.parametrize("grad", [True, False])
def test_inplace_without_a_gradient_does_nothing(backend, dtype, grad):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    logits = student.clone().requires_grad_(grad)
    with torch.set_grad_enabled(not grad):
        loss = kd_loss(logits, teacher, labels, inplace=True, backend=backend)
    assert_same_bits((logits, student), (loss, kd_loss(student, teacher, labels, backend=backend)))
    assert logits._version == 0


def test_inplace_what_was_saved_before_raises_at_its_own_backward(backend):
    student, teacher, labels = problem(4, 19)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    earlier = logits.square().sum()  # saves the logits
    loss = kd_loss(logits, teacher, labels, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        earlier.backward(retain_graph=True)
    (grad,) = torch.autograd.grad(loss, leaf, random_like(loss))  # the loss itself is sound
    assert_same_bits((grad, run(student, teacher, labels, backend=backend)[1]))


def test_inplace_what_saved_nothing_is_unharmed(backend):
    student, teacher, labels = problem(4, 19)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    earlier = 3 * logits.sum()
    loss = kd_loss(logits, teacher, labels, inplace=True, backend=backend)
    (grad,) = torch.autograd.grad(earlier + loss, leaf)
    one = torch.ones(())
    assert_same_bits((grad, run(student, teacher, labels, upstream=one, backend=backend)[1] + 3))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.sum(),
        lambda x: x.square().sum(),
        lambda x: x.softmax(-1)[0, 0],
        lambda x: x[1:].sum(),
        lambda x: kd_loss(x, torch.zeros_like(x)),
    ],
    ids=["linear", "square", "softmax", "view", "another loss"],
)
def test_inplace_later_use_raises(backend, use):
    student, teacher, labels = problem(4, 19)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    loss = kd_loss(logits, teacher, labels, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="overwritten|inplace"):
        (loss + use(logits)).backward()


def test_inplace_bumps_the_version(backend):
    student, teacher, labels = problem(4, 19)
    logits = student.requires_grad_() * 1
    kd_loss(logits, teacher, labels, inplace=True, backend=backend)
    assert logits._version > 0


def test_inplace_on_a_slice_of_the_models_output(backend):
    """The usual `logits[:, :-1]`: a view that is written where it lies, and nothing around it."""
    student, teacher, labels = problem(2, 5, 19)
    cut = slice(None), slice(None, -1)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    loss = kd_loss(logits[cut], teacher[cut], labels[cut], inplace=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, random_like(loss))
    expected = run(student[cut], teacher[cut], labels[cut], backend=backend)[1]
    assert_same_bits((grad[cut], expected))
    assert not grad[:, -1].any()
    assert_same_bits((logits[:, -1], student[:, -1]))


def test_inplace_backward_twice(backend, dtype):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf * 1, teacher, labels, inplace=True, backend=backend)
    upstream = random_like(loss)
    first, second = (
        torch.autograd.grad(loss, leaf, upstream, retain_graph=retain)[0]
        for retain in (True, False)
    )
    expected = run(student, teacher, labels, upstream=upstream, backend=backend)[1]
    assert_same_bits((first, expected), (second, expected))


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_inplace_refuses_what_it_would_have_to_copy(backend, layout):
    student, teacher, labels = problem(4, 4)
    leaf = student.clone().requires_grad_()
    logits = leaf[:1].clone().expand(4, 4) if layout == "expanded" else (leaf * 1).t()
    with pytest.raises((ValueError, RuntimeError), match="inplace|memory"):
        kd_loss(logits, teacher, labels, inplace=True, backend=backend)


@pytest.mark.parametrize(
    "kind", ["shifted", "interleaved", "denser rows", "shorter elements", "rows of each other"]
)
def test_inplace_refuses_memory_that_is_still_read(backend, kind):
    student, teacher, labels = problem(4, 6)
    buffer = (student.repeat(2, 2).requires_grad_() * 1)[:, :6]
    if kind == "shifted":
        logits, others = buffer[1:5], buffer[:4].detach()
    elif kind == "interleaved":
        logits, others = buffer[:4], buffer.detach().as_strided((4, 6), (12, 1), 3)
    elif kind == "denser rows":  # of the same address and dtype
        logits, others = buffer[:4], buffer.detach().as_strided((4, 6), (6, 1))
    elif kind == "shorter elements":  # of the same address and strides
        halves = buffer.detach().view(torch.float16)
        logits, others = buffer[:4], halves.as_strided((4, 6), (12, 1))
    else:
        logits, others = buffer.as_strided((4, 6), (3, 1)), teacher
    with pytest.raises(ValueError, match="inplace=True .*memory"):
        kd_loss(logits, others, labels, inplace=True, backend=backend)


@pytest.mark.parametrize("other", [0, 1])
def test_inplace_with_the_teacher_in_the_same_memory(backend, other):
    """Rows in turns, or the student's very own logits: nothing is overwritten before it is read."""
    student, teacher, labels = problem(4, 6)
    leaf = torch.stack([student, teacher], 1).requires_grad_()
    both = leaf * 1
    loss = kd_loss(both[:, 0], both.detach()[:, other], labels, inplace=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, random_like(loss))
    expected = run(student, (student, teacher)[other], labels, backend=backend)
    assert_same_bits((loss.detach(), expected[0]), (grad[:, 0], expected[1]))
    assert_plus_zero(grad[:, 1])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_inplace_with_a_term_that_is_not_in_the_loss(backend, dtype, alpha):
    """Both terms are of the logits, not of what the gradient leaves of them."""
    student, teacher, labels = problem(4, 19, dtype=dtype)
    options = dict(alpha=alpha, reduction="none", backend=backend)
    results = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        terms = kd_loss(
            leaf.clone(), teacher, labels, inplace=inplace, return_terms=True, **options
        )
        (grad,) = torch.autograd.grad(terms.loss, leaf, random_like(terms.loss))
        results.append((terms.loss.detach(), terms.distill, terms.hard, grad))
    assert_same_bits(*zip(*results, strict=True))


def test_inplace_check_is_made_on_the_cpu(backend):
    """Whatever the default device is: it says nothing of where addresses are compared."""
    student, teacher, labels = problem(4, 6)
    leaf = torch.stack([student, teacher], 1).requires_grad_()
    both = leaf * 1
    with torch.device("meta"):
        loss = kd_loss(both[:, 0], both.detach()[:, 1], labels, inplace=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, random_like(loss))
    expected = run(student, teacher, labels, backend=backend)
    assert_same_bits((loss.detach(), expected[0]), (grad[:, 0], expected[1]))
    assert_plus_zero(grad[:, 1])


def test_inplace_error_leaves_the_logits_alone(backend):
    student, teacher, labels = problem(4, 6)
    logits = student.clone().requires_grad_() * 1
    labels[2] = 6
    with pytest.raises(IndexError):
        kd_loss(logits, teacher, labels, inplace=True, backend=backend)
    assert logits._version == 0
    logits.sum().backward()


def test_grad_mode_is_respected(backend):
    student, teacher, labels = problem(4, 19)
    for requires, enabled in itertools.product((True, False), repeat=2):
        leaf = student.clone().requires_grad_(requires)
        with torch.set_grad_enabled(enabled):
            loss = kd_loss(leaf, teacher, labels, backend=backend)
        assert loss.requires_grad == (requires and enabled)
