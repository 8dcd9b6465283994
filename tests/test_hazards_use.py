"""Hazards H19 to H27, H31, H34 to H37: how logits come, and what is done around the loss.

H32 and H33 are about GPUs. More of upstream gradients and derivatives is in test_autograd.py, of
compilation in test_ops.py, of views in test_memory.py.
"""

import pytest
import torch
from conftest import (
    DTYPES,
    NAMES,
    assert_right,
    assert_same_bits,
    problem,
    random_like,
    run,
)

from kdkernels import kd_loss

IGNORE = -100


def test_h19_second_derivative(backend):
    student, teacher, labels = problem(4, 9)
    student.requires_grad_()
    loss = kd_loss(student, teacher, labels, backend=backend)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    if backend == "eager":
        (second,) = torch.autograd.grad(grad.square().sum(), student)
        assert second.any()
    else:
        with pytest.raises(RuntimeError, match="backend='eager'"):
            torch.autograd.grad(grad.square().sum(), student)


def test_h20_logits_survive_the_loss(backend, dtype):
    """Two losses of the same logits: neither has overwritten what the other reads."""
    student, teacher, labels = problem(4, 19, dtype=dtype)
    leaf = student.clone().requires_grad_()
    first = kd_loss(leaf, teacher, labels, alpha=0.0, backend=backend)
    second = kd_loss(leaf, teacher, backend=backend)
    one = torch.ones_like(first)
    for loss, arguments in ((first, dict(labels=labels, alpha=0.0)), (second, {})):
        (grad,) = torch.autograd.grad(loss, leaf)
        expected = run(student, teacher, upstream=one, backend=backend, **arguments)
        assert_same_bits((loss, expected[0]), (grad, expected[1]))
    assert_same_bits((leaf, student))
    assert leaf._version == 0


def test_h21_backward_twice(backend, dtype):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    student.requires_grad_()
    loss = kd_loss(student, teacher, labels, backend=backend)
    upstream = random_like(loss)
    first, second, third = (
        torch.autograd.grad(loss, student, upstream, retain_graph=retain)[0]
        for retain in (True, True, False)
    )
    assert first.data_ptr() != second.data_ptr()
    assert_same_bits((second, first), (third, first))


@pytest.mark.parametrize("stride", [0, 3, 2**20])
def test_h22_layout_of_the_upstream_gradient(backend, dtype, stride):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    labels[2] = IGNORE
    wide = torch.promote_types(dtype, torch.float32)
    upstream = torch.randn(3 * stride + 1, dtype=wide).as_strided((4,), (stride,))
    options = dict(reduction="none", backend=backend)
    ours = run(student, teacher, labels, upstream=upstream, **options)
    plain = run(student, teacher, labels, upstream=upstream.clone(), **options)
    assert_same_bits(*zip(ours, plain, strict=True))


@pytest.mark.parametrize("theirs", DTYPES)
def test_h23_mixed_dtypes_compute_in_float32(backend, theirs):
    """Rounding is done by the dtypes alone: the same values as float32 give the same loss."""
    for ours in DTYPES:
        student, teacher, labels = problem(4, 19, dtype=ours, teacher_dtype=theirs)
        options = dict(temperature=2.0, upstream=torch.tensor(2.0), backend=backend)
        loss, grad = run(student, teacher, labels, **options)
        wide_loss, wide_grad = run(student.float(), teacher.float(), labels, **options)
        assert grad.dtype == ours
        assert_same_bits((loss, wide_loss), (grad, wide_grad.to(ours)))


def layouts(x):
    """The values of x (4, 24) in the layouts that views have."""
    wide = x.new_empty(4, 100)
    wide[:, 7:31] = x
    stretched = x.new_empty(4, 48)
    stretched[:, ::2] = x
    third = x.new_empty(12, 24)
    third[1::3] = x
    flipped = x.flip(0)
    return {
        "column slice": wide[:, 7:31],
        "row slice": third[1::3],
        "every other column": stretched[:, ::2],
        "transposed": x.t().contiguous().t(),
        "gathered": flipped[[3, 2, 1, 0]],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(4, 24)))
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_h24_strides(backend, dtype, layout, who):
    student, teacher, labels = problem(4, 24, dtype=dtype)
    plain = run(student, teacher, labels, backend=backend)
    ours = {"student": student, "teacher": teacher}
    for name, x in ours.items():
        if who in (name, "both"):
            ours[name] = layouts(x)[layout]
            assert torch.equal(ours[name], x)
    views = run(**ours, labels=labels, backend=backend)
    assert_same_bits(*zip(views, plain, strict=True))


def test_h24_strides_of_labels_and_weights(backend):
    student, teacher, labels = problem(4, 24)
    weights = torch.rand(4)
    plain = run(student, teacher, labels, token_weights=weights, backend=backend)
    strided = torch.stack((labels, labels + 1), -1)[:, 0]
    heavy = torch.stack((weights, weights + 1), -1)[:, 0]
    ours = run(student, teacher, strided, token_weights=heavy, backend=backend)
    assert_same_bits(*zip(ours, plain, strict=True))
    expanded = labels[:1].expand(4)
    ours = run(student, teacher, expanded, token_weights=weights[:1].expand(4), backend=backend)
    plain = run(
        student, teacher, expanded.clone(), token_weights=weights[:1].repeat(4), backend=backend
    )
    assert_same_bits(*zip(ours, plain, strict=True))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_h24_expanded_rows(backend, dtype, who):
    student, teacher, labels = problem(4, 24, dtype=dtype)
    ours = {"student": student, "teacher": teacher}
    ours[who] = ours[who][:1].expand(4, 24)
    plain = {**ours, who: ours[who].clone()}
    pairs = zip(
        run(**ours, labels=labels, backend=backend),
        run(**plain, labels=labels, backend=backend),
        strict=True,
    )
    assert_same_bits(*pairs)


def test_h24_two_strides_per_row(backend, dtype):
    """Sequences cut out of longer ones, (B, L) rows that no single stride reaches."""
    student, teacher, labels = problem(3, 9, 24, dtype=dtype)
    cut = student[:, 2:7], teacher[:, 1:6], labels[:, 3:8]
    ours = run(*cut, temperature=2.0, backend=backend)
    plain = run(*(x.clone() for x in cut), temperature=2.0, backend=backend)
    assert_same_bits(*zip(ours, plain, strict=True))
    turned = [x.transpose(0, 1) for x in (student, teacher, labels)]
    ours = run(*turned, temperature=2.0, backend=backend)
    plain = run(*(x.contiguous() for x in turned), temperature=2.0, backend=backend)
    assert_same_bits(*zip(ours, plain, strict=True))


@pytest.mark.parametrize("who", ["student", "teacher", "labels", "weights", "upstream"])
def test_h25_alignment(backend, dtype, who):
    student, teacher, labels = problem(3, 67, dtype=dtype)
    tensors = dict(
        student=student,
        teacher=teacher,
        labels=labels,
        weights=torch.rand(3),
        upstream=torch.randn(3, dtype=torch.promote_types(dtype, torch.float32)),
    )

    def outputs(student, teacher, labels, weights, upstream):
        options = dict(token_weights=weights, reduction="none", temperature=2.0, backend=backend)
        return run(student, teacher, labels, upstream=upstream, **options)

    plain = outputs(**tensors)
    x = tensors[who]
    for offset in range(1, 16):
        moved = x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)
        ours = outputs(**{**tensors, who: moved})
        assert_same_bits(*zip(ours, plain, strict=True))


WIDTHS = (
    *range(1, 18),  # every tail of a vector of 16 lanes
    *(31, 32, 33, 63, 64, 65, 255, 256, 257),  # around more vectors
    *(1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097),  # around a tile
)
LARGE = (
    *(32000, 50257, 128256),  # Llama 2, GPT-2, Llama 3
    *(151936, 152064, 262144),  # Qwen 2.5 twice, Gemma
    *(65537, 262145),  # one more than a power of 2
)


@pytest.mark.parametrize("width", WIDTHS)
def test_h26_widths(exact, dtype, width):
    student, teacher, labels = problem(2, width, dtype=dtype)
    labels[1] = width - 1
    options = dict(temperature=2.0, label_smoothing=0.1, reduction="none")
    loss, grad = run(student, teacher, labels, backend=exact, **options)
    assert_right(exact, loss, grad, student, teacher, labels, **options)


@pytest.mark.parametrize("width", LARGE)
def test_h26_large_widths(compiled, width):
    student, teacher, labels = problem(1, width, dtype=torch.bfloat16)
    loss, grad = run(student, teacher, labels, temperature=2.0, backend=compiled)
    assert_right(compiled, loss, grad, student, teacher, labels, temperature=2.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1, 15, 17, 65])
def test_h26_tails_of_every_divergence(backend, dtype, name, width):
    """What lies beyond the last column of a row is its neighbour: NaN must not leak in."""
    student, teacher, labels = problem(3, width, dtype=dtype)
    options = dict(divergence=name, temperature=2.0, reduction="none", backend=backend)
    plain = run(student, teacher, labels, **options)
    wide = [torch.nn.functional.pad(x, (1, 1), value=float("nan")) for x in (student, teacher)]
    ours = run(*(x[:, 1:-1] for x in wide), labels, **options)
    assert_same_bits(*zip(ours, plain, strict=True))


def far_apart(x, stride):
    """The rows of x (N, V), `stride` elements apart in memory that is otherwise never touched."""
    storage = torch.empty((len(x) - 1) * stride + x.shape[1], dtype=x.dtype)
    return storage.as_strided(x.shape, (stride, 1)).copy_(x)


@pytest.mark.parametrize("stride", [2**30 + 3, 2**31 + 5])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_h27_offsets_beyond_32_bits(backend, stride, who):
    student, teacher, labels = problem(4, 37, dtype=torch.bfloat16)
    plain = run(student, teacher, labels, backend=backend)
    ours = {"student": student, "teacher": teacher}
    ours[who] = far_apart(ours[who], stride)
    far = run(**ours, labels=labels, backend=backend)
    assert_same_bits(*zip(far, plain, strict=True))


def test_h27_more_rows_than_16_bits_count(backend):
    student, teacher, labels = problem(66_000, 3)
    options = dict(temperature=2.0, reduction="none")
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    assert_right(backend, loss, grad, student, teacher, labels, **options)


def test_h31_compiled_with_ignored_rows(backend):
    student, teacher, labels = problem(6, 19)
    labels[[1, 4]] = IGNORE

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(student, teacher, labels):
        return kd_loss(student, teacher, labels, temperature=2.0, backend=backend)

    leaf = student.clone().requires_grad_()
    loss = compiled(leaf, teacher, labels)
    (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(1.7))
    options = dict(temperature=2.0, upstream=torch.tensor(1.7), backend=backend)
    expected = run(student, teacher, labels, **options)
    assert_same_bits((loss, expected[0]), (grad, expected[1]))


@pytest.mark.parametrize("shape", [(1, 19), (4, 1), (1, 4, 19), (19,), (4, 20), (5, 19)])
def test_h34_nothing_broadcasts(backend, dtype, shape):
    student, _, labels = problem(4, 19, dtype=dtype)
    with pytest.raises(ValueError, match="teacher"):
        kd_loss(student, torch.zeros(shape, dtype=dtype), labels, backend=backend)


def test_h35_padded_vocabularies(backend, dtype):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    wider = torch.cat((teacher, torch.full((4, 3), 50.0, dtype=dtype)), -1)
    with pytest.raises(ValueError, match="19.*22.*vocab_size"):
        kd_loss(student, wider, labels, backend=backend)
    ours = run(student, wider, labels, vocab_size=19, backend=backend)
    plain = run(student, teacher, labels, backend=backend)
    assert_same_bits(*zip(ours, plain, strict=True))
    loss, grad = run(wider, student, labels, vocab_size=19, backend=backend)
    assert grad.shape == wider.shape and not grad[:, 19:].any() and grad[:, :19].any()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_h36_autocast_rounds_no_logits(backend, dtype, cast):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    plain = run(student, teacher, labels, backend=backend)
    with torch.autocast("cpu", dtype=cast):
        ours = run(student, teacher, labels, backend=backend)
    assert_same_bits(*zip(ours, plain, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_h37_without_gradient(backend, dtype, mode, requires_grad, reduction):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    options = dict(reduction=reduction, backend=backend)
    expected, _ = run(student, teacher, labels, **options)
    leaf = student.clone().requires_grad_(requires_grad)
    with mode():
        loss = kd_loss(leaf, teacher, labels, **options)
        inside = kd_loss(leaf * 1, teacher * 1, labels.clone(), **options)
    assert not loss.requires_grad
    assert_same_bits((loss, expected), (inside, expected))
    loss = kd_loss(student, teacher, labels, **options)
    assert not loss.requires_grad and loss.grad_fn is None
    assert_same_bits((loss, expected))


def test_h37_partly_frozen_model(backend):
    """A gradient that only part of the graph needs: a frozen body, a trained bias."""
    hidden, teacher, labels = problem(4, 19)
    bias = torch.zeros(19, requires_grad=True)
    (grad,) = torch.autograd.grad(kd_loss(hidden + bias, teacher, labels, backend=backend), bias)
    expected = run(hidden, teacher, labels, upstream=torch.tensor(1.0), backend=backend)[1].sum(0)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)
