"""Bugs that other libraries had in masks, gradients and layouts, by their number in our list.

Those of numbers and objectives are in test_regressions_objective.py. Those of other sources than
dense logits, of several processes and of GPUs are tested with them.
"""

import math

import pytest
import torch
from conftest import (
    INF,
    NAMES,
    NAN,
    assert_plus_zero,
    assert_right,
    assert_same_bits,
    problem,
    run,
)

from kdkernels import kd_loss

IGNORE = -100
ONE = torch.ones(())


# --- masking, NaN and overflow -------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1024, 4096, 32768])
def test_regression_1_2_3_leading_tile_of_minus_inf(backend, dtype, tile):
    """flash-attention#1930: an online softmax of a tile that is all -inf forms -inf − (-inf)."""
    student, teacher, labels = problem(2, tile + 9, dtype=dtype)
    labels.fill_(tile + 2)
    student[:, :tile] = teacher[:, :tile] = -INF
    loss, grad = run(student, teacher, labels, backend=backend)
    short = run(student[:, tile:], teacher[:, tile:], labels - tile, backend=backend)
    torch.testing.assert_close(loss, short[0], rtol=1e-5, atol=0)
    assert grad.isfinite().all() and not grad[:, :tile].any()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_regression_4_5_6_mixture_of_two_underflows(backend, dtype, name, beta):
    """Liger#1453: log of a mixture of probabilities that are 0 on both sides."""
    student, teacher, _ = problem(3, 19, dtype=dtype)
    student[:, 4] = teacher[:, 4] = -6e4
    loss, grad = run(student, teacher, divergence=name, beta=beta, backend=backend)
    assert loss.isfinite() and loss > 0 and grad.isfinite().all() and not grad[:, 4].any()


def test_regression_7_jsd_uses_beta_and_the_maximum(backend):
    """Liger#609: beta ignored, and no maximum subtracted."""
    student, teacher, _ = problem(3, 19)
    losses = [
        kd_loss(student, teacher, divergence="jsd", beta=beta, backend=backend)
        for beta in (0.1, 0.5, 0.9)
    ]
    assert len({loss.item() for loss in losses}) == 3
    far = kd_loss(student + 1e4, teacher - 1e4, divergence="jsd", backend=backend)
    torch.testing.assert_close(far, losses[1], rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_regression_8_padding_of_minus_inf(backend, dtype, name):
    """TRL#5594: short completions padded with -inf: NaN gradients of rows that do not count."""
    student, teacher, labels = problem(2, 3, 19, dtype=dtype)
    plain = run(student, teacher, labels, divergence=name, num_items=5, backend=backend)[1]
    labels[1, 2] = IGNORE
    student[1, 2] = teacher[1, 2] = -INF
    loss, grad = run(student, teacher, labels, divergence=name, num_items=5, backend=backend)
    assert loss.isfinite()
    assert_same_bits((grad[0], plain[0]), (grad[1, :2], plain[1, :2]))
    assert_plus_zero(grad[1, 2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_regression_9_to_13_nothing_to_average(backend, name, num_items):
    """TRL GOLD#5885, LMOps#38, torchtune#2239, unsloth#7677, aiter#5165: division by no token."""
    student, teacher, labels = problem(3, 19)
    options = dict(divergence=name, num_items=num_items, return_terms=True, backend=backend)
    leaf = student.requires_grad_()
    terms = kd_loss(leaf, teacher, torch.full_like(labels, IGNORE), **options)
    terms.loss.backward()
    for x in (*terms, leaf.grad):
        assert not x.any()


@pytest.mark.parametrize("name", NAMES)
def test_regression_14_15_16_gradient_at_vanishing_probabilities(backend, dtype, name):
    """Soup#719, pytorch#89558, optax#1786: a finite loss whose gradient forms 0 · log 0."""
    student, teacher, _ = problem(3, 19, dtype=dtype, spread=20.0)
    options = dict(divergence=name, temperature=0.05)
    loss, grad = run(student, teacher, backend=backend, **options)
    assert loss.isfinite() and grad.isfinite().all()
    teacher[:, 3] = -INF  # a target of exactly 0
    if name != "reverse_kl":
        loss, grad = run(student, teacher, backend=backend, **options)
        assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_regression_17_nan_is_not_swallowed(backend, name):
    """tt-metal#56056: a row of NaN became a uniform softmax."""
    for column in (0, 18):
        for bad in (NAN, INF):
            student, teacher, labels = problem(2, 19)
            student[1, column] = bad
            rows = kd_loss(
                student, teacher, labels, divergence=name, reduction="none", backend=backend
            )
            assert rows.isnan().tolist() == [False, True]


def test_regression_18_padded_lanes_hold_no_probability(backend, dtype):
    """unsloth#10616: lanes beyond the last column took 2 to 48 % of the mass."""
    for width in (1, 3, 17, 33, 129):
        student = torch.full((2, width), -30.0, dtype=dtype)
        loss = kd_loss(student, student, torch.zeros(2).long(), alpha=0.0, backend=backend)
        torch.testing.assert_close(loss.item(), math.log(width), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ignore_index", [12, 14, -1])
def test_regression_19_ignore_index_that_names_a_padded_column(backend, dtype, ignore_index):
    """CCE#59: a sentinel label matched a padded column, and the loss was infinite."""
    student, teacher, labels = problem(3, 15, dtype=dtype)
    labels %= 12
    labels[1] = ignore_index
    student[:, 12:] = -INF
    options = dict(vocab_size=12, ignore_index=ignore_index, backend=backend)
    loss, grad = run(student, teacher, labels, **options)
    assert loss.isfinite()
    assert_plus_zero(grad[1])
    assert_plus_zero(grad[:, 12:])


# --- upstream gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_regression_21_to_29_upstream_gradient(backend, dtype, reduction):
    """TE#2139, Liger#1298, #968, ROCm/TE#623, verl#6960: a wrong pointer, index or stride."""
    student, teacher, labels = problem(4, 19, dtype=dtype)
    labels[0] = IGNORE
    wide = torch.promote_types(dtype, torch.float32)
    upstreams = [torch.tensor(-3.7, dtype=wide)]
    if reduction == "none":
        base = torch.randn(4, 3, dtype=wide)
        upstreams = [base[:, 1], base[0, 0].expand(4), base.flatten()[1:9:2]]
    for upstream in upstreams:
        options = dict(reduction=reduction, upstream=upstream)
        loss, grad = run(student, teacher, labels, backend=backend, **options)
        assert loss.shape == upstream.shape
        assert_right(backend, loss, grad, student, teacher, labels, check_blind=False, **options)


def test_regression_31_terms_share_their_gradient(backend):
    """axolotl#3660: the cross-entropy was reported as an auxiliary value and got no gradient."""
    student, teacher, labels = problem(4, 19)
    leaf = student.clone().requires_grad_()
    kd_loss(leaf, teacher, labels, alpha=0.3, return_terms=True, backend=backend).loss.backward()
    loss, grad = run(student, teacher, labels, alpha=0.3, upstream=ONE, backend=backend)
    assert_same_bits((leaf.grad, grad))
    assert not torch.allclose(grad, 0.3 * run(student, teacher, upstream=ONE, backend=backend)[1])


def test_regression_32_gradient_of_ignored_rows(backend, dtype):
    """Paddle#28622: it was not zero."""
    student, teacher, labels = problem(4, 19, dtype=dtype)
    labels[2] = IGNORE
    for reduction in ("mean", "sum", "none"):
        assert_plus_zero(run(student, teacher, labels, reduction=reduction, backend=backend)[1][2])


def test_regression_33_second_backward(backend, dtype):
    """Liger and TransformerEngine multiply the saved gradient again: twice the gradient."""
    student, teacher, labels = problem(4, 19, dtype=dtype)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, labels, backend=backend)
    upstream = 2 * torch.ones_like(loss)
    first = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0]
    assert_same_bits((torch.autograd.grad(loss, leaf, upstream)[0], first))


# --- aliasing and determinism --------------------------------------------------------------------


def test_regression_34_to_38_nothing_of_the_callers_is_changed(backend, dtype):
    """Megatron#1594, apex#1587, Liger#1305, #272: logits or incoming gradients overwritten."""
    student, teacher, labels = problem(4, 19, dtype=dtype)
    weights, num_items = torch.rand(4), torch.tensor(7.0)
    upstream = torch.randn((), dtype=torch.promote_types(dtype, torch.float32))
    tensors = (student, teacher, labels, weights, num_items, upstream)
    copies = [x.clone() for x in tensors]
    options = dict(token_weights=weights, num_items=num_items, upstream=upstream)
    run(student, teacher, labels, temperature=2.0, backend=backend, **options)
    assert_same_bits(*zip(tensors, copies, strict=True))
    assert all(x._version == 0 for x in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_regression_39_40_run_to_run(compiled, dtype, name):
    """flash-attention#337, intel-xpu#7962: races. Also under another number of threads."""
    student, teacher, labels = problem(40, 1030, dtype=dtype)
    options = dict(divergence=name, temperature=2.0, backend=compiled)
    first = run(student, teacher, labels, **options)
    threads = torch.get_num_threads()
    for count in (threads, 1, 7):
        torch.set_num_threads(count)
        try:
            again = run(student, teacher, labels, **options)
        finally:
            torch.set_num_threads(threads)
        assert_same_bits(*zip(again, first, strict=True))


# --- layout --------------------------------------------------------------------------------------


def test_regression_42_to_50_index_width(backend):
    """flash-attention#714, Liger#1248, vllm#50427, pytorch#85786: rows beyond 2^31 elements."""
    student, teacher, labels = problem(3, 19, dtype=torch.bfloat16)
    stride = 2**31 - 7
    far = torch.empty(2 * stride + 19, dtype=torch.bfloat16).as_strided((3, 19), (stride, 1))
    ours = run(far.copy_(student), teacher, labels, backend=backend)
    plain = run(student, teacher, labels, backend=backend)
    assert_same_bits(*zip(ours, plain, strict=True))


def test_regression_43_52_misaligned_pointers(backend, dtype):
    """flash-attention bedf8774, pytorch#56325: labels and rows off the vector's alignment."""
    student, teacher, labels = problem(3, 67, dtype=dtype)
    plain = run(student, teacher, labels, backend=backend)
    moved = [
        x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in (student, teacher, labels)
    ]
    assert_same_bits(*zip(run(*moved, backend=backend), plain, strict=True))


def test_regression_51_width_65537(backend, dtype):
    """pytorch#36485: the tail of a vectorised softmax at 2^16 + 1 columns."""
    student, teacher, labels = problem(1, 65537, dtype=dtype)
    labels.fill_(65536)
    student[0, 65536], teacher[0, 65536] = 9, 11
    loss, grad = run(student, teacher, labels, temperature=2.0, backend=backend)
    assert_right(backend, loss, grad, student, teacher, labels, temperature=2.0)


def test_regression_53_to_57_strided_inputs(backend, dtype):
    """TE#2734, unsloth#10713, VeOmni#1017, pytorch#72120: layouts read with wrong strides."""
    student, teacher, labels = problem(2, 3, 4, 38, dtype=dtype)
    views = [
        lambda x: x[..., 5:24],  # unit stride, rows apart
        lambda x: x[:, :, 1:3, :19],  # leading dimensions that do not flatten
        lambda x: x.transpose(0, 2)[..., :19],
        lambda x: x[..., ::2],
        lambda x: x.transpose(-1, -2)[..., :3],
    ]
    for view in views:
        inputs = view(student), view(teacher)
        classes = inputs[0].shape[-1]
        target = torch.randint(classes, (*inputs[0].shape[:-1], 2))[..., 1]
        ours = run(*inputs, target, temperature=2.0, backend=backend)
        plain = run(*(x.contiguous() for x in (*inputs, target)), temperature=2.0, backend=backend)
        assert_same_bits(*zip(ours, plain, strict=True))


def test_regression_59_no_elements(backend, dtype):
    """quack d99232e: tensors of no row."""
    for shape in ((0, 19), (0, 3, 19), (3, 0, 19)):
        student, teacher, labels = problem(*shape, dtype=dtype)
        loss, grad = run(student, teacher, labels, backend=backend)
        assert loss == 0 and grad.shape == shape
