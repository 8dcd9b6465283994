"""`Ensemble`: several teachers, one distribution."""

import pytest
import torch
from conftest import INF, NAN, assert_plus_zero, assert_right, assert_same_bits, problem, run
from test_linear_head import heads, logits_of

from kdkernels import Ensemble, LinearHead, Sampled, TopK, kd_loss

IGNORE = -100
WEIGHTS = [0.7, 0.3]


def mean_logits(members, weights, temperature=1.0, mean="arithmetic"):
    """Logits (…, V) float64 whose softmax at T is the mean of log-softmaxes or softmaxes at T."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    log_p = torch.stack([(x.double() / temperature).log_softmax(-1) for x in members], -1)
    if mean == "geometric":
        return temperature * (shares * log_p).sum(-1)
    return temperature * (shares.log() + log_p).logsumexp(-1)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=2.0),
        dict(divergence="jsd", alpha=0.3, reduction="none"),
        dict(divergence="reverse_kl", temperature=0.5, reduction="sum"),
        dict(divergence="tvd", alpha=1.0),
    ],
    ids=lambda x: x.get("divergence", "forward_kl"),
)
def test_is_the_mean(backend, dtype, mean, options):
    student, first, labels = problem(7, 60, dtype=dtype)
    _, second, _ = problem(7, 60, dtype=dtype)
    labels[2] = IGNORE
    teacher = Ensemble([first, second], WEIGHTS, mean)
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    temperature = options.get("temperature", 1.0)
    mixed = mean_logits([first, second], WEIGHTS, temperature, mean)
    assert_right(backend, loss, grad, student, mixed, labels, **options)


def test_one_teacher_is_itself(backend, dtype):
    student, teacher, labels = problem(5, 60, dtype=dtype)
    for mean in ("arithmetic", "geometric"):
        options = dict(temperature=2.0, backend=backend)
        loss, grad = run(student, Ensemble([teacher], mean=mean), labels, **options)
        assert_right(backend, loss, grad, student, teacher, labels, temperature=2.0)


def test_weights_are_relative_and_equal_by_default(backend):
    student, first, labels = problem(4, 30)
    _, second, _ = problem(4, 30)
    options = dict(backend=backend)
    half = run(student, Ensemble([first, second]), labels, **options)
    for weights in ([0.5, 0.5], (3, 3), [2.0**-1000, 2.0**-1000]):
        ours = run(student, Ensemble([first, second], weights), labels, **options)
        assert_same_bits(*zip(ours, half, strict=True))


def test_a_teacher_of_weight_0_is_not_read(backend):
    student, teacher, labels = problem(4, 30)
    for mean in ("arithmetic", "geometric"):
        sound = run(student, Ensemble([teacher], mean=mean), labels, backend=backend)
        both = Ensemble([teacher * NAN, teacher], [0, 2], mean)
        assert_same_bits(*zip(run(student, both, labels, backend=backend), sound, strict=True))


@pytest.mark.parametrize("who", ["logits", "head"])
def test_teachers_of_different_kinds(compiled, dtype, who):
    student, teacher, labels = heads(9, dtype=dtype)
    _, logits, _ = problem(9, teacher[1].shape[0], dtype=dtype)
    logprobs, ids = logits.float().log_softmax(-1).topk(8)
    members = [LinearHead(*teacher, softcap=2.0, chunk_rows=4), logits, TopK(ids, logprobs)]
    members[2] = TopK(ids, logprobs, "renormalize")
    weights = [0.2, 0.5, 0.3]
    kept = torch.full(logits.shape, -INF, dtype=torch.float64).scatter(1, ids, logprobs.double())
    exact = [logits_of(*teacher, softcap=2.0), logits, kept]
    mixed = mean_logits(exact, weights, 2.0).to(torch.float32)
    options = dict(temperature=2.0, reduction="sum", backend=compiled)
    if who == "logits":
        leaves = [logits_of(*student).to(dtype).requires_grad_()]
        prediction = leaves[0]
    else:
        leaves = [x.requires_grad_() for x in student]
        prediction = LinearHead(*leaves, chunk_rows=4)
    loss = kd_loss(prediction, Ensemble(members, weights), labels, **options)
    expected = kd_loss(prediction, mixed, labels, **options)
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0.0)
    upstream = torch.tensor(0.37)
    for ours, wanted in zip(
        torch.autograd.grad(loss, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        # Entries are sums of terms of both signs: held to the largest of them.
        error = (ours.double() - wanted.double()).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * wanted.double().abs().max() + 1e-6 * len(ours)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_chunks_change_nothing(compiled, rows):
    student, teacher, labels = heads(2, 4)
    _, logits, _ = problem(2, 4, teacher[1].shape[0])
    dense = logits_of(*student).float()
    found = []
    for chunk_rows in (rows, 100):
        head = LinearHead(*teacher, chunk_rows=chunk_rows)
        options = dict(temperature=2.0, reduction="none", backend=compiled)
        found.append(run(dense, Ensemble([head, logits]), labels, **options))
    (loss, grad), (whole_loss, whole_grad) = found
    # PyTorch's exponentials and logarithms depend in the last bit on where in a tensor they are.
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0.0)
    error, size = (grad - whole_grad).abs().amax(-1), whole_grad.abs().amax(-1)
    assert (error <= 1e-6 * size).all()


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_absent_classes(backend, mean):
    student, first, labels = problem(4, 30)
    _, second, _ = problem(4, 30)
    first[:, :5] = second[:, :3] = -INF  # both rule out the first three classes
    loss, grad = run(student, Ensemble([first, second], WEIGHTS, mean), labels, backend=backend)
    mixed = mean_logits([first, second], WEIGHTS, mean=mean)
    assert torch.isfinite(mixed[:, 3:5]).all() == (mean == "arithmetic")
    assert_right(backend, loss, grad, student, mixed, labels)


def test_a_bad_row_is_nan_alone_and_an_ignored_one_is_not_read(backend):
    student, first, labels = problem(5, 30)
    _, second, _ = problem(5, 30)
    options = dict(reduction="none", backend=backend)
    labels[3] = IGNORE
    sound = run(student, Ensemble([first, second]), labels, **options)
    second[1, 4] = second[3, 2] = NAN
    loss, grad = run(student, Ensemble([first, second]), labels, **options)
    assert loss[1].isnan() and grad[1].isnan().all()
    assert_plus_zero(grad[3])
    rest = [0, 2, 3, 4]
    assert_same_bits((loss[rest], sound[0][rest]), (grad[rest], sound[1][rest]))


def test_in_place_with_a_mean_of_other_logits(compiled, dtype):
    student, first, labels = problem(6, 60, dtype=dtype)
    _, second, _ = problem(6, 60, dtype=dtype)
    teacher = Ensemble([first, second])
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf * 1, teacher, labels, inplace=True, backend=compiled)
    (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(0.3))
    expected = run(student, teacher, labels, upstream=torch.tensor(0.3), backend=compiled)
    assert_same_bits((loss.detach(), expected[0]), (grad, expected[1]))


LOGITS = torch.zeros(2, 8)
TOP = TopK(torch.tensor([[1], [2]]), torch.full((2, 1), -1.0))
RENORMALIZED = TopK(TOP.ids, TOP.logprobs, "renormalize")
DRAWN = Sampled(TOP.ids, TOP.ids)


@pytest.mark.parametrize(
    "error, words, make",
    [
        (ValueError, ["teacher.teachers", "at least one"], lambda: Ensemble([])),
        (TypeError, ["teacher.teachers", "list", "Tensor"], lambda: Ensemble(LOGITS)),
        (TypeError, ["teacher.teachers[1]", "NoneType"], lambda: Ensemble([LOGITS, None])),
        (ValueError, ["teachers[0]", "Ensemble"], lambda: Ensemble([Ensemble([LOGITS])])),
        (ValueError, ["teachers[1]", "tail='bucket'"], lambda: Ensemble([LOGITS, TOP])),
        (ValueError, ["teachers[0]", "Sampled"], lambda: Ensemble([DRAWN, LOGITS])),
        (
            ValueError,
            ["teachers[0]", "renormalize", "geometric"],
            lambda: Ensemble([RENORMALIZED, LOGITS], mean="geometric"),
        ),
        (ValueError, ["teacher.mean", "'median'"], lambda: Ensemble([LOGITS], mean="median")),
        (ValueError, ["teacher.weights", "1 number", "2"], lambda: Ensemble([LOGITS], [1, 2])),
        (ValueError, ["teacher.weights", "-1"], lambda: Ensemble([LOGITS], [-1])),
        (ValueError, ["teacher.weights", "nan"], lambda: Ensemble([LOGITS], [NAN])),
        (ValueError, ["teacher.weights", "inf"], lambda: Ensemble([LOGITS], [INF])),
        (ValueError, ["teacher.weights", "all be 0"], lambda: Ensemble([LOGITS], [0])),
        (TypeError, ["teacher.weights", "float"], lambda: Ensemble([LOGITS], 0.5)),
        (TypeError, ["teacher.weights", "str"], lambda: Ensemble([LOGITS], ["1"])),
        (ValueError, ["teachers[1]", "9"], lambda: Ensemble([LOGITS, torch.zeros(2, 9)])),
        (ValueError, ["teachers[1]", "(3, 8)"], lambda: Ensemble([LOGITS, torch.zeros(3, 8)])),
        (
            ValueError,
            ["teachers[0]", "detach"],
            lambda: Ensemble([torch.zeros(2, 8, requires_grad=True)]),
        ),
    ],
)
def test_refused(error, words, make):
    with pytest.raises(error) as caught:
        kd_loss(torch.zeros(2, 8), make())
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


@pytest.mark.parametrize("options", [dict(), dict(beta=1)], ids=["by name", "by beta"])
def test_no_reverse_kl_of_sparse_teachers_alone(backend, options):
    divergence = "jsd" if options else "reverse_kl"
    with pytest.raises(ValueError, match=f"'{divergence}'.*renormalize"):
        teacher = Ensemble([RENORMALIZED, RENORMALIZED])
        kd_loss(LOGITS, teacher, divergence=divergence, backend=backend, **options)
    mixed = Ensemble([RENORMALIZED, LOGITS])
    assert kd_loss(LOGITS, mixed, divergence=divergence, backend=backend, **options) > 0
