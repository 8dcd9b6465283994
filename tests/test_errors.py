"""What `kd_loss` refuses: the type of each error, and a message that says what to change."""

import pytest
import torch
from conftest import NAN, problem

from kdkernels import KDLoss, kd_loss

STUDENT, TEACHER = torch.zeros(4, 5), torch.zeros(4, 5)
LABELS = torch.zeros(4, dtype=torch.int64)


def refused(error, *words, student=STUDENT, teacher=TEACHER, labels=LABELS, **options):
    """Every backend raises `error`, and its message has all the words."""
    with pytest.raises(error) as caught:
        kd_loss(student, teacher, labels, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


# (error, words the message has to say, arguments)
DTYPES = [
    (TypeError, ["student", "list"], dict(student=[[1.0, 2.0]])),
    (TypeError, ["teacher", "NoneType"], dict(teacher=None)),
    (TypeError, ["student", "int64", "float32"], dict(student=torch.zeros(4, 5).long())),
    (TypeError, ["teacher", "bool"], dict(teacher=torch.zeros(4, 5).bool())),
    (TypeError, ["student", "complex64"], dict(student=torch.zeros(4, 5).cfloat())),
    (TypeError, ["student", "sparse"], dict(student=torch.zeros(4, 5).to_sparse())),
    (TypeError, ["float64", "float32"], dict(student=STUDENT.double())),
    (
        TypeError,
        ["float64", "bfloat16"],
        dict(student=STUDENT.bfloat16(), teacher=TEACHER.double()),
    ),
    (TypeError, ["labels", "list"], dict(labels=[0, 1, 2, 3])),
    (TypeError, ["labels", "int64", "int32", "float32"], dict(labels=torch.zeros(4))),
    (TypeError, ["labels", "int64", "int32", "uint8"], dict(labels=LABELS.byte())),
    (TypeError, ["token_weights", "list"], dict(token_weights=[1.0] * 4)),
    (TypeError, ["token_weights", "complex64"], dict(token_weights=torch.ones(4).cfloat())),
    (TypeError, ["temperature", "str"], dict(temperature="2")),
    (TypeError, ["temperature", "Tensor"], dict(temperature=torch.ones(4))),
    (TypeError, ["alpha", "NoneType"], dict(alpha=None)),
    (TypeError, ["beta", "str"], dict(divergence="jsd", beta="0.5")),
    (TypeError, ["ignore_index", "float"], dict(ignore_index=-100.0)),
    (TypeError, ["vocab_size", "float"], dict(vocab_size=5.0)),
    (TypeError, ["num_items", "str"], dict(num_items="4")),
    (TypeError, ["num_items", "bool"], dict(num_items=torch.tensor(True))),
]

SHAPES = [
    (ValueError, ["student", "2-D", "(5,)"], dict(student=torch.zeros(5), teacher=torch.zeros(5))),
    (ValueError, ["student", "()"], dict(student=torch.zeros(()), teacher=torch.zeros(()))),
    (ValueError, ["teacher", "(1, 5)", "(4, 5)"], dict(teacher=torch.zeros(1, 5))),
    (ValueError, ["teacher", "(5,)", "(4, 5)"], dict(teacher=torch.zeros(5))),
    (ValueError, ["teacher", "(2, 2, 5)"], dict(teacher=torch.zeros(2, 2, 5))),
    (ValueError, ["teacher", "(1, 4, 5)"], dict(teacher=torch.zeros(1, 4, 5))),
    (ValueError, ["vocab_size", "5", "7"], dict(teacher=torch.zeros(4, 7))),
    (ValueError, ["student", "5", "1"], dict(teacher=torch.zeros(4, 1))),
    (ValueError, ["class", "(4, 0)"], dict(student=torch.zeros(4, 0), teacher=torch.zeros(4, 0))),
    (ValueError, ["labels", "(4,)", "(1,)"], dict(labels=LABELS[:1])),
    (ValueError, ["labels", "(4,)", "()"], dict(labels=LABELS[0])),
    (ValueError, ["labels", "(4,)", "(4, 1)"], dict(labels=LABELS[:, None])),
    (ValueError, ["labels", "(4,)", "(4, 5)"], dict(labels=torch.zeros(4, 5).long())),
    (ValueError, ["token_weights", "(4,)", "(1,)"], dict(token_weights=torch.ones(1))),
    (ValueError, ["token_weights", "(4,)", "(4, 1)"], dict(token_weights=torch.ones(4, 1))),
    (ValueError, ["num_items", "(2,)"], dict(num_items=torch.ones(2))),
    (ValueError, ["num_items", "(0,)"], dict(num_items=torch.ones(0))),
]

VALUES = [
    (ValueError, ["divergence", "'kl'", "forward_kl", "tvd"], dict(divergence="kl")),
    (ValueError, ["reduction", "'batchmean'", "mean", "sum", "none"], dict(reduction="batchmean")),
    (ValueError, ["reduction", "None"], dict(reduction=None)),
    *(
        (ValueError, ["temperature", f"{t}"], dict(temperature=t))
        for t in (0, 0.0, -1.0, NAN, float("inf"), -float("inf"), 2.0**-20.1, 2.0**20.1)
    ),
    *((ValueError, ["alpha", f"{a}"], dict(alpha=a)) for a in (-0.1, 1.1, NAN, 2)),
    *((ValueError, ["label_smoothing", f"{e}"], dict(label_smoothing=e)) for e in (-0.1, 1.1, NAN)),
    *((ValueError, ["beta", f"{b}"], dict(divergence="jsd", beta=b)) for b in (-0.1, 1.1, NAN)),
    *(
        (ValueError, ["beta", name], dict(divergence=name, beta=0.5))
        for name in ("forward_kl", "reverse_kl", "tvd")
    ),
    (ValueError, ["beta", "forward_kl"], dict(beta=0.0)),
    (ValueError, ["label_smoothing", "labels"], dict(label_smoothing=0.1, labels=None)),
    (ValueError, ["shift", "labels"], dict(shift=True, labels=None)),
    (ValueError, ["num_items", "mean", "'sum'"], dict(num_items=4, reduction="sum")),
    (
        ValueError,
        ["num_items", "mean", "'none'"],
        dict(num_items=torch.tensor(4), reduction="none"),
    ),
    (ValueError, ["num_items", "-1"], dict(num_items=-1)),
    (ValueError, ["num_items", "finite"], dict(num_items=10**400)),
    (ValueError, ["ignore_index", "int64"], dict(ignore_index=2**63)),
    (TypeError, ["labels", "sparse"], dict(labels=torch.ones(4, dtype=torch.int64).to_sparse())),
    (TypeError, ["token_weights", "sparse"], dict(token_weights=torch.ones(4).to_sparse())),
    (ValueError, ["num_items", "nan"], dict(num_items=NAN)),
    (ValueError, ["vocab_size", "6", "5"], dict(vocab_size=6)),
    (ValueError, ["vocab_size", "6", "5"], dict(vocab_size=6, teacher=torch.zeros(4, 7))),
    (ValueError, ["vocab_size", "6", "5"], dict(vocab_size=6, student=torch.zeros(4, 7))),
    (ValueError, ["vocab_size", "0"], dict(vocab_size=0)),
    (ValueError, ["vocab_size", "-1"], dict(vocab_size=-1)),
    (ValueError, ["teacher", "detach"], dict(teacher=torch.zeros(4, 5, requires_grad=True))),
    (
        ValueError,
        ["token_weights", "detach"],
        dict(token_weights=torch.ones(4, requires_grad=True)),
    ),
]


@pytest.mark.parametrize("error, words, arguments", DTYPES)
def test_dtypes(backend, error, words, arguments):
    refused(error, *words, backend=backend, **arguments)


@pytest.mark.parametrize("error, words, arguments", SHAPES)
def test_shapes(backend, error, words, arguments):
    refused(error, *words, backend=backend, **arguments)


@pytest.mark.parametrize("error, words, arguments", VALUES)
def test_values(backend, error, words, arguments):
    refused(error, *words, backend=backend, **arguments)


def test_shift_needs_sequences(backend):
    student, teacher, labels = problem(2, 3, 4, 5)
    words = "shift", "(2, 3, 4, 5)"
    refused(
        ValueError,
        *words,
        student=student,
        teacher=teacher,
        labels=labels,
        shift=True,
        backend=backend,
    )


@pytest.mark.parametrize("label", [5, -1, -99, 2**31 + 1, 2**32, -(2**33), 2**62])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("grad", [True, False])
def test_labels_out_of_range(backend, dtype, label, alpha, grad):
    labels = torch.tensor([0, 4, label, -100])
    student = torch.zeros(4, 5, dtype=dtype, requires_grad=grad)
    words = "label", "[0, 5)", "-100", str(label)
    refused(
        IndexError,
        *words,
        student=student,
        teacher=torch.zeros(4, 5, dtype=dtype),
        labels=labels,
        alpha=alpha,
        backend=backend,
    )


@pytest.mark.parametrize("label", [5, -1, -(2**31), 2**31 - 1])
def test_labels_of_int32_out_of_range(backend, label):
    labels = torch.tensor([0, 4, 1, label], dtype=torch.int32)
    refused(IndexError, "label", str(label), labels=labels, backend=backend)


@pytest.mark.parametrize("label", [3, 4])
def test_labels_in_the_padding_are_out_of_range(backend, label):
    labels = torch.tensor([0, 1, 2, label])
    refused(IndexError, "[0, 3)", str(label), labels=labels, vocab_size=3, backend=backend)


def test_an_error_leaves_the_logits_alone(backend):
    student, teacher, labels = problem(4, 5)
    labels[3] = 5
    leaf = student.clone().requires_grad_()
    with pytest.raises(IndexError):
        kd_loss(leaf, teacher, labels, backend=backend)
    assert leaf.grad is None and torch.equal(leaf.detach(), student)


# What the constructor of `KDLoss` can see it refuses at once, and the rest when called.
@pytest.mark.parametrize(
    "error, arguments",
    [
        (ValueError, dict(divergence="kl")),
        (ValueError, dict(temperature=0)),
        (ValueError, dict(alpha=2)),
        (ValueError, dict(beta=0.5)),
        (ValueError, dict(label_smoothing=-1)),
        (ValueError, dict(reduction="max")),
        (TypeError, dict(temperature="1")),
        (TypeError, dict(tau=1.0)),
    ],
)
def test_criterion_refuses_early(error, arguments):
    with pytest.raises(error, match=next(iter(arguments))):
        KDLoss(**arguments)
