"""`kd_loss(group=...)`: what one device computes, from shards of the vocabulary."""

import pytest
import torch
from conftest import (
    DIVERGENCES,
    INF,
    NAMES,
    NAN,
    assert_plus_zero,
    assert_right,
    assert_same_bits,
    problem,
    random_like,
    run,
)
from oracle import assert_gradient_close, assert_loss_close, reference
from rank_threads import Shared, columns_of, over_ranks, run_sharded
from test_linear_head import assert_gradients_close, heads, logits_of
from test_sparse import expected, top

from kdkernels import Ensemble, LinearHead, Sampled, TopK, kd_loss

UNEVEN, FOUR = [30, 7], [5, 1, 20, 11]


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_logits_of_every_dtype(backend, dtype, divergence):
    student, teacher, labels = problem(6, sum(UNEVEN), dtype=dtype)
    inputs, options = (student, teacher, labels), dict(divergence=divergence, alpha=0.6)
    loss, grad = run_sharded(*inputs, UNEVEN, backend=backend, **options)
    assert_right(backend, loss, grad, *inputs, **options)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_shards_give_what_one_device_does(backend, divergence, beta):
    student, teacher, labels = problem(6, sum(UNEVEN))
    labels[2] = -100
    options = dict(divergence=divergence, beta=beta, temperature=2.0, alpha=0.6)
    inputs = student, teacher, labels
    loss, grad = run_sharded(*inputs, UNEVEN, backend=backend, **options)
    assert_right(backend, loss, grad, *inputs, **options)


OPTIONS = [
    dict(),
    dict(alpha=0.0),
    dict(alpha=1.0, temperature=0.5),
    dict(temperature=3.0, reduction="none"),
    dict(temperature=1.7, reduction="sum", t_squared=False),
    dict(label_smoothing=0.2, reduction="none"),
    dict(label_smoothing=1.0, divergence="jsd"),
    dict(num_items=17, divergence="reverse_kl"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_four_shards_under_every_option(exact, options):
    student, teacher, labels = problem(2, 4, sum(FOUR))
    labels[0, 1] = labels[1, 3] = -100
    inputs = student, teacher, labels
    loss, grad = run_sharded(*inputs, FOUR, backend=exact, **options)
    assert_right(exact, loss, grad, *inputs, **options)


@pytest.mark.parametrize("divergence", NAMES)
def test_without_labels(exact, divergence):
    student, teacher, _ = problem(5, sum(FOUR))
    loss, grad = run_sharded(student, teacher, None, FOUR, backend=exact, divergence=divergence)
    assert_right(exact, loss, grad, student, teacher, divergence=divergence)


def test_weights_and_a_row_of_none(exact):
    student, teacher, labels = problem(6, sum(UNEVEN))
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 3.0])
    student[1] = NAN
    inputs, options = (student, teacher, labels), dict(token_weights=weights, alpha=0.3)
    loss, grad = run_sharded(*inputs, UNEVEN, backend=exact, **options)
    assert_plus_zero(grad[1])
    student[1] = 0.0
    assert_right(exact, loss, grad, *inputs, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_padding_lies_on_the_last_shards_and_is_never_read(exact, divergence):
    splits, classes = [8, 8, 8], 13  # of the last shard nothing is real
    student, teacher, labels = problem(5, sum(splits))
    labels %= classes
    student[:, classes:] = teacher[:, classes:] = NAN
    options = dict(vocab_size=classes, divergence=divergence, label_smoothing=0.1)
    loss, grad = run_sharded(student, teacher, labels, splits, backend=exact, **options)
    assert_right(exact, loss, grad, student, teacher, labels, **options)
    assert_plus_zero(grad[:, classes:])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("sparse", [False, True])
def test_shards_without_a_column(exact, divergence, sparse):
    splits = [0, 40, 0, 21]
    student, teacher, labels = problem(5, sum(splits))
    options = dict(divergence=divergence, reduction="none")
    if sparse:
        check_sparse(exact, student, TopK(*top(teacher, 8)), labels, splits, **options)
    else:
        loss, grad = run_sharded(student, teacher, labels, splits, backend=exact, **options)
        assert_right(exact, loss, grad, student, teacher, labels, **options)


def test_student_and_teacher_are_padded_differently(exact):
    student, teacher, labels = problem(4, 20)
    options = dict(vocab_size=15)

    def on_rank(group):
        own = [slice(0, 8), slice(8, 20)][group.rank]
        own_teacher = [slice(0, 8), slice(8, 16)][group.rank]
        x = student[:, own].clone().requires_grad_()
        inputs = x, teacher[:, own_teacher], labels
        loss = kd_loss(*inputs, group=group, backend=exact, **options)
        return loss.detach(), torch.autograd.grad(loss, x, random_like(loss))[0]

    (loss, first), (_, second) = over_ranks(2, on_rank)
    grad = torch.cat([first, second], 1)
    assert_right(exact, loss, grad, student, teacher, labels, **options)


def test_shifted_labels_and_terms(exact):
    student, teacher, labels = problem(2, 5, sum(UNEVEN))
    labels[1, 2] = -100
    options = dict(shift=True, temperature=2.0, alpha=0.7, return_terms=True)
    alone = kd_loss(student, teacher, labels, backend=exact, **options)

    def on_rank(group):
        own = slice(0, UNEVEN[0]) if group.rank == 0 else slice(UNEVEN[0], None)
        inputs = student[..., own], teacher[..., own], labels
        return kd_loss(*inputs, group=group, backend=exact, **options)

    first, second = over_ranks(2, on_rank)
    for name in ("loss", "distill", "hard", "num_items"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, getattr(alone, name), rtol=2e-6, atol=0.0)


def test_terms_of_weight_0_are_reported_and_nothing_of_them_is_lost_to_nan(exact):
    student, teacher, labels = problem(3, sum(UNEVEN))
    teacher[:] = NAN

    def on_rank(group):
        own = slice(0, UNEVEN[0]) if group.rank == 0 else slice(UNEVEN[0], None)
        x = student[:, own].clone().requires_grad_()
        options = dict(alpha=0.0, group=group, backend=exact, return_terms=True)
        terms = kd_loss(x, teacher[:, own], labels, **options)
        terms.loss.backward()
        return terms, x.grad

    (terms, _), (_, grad) = over_ranks(2, on_rank)
    assert terms.loss.isfinite() and terms.distill.isnan() and grad.isfinite().all()


def test_in_place_the_gradient_lies_in_the_shard(exact):
    student, teacher, labels = problem(4, sum(UNEVEN))
    _, expected_grad = run_sharded(student, teacher, labels, UNEVEN, backend=exact)

    def on_rank(group):
        own = slice(0, UNEVEN[0]) if group.rank == 0 else slice(UNEVEN[0], None)
        leaf = student[:, own].clone().requires_grad_()
        logits = leaf * 1
        inputs = logits, teacher[:, own].clone(), labels
        loss = kd_loss(*inputs, group=group, backend=exact, inplace=True)
        loss.backward(random_like(loss))
        return leaf.grad

    assert_same_bits((torch.cat(over_ranks(2, on_rank), 1), expected_grad))


# ---- Hazards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_a_shard_without_a_finite_logit(exact, divergence, who):
    student, teacher, labels = problem(4, sum(UNEVEN))
    labels %= UNEVEN[0]
    options = dict(divergence=divergence, temperature=2.0, reduction="none")
    if who != "teacher":
        student[:, UNEVEN[0] :] = -INF
    if who != "student":
        teacher[:, UNEVEN[0] :] = -INF
    inputs = student, teacher, labels
    loss, grad = run_sharded(*inputs, UNEVEN, backend=exact, **options)
    assert_right(exact, loss, grad, *inputs, check_blind=False, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_bad_logit_spoils_its_row_on_every_shard_and_no_other(exact, divergence, bad, alpha):
    student, teacher, labels = problem(4, sum(UNEVEN))
    options = dict(divergence=divergence, alpha=alpha, reduction="none", backend=exact)
    clean, clean_grad = run_sharded(student, teacher, labels, UNEVEN, **options)
    for side in (student, teacher):
        side[2, 33] = bad
        loss, grad = run_sharded(student, teacher, labels, UNEVEN, **options)
        side[2, 33] = 0.0
        assert loss[2].isnan() and grad[2].isnan().all()
        kept = torch.tensor([0, 1, 3])
        assert_same_bits((loss[kept], clean[kept]), (grad[kept], clean_grad[kept]))


def test_rows_of_nothing_are_nan_and_ignored_ones_are_not_read(exact):
    student, teacher, labels = problem(3, sum(UNEVEN))
    student[0], student[1], labels[1] = -INF, NAN, -100
    options = dict(reduction="none", backend=exact)
    loss, grad = run_sharded(student, teacher, labels, UNEVEN, **options)
    assert loss[0].isnan() and grad[0].isnan().all()
    assert loss[1] == 0 and loss[2].isfinite()
    assert_plus_zero(grad[1])


def test_all_rows_ignored(exact):
    student, teacher, labels = problem(3, sum(UNEVEN))
    loss, grad = run_sharded(student, teacher, labels * 0 - 100, UNEVEN, backend=exact)
    assert loss == 0
    assert_plus_zero(grad)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_common_shift_changes_no_bit(exact, divergence):
    student, teacher, labels = problem(4, sum(FOUR))
    student, teacher = (student * 4).round() / 4, (teacher * 4).round() / 4
    options = dict(divergence=divergence, temperature=2.0, reduction="none", backend=exact)
    first = run_sharded(student, teacher, labels, FOUR, **options)
    second = run_sharded(student + 2.0**17, teacher - 2.0**16, labels, FOUR, **options)
    assert_same_bits(*zip(first, second, strict=True))


@pytest.mark.parametrize("divergence", NAMES)
def test_equal_rows_have_no_divergence_and_no_gradient(compiled, divergence):
    student, _, _ = problem(4, sum(FOUR))
    options = dict(divergence=divergence, reduction="none", backend=compiled)
    loss, grad = run_sharded(student, student.clone(), None, FOUR, **options)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("columns", [1200])
def test_near_rows_are_as_exact_as_on_one_device(exact, size, columns):
    splits = [columns // 3, columns // 4, columns - columns // 3 - columns // 4]
    student, _, _ = problem(4, columns)
    teacher = student + size * torch.randn(4, columns)
    options = dict(temperature=2.0, reduction="none")
    loss, grad = run_sharded(student, teacher, None, splits, backend=exact, **options)
    assert_right(exact, loss, grad, student, teacher, check_blind=False, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_float16_shard_far_below_the_maximum(compiled, divergence):
    student, teacher, labels = problem(2, 8, dtype=torch.float16, spread=1.0)
    for side in (student, teacher):
        side[:, :4] -= 83
    options = dict(temperature=2.0**-10, t_squared=False, divergence=divergence, backend=compiled)
    _, grad = run_sharded(student, teacher, labels * 0 + 5, [4, 4], **options)
    assert grad.isfinite().all() and (grad[:, 4:] != 0).any()


def test_a_confident_row_keeps_its_tail(exact):
    student, teacher, labels = problem(4, sum(FOUR))
    student.scatter_(1, labels[:, None], 35.0)
    options = dict(alpha=0.0, reduction="none")
    loss, grad = run_sharded(student, teacher, labels, FOUR, backend=exact, **options)
    ref = reference(student, teacher, labels, upstream=random_like(loss), **options)
    assert_loss_close(loss, ref, 2e-6)
    label = labels[:, None]
    torch.testing.assert_close(
        grad.gather(1, label).double(), ref.grad.gather(1, label), rtol=2e-6, atol=0.0
    )


def test_which_shard_columns_lie_on_changes_the_loss_by_rounding_only(exact):
    student, teacher, labels = problem(5, 60)
    wanted, _ = run(student, teacher, labels, backend=exact, reduction="none")
    for splits in ([30, 30], [59, 1], [20, 20, 20], [3] * 20):
        loss, _ = run_sharded(student, teacher, labels, splits, backend=exact, reduction="none")
        torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=0.0)


def test_a_second_derivative_is_refused(backend):
    student, teacher, labels = problem(3, sum(UNEVEN))

    def on_rank(group):
        own = slice(0, UNEVEN[0]) if group.rank == 0 else slice(UNEVEN[0], None)
        x = student[:, own].clone().requires_grad_()
        loss = kd_loss(x, teacher[:, own], labels, group=group, backend=backend)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="over a group"):
            grad.sum().backward()

    over_ranks(2, on_rank)


# ---- What is told --------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "count"), [("forward_kl", 1), ("jsd", 2), ("tvd", 2)])
def test_a_call_takes_one_message_or_two_and_they_are_small(exact, divergence, count):
    rows, columns = 64, 600
    student, teacher, labels = problem(rows, columns)
    shared = Shared(2)
    options = dict(divergence=divergence, backend=exact, shared=shared)
    run_sharded(student, teacher, labels, [300, 300], **options)
    assert [what for what, _ in shared.messages] == ["all_gather"] * count
    sizes = [size for _, size in shared.messages]
    assert sizes[0] <= rows * 9 * 8 + 2000 and sizes[1:] in ([], [rows * 3 * 8])


# ---- Sparse teachers -----------------------------------------------------------------------------


def check_sparse(backend, student, source, labels, splits, **options):
    loss, grad = run_sharded(student, source, labels, splits, backend=backend, **options)
    if labels is None:
        options["alpha"] = 1.0
    ref = expected(student, source, labels, upstream=random_like(loss), **options)
    assert_loss_close(loss, ref, 2e-5)
    assert_gradient_close(grad, ref)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_top_k_and_its_bucket(exact, divergence, beta):
    student, teacher, labels = problem(5, 150)
    source = TopK(*top(teacher, 12))
    options = dict(divergence=divergence, beta=beta, reduction="none")
    check_sparse(exact, student, source, labels, [40, 61, 49], **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_forward_kl"])
def test_top_k_renormalised(exact, divergence):
    student, teacher, labels = problem(5, 150)
    source = TopK(*top(teacher, 12), tail="renormalize")
    options = dict(divergence=divergence, temperature=2.0, alpha=0.7)
    check_sparse(exact, student, source, labels, [40, 61, 49], **options)


def test_sampled_ids_of_the_whole_vocabulary(exact, dtype):
    student, _, labels = problem(5, 150, dtype=dtype)
    ids, counts = torch.randint(150, (5, 20)), torch.randint(0, 4, (5, 20))
    counts[:, 0] += 1
    ids[2, 5:] = -1
    options = dict(label_smoothing=0.1, reduction="none")
    check_sparse(exact, student, Sampled(ids, counts), labels, [149, 1], **options)


def test_all_that_is_kept_lies_on_one_shard(exact):
    student, teacher, labels = problem(4, 100)
    teacher[:, 50:] -= 100
    source = TopK(*top(teacher, 8))
    check_sparse(exact, student, source, labels, [50, 30, 20], reduction="none")
    check_sparse(exact, student, source, None, [50, 50], divergence="reverse_kl")


def test_a_sparse_teacher_takes_one_message_too(exact):
    student, teacher, labels = problem(4, 100)
    shared = Shared(2)
    source = TopK(*top(teacher, 8))
    run_sharded(student, source, labels, [50, 50], backend=exact, shared=shared)
    assert len(shared.messages) == 1


# ---- Heads and ensembles -------------------------------------------------------------------------


def run_heads(student, teacher, labels, splits, bias=None, shared=None, **options):
    """loss, gradients of hidden states (equal on all ranks) and of weight and bias (put together).

    student: (hidden (…, H), weight (V, H)); teacher: a source, its head's weight whole.
    """

    def on_rank(group):
        begin = sum(splits[: group.rank])
        own = slice(begin, begin + splits[group.rank])
        leaves = [student[0].clone(), student[1][own].clone()]
        leaves += [] if bias is None else [bias[own].clone()]
        for x in leaves:
            x.requires_grad_()
        ours = teacher
        if isinstance(teacher, LinearHead):
            ours = LinearHead(teacher.hidden, teacher.weight[own], chunk_rows=teacher.chunk_rows)
        else:
            ours = columns_of(teacher, own.start, own.stop)
        head = LinearHead(*leaves, chunk_rows=options.get("chunk_rows"))
        rest = {name: x for name, x in options.items() if name != "chunk_rows"}
        loss = kd_loss(head, ours, labels, group=group, **rest)
        return loss.detach(), torch.autograd.grad(loss, leaves, random_like(loss))

    losses, grads = zip(*over_ranks(len(splits), on_rank, shared), strict=True)
    for loss, (hidden, *_) in zip(losses, grads, strict=True):
        assert_same_bits((loss, losses[0]), (hidden, grads[0][0]))
    hidden, *rest = zip(*grads, strict=True)
    return losses[0], [hidden[0], *(torch.cat(x) for x in rest)]


HEAD_OPTIONS = [
    dict(),
    dict(divergence="jsd", chunk_rows=3),
    dict(reduction="none", chunk_rows=4, temperature=2.0),
    dict(reduction="sum", alpha=0.0),
]


@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
def test_heads_of_which_a_rank_has_some_rows(compiled, dtype, options):
    student, teacher, labels = heads(2, 5, dtype=dtype)
    inputs = student, LinearHead(*teacher), labels, [60, 7, 23]
    loss, grads = run_heads(*inputs, backend=compiled, **options)
    rest = {name: x for name, x in options.items() if name != "chunk_rows"}
    logits = (logits_of(*x).float() for x in (student, teacher))
    ref = reference(*logits, labels, upstream=random_like(loss), **rest)
    assert_loss_close(loss, ref, 2e-5)
    assert_gradients_close(grads, student, ref)


def test_heads_of_which_a_rank_has_no_row(compiled, dtype):
    student, teacher, labels = heads(2, 5, dtype=dtype)
    loss, grads = run_heads(student, LinearHead(*teacher), labels, [60, 0, 30], backend=compiled)
    logits = (logits_of(*x).float() for x in (student, teacher))
    ref = reference(*logits, labels, upstream=random_like(loss))
    assert_loss_close(loss, ref, 2e-5)
    assert_gradients_close(grads, student, ref)


def test_a_head_with_bias_against_logits_and_top_k(exact):
    student, teacher, labels = heads(10)
    bias = torch.arange(90) % 5 * 0.25
    logits = logits_of(*student, bias).float()
    t = logits_of(*teacher).float()
    for source in (t, TopK(*top(t, 9))):
        inputs = student, source, labels, [50, 40], bias
        loss, grads = run_heads(*inputs, backend=exact, chunk_rows=4)
        if isinstance(source, TopK):
            ref = expected(logits, source, labels, upstream=random_like(loss))
        else:
            ref = reference(logits, t, labels, upstream=random_like(loss))
        assert_loss_close(loss, ref, 2e-5)
        assert_gradients_close(grads, student, ref, bias=True)


def test_chunks_overlap_their_messages_with_the_next_projection(exact):
    student, teacher, labels = heads(12)
    shared = Shared(2)
    options = dict(backend=exact, chunk_rows=4, shared=shared)
    run_heads(student, LinearHead(*teacher), labels, [45, 45], **options)
    # The ranks agree on chunks once; then one message a chunk, the next one before the gradient.
    assert [what for what, _ in shared.messages] == [
        "all_gather",
        *("all_gather", "all_gather", "all_reduce"),
        *("all_gather", "all_reduce", "all_reduce"),
    ]


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_an_ensemble_is_normalised_over_all_shards(exact, mean):
    student, first, labels = problem(5, 70)
    second = torch.randn(5, 70) * 2
    members = [first, second]
    if mean == "arithmetic":
        members.append(TopK(*top(torch.randn(5, 70) * 3, 6), tail="renormalize"))
    teacher = Ensemble(members, weights=[0.5, 0.2, 0.3][: len(members)], mean=mean)
    options = dict(temperature=2.0, reduction="none")
    alone, alone_grad = run(student.double(), _double(teacher), labels, **options)
    loss, grad = run_sharded(student, teacher, labels, [30, 40], backend=exact, **options)
    torch.testing.assert_close(loss.double(), alone, rtol=2e-5, atol=0.0)
    largest = alone_grad.abs().amax(-1, keepdim=True)
    assert ((grad.double() - alone_grad).abs() <= 1e-5 * largest).all()


def _double(teacher):
    members = [x.double() if isinstance(x, torch.Tensor) else x for x in teacher.teachers]
    return Ensemble(members, teacher.weights, teacher.mean)
