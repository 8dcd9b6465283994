"""What must hold whatever the logits are, with no oracle: P1 to P28 of the project's list.

Hypothesis draws the logits, among them equal, tiny, huge and coarse ones. A native backend is
tested in float32, eager in float64. Statements that are exact are tested bit for bit; the rest
within the bars of `test_exactness.py`, and gradients within the componentwise bound of `oracle.py`.
"""

import math

import cuda_for_cpu
import cuda_on_cpu
import pytest
import torch
from conftest import NAMES, assert_same_bits, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import assert_gradient_close, gradient_bound, reference

from kdkernels import kd_loss

# N2 on any row; what float64 leaves of a KL of 1e-8. And a sum of numbers of one sign: N1's bar.
GPUS = (cuda_on_cpu.NAME, "triton", *cuda_for_cpu.NAMES)
LOSS = {"native": 2e-4, **dict.fromkeys(GPUS, 2e-4), "eager": 1e-7}
SUMS = {"native": 1e-6, **dict.fromkeys(GPUS, 2e-6), "eager": 1e-12}
SMALLEST = 1e-8  # the KL from which on a relative bar is given
INF = math.inf

# Every value a float32, so that both backends see the same rows.
LOGIT = st.one_of(
    st.floats(-20, 20, width=32),
    st.floats(-80, 80, width=32),
    st.integers(-12, 12).map(lambda i: i / 4),  # ties, and differences of exactly 0
)
TEMPERATURE = st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.7, 16.0])
DIVERGENCE = st.sampled_from(NAMES)
BETA = st.sampled_from([0.03, 0.3, 0.5, 0.9])  # lopsided either way, and the middle
SEED = st.integers(0, 10**6)


def checked(examples=25):
    """The same examples every time, on any machine."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, print_blob=False
    )


@st.composite
def pairs(draw, logit=LOGIT, most_rows=3, least_classes=1, step=None):
    """(student, teacher) float64 logits (n, v); `step`: all of `logit` are multiples of it."""
    n = draw(st.integers(1, most_rows))
    v = draw(st.integers(least_classes, 20))  # beyond one vector of 16
    row = st.lists(logit, min_size=n * v, max_size=n * v)
    student = torch.tensor(draw(row), dtype=torch.float64).view(n, v)
    if draw(st.booleans()):
        teacher = torch.tensor(draw(row), dtype=torch.float64).view(n, v)
    else:  # close to the student
        size = draw(st.sampled_from([0.0, 2.0**-12, 2.0**-4]))
        noise = torch.randn(n, v, generator=torch.Generator().manual_seed(draw(SEED)))
        noise = size * noise if step is None else step * noise.round()
        teacher = (student + noise).float().double()
    return student, teacher


def labels_of(student, seed):
    return torch.randint(student.shape[1], student.shape[:1], generator=generator(seed))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def as_seen(backend, *tensors):
    """The logits in the dtype that the backend is tested in."""
    dtype = torch.float64 if backend == "eager" else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def rows(backend, student, teacher, labels=None, **options):
    """The row losses in float64."""
    loss = kd_loss(student, teacher, labels, reduction="none", backend=backend, **options)
    return loss.double()


def gradient(backend, student, teacher, labels=None, *, upstream=None, **options):
    upstream = torch.ones(student.shape[:-1]) if upstream is None else upstream
    options = dict(reduction="none", backend=backend, **options)
    return run(student, teacher, labels, upstream=upstream, **options)[1]


def assert_close(actual, expected, rel, floor=0.0):
    """|actual − expected| <= rel · max(expected, floor), for losses (never for gradients)."""
    slack = rel * torch.as_tensor(expected).abs().clamp(min=floor)
    off = (actual - expected).abs()
    assert (off <= slack).all(), f"{off.max().item():.3g} > {slack.min().item():.3g}"


def log_probabilities(student, teacher, temperature):
    """log q and log p in float64."""
    return (torch.log_softmax(x.double() / temperature, -1) for x in (student, teacher))


# --- algebra -------------------------------------------------------------------------------------


@checked()
@given(data=pairs(), temperature=TEMPERATURE, beta=BETA)
def test_p01_gradient_formulas(backend, data, temperature, beta):
    student, teacher = as_seen(backend, *data)
    log_q, log_p = log_probabilities(student, teacher, temperature)
    q, p, d = log_q.exp(), log_p.exp(), log_q - log_p
    log_q_m = -torch.log((1 - beta) + beta * (-d).exp())
    for divergence, b, formula in (
        ("forward_kl", None, q - p),
        ("reverse_kl", None, q * (d - (q * d).sum(-1, keepdim=True))),
        ("jsd", beta, (1 - beta) * q * (log_q_m - (q * log_q_m).sum(-1, keepdim=True))),
    ):
        options = dict(divergence=divergence, beta=b, temperature=temperature)
        ref = reference(student, teacher, reduction="none", **options)
        # The formula in plain float64 is itself only as exact as its cancellations allow.
        loose = 2.0**-40 * temperature * (1 + d.abs()) * (q + p) * (1 + d.abs().amax(-1, True))
        told = log_q_m.isfinite().all(-1)  # rows in which e^{-d} does not overflow
        assert ((temperature * formula - ref.grad).abs() <= loose)[told].all()
        assert_gradient_close(
            gradient(backend, student, teacher, **options), ref, check_blind=False
        )


@checked()
@given(data=pairs(least_classes=2), temperature=TEMPERATURE)
def test_p02_bregman_identity(backend, data, temperature):
    student, teacher = as_seen(backend, *data)
    log_q, log_p = log_probabilities(student, teacher, temperature)
    p, d = log_p.exp(), log_q - log_p
    terms = torch.where(d.abs() < 1, p * (d.expm1() - d), log_q.exp() - p - p * d)
    assert (terms >= -1e-15).all()
    kl = terms.sum(-1)
    actual = rows(backend, student, teacher, temperature=temperature, t_squared=False)
    assert_close(actual[kl >= SMALLEST], kl[kl >= SMALLEST], LOSS[backend])


@checked()
@given(data=pairs(least_classes=2), temperature=TEMPERATURE, beta=BETA)
def test_p03_swapping_the_sides(backend, data, temperature, beta):
    student, teacher = as_seen(backend, *data)
    options = dict(temperature=temperature, t_squared=False)
    for one, other in (
        (dict(divergence="jsd", beta=beta), dict(divergence="jsd", beta=1 - beta)),
        (dict(divergence="jsd"), dict(divergence="jsd")),
        (dict(divergence="reverse_kl"), dict(divergence="forward_kl")),
        (dict(divergence="tvd"), dict(divergence="tvd")),
        (
            dict(divergence="skew_forward_kl", beta=beta),
            dict(divergence="skew_reverse_kl", beta=beta),
        ),
    ):
        value = rows(backend, student, teacher, **one, **options)
        swapped = rows(backend, teacher, student, **other, **options)
        large = value >= (1e-4 if one["divergence"] == "tvd" else SMALLEST)
        assert_close(swapped[large], value[large], 2 * LOSS[backend])


@checked()
@given(data=pairs(), divergence=DIVERGENCE, temperature=TEMPERATURE, c=st.integers(-(2**12), 2**12))
def test_p04_never_negative_and_0_for_equal_rows(backend, data, divergence, temperature, c):
    student, teacher = as_seen(backend, *data)
    options = dict(divergence=divergence, temperature=temperature)
    value = rows(backend, student, teacher, **options)
    coarse = (student * 4).round() / 4
    equal = rows(backend, coarse, coarse + c / 4, **options)
    grad = gradient(backend, coarse, coarse + c / 4, **options)
    if backend == "eager":  # which adds up signed terms
        assert (value >= -1e-13 * temperature**2).all()
        assert (equal.abs() <= 1e-13 * temperature**2).all()
    else:
        assert (value >= 0).all()
        assert not equal.any() and not grad.any()


@checked()
@given(data=pairs(), temperature=TEMPERATURE, beta=BETA)
def test_p05_jsd_is_bounded(backend, data, temperature, beta):
    student, teacher = as_seen(backend, *data)
    options = dict(divergence="jsd", beta=beta, temperature=temperature, t_squared=False)
    most = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert most <= math.log(2) * (1 + 1e-15)
    assert (rows(backend, student, teacher, **options) <= most * (1 + SUMS[backend])).all()


@checked()
@given(data=pairs(), temperature=TEMPERATURE)
def test_p06_pinsker(backend, data, temperature):
    student, teacher = as_seen(backend, *data)
    options = dict(temperature=temperature, t_squared=False)
    kl = rows(backend, student, teacher, **options)
    reverse = rows(backend, student, teacher, divergence="reverse_kl", **options)
    tvd = rows(backend, student, teacher, divergence="tvd", **options)
    assert (tvd <= 1 + SUMS[backend]).all()
    large = tvd >= 1e-4  # the KL's own bar begins at 1e-8
    for value in (kl, reverse):
        assert (value[large] * (1 + LOSS[backend]) >= 2 * tvd[large] ** 2).all()


@checked()
@given(data=pairs(), seed=SEED)
def test_p07_cross_entropy_bounds(backend, data, seed):
    (student,) = as_seen(backend, data[0])
    labels = labels_of(student, seed)
    loss = rows(backend, student, student, labels, alpha=0.0)
    s = student.double()
    least = s.amax(-1) - s.gather(-1, labels[:, None])[:, 0]
    assert (loss >= least * (1 - SUMS[backend])).all()
    assert (loss <= (least + math.log(s.shape[1])) * (1 + SUMS[backend])).all()


# --- invariances ---------------------------------------------------------------------------------

QUARTERS = st.integers(-100, 100).map(lambda i: i / 4)


@checked()
@given(
    data=pairs(logit=QUARTERS, step=0.25),
    shifts=st.tuples(*[st.integers(-(2**22), 2**22).map(lambda i: i / 4)] * 2),
    divergence=DIVERGENCE,
    temperature=TEMPERATURE,
    seed=SEED,
)
def test_p08_exact_shifts_change_no_bit(backend, data, shifts, divergence, temperature, seed):
    student, teacher = (x.float() for x in data)
    moved = student + shifts[0], teacher + shifts[1]
    labels = labels_of(student, seed)
    options = dict(divergence=divergence, temperature=temperature, label_smoothing=0.1)
    options.update(reduction="none", backend=backend)
    before, after = (run(s, t.clone(), labels, **options) for s, t in ((student, teacher), moved))
    assert_same_bits(*zip(after, before, strict=True))


@checked()
@given(data=pairs(), divergence=DIVERGENCE, temperature=TEMPERATURE, seed=SEED)
def test_p09_vocabulary_permutation(backend, data, divergence, temperature, seed):
    student, teacher = as_seen(backend, *data)
    order = torch.randperm(student.shape[1], generator=generator(seed))
    labels = labels_of(student, seed)
    moved = order.argsort()[labels]
    options = dict(divergence=divergence, temperature=temperature)
    assert torch.equal(
        student[:, order].gather(1, moved[:, None]), student.gather(1, labels[:, None])
    )
    value = rows(backend, student, teacher, labels, **options)
    permuted = rows(backend, student[:, order], teacher[:, order], moved, **options)
    assert_close(permuted, value, 2 * LOSS[backend], floor=SMALLEST)
    ref = reference(student, teacher, labels, reduction="none", **options)
    grad = gradient(backend, student[:, order], teacher[:, order], moved, **options)
    assert_gradient_close(grad[:, order.argsort()], ref, check_blind=False)


@checked()
@given(data=pairs(most_rows=6), divergence=DIVERGENCE, temperature=TEMPERATURE, seed=SEED)
def test_p10_rows_do_not_see_each_other(backend, data, divergence, temperature, seed):
    student, teacher = as_seen(backend, *data)
    labels = labels_of(student, seed)
    options = dict(
        divergence=divergence, temperature=temperature, reduction="none", backend=backend
    )

    def outputs(at):
        upstream = torch.ones(len(student))[at]
        return run(student[at], teacher[at], labels[at], upstream=upstream, **options)

    loss, grad = outputs(slice(None))
    order = torch.randperm(len(student), generator=generator(seed))
    assert_same_bits(*zip(outputs(order), (loss[order], grad[order]), strict=True))
    for i in range(len(student)):
        at = slice(i, i + 1)
        assert_same_bits(*zip(outputs(at), (loss[at], grad[at]), strict=True))


@checked()
@given(
    data=pairs(), divergence=DIVERGENCE, temperature=TEMPERATURE, power=st.sampled_from([-3, 1, 5])
)
def test_p11_scaling_by_powers_of_2(backend, data, divergence, temperature, power):
    student, teacher = as_seen(backend, *data)
    c = 2.0**power
    scaled = (student * c).clone(), (teacher * c).clone()
    options = dict(divergence=divergence, reduction="none", backend=backend)
    for t_squared, factors in ((True, (c * c, c)), (False, (1.0, 1 / c))):
        upstream = torch.ones(len(student))
        options.update(t_squared=t_squared, upstream=upstream)
        before = run(student, teacher, temperature=temperature, **options)
        after = run(*scaled, temperature=temperature * c, **options)
        for x, y, factor in zip(after, before, factors, strict=True):
            normal = (x.abs() > 1e-30) & (y.abs() > 1e-30)  # scaling a subnormal number rounds
            assert_same_bits((x[normal], (y * factor)[normal]))


@checked()
@given(
    data=pairs(),
    divergence=DIVERGENCE,
    temperature=TEMPERATURE,
    extra=st.integers(1, 40),
    seed=SEED,
)
def test_p12_padding(backend, data, divergence, temperature, extra, seed):
    student, teacher = as_seen(backend, *data)
    n, v = student.shape
    labels = labels_of(student, seed)
    options = dict(divergence=divergence, temperature=temperature)
    ref = reference(student, teacher, labels, reduction="none", **options)
    value = rows(backend, student, teacher, labels, **options)
    grad = gradient(backend, student, teacher, labels, **options)

    absent = [torch.cat((x, x.new_full((n, extra), -INF)), 1) for x in (student, teacher)]
    padded = rows(backend, *absent, labels, **options)
    assert_close(padded, value, 2 * LOSS[backend], floor=SMALLEST)
    padded_grad = gradient(backend, *absent, labels, **options)
    assert not padded_grad[:, v:].any()
    assert_gradient_close(padded_grad[:, :v], ref, check_blind=False)

    # With vocab_size the columns are not there at all.
    unread = [torch.cat((x, x.new_full((n, extra), math.nan)), 1) for x in (student, teacher)]
    assert_same_bits((rows(backend, *unread, labels, vocab_size=v, **options), value))
    unread_grad = gradient(backend, *unread, labels, vocab_size=v, **options)
    assert_same_bits(
        (unread_grad[:, :v], grad), (unread_grad[:, v:], torch.zeros_like(absent[0][:, v:]))
    )


@checked()
@given(data=pairs(), divergence=DIVERGENCE, temperature=TEMPERATURE, seed=SEED)
def test_p13_duplication(backend, data, divergence, temperature, seed):
    student, teacher = as_seen(backend, *data)
    twice = student.repeat(1, 2), teacher.repeat(1, 2)
    labels = labels_of(student, seed)
    options = dict(divergence=divergence, temperature=temperature, t_squared=False)
    value = rows(backend, student, teacher, **options)
    assert_close(rows(backend, *twice, **options), value, 2 * LOSS[backend], floor=SMALLEST)
    cross_entropy = rows(backend, student, teacher, labels, alpha=0.0)
    more = rows(backend, *twice, labels, alpha=0.0)
    assert_close(more, cross_entropy + math.log(2), SUMS[backend])

    upstream = torch.full((len(student),), 0.5)
    half = reference(student, teacher, reduction="none", upstream=upstream, **options)
    grad = gradient(backend, *twice, **options)
    for copy in grad.chunk(2, 1):
        assert_gradient_close(copy.contiguous(), half, check_blind=False)


@checked()
@given(data=pairs(), seed=SEED)
def test_p14_one_hot_teacher_is_the_cross_entropy(backend, data, seed):
    (student,) = as_seen(backend, data[0])
    labels = labels_of(student, seed)
    teacher = torch.full_like(student, -INF).scatter(1, labels[:, None], 3.0)
    distill = rows(backend, student, teacher)
    hard = rows(backend, student, student, labels, alpha=0.0)
    assert_close(distill, hard, LOSS[backend], floor=SMALLEST)
    ref = reference(student, student, labels, alpha=0.0, reduction="none")
    one_hot = reference(student, teacher, reduction="none")
    assert_gradient_close(gradient(backend, student, teacher), one_hot, check_blind=False)
    hard_grad = gradient(backend, student, student, labels, alpha=0.0)
    assert_gradient_close(hard_grad, ref, check_blind=False)
    assert ((ref.grad - one_hot.grad).abs() <= ref.bound + one_hot.bound).all()


@checked(15)
@given(data=pairs(least_classes=3))
def test_p15_top_k_with_a_tail_bucket(backend, data):
    student, teacher = data
    order = teacher.argsort(-1, descending=True)
    s, t = (x.gather(-1, order) for x in (student, teacher))
    before = torch.zeros(len(s), dtype=torch.float64)
    full = rows(backend, *as_seen(backend, s, t))
    for k in range(s.shape[1]):
        bucket = [torch.cat((x[:, :k], x[:, k:].logsumexp(-1, keepdim=True)), -1) for x in (s, t)]
        value = rows(backend, *as_seen(backend, *bucket))
        # Rounding the bucket's logit to float32 moves a KL by about its square root.
        slack = (
            2 * LOSS[backend] * value + (4e-6 * value.sqrt() if backend != "eager" else 0) + 1e-11
        )
        assert (value >= before - slack).all()
        assert (value <= full + slack).all()
        before = value
    assert_close(before, full, 2 * LOSS[backend], floor=SMALLEST)


# --- the gradient's structure --------------------------------------------------------------------


# Of 16 classes 15 are alike: their roundings are one rounding, that of 1/15, 15 times as large.
ALIKE = torch.zeros(1, 16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)[15:]
# The student rules out what the teacher is sure of: the log-ratios are 100 for all it allows.
OPPOSED = -3 * ALIKE[1], 10 * ALIKE[1]
# Log-ratios of 160, next to which a single float keeps nothing below 2^-17 of their mean.
FAR = -3 * ALIKE[1], 80 * ALIKE[1]


@checked()
@given(data=pairs(), divergence=DIVERGENCE, temperature=TEMPERATURE, seed=SEED)
@example(data=ALIKE, divergence="reverse_kl", temperature=0.1, seed=0)
@example(data=OPPOSED, divergence="reverse_kl", temperature=0.1, seed=0)
@example(data=FAR, divergence="reverse_kl", temperature=0.5, seed=0)
def test_p16_gradient_rows_sum_to_0(backend, data, divergence, temperature, seed):
    student, teacher = as_seen(backend, *data)
    labels = labels_of(student, seed)
    for options in (
        dict(divergence=divergence, temperature=temperature, alpha=1.0),
        dict(alpha=0.0),
        dict(alpha=0.0, label_smoothing=0.3),
    ):
        grad = gradient(backend, student, teacher, labels, **options).double()
        ref = reference(student, teacher, labels, reduction="none", **options)
        # N7, of the row's size: the reverse KL's gradient is as large as its log-ratios.
        size = torch.maximum(ref.scale, ref.grad.abs().sum(-1))
        assert (grad.sum(-1).abs() <= 2.0**-20 * size).all()


@checked()
@given(data=pairs(), temperature=TEMPERATURE)
def test_p17_forward_gradient_is_bounded(backend, data, temperature):
    student, teacher = as_seen(backend, *data)
    grad = gradient(backend, student, teacher, temperature=temperature).double().abs()
    assert (grad <= temperature * (1 + SUMS[backend])).all()
    assert (grad.sum(-1) <= 2 * temperature * (1 + SUMS[backend])).all()


@checked()
@given(data=pairs(), seed=SEED)
def test_p18_cross_entropy_gradient_signs(backend, data, seed):
    (student,) = as_seen(backend, data[0])
    labels = labels_of(student, seed)
    grad = gradient(backend, student, student, labels, alpha=0.0)
    at_label = grad.gather(-1, labels[:, None])
    assert (at_label <= 0).all()
    assert (grad.scatter(-1, labels[:, None], 0.0) >= 0).all()


SMALL = st.floats(-4, 4, width=32)


@checked()
@given(data=pairs(logit=SMALL, least_classes=2), power=st.sampled_from([8, 10]))
def test_p19_high_temperature_matches_logits(backend, data, power):
    student, teacher = as_seen(backend, *data)
    temperature, v = 2.0**power, student.shape[1]
    s, t = (x.double() - x.double().mean(-1, keepdim=True) for x in (student, teacher))
    difference = s - t
    grad = gradient(backend, student, teacher, temperature=temperature)
    ref = reference(student, teacher, temperature=temperature, reduction="none")
    # O(1/T): the next term of softmax(x / T) is at most 2 max|x|² / T² per class.
    size = torch.maximum(s.abs().amax(-1), t.abs().amax(-1))[:, None]
    remainder = 4 * size**2 / (temperature * v)
    assert ((grad.double() - difference / v).abs() <= remainder + gradient_bound(ref)).all()
    loss = rows(backend, student, teacher, temperature=temperature)
    limit = (difference**2).sum(-1) / (2 * v)
    large = limit >= SMALLEST * temperature**2
    near = (difference.abs().amax(-1, keepdim=True) > size / 8).all(-1)
    assert_close(loss[large & near], limit[large & near], 0.2 if power == 8 else 0.05)


@checked()
@given(data=pairs(logit=QUARTERS, step=0.25), power=st.sampled_from([-8, -12]))
def test_p20_low_temperature_is_the_margin(backend, data, power):
    # Logits on quarters with T <= 1/256: a difference is 0 or at least 64 T.
    student, teacher = as_seen(backend, *data)
    temperature = 2.0**power
    unique = ((teacher == teacher.amax(-1, keepdim=True)).sum(-1) == 1) & (
        (student == student.amax(-1, keepdim=True)).sum(-1) == 1
    )
    loss = rows(backend, student, teacher, temperature=temperature, t_squared=False)
    s = student.double()
    chosen = s.gather(-1, teacher.argmax(-1, keepdim=True))[:, 0]
    margin = s.amax(-1) - chosen
    assert_close(temperature * loss[unique], margin[unique], LOSS[backend], floor=1e-12)


NARROW = st.floats(-0.5, 0.5, width=32)


@checked()
@given(data=pairs(logit=NARROW, least_classes=2))
def test_p21_jsd_tends_to_the_kls(backend, data):
    student, teacher = as_seen(backend, *data)
    for divergence, end in (("forward_kl", 0.0), ("reverse_kl", 1.0)):
        kl = rows(backend, student, teacher, divergence=divergence)
        large = kl >= 1e-4
        for beta in (2.0**-7, 2.0**-10):
            at = beta if end == 0 else 1 - beta
            jsd = rows(backend, student, teacher, divergence="jsd", beta=at) / beta
            # The next order: beta times a chi-squared, within e^4 of the KL on these rows.
            assert_close(jsd[large], kl[large], 8 * beta + LOSS[backend])
        same = rows(backend, student, teacher, divergence="jsd", beta=end)
        assert_same_bits((same, kl))


@checked()
@given(data=pairs(logit=SMALL), divergence=DIVERGENCE, temperature=TEMPERATURE, seed=SEED)
def test_p22_finite_differences(data, divergence, temperature, seed):
    # In float64, which only eager takes; the others are held to the same oracle.
    if divergence == "tvd":
        return  # has a kink wherever q = p
    student, teacher = data
    labels = labels_of(student, seed)
    direction = torch.randn(student.shape, generator=generator(seed), dtype=torch.float64)
    options = dict(divergence=divergence, temperature=temperature, label_smoothing=0.1)
    h = 1e-5
    up, down = (rows("eager", student + e * direction, teacher, labels, **options) for e in (h, -h))
    slope = (gradient("eager", student, teacher, labels, **options) * direction).sum(-1)
    size = (1 + temperature**2) * (1 + direction.abs().amax() / temperature) ** 3 * 10
    assert (((up - down) / (2 * h) - slope).abs() <= size * (h * h + 1e-15 / h)).all()


@checked()
@given(data=pairs(), divergence=DIVERGENCE, temperature=TEMPERATURE, seed=SEED)
def test_p23_backward_is_linear(backend, data, divergence, temperature, seed):
    student, teacher = as_seen(backend, *data)
    labels = labels_of(student, seed)
    leaf = student.clone().requires_grad_()
    options = dict(divergence=divergence, temperature=temperature, reduction="none")
    loss = kd_loss(leaf, teacher, labels, backend=backend, **options)

    def backward(upstream):
        return torch.autograd.grad(loss, leaf, upstream.to(loss.dtype), retain_graph=True)[0]

    g1, g2 = torch.randn(2, len(student), generator=generator(seed), dtype=loss.dtype)
    one, two, both = backward(g1), backward(g2), backward(3 * g1 - 0.5 * g2)
    ref = reference(student, teacher, labels, **options, upstream=(3 * g1 - 0.5 * g2).double())
    assert_gradient_close(both, ref, check_blind=False)
    # Each of the three was rounded twice, and the upstream gradients once. Eager's terms cancel
    # anew in each backward pass, so that their sizes count.
    info = torch.finfo(both.dtype)
    sizes = 3 * one.abs() + 0.5 * two.abs() + both.abs()
    slack = 4 * (info.eps * sizes.double() + info.smallest_normal * info.eps)
    if backend == "eager":
        slack = slack + 2 * sum(
            (c * g.abs())[:, None] * reference(student, teacher, labels, **options).bound
            for c, g in ((3, g1), (0.5, g2))
        )
    assert ((both.double() - (3 * one.double() - 0.5 * two.double())).abs() <= slack).all()
    assert not backward(torch.zeros(len(student))).any()
    assert_same_bits((backward(g1), one))


# --- convexity -----------------------------------------------------------------------------------


@checked()
@given(
    data=pairs(), other=SEED, temperature=TEMPERATURE, mix=st.sampled_from([0.25, 0.5]), seed=SEED
)
def test_p24_convex_in_the_student(backend, data, other, temperature, mix, seed):
    student, teacher = ((x * 4).round() / 4 for x in data)  # so that mixtures are exact
    steps = torch.randint(-8, 9, student.shape, generator=generator(other))
    first, second, teacher = as_seen(backend, student, student + steps, teacher)
    between = mix * first + (1 - mix) * second
    labels = labels_of(student, seed)
    for options in (dict(temperature=temperature, alpha=1.0), dict(alpha=0.0)):
        ends = [rows(backend, x, teacher, labels, **options) for x in (first, second)]
        middle = rows(backend, between, teacher, labels, **options)
        chord = mix * ends[0] + (1 - mix) * ends[1]
        assert (middle <= chord * (1 + 2 * LOSS[backend]) + SMALLEST * temperature**2).all()


@checked()
@given(data=pairs(), other=SEED, temperature=TEMPERATURE, seed=SEED)
def test_p25_monotone_gradient(backend, data, other, temperature, seed):
    student, teacher = as_seen(backend, *data)
    noise = torch.randn(student.shape, generator=generator(other))
    second = (student.double() + noise).to(student.dtype)
    labels = labels_of(student, seed)
    for options in (dict(temperature=temperature, alpha=1.0), dict(alpha=0.0)):
        gap = second.double() - student.double()
        product, slack = torch.zeros(len(gap), dtype=torch.float64), 0.0
        for sign, x in ((-1, student), (1, second)):
            grad = gradient(backend, x, teacher, labels, **options).double()
            ref = reference(x, teacher, labels, reduction="none", **options)
            product = product + sign * (grad * gap).sum(-1)
            slack = slack + (gradient_bound(ref) * gap.abs()).sum(-1)
        assert (product >= -slack).all()


# --- composition ---------------------------------------------------------------------------------


@checked()
@given(
    data=pairs(),
    divergence=DIVERGENCE,
    temperature=TEMPERATURE,
    alpha=st.sampled_from([0.25, 0.5, 0.9]),
    seed=SEED,
)
def test_p26_affine_in_alpha(backend, data, divergence, temperature, alpha, seed):
    student, teacher = as_seen(backend, *data)
    labels = labels_of(student, seed)
    options = dict(divergence=divergence, temperature=temperature)
    hard, soft, both = (
        rows(backend, student, teacher, labels, alpha=a, **options) for a in (0.0, 1.0, alpha)
    )
    assert_close(both, (1 - alpha) * hard + alpha * soft, SUMS[backend], floor=1e-12)
    ref = reference(student, teacher, labels, alpha=alpha, reduction="none", **options)
    grad = gradient(backend, student, teacher, labels, alpha=alpha, **options)
    assert_gradient_close(grad, ref, check_blind=False)
    # At the ends the other term is not there: neither its labels nor its teacher matter.
    soft_grad = gradient(backend, student, teacher, labels, alpha=1.0, **options)
    assert_same_bits(
        (rows(backend, student, teacher, **options), soft),
        (gradient(backend, student, teacher, **options), soft_grad),
    )
    absent = torch.full_like(teacher, math.nan)
    assert_same_bits(
        (rows(backend, student, absent, labels, alpha=0.0), hard),
        (
            gradient(backend, student, absent, labels, alpha=0.0),
            gradient(backend, student, teacher, labels, alpha=0.0, **options),
        ),
    )


@checked()
@given(data=pairs(most_rows=6), divergence=DIVERGENCE, temperature=TEMPERATURE, seed=SEED)
def test_p27_rows_add_up(backend, data, divergence, temperature, seed):
    student, teacher = as_seen(backend, *data)
    labels = labels_of(student, seed)
    options = dict(divergence=divergence, temperature=temperature, reduction="sum", backend=backend)
    whole = kd_loss(student, teacher, labels, **options).double()
    half = len(student) // 2
    parts = [
        kd_loss(student[at], teacher[at], labels[at], **options).double()
        for at in (slice(0, half), slice(half, None))
    ]
    assert_close(sum(parts), whole, SUMS[backend])
    each = rows(backend, student, teacher, labels, divergence=divergence, temperature=temperature)
    assert_close(each.sum(), whole, SUMS[backend])


@checked()
@given(data=pairs(most_rows=6), divergence=DIVERGENCE, weighted=st.booleans(), seed=SEED)
def test_p28_mean_times_count_is_the_sum(backend, data, divergence, weighted, seed):
    student, teacher = as_seen(backend, *data)
    labels = labels_of(student, seed)
    labels[torch.rand(len(labels), generator=generator(seed)) < 0.3] = -100
    weights = torch.rand(len(labels), generator=generator(seed + 1)) if weighted else None
    count = (labels != -100).sum().double()
    if weighted:
        count = weights.masked_fill(labels == -100, 0).double().sum()
    options = dict(divergence=divergence, token_weights=weights, backend=backend)
    total = kd_loss(student, teacher, labels, reduction="sum", **options).double()
    mean = kd_loss(student, teacher, labels, **options).double()
    assert_close(mean * count, total, SUMS[backend])
    shared = kd_loss(student, teacher, labels, num_items=7, **options).double()
    assert_close(shared * 7, total, SUMS[backend])


@pytest.mark.parametrize("number", range(1, 29))
def test_every_property_has_its_test(number):
    assert any(name.startswith(f"test_p{number:02d}_") for name in globals())
