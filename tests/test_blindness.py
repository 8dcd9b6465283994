"""The tests' own blindness: what the comparators of `oracle.py` would let through.

Other libraries' gradient tests pass an all-zero gradient (hazards.md, "Blindness"). Here every
comparator is given, on the shapes and options the suite uses, the exact gradient, which it must
accept, and gradients wrong in each way that was ever shipped, which it must reject.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES
from oracle import (
    HALVES,
    MAX_BLIND,
    assert_gradient_close,
    assert_loss_close,
    blind_share,
    gradient_bound,
    reference,
    visible,
)
from rows import confident, realistic

DTYPES = (torch.float64, torch.float32, *HALVES)
# A tail, the first width of the KL bars, past two tiles.
WIDTHS = (17, 1000, 4097)
ROWS = 6
OPTIONS = dict(temperature=2.0, alpha=0.5, reduction="sum")


def exact(ref):
    return ref.grad.to(ref.dtype)


def rejects(wrong, ref):
    try:
        assert_gradient_close(wrong, ref)
    except AssertionError:
        return True
    return False


def torch_gradient(student, teacher, labels, *, temperature, alpha, reduction):
    """What PyTorch computes in the logits' own dtype."""
    student = student.detach().requires_grad_()
    log_q = F.log_softmax(student / temperature, -1)
    p = F.softmax(teacher / temperature, -1)
    soft = F.kl_div(log_q, p, reduction=reduction) * temperature**2
    hard = F.cross_entropy(student, labels, reduction=reduction)
    (alpha * soft + (1 - alpha) * hard).backward()
    return student.grad


def without(grad, columns):
    wrong = grad.clone()
    wrong[:, columns] = 0
    return wrong


@pytest.mark.parametrize("dtype_of_rows", DTYPES)
@pytest.mark.parametrize("v", WIDTHS)
def test_wrong_gradients_are_rejected(v, dtype_of_rows):
    student, teacher, labels = realistic(ROWS, v, dtype=dtype_of_rows, seed=v)
    ref = reference(student, teacher, labels, **OPTIONS)
    good = exact(ref)
    assert_gradient_close(good, ref)

    def of(student=student, teacher=teacher, labels=labels, **options):
        return exact(reference(student, teacher, labels, **{**OPTIONS, **options}))

    swapped = labels.clone()
    swapped[[0, 1]] = labels[[1, 0]]
    wrong = {
        "all zero": torch.zeros_like(good),
        "one row zero": torch.cat((good[:-1], torch.zeros_like(good[-1:]))),
        "labels' column zero": good.scatter(-1, labels[:, None], 0.0),
        "last class not written": without(good, slice(-1, None)),
        "tail of the last vector not written": without(good, slice(v - v % 16, None)),
        "1 % off": (good.double() * 1.01).to(good.dtype),
        "one row 1 % off": torch.cat((good[:-1], (good[-1:].double() * 1.01).to(good.dtype))),
        "twice (a second backward that scales again)": good * 2,
        "the logits": student,
        "two labels swapped": of(labels=swapped),
        "teacher rows against other rows": of(teacher=teacher.roll(1, 0)),
        "teacher and student swapped": of(student=teacher, teacher=student),
        "T² left out": of(t_squared=False),
        "another temperature": of(temperature=2.01),
        "alpha the wrong way round": of(alpha=0.49),
        "a mean instead of a sum": of(reduction="mean"),
        "reverse for forward": of(divergence="reverse_kl"),
        "no cross-entropy": of(alpha=1.0),
        "smoothed": of(label_smoothing=1e-3),
        "rounded to bfloat16 on the way": (good.float() * 1.7)
        .bfloat16()
        .float()
        .div(1.7)
        .to(good.dtype),
    }
    if dtype_of_rows in (torch.float32, *HALVES):
        wrong["PyTorch's"] = torch_gradient(student, teacher, labels, **OPTIONS)
    if dtype_of_rows == torch.float32:
        wrong.pop("PyTorch's")  # is as exact as N4 on some rows
        low = (x.bfloat16() for x in (student, teacher))
        wrong["PyTorch's in bfloat16"] = torch_gradient(*low, labels, **OPTIONS).float()
    accepted = [name for name, grad in wrong.items() if not rejects(grad, ref)]
    assert not accepted


@pytest.mark.parametrize("dtype_of_rows", DTYPES)
@pytest.mark.parametrize("divergence", NAMES)
def test_blind_share_of_every_divergence(divergence, dtype_of_rows):
    for v in (1000, 32000):  # the first width of the KL bars, a real one
        for temperature in (1.0, 2.0):
            student, teacher, labels = realistic(2, v, dtype=dtype_of_rows, seed=v)
            options = dict(divergence=divergence, temperature=temperature)
            upstream = torch.tensor(2.0**16)
            ref = reference(student, teacher, labels, upstream=upstream, **options)
            share = blind_share(ref.grad, gradient_bound(ref), visible(ref))
            print(f"{divergence} {dtype_of_rows} V={v} T={temperature:g}: {share:.2e} is blind")
            assert share <= MAX_BLIND
            # The share is about entries one at a time; and nearly all of them are looked at.
            assert visible(ref).double().mean() > (0.5 if dtype_of_rows == torch.float16 else 0.99)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_single_entries_are_seen(reduction):
    student, teacher, labels = realistic(ROWS, 1000)
    ref = reference(student, teacher, labels, temperature=2.0, reduction=reduction)
    good = exact(ref)
    picks = torch.randint(good.numel(), (200,), generator=torch.Generator().manual_seed(1))
    for at in picks.tolist():
        for change in (0.0, 0.99, -1.0):
            wrong = good.clone()
            wrong.view(-1)[at] *= change
            assert rejects(wrong, ref), (at, change)


def test_wrong_zeros_are_seen():
    """Where the gradient is exactly 0 the smallest number is wrong."""
    student, teacher, labels = realistic(ROWS, 1000)
    labels[3] = -100
    ref = reference(student, teacher, labels, vocab_size=990)
    good = exact(ref)
    assert_gradient_close(good, ref)
    for row, column in ((3, 5), (0, 995)):
        wrong = good.clone()
        wrong[row, column] = 1e-44
        assert rejects(wrong, ref)
    for value in (torch.nan, torch.inf):
        wrong = good.clone()
        wrong[0, 0] = value
        assert rejects(wrong, ref)
    broken = student.clone()
    broken[2, 7] = torch.nan
    ref = reference(broken, teacher, labels)
    assert_gradient_close(exact(ref), ref)
    assert rejects(torch.nan_to_num(exact(ref)), ref)


def test_confident_labels_are_seen():
    """The true class's gradient as 1 − q or −exp(log q) − 1 in float32, which loses it."""
    student, labels = confident(1000)
    ref = reference(student, student, labels, alpha=0.0, reduction="sum")
    good = exact(ref)
    assert_gradient_close(good, ref)
    subtracted = good.scatter(
        -1, labels[:, None], (student.softmax(-1).gather(-1, labels[:, None]) - 1)
    )
    assert rejects(subtracted, ref)
    slightly = good.double().scatter_add(
        -1, labels[:, None], 2e-6 * ref.grad.gather(-1, labels[:, None])
    )
    assert rejects(slightly.float(), ref)


def test_data_that_hides_the_gradient_is_refused():
    student, _, _ = realistic(ROWS, 1000)
    ref = reference(student, student + 1e-6 * torch.randn(ROWS, 1000))
    with pytest.raises(AssertionError, match="hide"):
        assert_gradient_close(exact(ref), ref)


@pytest.mark.parametrize("dtype_of_rows", HALVES)
def test_double_rounding_is_seen(dtype_of_rows):
    """A half gradient rounded to bfloat16, or to 11 bits, before its own rounding."""
    student, teacher, labels = realistic(ROWS, 4097, dtype=dtype_of_rows)
    ref = reference(student, teacher, labels, temperature=2.0, reduction="sum")
    scaled = (ref.grad * 0.7).to(dtype_of_rows).double() / 0.7
    assert rejects(scaled.to(dtype_of_rows), ref)


@pytest.mark.parametrize("rel", [2e-4, 1e-5, 1e-6])  # the bars of any row, of N2, and of N1
def test_wrong_losses_are_rejected(rel):
    student, teacher, labels = realistic(ROWS, 1000)
    ref = reference(student, teacher, labels, reduction="none")
    assert_loss_close(ref.loss.float(), ref, rel)
    wrong = {
        "zero": torch.zeros_like(ref.loss),
        "twice the bar off": ref.loss * (1 + 2 * rel),
        "one row off": ref.loss + torch.eye(ROWS)[0] * 2 * rel * ref.loss,
        "NaN": torch.full_like(ref.loss, torch.nan),
        "rows in another order": ref.loss.roll(1),
        "bfloat16": ref.loss.bfloat16(),
    }
    for name, loss in wrong.items():
        with pytest.raises(AssertionError, match="relative error"):
            assert_loss_close(loss, ref, rel)
            print(name)
