"""The numeric bars N1 to N11 of the loss, on every usable backend, against float64.

Eager is held to them in float64: its float32 forms log q − log p by subtraction and need not meet
them. Every test prints the worst value it measured, which pytest shows when it fails.
"""

import functools
import math

import cuda_for_cpu
import cuda_on_cpu
import mpmath
import pytest
import torch
from conftest import (
    DIVERGENCES,
    DTYPES,
    NAMES,
    assert_plus_zero,
    assert_same_bits,
    random_like,
    run,
)
from oracle import (
    HALVES,
    assert_gradient_close,
    assert_loss_close,
    blind_share,
    correctly_rounded,
    gradient_bound,
    gradient_ratio,
    reference,
    relative_error,
    visible,
)
from rows import (
    VOCABULARIES,
    at_offset,
    confident,
    flat,
    generator,
    moved,
    nudged,
    on_grid,
    realistic,
)

from kdkernels import kd_loss

GRID = 2.0**-6  # what float32 resolves at the largest shift of N2
SHIFT = 2.0**17


def precise(backend):
    """The dtype in which a backend must meet the bars."""
    return torch.float64 if backend == "eager" else torch.float32


def bar_of(backend, cpu, gpu):
    """A bar that is another one on GPUs, whose exponentials are less exact (hazards.md (d))."""
    return gpu if backend in ("triton", *cuda_for_cpu.NAMES) else cpu


def check(name, measured, bar):
    print(f"{name}: {measured:.3g} (bar {bar:.3g})")
    assert measured <= bar, f"{name}: {measured:.3g} > {bar:.3g}"


def rows_of(backend, student, teacher, labels=None, **options):
    """The row losses."""
    return kd_loss(student, teacher, labels, reduction="none", backend=backend, **options)


# --- the oracle ----------------------------------------------------------------------------------


def mp_divergence(s, t, temperature, divergence, beta):
    """The definition in 50 digits: lists of mpf -> mpf."""

    def softmax(x):
        e = [mpmath.exp(value / temperature) for value in x]
        return [value / sum(e) for value in e]

    def kl(a, b):
        return sum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True) if x)

    def mix(a, b):
        return [beta * x + (1 - beta) * y for x, y in zip(a, b, strict=True)]

    q, p = softmax(s), softmax(t)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mix(p, q)) + (1 - beta) * kl(q, mix(p, q)),
        "skew_forward_kl": lambda: kl(p, mix(p, q)),
        "skew_reverse_kl": lambda: kl(q, mix(q, p)),
        "tvd": lambda: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
    }[divergence]()


# 1 is far apart, 1e-12 two digits below the smallest KL any bar speaks of.
@pytest.mark.parametrize("distance", [1.0, 1e-5, 1e-12])
@pytest.mark.parametrize("divergence", NAMES)
def test_oracle_agrees_with_50_digits(divergence, distance):
    _, teacher, _ = realistic(2, 12, dtype=torch.float64)
    student = moved(teacher, distance)
    teacher[1, 3] = student[1, 3] = -math.inf
    beta = {"forward_kl": None, "reverse_kl": None, "tvd": None}.get(divergence, 0.25)
    options = dict(divergence=divergence, beta=beta, temperature=1.5)
    ref = reference(student, teacher, reduction="none", **options)
    h = mpmath.mpf(10) ** -20
    with mpmath.workdps(80):
        for row in range(2):
            s, t = ([mpmath.mpf(value) for value in x[row].tolist()] for x in (student, teacher))
            exact = mp_divergence(s, t, 1.5, divergence, beta)
            assert abs(ref.distill[row].item() / 2.25 / exact - 1) < 1e-9
            for i in (0, 3, 7):
                up, down = ([*s[:i], s[i] + e, *s[i + 1 :]] for e in (h, -h))
                slope = mp_divergence(up, t, 1.5, divergence, beta)
                slope -= mp_divergence(down, t, 1.5, divergence, beta)
                slope *= 2.25 / (2 * h)
                assert abs(ref.grad[row, i].item() - slope) <= 1e-8 * abs(slope)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_oracle_agrees_with_eager_float64(divergence, beta):
    student, teacher, labels = realistic(6, 300, dtype=torch.float64)
    student[0, 3] = teacher[0, 3] = student[1, 4] = teacher[2, 5] = -math.inf
    if divergence == "reverse_kl" or (divergence, beta) == ("jsd", 1.0):
        teacher[2, 5] = 0.0
    labels[3] = -100
    weights = torch.tensor([1, 0.5, 2, 1, 0, 3.0], dtype=torch.float64)
    for options in (
        dict(temperature=0.7, token_weights=weights),
        dict(temperature=5.0, t_squared=False, label_smoothing=0.1, num_items=9),
        dict(alpha=0.0, vocab_size=290, reduction="sum"),
        dict(alpha=1.0, reduction="none", token_weights=weights),
    ):
        options.update(divergence=divergence, beta=beta)
        labels = labels.clamp(max=options.get("vocab_size", 300) - 1)
        upstream = random_like(kd_loss(student, teacher, labels, **options, backend="eager"))
        loss, grad = run(student, teacher, labels, upstream=upstream, **options, backend="eager")
        ref = reference(student, teacher, labels, upstream=upstream, **options)
        assert_loss_close(loss, ref, 1e-12)
        assert_gradient_close(grad, ref, check_blind=False)


# --- N1, N6: confident rows ----------------------------------------------------------------------

# 2: one other class; 17: a tail; 1000, 50257, 128256: the widths of the other bars.
N1_WIDTHS = (2, 17, 1000, 50257, 128256)


def cross_entropy_rows(backend, dtype, v):
    """Confident rows, and rows whose label is no peak (their loss is large)."""
    # Eager in float64 forms 1 − q, which is 1e-6 exact while the loss is above about 1e-8.
    margins = range(5, 18, 4) if backend == "eager" else range(5, 70, 4)
    yield "confident", *confident(v, dtype=dtype, seed=v, margins=margins)
    student, _, labels = realistic(4, v, dtype=dtype, seed=v)
    yield "any", student, labels


def cross_entropy_dtypes(backend, v):
    if backend == "eager":
        return (torch.float64,)
    return DTYPES if v < 128256 else (torch.float32,)


@pytest.mark.parametrize("v", N1_WIDTHS)
def test_n1_cross_entropy(backend, v):
    if backend == "eager" and v > 50257:
        pytest.skip("as at V = 50257")
    for dtype in cross_entropy_dtypes(backend, v):
        for name, student, labels in cross_entropy_rows(backend, dtype, v):
            ref = reference(student, student, labels, alpha=0.0, reduction="none")
            known = ref.loss >= 1e-30
            assert known.sum() >= len(known) - 1  # a half's rounding may push the last one out
            loss = rows_of(backend, student, student, labels, alpha=0.0)
            worst = relative_error(loss, ref.loss)[known].max().item()
            check(f"N1 {dtype} V={v} {name}", worst, bar_of(backend, 1e-6, 2e-6))


@pytest.mark.parametrize("v", [2, 3, 64])
def test_n1_n6_labels_a_little_ahead(exact, dtype, v):
    # Margins between those that one float holds and those that take two: e^-3.5 to e^-8.
    n = 2000
    logits = torch.randn(n, v, generator=generator(v))
    labels = torch.randint(v, (n,), generator=generator(v + 1))
    rest = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
    ahead = rest + torch.linspace(3.4, 8.0, n)
    logits = logits.scatter(1, labels[:, None], ahead[:, None]).to(dtype)
    ref = reference(logits, logits, labels, alpha=0.0, reduction="none")
    loss, grad = run(
        logits, logits, labels, alpha=0.0, reduction="none", upstream=torch.ones(n), backend=exact
    )
    worst = relative_error(loss, ref.loss).max().item()
    check(f"N1 {dtype} V={v}, a little ahead", worst, bar_of(exact, 1e-6, 2e-6))
    if dtype not in HALVES:
        at_label = labels[:, None]
        got, exact_grad = (x.double().gather(1, at_label) for x in (grad, ref.grad))
        worst = relative_error(got, exact_grad).max().item()
        check(f"N6 V={v}, a little ahead", worst, bar_of(exact, 1e-6, 2e-6))


def test_n1_a_difference_that_one_float_does_not_hold(compiled, dtype):
    # 65 − 3.7e-6 has more bits than a float, in every dtype; the loss is e to that power.
    student = torch.full((1, 1000), 3.7e-6).to(dtype)
    student[0, 0] = 65
    labels = torch.zeros(1, dtype=torch.int64)
    for temperature in (1.0, 2.0, 2.5):
        options = dict(temperature=temperature, return_terms=True, backend=compiled)
        hard = kd_loss(student, student, labels, **options).hard
        exact = reference(student, student, labels, alpha=0.0, reduction="sum").loss
        worst = relative_error(hard, exact).item()
        check(f"N1 {dtype} T={temperature:g}", worst, bar_of(compiled, 1e-6, 2e-6))


@pytest.mark.parametrize("v", N1_WIDTHS)
def test_n6_true_class_gradient(backend, v):
    if backend == "eager" and v > 1000:
        pytest.skip("as at V = 1000")
    for name, student, labels in cross_entropy_rows(backend, precise(backend), v):
        _, grad = run(student, student, labels, alpha=0.0, reduction="sum", backend=backend)
        upstream = random_like(grad.sum())
        ref = reference(student, student, labels, alpha=0.0, reduction="sum", upstream=upstream)
        actual, exact = (x.gather(-1, labels[:, None]) for x in (grad, ref.grad))
        check(f"N6 V={v} {name}", relative_error(actual, exact).max().item(), 1e-6)


# --- N2, N3, N9: near-equal rows -----------------------------------------------------------------

NEAR = (2e-8, 2e-7, 2e-6, 5e-5, 1e-3)  # the KL of the pairs: every decade that has a bar
TEMPERATURES = (1.0, 3.0, 64.0, 1024.0)  # the domain's ends and what people use


@functools.cache
def near_pairs(v, dtype, temperature):
    """{name: (student, teacher, KL)}: a row for every KL of NEAR, either side shifted exactly."""
    _, base, _ = realistic(len(NEAR), v, seed=v)
    base = on_grid(base, GRID)
    step = GRID * 2.0 ** max(0, math.ceil(math.log2(temperature)) - 3)
    level = torch.cat([flat(1, v, seed=i) for i in range(len(NEAR))])
    dense, steps, even = [], [], []
    for i, kl in enumerate(NEAR):
        dense.append(moved(base[i], kl, temperature, seed=i))
        steps.append(nudged(base[i], kl, step, temperature))
        even.append(moved(level[i], kl, temperature, seed=i))
    dense, steps, even = (torch.stack(x) for x in (dense, steps, even))
    pairs = {
        "student off grid": (dense, base),
        "student shifted": (base + SHIFT, dense),
        "teacher shifted": (dense, base - SHIFT),
        "both shifted": (base + SHIFT, steps - SHIFT),
        "flat": (even, level),
    }
    return {name: with_kl(s.to(dtype), t.to(dtype), temperature) for name, (s, t) in pairs.items()}


@functools.cache
def near_half_pairs(v, dtype):
    """The same for logits whose spacing is too coarse for `moved`."""
    step = 2.0**-4 if dtype == torch.bfloat16 else 2.0**-7
    _, base, _ = realistic(len(NEAR), v, seed=v)
    base = on_grid(base, step).clamp(-15, 15)
    near = torch.stack([nudged(row, kl, step) for row, kl in zip(base, NEAR, strict=True)])
    return {f"{dtype}": with_kl(near.to(dtype), base.to(dtype), 1.0)}


def with_kl(student, teacher, temperature):
    """(student, teacher, forward KL): all rows but one must be in the domain of the bars."""
    kl = reference(student, teacher, temperature=temperature, t_squared=False).distill
    assert (kl >= 1e-8).sum() >= len(kl) - 1, kl
    return student, teacher, kl


# The smallest of the domain, one past two tiles, and two real ones.
@pytest.mark.parametrize("v", [1000, 4097, 32000, 128256])
@pytest.mark.parametrize(
    ("divergence", "beta", "bar"),
    [
        ("forward_kl", None, 1e-5),  # N2
        ("reverse_kl", None, 2e-5),  # N3
        ("jsd", 0.5, 5e-6),
        ("jsd", 0.1, 5e-6),
        ("jsd", 0.9, 5e-6),
    ],
)
def test_n2_n3_n9_near_equal_rows(backend, divergence, beta, bar, v):
    if divergence == "jsd":
        bar = bar_of(backend, bar, 1e-5)
    if v > 1000 and (backend == "eager" or beta in (0.1, 0.9)):
        pytest.skip("as at V = 1000")
    for temperature in TEMPERATURES if v <= 4097 else (1.0,):
        pairs = dict(near_pairs(v, precise(backend), temperature))
        if backend != "eager" and temperature == 1.0 and v < 128256:
            for dtype in HALVES:
                pairs.update(near_half_pairs(v, dtype))
        options = dict(divergence=divergence, beta=beta, temperature=temperature, reduction="none")
        worst = (0.0, "")
        for name, (student, teacher, kl) in pairs.items():
            loss, grad = run(
                student, teacher, upstream=torch.ones(len(NEAR)), backend=backend, **options
            )
            ref = reference(student, teacher, **options)
            inside = kl >= 1e-8
            # Eager's sum of signed terms may end below 0 by its rounding.
            assert (loss >= 0)[inside if backend == "eager" else ...].all()
            worst = max(worst, (relative_error(loss, ref.rows)[inside].max().item(), name))
            where = f"{divergence} {beta} V={v} T={temperature:g}, {name}"
            assert_gradient_close(grad, ref, check_blind=False)
            if divergence == "forward_kl" and grad.dtype not in HALVES:
                check_near_gradient(f"N9 {where}", backend, grad, ref, kl, seen=name == "flat")
        check(f"N2/N3 {divergence} {beta} V={v} T={temperature:g}, {worst[1]}", worst[0], bar)


def check_near_gradient(name, backend, grad, ref, kl, seen):
    """N9. On rows where every class counts (`seen`), N4 and N9 together must see every entry."""
    error = (grad.double() - ref.grad).abs().amax(-1)
    largest = ref.grad.abs().amax(-1)
    for low, high, cpu_bar in ((1e-7, 1e-4, 1e-4), (1e-8, 1e-7, 3e-4)):
        bar = bar_of(backend, cpu_bar, 2e-3)
        at = (kl >= low) & (kl <= high)
        if at.any():
            check(f"{name}, KL >= {low:g}", (error / largest)[at].max().item(), bar)
    if seen:
        bound = torch.minimum(gradient_bound(ref), 1e-4 * largest[:, None])
        at = (kl >= 1e-7) & (kl <= 1e-4)
        check(f"{name}, blind share", blind_share(ref.grad[at], bound[at], visible(ref)[at]), 1e-4)


# 2, 3: the fewest classes; 5, 16, 17, 33: tails; 1000, 4097: where the sharper bar begins.
@pytest.mark.parametrize("v", [2, 3, 5, 16, 17, 33, 1000, 4097])
def test_n2_any_width_and_low_temperatures(backend, v):
    for temperature in (0.1, 0.3, 1.0, 2.0, 1024.0):  # 0.1: the domain's end
        for seed in range(4):
            _, teacher, _ = realistic(len(NEAR), v, seed=seed)
            student = torch.stack(
                [moved(teacher[i], kl, temperature, seed) for i, kl in enumerate(NEAR)]
            )
            student, teacher = (x.to(precise(backend)) for x in (student, teacher))
            exact = reference(student, teacher, temperature=temperature, t_squared=False).rows
            known = exact >= 1e-8
            assert known.any()
            loss = rows_of(backend, student, teacher, temperature=temperature, t_squared=False)
            assert (loss >= 0)[known if backend == "eager" else ...].all()
            error = relative_error(loss, exact)[known].max().item()
            check(f"N2 V={v} T={temperature:g}", error, 2e-4)


@pytest.mark.parametrize("dtype_of_rows", DTYPES)
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_n2_equal_rows_are_exactly_0(compiled, dtype_of_rows, divergence, beta):
    options = dict(divergence=divergence, beta=beta, temperature=3.0, reduction="none")
    for v in (1, 17, 1000, 50257):  # one class; a tail; the bars' first width; an odd one
        logits = on_grid(realistic(2, v, seed=v)[0], 0.25).clamp(-15, 15).to(dtype_of_rows)
        pairs = [(logits, logits)]
        if dtype_of_rows != torch.bfloat16:  # 8 bits: no shift is exact on this grid
            shifted = logits + (SHIFT if dtype_of_rows == torch.float32 else 16)
            pairs += [(shifted, logits), (logits, shifted)]
        for student, teacher in pairs:
            loss, grad = run(student, teacher, backend=compiled, **options)
            assert not loss.any() and not grad.any()


def far_pairs(v, temperature):
    """name, student, teacher (n, v) float32: KLs from 0.05 on, as training begins with."""
    g = torch.Generator().manual_seed(v)
    n = 8 if v < 32000 else 3
    unit = torch.linspace(-2, 2, n)[:, None] * temperature
    base, noise = (torch.randn(n, v, generator=g) * temperature for _ in range(2))
    for size in (0.3, 0.6, 1.0, 4.0):
        yield f"noise {size}", 3 * base + size * noise, 3 * base
    student, teacher = on_grid(3 * base + noise, 0.25), on_grid(3 * base, 0.25)
    yield "shifted", student + SHIFT, teacher - SHIFT / 2
    # The same logit in nearly every class: equal roundings add up instead of cancelling.
    flat = torch.zeros(n, v)
    spike = flat.index_fill(1, torch.tensor([0]), 1.0) * (math.log(v) * temperature + unit)
    yield "student's spike", spike, flat
    yield "teacher's spike", flat, spike
    level = flat.index_fill(1, torch.arange(v // 3), -0.7 * temperature)
    yield "levels", level + spike, level.roll(v // 5, 1)


FAR_BARS = {"forward_kl": 1e-5, "jsd": 5e-6}  # N2, N3; the others have N3's 2e-5


@pytest.mark.parametrize("v", [17, 1000, 4097, 32000])  # a tail; the domain's smallest; tiles; real
@pytest.mark.parametrize("divergence", NAMES)
def test_n2_n3_rows_far_apart(backend, divergence, v):
    for temperature in (1.0, 2.0, 1024.0):
        options = dict(divergence=divergence, temperature=temperature)
        for name, student, teacher in far_pairs(v, temperature):
            student, teacher = (x.to(precise(backend)) for x in (student, teacher))
            loss = rows_of(backend, student, teacher, **options)
            exact = reference(student, teacher, **options).rows
            worst = relative_error(loss, exact).max().item()
            bar = FAR_BARS.get(divergence, 2e-5)
            if divergence == "jsd":
                bar = bar_of(backend, bar, 1e-5)
            check(f"{divergence} V={v} T={temperature:g}, {name}", worst, bar)


# --- N4, N5, N7: gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("v", VOCABULARIES)
def test_n4_gradient_at_every_width(backend, v):
    if backend == "eager" and v > 1000:
        pytest.skip("eager has no tails")
    n = 2 if v > 5000 else 8
    student, teacher, labels = realistic(n, v, dtype=precise(backend), seed=v)
    all_options = (
        dict(temperature=2.0, alpha=0.5, label_smoothing=0.1),
        dict(temperature=1.0, alpha=1.0),
        dict(alpha=0.0),
    )
    for options in all_options[: 1 if v > 5000 else 3]:
        _, grad = run(
            student,
            teacher,
            labels,
            upstream=torch.ones(n),
            backend=backend,
            reduction="none",
            **options,
        )
        ref = reference(student, teacher, labels, reduction="none", **options)
        assert_gradient_close(grad, ref)
        check(f"N4 V={v} {options}, error / bound", gradient_ratio(grad, ref), 1.0)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.3])  # 7.3: no special case's number
def test_n4_gradient_of_every_divergence(backend, divergence, beta, temperature):
    for v in (33, 4097):  # two vectors and a tail; past two tiles
        if backend == "eager" and v == 4097:
            continue
        student, teacher, labels = realistic(6, v, dtype=precise(backend), seed=v)
        options = dict(divergence=divergence, beta=beta, temperature=temperature)
        weights = torch.tensor([1, 0.5, 3, 1, 0, 0.1])
        for more in (dict(alpha=1.0), dict(alpha=0.3, token_weights=weights)):
            upstream = torch.tensor(0.7)
            _, grad = run(
                student, teacher, labels, upstream=upstream, backend=backend, **options, **more
            )
            ref = reference(student, teacher, labels, upstream=upstream, **options, **more)
            assert_gradient_close(grad, ref)
            check(f"N4 {options} V={v}, error / bound", gradient_ratio(grad, ref), 1.0)


# At these most of p and q is equal or 0, and entries that small hide in the bound; it still holds.
@pytest.mark.parametrize("temperature", [2.0**-20, 2.0**-10, 0.1, 2.0**10, 2.0**20])
def test_n4_gradient_at_extreme_temperatures(backend, temperature):
    for divergence in NAMES:
        student, teacher, _ = realistic(6, 1000, dtype=precise(backend))
        options = dict(divergence=divergence, temperature=temperature, reduction="sum")
        _, grad = run(student, teacher, upstream=torch.tensor(1.0), backend=backend, **options)
        ref = reference(student, teacher, **options)
        assert_gradient_close(grad, ref, check_blind=False)


HALF_PAIRS = [
    *((dtype, other) for dtype in HALVES for other in (dtype, torch.float32)),
    (torch.bfloat16, torch.float16),
]


# V = 1000: the first width of the KL bars; 50257: an odd real one.
@pytest.mark.parametrize("v", [1000, 50257])
@pytest.mark.parametrize("divergence", NAMES)
def test_n5_half_gradients_are_rounded_once(compiled, divergence, v):
    for dtype, teacher_dtype in HALF_PAIRS if v == 1000 else HALF_PAIRS[::2]:
        n = 48 if v == 1000 else 2  # a share of 0.1 % takes many entries to measure
        student, teacher, labels = realistic(n, v, dtype=dtype, teacher_dtype=teacher_dtype, seed=1)
        for temperature in (1.0, 2.0):
            options = dict(divergence=divergence, temperature=temperature, reduction="sum")
            upstream = torch.tensor(1.0)
            _, grad = run(student, teacher, labels, upstream=upstream, backend=compiled, **options)
            ref = reference(student, teacher, labels, upstream=upstream, **options)
            right, normal = correctly_rounded(grad, ref)
            print(f"N5 {dtype} {options} V={v}: {right / normal:.5f} of {normal} are right")
            assert_gradient_close(grad, ref)


@pytest.mark.parametrize("v", [1000, 50257])  # as above
@pytest.mark.parametrize("divergence", NAMES)
def test_n5_float16_mean_under_a_loss_scale(compiled, divergence, v):
    # As mixed-precision training has it: without the scale nearly every entry is below float16,
    # and it arrives in the backward pass only (H18). A mean over 128 tokens, as fewer would bring
    # the largest entries near float16's own end, and with them its smallest ones, 2^-39 as large,
    # would be rounded twice in their last bit.
    n = 128 if v == 1000 else 4  # a share of 0.1 % takes many entries to measure
    student, teacher, labels = realistic(n, v, dtype=torch.float16, seed=1)
    upstream = torch.tensor(2.0**16)
    for temperature in (1.0, 2.0):
        options = dict(divergence=divergence, temperature=temperature, num_items=128)
        _, grad = run(student, teacher, labels, upstream=upstream, backend=compiled, **options)
        ref = reference(student, teacher, labels, upstream=upstream, **options)
        right, normal = correctly_rounded(grad, ref)
        print(f"N5 loss scale {options} V={v}: {right / normal:.5f} of {normal} are right")
        print(f"N5 error / bound {gradient_ratio(grad, ref):.3g}")
        assert_gradient_close(grad, ref)


@pytest.mark.parametrize("dtype_of_student", HALVES)
def test_n5_any_upstream(compiled, dtype_of_student):
    student, teacher, labels = realistic(8, 2000, dtype=dtype_of_student)
    upstream = torch.tensor([1.0, 0.3, -2.0, 1e-3, 700.0, 0.0, 1 / 3, -1.1])
    options = dict(reduction="none", temperature=2.0)
    _, grad = run(student, teacher, labels, upstream=upstream, backend=compiled, **options)
    assert_gradient_close(grad, reference(student, teacher, labels, upstream=upstream, **options))


@pytest.mark.parametrize("divergence", NAMES)
def test_n7_gradient_row_sum(backend, divergence):
    for v in (17, 1000, 50257):  # a tail; the first of the domain; odd
        if backend == "eager" and v == 50257:
            continue
        student, teacher, labels = realistic(3, v, dtype=precise(backend), seed=v)
        for temperature in (1.0, 2.0):
            for alpha in (0.0, 0.5, 1.0):
                options = dict(
                    divergence=divergence, temperature=temperature, alpha=alpha, reduction="sum"
                )
                upstream = torch.tensor(1.0)
                _, grad = run(
                    student, teacher, labels, upstream=upstream, backend=backend, **options
                )
                scale = alpha * temperature + 1 - alpha
                worst = (grad.double().sum(-1).abs() / scale).max().item()
                check(f"N7 {options} V={v}, row sum / scale", worst, 2.0**-20)


# --- N8: exact shifts ----------------------------------------------------------------------------


def exact_shifts(dtype):
    """(grid, largest logit, shifts of student and teacher) such that every sum is exact."""
    if dtype == torch.bfloat16:
        return 1.0, 31, ((32.0, 0.0), (0.0, 64.0), (64.0, 32.0))  # 8 bits
    if dtype == torch.float16:
        return 0.25, 31, ((-64.0, 0.0), (0.0, 256.0), (256.0, -64.0))  # 11 bits
    return 0.25, 64, ((0.25, 0.0), (0.0, -1000.75), (SHIFT, -(2.0**20)), (-(2.0**20), SHIFT))


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_n8_exact_shifts_change_no_bit(backend, dtype, divergence, beta):
    grid, largest, shifts = exact_shifts(dtype)
    for v in (17, 4097):  # a tail; past two tiles
        if backend == "eager" and v == 4097:
            continue
        student, teacher, labels = realistic(4, v, seed=v)
        student, teacher = (
            on_grid(x - x.amin(), grid).clamp(0, largest).to(dtype) for x in (student, teacher)
        )
        for options in (
            dict(temperature=2.0),
            dict(temperature=0.3, alpha=0.0, label_smoothing=0.1),
        ):
            options.update(divergence=divergence, beta=beta, reduction="none", backend=backend)
            loss, grad = run(student, teacher, labels, **options)
            for c_s, c_t in shifts:
                assert torch.equal((student + c_s) - c_s, student)
                assert torch.equal((teacher + c_t) - c_t, teacher)
                actual = run(student + c_s, teacher + c_t, labels, **options)
                assert_same_bits(*zip(actual, (loss, grad), strict=True))


# --- N10: many rows ------------------------------------------------------------------------------


def test_n10_reduction_over_many_rows(backend):
    # 2^12 rows again and again: 2^22 in little memory, where a running sum in float32 keeps two
    # digits. (The bar goes to 2^24, which takes half a minute.) Eager adds up in the same place
    # and would need gigabytes for its temporaries.
    # The emulated GPU takes a tenth of a millisecond for a row, the interpreter some of them.
    times = {"eager": 2**6, cuda_on_cpu.NAME: 2, "triton": 1}.get(backend, 2**10)
    student, teacher, _ = realistic(2**12, 2)
    exact = rows_of(backend, student, teacher).double().mean().item()
    repeated = (x.expand(times, 2**12, 2) for x in (student, teacher))
    mean = kd_loss(*repeated, backend=backend).item()
    check("N10", abs(mean / exact - 1), 1e-6)


# --- N11: determinism ----------------------------------------------------------------------------

# Rows of these differ in everything a kernel may be tempted to depend on.
N11_OPTIONS = (
    dict(temperature=2.0),
    dict(divergence="jsd", temperature=1.0, label_smoothing=0.1),
    dict(divergence="reverse_kl", temperature=0.7, alpha=1.0),
)


def n11_problem(backend, dtype, v=4099):  # prime: no block size divides it
    v = min(v, 521) if backend == "eager" else v  # and another
    student, teacher, labels = realistic(9, v, dtype=dtype)
    labels[4] = -100
    return student, teacher, labels


def row_outputs(backend, student, teacher, labels, **options):
    upstream = torch.ones(labels.shape)
    return run(
        student, teacher, labels, upstream=upstream, reduction="none", backend=backend, **options
    )


@pytest.mark.parametrize("options", N11_OPTIONS)
def test_n11_run_to_run(backend, dtype, options):
    problem = n11_problem(backend, dtype)
    first = run(*problem, **options, backend=backend)
    for _ in range(3):
        assert_same_bits(*zip(run(*problem, **options, backend=backend), first, strict=True))


@pytest.mark.parametrize("options", N11_OPTIONS)
def test_n11_batch_invariance(backend, dtype, options):
    student, teacher, labels = n11_problem(backend, dtype)
    loss, grad = row_outputs(backend, student, teacher, labels, **options)
    order = torch.randperm(9, generator=generator(1))
    permuted = row_outputs(backend, student[order], teacher[order], labels[order], **options)
    assert_same_bits((permuted[0], loss[order]), (permuted[1], grad[order]))
    for rows in (slice(0, 1), slice(8, 9), slice(3, 8), slice(0, 9, 2)):
        part = row_outputs(backend, student[rows], teacher[rows], labels[rows], **options)
        assert_same_bits((part[0], loss[rows]), (part[1], grad[rows]))
    cube = row_outputs(
        backend, student.view(3, 3, -1), teacher.view(3, 3, -1), labels.view(3, 3), **options
    )
    assert_same_bits((cube[0].flatten(), loss), (cube[1].flatten(0, 1), grad))


@pytest.mark.parametrize("v", [60, 4099])
@pytest.mark.parametrize("divergence", NAMES)
def test_n11_rows_of_every_kind_together(backend, divergence, v):
    """Far apart, nearly equal and confident rows: each with the bits it has by itself."""
    student, teacher, labels = realistic(4, v, dtype=precise(backend), seed=v)
    teacher[1] = student[1] + 1e-3 * teacher[0]
    student[2] += 40.0 * (torch.arange(v) == labels[2])
    teacher[3] = student[3]
    for temperature in (1.0, 1.7):
        options = dict(divergence=divergence, temperature=temperature)
        loss, grad = row_outputs(backend, student, teacher, labels, **options)
        for row in range(4):
            same = [x[row].expand(4, *x.shape[1:]) for x in (student, teacher, labels)]
            alone = row_outputs(backend, *(x.contiguous() for x in same), **options)
            assert_same_bits((alone[0][0], loss[row]), (alone[1][0], grad[row]))


@pytest.mark.parametrize("v", [7, 33, 4099])  # less than a vector; two and a tail; many blocks
def test_n11_alignment_invariance(backend, dtype, v):
    student, teacher, labels = n11_problem(backend, dtype, v)
    expected = row_outputs(backend, student, teacher, labels, **N11_OPTIONS[0])
    for offset in range(1, 16):
        for moved_student, moved_teacher in ((offset, 0), (0, offset), (offset, 16 - offset)):
            actual = row_outputs(
                backend,
                at_offset(student, moved_student),
                at_offset(teacher, moved_teacher),
                at_offset(labels, offset),
                **N11_OPTIONS[0],
            )
            assert_same_bits(*zip(actual, expected, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", N11_OPTIONS)
def test_n11_thread_count_invariance(backend, dtype, options, threads):
    problem = n11_problem(backend, dtype)
    results = []
    for count in (1, 2, 3):  # one, as many as CI has, and more rows than divide evenly
        threads(count)
        results.append(run(*problem, **options, backend=backend))
    for result in results[1:]:
        assert_same_bits(*zip(result, results[0], strict=True))


def test_n11_ignored_rows_are_plus_0(backend, dtype):
    student, teacher, labels = n11_problem(backend, dtype)
    loss, grad = row_outputs(backend, student, teacher, labels)
    assert_plus_zero(loss[4])
    assert_plus_zero(grad[4])


@pytest.mark.parametrize("name", ["reverse_kl", "skew_reverse_kl"])
def test_n7_gradient_row_sum_where_the_slopes_are_large(backend, name):
    """Rounded probabilities do not add up to 1: with slopes of 1000 the row sum shows it."""
    dtype = torch.float64 if backend == "eager" else torch.float32
    for v in (67, 1000, 3001):
        student, teacher = torch.zeros(1, v, dtype=dtype), torch.zeros(1, v, dtype=dtype)
        teacher[0, 5] = 1000.0
        options = dict(divergence=name, reduction="sum", backend=backend)
        _, grad = run(student, teacher, upstream=torch.tensor(1.0), **options)
        print(f"{name} {v}: row sum {grad.double().sum().item():.3g}")
        assert grad.double().sum().abs() <= 2.0**-20


# --- Rows that are far apart ---------------------------------------------------------------------

# With the betas at which φ of a class that only the student has is well above the bound.
SEPARATE = (("reverse_kl", None), ("jsd", 0.3), ("jsd", 0.5), ("skew_forward_kl", 0.1))


@pytest.mark.parametrize(("divergence", "beta"), (*SEPARATE, ("skew_reverse_kl", 0.1)))
def test_n4_of_classes_that_one_side_has_for_itself(compiled, divergence, beta):
    for v in (2, 3, 5, 17, 1000):
        student, teacher, _ = realistic(40, v, dtype=torch.float32, seed=v)
        student[:20, 0] += torch.arange(20.0)
        teacher[10:30, -1] += torch.arange(20.0) * 1.3
        options = dict(divergence=divergence, beta=beta, reduction="sum")
        _, grad = run(student, teacher, upstream=torch.tensor(1.0), backend=compiled, **options)
        worst = gradient_ratio(grad, reference(student, teacher, **options))
        check(f"N4 {divergence} V={v}", worst, 1.0)


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.125, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("v", [3, 17, 1000])
def test_n4_of_a_jsd_from_half_to_all_of_its_largest(compiled, v, beta):
    """φ changes little between classes that p or q has almost alone: Σ q φ must be as exact."""
    student, teacher, _ = realistic(400, v, dtype=torch.float32, seed=v)
    student[:, 0] += torch.linspace(0, 14, 400)
    teacher[:, -1] += torch.linspace(14, 0, 400)[torch.randperm(400, generator=generator(v))]
    options = dict(divergence="jsd", beta=beta, reduction="sum")
    _, grad = run(student, teacher, upstream=torch.tensor(1.0), backend=compiled, **options)
    check(f"N4 V={v}", gradient_ratio(grad, reference(student, teacher, **options)), 1.0)


# -60 is an ordinary logit, -80 of nearly the smallest normal probability, -95 of none.
@pytest.mark.parametrize("logit", [-60.0, -80.0, -86.0, -95.0, -math.inf])
@pytest.mark.parametrize("divergence", NAMES)
def test_n4_of_a_class_that_the_student_all_but_rules_out(compiled, divergence, logit):
    student, teacher = torch.full((1, 1000), -5.0), torch.full((1, 1000), -5.0)
    student[0, 0] = teacher[0, 1] = 0.0
    student[0, 1] = logit
    options = dict(divergence=divergence, reduction="sum")
    _, grad = run(student, teacher, upstream=torch.tensor(1.0), backend=compiled, **options)
    check("N4", gradient_ratio(grad, reference(student, teacher, **options)), 1.0)


@pytest.mark.parametrize("temperature", [2.0**-16, 2.0**-20])
def test_a_large_scale_times_no_probability(compiled, temperature):
    """1 / T² and a logit of -inf: 0 times what float32 does not hold."""
    student, teacher, labels = realistic(1, 50, dtype=torch.float32)
    student[0, 3] = -math.inf
    for divergence in ("reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        _, grad = run(
            student * temperature,
            teacher * temperature,
            labels,
            upstream=torch.tensor(1.0),
            backend=compiled,
            divergence=divergence,
            temperature=temperature,
            t_squared=False,
        )
        assert grad.isfinite().all()
        assert_plus_zero(grad[0, 3])


@pytest.mark.parametrize("divergence", NAMES)
def test_n7_of_a_tail_of_equal_logits(compiled, divergence):
    """Their exponentials are all rounded alike, and no error of theirs averages out."""
    v, temperature = 128256, 3.0
    student, teacher = torch.full((1, v), -11.366013), torch.full((1, v), -11.630389)
    student[0, :2] = torch.tensor([0.0, -0.1786276])
    teacher[0, v // 2 :] = -11.87685
    teacher[0, 0] = 0.0
    student, teacher = student * temperature, teacher * temperature
    options = dict(divergence=divergence, temperature=temperature, reduction="sum")
    _, grad = run(student, teacher, upstream=torch.tensor(1.0), backend=compiled, **options)
    check("N7", grad.double().sum().abs().item() / temperature, 2.0**-20)
