"""Bugs that other libraries had in their numbers and objectives, by their number in our list."""

import math

import cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, assert_right, assert_same_bits, problem, run
from oracle import assert_gradient_close, reference

from kdkernels import KDLoss, kd_loss

IGNORE = -100
ONE = torch.ones(())


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.99, 0.999, 0.99999])
def test_regression_62_confident_labels_in_half(compiled, dtype, probability):
    """Liger#1329: q − 1 formed from a q already rounded to bfloat16."""
    student = torch.zeros(1, 50)
    student[0, 3] = math.log(49 * probability / (1 - probability))
    student = student.to(dtype)
    labels, options = torch.tensor([3]), dict(alpha=0.0, upstream=ONE)
    _, grad = run(student, student, labels, backend=compiled, **options)
    assert_gradient_close(grad, reference(student, student, labels, **options))


def test_regression_63_105_logits_are_not_rounded_before_the_loss(backend):
    """Liger#1432, #501, #1283: float32 logits rounded to the teacher's or to autocast's dtype."""
    student, teacher, labels = problem(4, 19, teacher_dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grad = run(student, teacher, labels, backend=backend)
    assert loss.dtype == grad.dtype == torch.float32
    assert_right(backend, loss, grad, student, teacher, labels)


def test_regression_64_weights_are_applied_before_the_rounding(compiled, dtype):
    """TransformerEngine#3193: bfloat16 gradients rounded first and scaled by the token after."""
    student, teacher, labels = problem(8, 130, dtype=dtype)
    options = dict(token_weights=torch.rand(8) + 0.3, num_items=11, upstream=ONE)
    loss, grad = run(student, teacher, labels, backend=compiled, **options)
    assert_right(compiled, loss, grad, student, teacher, labels, **options)


@pytest.mark.parametrize("name", NAMES)
def test_regression_65_66_never_negative(compiled, dtype, name):
    """EasyDeL#267, pytorch#80488: negative divergences, and a floor for identical logits."""
    student, teacher, _ = problem(2, 248_320 // 8, dtype=dtype)
    options = dict(divergence=name, reduction="none", backend=compiled)
    assert not kd_loss(student, student.clone(), **options).any()
    near = (student.float() * (1 + 1e-3)).to(dtype)
    assert (kd_loss(student, near, **options) >= 0).all()


def test_regression_67_68_large_common_offset(backend):
    """pytorch#38839, #195829: lse subtracted in the wrong order loses the offset's digits."""
    student, teacher = torch.randint(-16, 16, (2, 4, 19)).float()
    labels = torch.randint(19, (4,))
    plain = run(student, teacher, labels, backend=backend)
    ours = run(student + 2.0**23, teacher - 2.0**23, labels, backend=backend)
    assert_same_bits(*zip(ours, plain, strict=True))


def test_regression_70_sum_over_many_rows(backend):
    """Liger#300: a float32 sum of as many losses loses what a float64 one keeps."""
    # Emulated, 200,000 rows take minutes; the sum over them is taken all the same.
    student, teacher, labels = problem(
        20_000 if backend in (cuda_on_cpu.NAME, "triton") else 200_000, 2
    )
    rows = kd_loss(student, teacher, labels, reduction="none", backend=backend)
    total = kd_loss(student, teacher, labels, reduction="sum", backend=backend)
    assert abs(total.item() / rows.double().sum().item() - 1) <= 1e-6


# --- the objective -------------------------------------------------------------------------------


def test_regression_73_no_term_that_was_not_asked_for(backend):
    """TRL#5731: a JSD at T = 1 that silently was half cross-entropy at T = 0.9."""
    student, teacher, labels = problem(4, 19)
    criterion = KDLoss(divergence="jsd", alpha=1.0, backend=backend)
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    m = (p + q) / 2
    expected = 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean()
    for inputs in ((student, teacher), (student, teacher, labels)):
        torch.testing.assert_close(criterion(*inputs).double(), expected, rtol=1e-5, atol=0)


def test_regression_74_orientation_of_beta(backend):
    """TRL#3043: beta weighs the teacher; near its ends the JSD tends to the KLs it is named by."""
    student, teacher, _ = problem(4, 19, spread=1.0)

    def loss(divergence, beta=None):
        return kd_loss(student, teacher, divergence=divergence, beta=beta, backend=backend).item()

    assert loss("jsd", 0) == loss("forward_kl") and loss("jsd", 1) == loss("reverse_kl")
    assert loss("forward_kl") != loss("reverse_kl")
    assert loss("jsd", 1e-3) / 1e-3 == pytest.approx(loss("forward_kl"), rel=0.01)
    assert loss("jsd", 1 - 1e-3) / 1e-3 == pytest.approx(loss("reverse_kl"), rel=0.01)


def test_regression_75_82_84_divided_once_and_by_tokens(backend):
    """TRL#4105, haitongli#2, easydistill#16: also divided by the sequence or the vocabulary."""
    student, teacher, labels = problem(3, 5, 19)
    mean = kd_loss(student, teacher, labels, backend=backend)
    rows = kd_loss(student, teacher, labels, reduction="none", backend=backend)
    torch.testing.assert_close(mean.double(), rows.double().sum() / 15, rtol=1e-6, atol=0)
    one = kd_loss(student[:1, :1], teacher[:1, :1], labels[:1, :1], backend=backend)
    torch.testing.assert_close(one, rows[0, 0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_regression_78_divergences_obey_ignore_index(backend, name):
    """Liger#974: it was accepted and never used."""
    student, teacher, labels = problem(4, 19)
    labels[[0, 2]] = 5
    options = dict(divergence=name, alpha=1.0, ignore_index=5, upstream=ONE, backend=backend)
    loss, grad = run(student, teacher, labels, **options)
    kept = labels != 5
    expected = run(student[kept], teacher[kept], labels[kept], **options)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert_same_bits((grad[kept], expected[1]))


@pytest.mark.parametrize("name", NAMES)
def test_regression_79_80_value_and_gradient_are_of_one_loss(backend, name):
    """Liger#262, aprender#2153: the value of one divergence with the gradient of another."""
    student, teacher, _ = problem(3, 7, spread=1.0)
    options = dict(divergence=name, temperature=1.5, upstream=ONE, backend=backend)
    _, grad = run(student, teacher, **options)
    direction = torch.randn(3, 7)
    step = 2.0**-7
    ahead, behind = (run(student + h * direction, teacher, **options)[0] for h in (step, -step))
    slope = ((ahead.double() - behind.double()) / (2 * step)).item()
    assert (grad * direction).sum().item() == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_regression_81_86_true_divergence(backend):
    """distillm#7, verl#2656: no entropy term, log-probabilities above 0."""
    student, teacher, labels = problem(4, 19, spread=8.0)
    assert kd_loss(teacher, teacher.clone(), backend=backend).abs() < 1e-6
    student.scatter_(-1, labels[:, None], 100.0)
    losses = kd_loss(student, teacher, labels, alpha=0.0, reduction="none", backend=backend)
    assert (losses >= 0).all()


def test_regression_83_the_teacher_matters(backend):
    """labml#66: a refactoring that stopped distilling at all."""
    student, teacher, labels = problem(4, 19)
    for temperature in (1.0, 2.0, 8.0):
        options = dict(temperature=temperature, upstream=ONE, backend=backend)
        ours = run(student, teacher, labels, **options)
        others = run(student, teacher.roll(1, 0), labels, **options)
        assert ours[0] != others[0] and (ours[1] != others[1]).any(-1).all()


def test_regression_87_88_89_accumulation(backend):
    """transformers#34191, TRL#6478, TE#2476: a mean of means over uneven micro-batches."""
    student, teacher, labels = problem(6, 19)
    labels[:3] = IGNORE
    labels[4] = IGNORE
    whole = run(student, teacher, labels, upstream=ONE, backend=backend)
    parts = [
        run(student[i : i + 2], teacher[i : i + 2], labels[i : i + 2], num_items=2, upstream=ONE,
            backend=backend)
        for i in (0, 2, 4)
    ]  # fmt: skip
    assert_same_bits((torch.cat([grad for _, grad in parts]), whole[1]))


def test_regression_98_invalid_labels_are_no_silent_zero(backend):
    """torchtitan#4297: loss 0 with a gradient that was not."""
    student, teacher, labels = problem(4, 19)
    labels[3] = 19
    with pytest.raises(IndexError, match="19"):
        kd_loss(student, teacher, labels, backend=backend)


def test_regression_101_no_silent_float64(backend):
    """Liger#1350: Python floats promoted the whole computation."""
    student, teacher, labels = problem(4, 19)
    loss, grad = run(student, teacher, labels, temperature=2.0, alpha=0.5, backend=backend)
    assert loss.dtype == grad.dtype == torch.float32
    weighed = run(student, teacher, labels, token_weights=torch.ones(4).double(), backend=backend)
    assert weighed[0].dtype == torch.float32


def test_regression_104_frozen_inputs_and_no_grad(backend):
    """Liger#930, #1156: crashes where no gradient was needed."""
    student, teacher, labels = problem(4, 19)
    expected = kd_loss(student, teacher, labels, backend=backend)
    with torch.no_grad():
        assert_same_bits(
            (kd_loss(student.requires_grad_(), teacher, labels, backend=backend), expected)
        )
    hard = F.cross_entropy(student.detach(), labels)
    value = kd_loss(student.detach(), teacher, labels, alpha=0.0, backend=backend)
    torch.testing.assert_close(value, hard, rtol=1e-5, atol=0)
