"""`vocab_size` and `shift`: columns and positions that are there and do not count."""

import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, NAN, assert_plus_zero, assert_same_bits, problem, run

IGNORE = -100


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("widths", [(17, 12), (13, 15), (16, 24)])  # the last: whole vectors
def test_columns_from_vocab_size_on_are_padding(backend, dtype, name, widths):
    student, teacher, labels = problem(5, 12, dtype=dtype)
    options = dict(divergence=name, temperature=2.0, label_smoothing=0.1, backend=backend)
    padded = [
        F.pad(x, (0, width - 12), value=NAN)
        for x, width in zip((student, teacher), widths, strict=True)
    ]
    loss, grad = run(*padded, labels, vocab_size=12, **options)
    expected_loss, expected_grad = run(student, teacher, labels, **options)
    assert_same_bits((loss, expected_loss), (grad[:, :12], expected_grad))
    assert_plus_zero(grad[:, 12:])


@pytest.mark.parametrize(("width", "columns"), [(12, 9), (80, 77)])  # 80: rows of whole vectors
@pytest.mark.parametrize("upstream", [NAN, -1.0])
def test_padding_stays_zero(backend, dtype, width, columns, upstream):
    student, teacher, labels = problem(5, width, dtype=dtype)
    student[1, 2] = NAN
    upstream = torch.tensor(upstream, dtype=torch.promote_types(dtype, torch.float32))
    labels %= columns
    options = dict(vocab_size=columns, upstream=upstream, backend=backend)
    _, grad = run(student, teacher, labels, **options)
    assert grad[1, :columns].isnan().all()
    assert grad[:, :columns].isnan().all() or not upstream.isnan()
    assert_plus_zero(grad[:, columns:])


@pytest.mark.parametrize("leading", [(7,), (3, 7), (3, 1), (1,)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shift_predicts_the_next_label(backend, dtype, leading, reduction):
    student, teacher, labels = problem(*leading, 12, dtype=dtype)
    weights = torch.rand(leading) + 0.5
    labels[..., 0] = 10**6  # predicted by no position, so not even its range matters
    student[..., -1, :] = NAN  # predicts nothing
    if leading[-1] > 3:
        labels[..., 3] = IGNORE
    options = dict(temperature=2.0, reduction=reduction, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = torch.randn(leading if reduction == "none" else (), dtype=wide)
    loss, grad = run(
        student, teacher, labels, shift=True, token_weights=weights, upstream=upstream, **options
    )
    expected_loss, expected_grad = run(
        student[..., :-1, :],
        teacher[..., :-1, :],
        labels[..., 1:],
        token_weights=weights[..., 1:],
        upstream=upstream[..., :-1] if reduction == "none" else upstream,
        **options,
    )
    if reduction == "none":
        assert_same_bits((loss[..., :-1], expected_loss))
        assert_plus_zero(loss[..., -1])
    else:
        torch.testing.assert_close(loss, expected_loss, rtol=2e-7, atol=0)
    assert_same_bits((grad[..., :-1, :], expected_grad))
    assert_plus_zero(grad[..., -1, :])


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32])
def test_shift_with_any_ignore_index(backend, label_dtype):
    student, teacher, labels = problem(3, 7, 12)
    options = dict(shift=True, backend=backend)
    usual = run(student, teacher, labels, **options)
    huge = run(student, teacher, labels.to(label_dtype), ignore_index=2**40, **options)
    assert_same_bits(*zip(huge, usual, strict=True))


@pytest.mark.parametrize("padding", [65, 1000])
def test_padding_of_many_columns(backend, dtype, padding):
    """More of them than a block has threads; Qwen's vocabularies have 293."""
    student, teacher, labels = problem(3, 19, dtype=dtype)
    plain = run(student, teacher, labels, backend=backend)
    wide = torch.cat((student, torch.full((3, padding), NAN, dtype=dtype)), -1)
    loss, grad = run(wide, teacher, labels, vocab_size=19, backend=backend)
    assert_same_bits((loss, plain[0]), (grad[:, :19], plain[1]))
    assert_plus_zero(grad[:, 19:])
