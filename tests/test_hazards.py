"""Hazards H1 to H18 and H28 to H30: values of logits, labels and T that break other losses.

This file has what logits hold and test_hazards_use.py how they come and what is done with them
(H19 to H27, H31, H34 to H37). H32 and H33 are about GPUs.
"""

import pytest
import torch
import torch.nn.functional as F
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

from kdkernels import kd_loss

IGNORE = -100

# Columns of 70 that are -inf, for each of seven rows: ends, a middle, whole vectors of any width.
ABSENT = ([], [0], [69], range(64), range(6, 70), range(16, 48), range(1, 70, 2))


def without_classes(x):
    """x (7, 70) with the classes of ABSENT ruled out."""
    return x.masked_fill(absent(), -INF)


def absent():
    mask = torch.zeros(7, 70, dtype=torch.bool)
    for row, columns in enumerate(ABSENT):
        mask[row, list(columns)] = True
    return mask


def every_divergence(test):
    return pytest.mark.parametrize("divergence, beta", DIVERGENCES)(test)


def assert_only_rows(bad, ours, sound):
    """The `bad` rows of loss and gradient are NaN, and no bit of any other row has changed."""
    rest = [row for row in range(len(ours[0])) if row not in bad]
    for x, y in zip(ours, sound, strict=True):
        assert x[bad].isnan().all()
        assert_same_bits((x[rest], y[rest]))


def test_h01_absent_classes_in_cross_entropy(backend, dtype):
    student, teacher, _ = problem(7, 70, dtype=dtype)
    student = without_classes(student)
    labels = (~absent()).float().multinomial(1)[:, 0]
    loss, grad = run(student, teacher, labels, alpha=0.0, reduction="none", backend=backend)
    assert loss.isfinite().all() and not grad[absent()].any()
    assert_right(backend, loss, grad, student, teacher, labels, alpha=0.0, reduction="none")


@pytest.mark.parametrize("leading", [32768, 65536])
def test_h01_whole_leading_tiles(backend, leading):
    student, teacher, labels = problem(2, 70001)
    labels.clamp_(min=leading)
    student[0, :leading] = teacher[0, :leading] = -INF
    options = dict(temperature=2.0, reduction="none")
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    assert not grad[0, :leading].any()
    assert_right(backend, loss, grad, student, teacher, labels, **options)


@every_divergence
def test_h02_absent_on_both_sides(backend, dtype, divergence, beta):
    student, teacher, _ = problem(7, 70, dtype=dtype)
    student, teacher = without_classes(student), without_classes(teacher)
    options = dict(divergence=divergence, beta=beta, temperature=2.0, reduction="none")
    loss, grad = run(student, teacher, backend=backend, **options)
    assert loss.isfinite().all() and not grad[absent()].any()
    assert_right(backend, loss, grad, student, teacher, **options)


# Where few classes are left to disagree about, hardly any gradient is: hence `check_blind=False`.


@every_divergence
def test_h03_teacher_rules_classes_out(backend, dtype, divergence, beta):
    student, teacher, _ = problem(7, 70, dtype=dtype)
    options = dict(divergence=divergence, beta=beta, temperature=2.0, reduction="none")
    full = run(student, teacher, backend=backend, **options)
    teacher = without_classes(teacher)
    loss, grad = run(student, teacher, backend=backend, **options)
    if divergence == "reverse_kl" or (divergence, beta) == ("jsd", 1):
        assert (loss[1:] == INF).all() and grad[1:].isnan().all()
        assert_same_bits((loss[0], full[0][0]), (grad[0], full[1][0]))
    else:
        assert loss.isfinite().all() and grad.isfinite().all()
        assert_right(backend, loss, grad, student, teacher, check_blind=False, **options)


@every_divergence
def test_h04_student_rules_classes_out(backend, dtype, divergence, beta):
    student, teacher, _ = problem(7, 70, dtype=dtype)
    student = without_classes(student)
    options = dict(divergence=divergence, beta=beta, temperature=2.0, reduction="none")
    loss, grad = run(student, teacher, backend=backend, **options)
    forward = divergence == "forward_kl" or (divergence, beta) == ("jsd", 0)
    assert loss.isinf().tolist() == [False] + 6 * [forward] and grad.isfinite().all()
    assert_right(backend, loss, grad, student, teacher, check_blind=False, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_h04_absent_label(backend, dtype, smoothing):
    """+inf, and PyTorch's gradient; one label class of -inf is enough for smoothing too."""
    student, teacher, labels = problem(3, 9, dtype=dtype)
    student[1, labels[1]] = -INF
    options = dict(alpha=0.0, label_smoothing=smoothing, reduction="none")
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    assert loss.tolist()[1] == INF and loss[[0, 2]].isfinite().all()
    leaf = student.double().requires_grad_()
    expected = F.cross_entropy(leaf, labels, label_smoothing=smoothing, reduction="none")
    (exact,) = torch.autograd.grad(expected, leaf, random_like(loss).double())
    assert grad.isfinite().all()
    torch.testing.assert_close(grad, exact.to(dtype))


# With beta = 1 too, where the value of a divergence no longer depends on what is bad.
of_any_value = pytest.mark.parametrize(
    "name, beta",
    [*((name, None) for name in NAMES), ("skew_forward_kl", 1.0), ("skew_reverse_kl", 1.0)],
)


@of_any_value
def test_h05_row_of_minus_inf(backend, dtype, name, beta):
    student, teacher, labels = problem(6, 19, dtype=dtype)
    options = dict(divergence=name, beta=beta, reduction="none", backend=backend)
    sound = run(student, teacher, **options)
    student[[1, 3]], teacher[[2, 3]] = -INF, -INF
    assert_only_rows([1, 2, 3], run(student, teacher, **options), sound)
    labels[[1, 2, 3]] = IGNORE
    loss, grad = run(student, teacher, labels, **options)
    assert_plus_zero(loss[1:4])
    assert_plus_zero(grad[1:4])


@pytest.mark.parametrize("bad", [INF, NAN], ids=["h06_plus_inf", "h07_nan"])
@pytest.mark.parametrize("who", ["student", "teacher"])
@of_any_value
def test_h06_h07_one_bad_logit(backend, dtype, bad, who, name, beta):
    student, teacher, labels = problem(6, 70, dtype=dtype)
    options = dict(divergence=name, beta=beta, temperature=1.7, backend=backend)
    sound = run(student, teacher, reduction="none", **options)
    x = {"student": student, "teacher": teacher}[who]
    x[1, 0] = x[2, 33] = x[3, 69] = bad
    assert_only_rows([1, 2, 3], run(student, teacher, reduction="none", **options), sound)
    loss, grad = run(student, teacher, labels, **options)
    assert loss.isnan() and grad[1:4].isnan().all() and grad[[0, 4, 5]].isfinite().all()


def test_h07_a_bad_teacher_leaves_the_cross_entropy_alone(backend, dtype):
    student, teacher, labels = problem(3, 19, dtype=dtype)
    options = dict(return_terms=True, reduction="sum", backend=backend)
    sound = kd_loss(student, teacher, labels, **options)
    teacher[1, 5] = NAN
    terms = kd_loss(student, teacher, labels, **options)
    assert terms.loss.isnan() and terms.distill.isnan()
    assert_same_bits((terms.hard, sound.hard))


@pytest.mark.parametrize(
    "why, reduction", [("ignored", "mean"), ("ignored", "none"), ("weight 0", "none")]
)
@pytest.mark.parametrize("name", NAMES)
def test_h08_content_of_rows_that_do_not_count(backend, dtype, why, reduction, name):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    weights = torch.tensor([0.5, 2.0, 0.0 if why == "weight 0" else 1.0, 1.0])
    labels[2] = IGNORE if why == "ignored" else labels[2]
    options = dict(divergence=name, token_weights=weights, reduction=reduction, backend=backend)
    sound = run(student, teacher, labels, **options)
    for bad in (NAN, INF, -INF):
        student[2], teacher[2] = bad, bad
        assert_same_bits(*zip(run(student, teacher, labels, **options), sound, strict=True))
    upstream = torch.full_like(sound[0], NAN)
    _, grad = run(student, teacher, labels, upstream=upstream, **options)
    assert_plus_zero(grad[2])
    assert grad[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("weight", [NAN, INF, 1e30, 0.0, -1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_h08_weight_of_an_ignored_row(backend, dtype, weight, reduction):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    labels[2] = IGNORE
    options = dict(reduction=reduction, backend=backend)
    weights = torch.tensor([0.5, 2.0, 1.0, 1.0])
    sound = run(student, teacher, labels, token_weights=weights, **options)
    weights[2] = weight
    ours = run(student, teacher, labels, token_weights=weights, **options)
    assert_same_bits(*zip(ours, sound, strict=True))


@pytest.mark.parametrize("rows", [3, 0])
def test_h09_nothing_counts(backend, dtype, rows):
    student, teacher, labels = problem(rows, 9, dtype=dtype)
    for reduction in ("mean", "sum", "none"):
        loss, grad = run(
            student, teacher, labels * 0 + IGNORE, reduction=reduction, backend=backend
        )
        assert_plus_zero(loss)
        assert_plus_zero(grad)


@every_divergence
def test_h10_one_class(backend, dtype, divergence, beta):
    student, teacher, labels = problem(5, 1, dtype=dtype, spread=100.0)
    options = dict(divergence=divergence, beta=beta, temperature=1.7, label_smoothing=0.1)
    loss, grad = run(student, teacher, labels, reduction="none", backend=backend, **options)
    assert not loss.any() and not grad.any()


def test_h11_no_class(backend, dtype):
    student = torch.empty(3, 0, dtype=dtype)
    with pytest.raises(ValueError, match="class"):
        kd_loss(student, student, backend=backend)
    empty = student[:0]
    assert_plus_zero(kd_loss(empty, empty, backend=backend))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_h05_h06_h07_without_a_teacher(backend, dtype, smoothing):
    """A row of -inf, +inf at and beside the label, NaN: NaN as a whole."""
    student, teacher, _ = problem(7, 70, dtype=dtype)
    labels = torch.full((7,), 3)
    options = dict(alpha=0.0, label_smoothing=smoothing, reduction="none", backend=backend)
    sound = run(student, teacher, labels, **options)
    student[1] = -float("inf")
    student[2, 3] = student[3, 60] = float("inf")
    student[4, 3] = student[5, 60] = NAN
    loss, grad = run(student, teacher, labels, **options)
    assert loss[1:6].isnan().all() and grad[1:6].isnan().all()
    assert_same_bits((loss[[0, 6]], sound[0][[0, 6]]), (grad[[0, 6]], sound[1][[0, 6]]))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_h4_infinite_even_where_the_labels_probability_underflows(
    backend, dtype, temperature, spread
):
    teacher = torch.randn(1, 1000) * 2 * temperature
    teacher[0, 7] = teacher.max() - 800 * temperature  # e^-800 is no double either
    teacher = teacher.to(dtype)
    student = teacher.clone()
    student[0, :500] += spread * temperature
    student[0, 7] = -INF
    labels = torch.tensor([7])
    options = dict(temperature=temperature, return_terms=True, backend=backend)
    assert kd_loss(student, teacher, labels, **options).distill == INF


def test_infinite_weights_do_not_stop_the_upstream_gradient(backend, dtype):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    options = dict(num_items=torch.tensor(INF), backend=backend)
    upstream = torch.full((), NAN, dtype=torch.promote_types(dtype, torch.float32))
    assert run(student, teacher, labels, upstream=upstream, **options)[1].isnan().all()


@pytest.mark.parametrize("label", [19, -1, 2**31 + 3, 2**32 + 3])
def test_h12_label_out_of_range(backend, dtype, label):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    labels[2] = label
    with pytest.raises(IndexError, match=str(label)):
        kd_loss(student, teacher, labels, backend=backend)


@pytest.mark.parametrize("temperature", [0, -1.0, NAN, INF, 2.0**-21, 2.0**21])
def test_h13_temperature_out_of_range(backend, dtype, temperature):
    with pytest.raises(ValueError, match="temperature"):
        kd_loss(*problem(4, 19, dtype=dtype), temperature=temperature, backend=backend)


@every_divergence
def test_h14_tiny_temperature(backend, dtype, divergence, beta):
    """softmax(x / T) is the one-hot of the maximum: agreeing rows have no divergence at all."""
    student, teacher, _ = problem(6, 19, dtype=dtype, spread=1.0)
    student[:, 7] = teacher[:, 7] = 100.0
    options = dict(divergence=divergence, beta=beta, temperature=2.0**-20, t_squared=False)
    loss, grad = run(student, teacher, reduction="none", backend=backend, **options)
    assert (loss.abs() <= 2.0**-22).all() and not grad.any()
    teacher[0, 7] = -100.0
    loss, grad = run(student, teacher, reduction="none", backend=backend, **options)
    assert loss[0] > 0.1 and not loss.isnan().any() and not grad.isnan().any()
    assert (loss[1:].abs() <= 2.0**-22).all() and not grad[1:].any()


@pytest.mark.parametrize("temperature", [2.0**-4, 2.0**-10, 2.0**-20])
@every_divergence
def test_h14_log_ratios_as_large_as_temperatures_are_tiny(
    backend, dtype, temperature, divergence, beta
):
    """A tie of the student that the teacher breaks: log(q / p) is 100 / T, the gradient is not."""
    student = torch.tensor([[0.0, 0.0, -1.0]]).to(dtype)
    teacher = torch.tensor([[0.0, -100.0, 1.0]]).to(dtype)
    options = dict(divergence=divergence, beta=beta, temperature=temperature)
    options["upstream"] = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    loss, grad = run(student, teacher, backend=backend, **options)
    assert grad.isfinite().all()
    assert_right(backend, loss, grad, student, teacher, check_blind=False, **options)


@pytest.mark.parametrize("temperature", [2.0**10, 2.0**20])
@every_divergence
def test_h15_huge_temperature(exact, dtype, temperature, divergence, beta):
    student, teacher, _ = problem(3, 1000, dtype=dtype, spread=2.0)
    options = dict(divergence=divergence, beta=beta, temperature=temperature, reduction="none")
    loss, _ = run(student, teacher, backend=exact, **options)
    assert (loss >= 0).all()
    bar = {"forward_kl": 1e-5, "reverse_kl": 2e-5, "jsd": 2e-5}.get(divergence, 2e-4)
    if temperature <= 2.0**10:  # beyond it the bars promise no relative accuracy
        assert_loss_close(loss, reference(student, teacher, **options), bar)


def test_h16_teacher_that_requires_grad(backend, dtype):
    student, teacher, labels = problem(4, 19, dtype=dtype)
    with pytest.raises(ValueError, match="teacher.*detach"):
        kd_loss(student, teacher.requires_grad_(), labels, backend=backend)


def test_h17_float16_sum(backend):
    student, teacher, labels = problem(64, 19, dtype=torch.float16)
    student[:, 3], labels[:] = 3e4, 4
    options = dict(alpha=0.0, reduction="sum")
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    assert loss.dtype == torch.float32 and loss > 1e6
    assert_right(backend, loss, grad, student, teacher, labels, **options)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**24, 3.0e6])
def test_h18_float16_gradients_survive_the_mean(backend, scale):
    """A loss scale arrives after the mean: what it lifts out of float16's range must be there."""
    student, teacher, labels = problem(64, 50, dtype=torch.float16, spread=1.0)
    options = dict(temperature=2.0, num_items=2**24, upstream=torch.tensor(scale))
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    assert_right(backend, loss, grad, student, teacher, labels, **options)
    assert grad.count_nonzero() > 0.99 * grad.numel()


def test_h18_float16_rows_of_unlike_weights(backend):
    """A heavy row must not push the gradients of the light ones out of float16's range."""
    student, teacher, labels = problem(4, 50, dtype=torch.float16, spread=1.0)
    weights = torch.tensor([1e6, 1.0, 1.0, 1e-3])
    options = dict(token_weights=weights, num_items=2**16, upstream=torch.tensor(2.0**10))
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    assert_right(backend, loss, grad, student, teacher, labels, **options)


def test_h18_upstream_and_one_rounding(compiled, dtype):
    """A power of 2 commutes with rounding, so it must be exact whatever the dtype."""
    student, teacher, labels = problem(8, 50, dtype=dtype)
    _, one = run(student, teacher, labels, upstream=torch.tensor(1.0), backend=compiled)
    _, many = run(student, teacher, labels, upstream=torch.tensor(64.0), backend=compiled)
    normal = one.abs() > torch.finfo(dtype).tiny * 2
    assert torch.equal(many[normal], one[normal] * 64) and normal.any()


# Steps of 1/4 and offsets that every dtype adds exactly.
OFFSET = {torch.float64: 2.0**40, torch.float32: 2.0**20, torch.float16: 256, torch.bfloat16: 16}


@pytest.mark.parametrize("name", NAMES)
def test_h28_exact_common_offsets_change_no_bit(backend, dtype, name):
    offset = OFFSET[dtype]
    limit = min(40, int(offset) // 4 * 4 - 1)
    exact = torch.randint(-limit, limit, (2, 4, 70)) / 4
    student, teacher = exact.to(dtype)
    labels = torch.randint(70, (4,))
    options = dict(divergence=name, temperature=1.7, reduction="none", backend=backend)
    plain = run(student, teacher, labels, **options)
    for signs in ((1, 0), (0, -1), (1, 1), (-1, 1)):
        moved = exact.double() + offset * torch.tensor(signs)[:, None, None]
        assert torch.equal(moved.to(dtype).double(), moved)
        ours = run(*moved.to(dtype), labels, **options)
        assert_same_bits(*zip(ours, plain, strict=True))


@pytest.mark.parametrize("margin", [5.0, 10.0, 20.0, 40.0, 60.0])
def test_h29_confident_rows(compiled, dtype, margin):
    student, teacher, labels = problem(6, 1000, dtype=dtype, spread=1.0)
    student.scatter_(-1, labels[:, None], 4.0 + margin)
    options = dict(alpha=0.0, reduction="none", upstream=torch.ones(6))
    ref = reference(student, teacher, labels, **options)
    loss, grad = run(student, teacher, labels, backend=compiled, **options)
    assert_loss_close(loss, ref, 1e-6)
    assert_gradient_close(grad, ref)  # the label's own entry to 1e-6, however small


@pytest.mark.parametrize("distance", [2.0**-5, 2.0**-8, 2.0**-11])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_h30_nearly_equal_rows(exact, dtype, distance, name):
    _, teacher, _ = problem(6, 1000, dtype=dtype)
    student = (teacher.double() + distance * torch.randn(6, 1000)).to(dtype)
    options = dict(divergence=name, temperature=1.5, reduction="none")
    loss, grad = run(student, teacher, backend=exact, upstream=torch.ones(6), **options)
    ref = reference(student, teacher, **options)
    near = ref.loss >= 1e-8
    bar = {"forward_kl": 1e-5, "reverse_kl": 2e-5, "jsd": 5e-6}[name]
    assert (loss >= 0).all()
    assert_loss_close(loss[near], ref.loss[near], bar)
    assert_gradient_close(grad, ref, check_blind=False)


@pytest.mark.parametrize("name", NAMES)
def test_h30_equal_rows(compiled, dtype, name):
    student, _, _ = problem(6, 1000, dtype=dtype)
    options = dict(divergence=name, temperature=1.5, reduction="none", backend=compiled)
    loss, grad = run(student, student.clone(), **options)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_h4_infinite_even_where_the_teachers_probability_underflows(
    backend, dtype, temperature, spread
):
    teacher = torch.randn(1, 1000) * 2 * temperature
    teacher[0, 7] = teacher.max() - 110 * temperature  # e^-110 is no float
    teacher = teacher.to(dtype)
    student = teacher.clone()
    student[0, :500] += spread * temperature  # no KL to speak of, or a large one
    student[0, 7] = -INF
    loss, grad = run(student, teacher, temperature=temperature, backend=backend)
    assert loss == INF and grad.isfinite().all()


def test_infinite_weights_do_not_make_a_row_that_counts_vanish(backend):
    student, teacher, labels = problem(4, 19)
    weights = torch.tensor([1, INF, 1, 1])
    for options in (dict(token_weights=weights), dict(num_items=torch.tensor(INF))):
        broken = student.clone()
        broken[1] = NAN
        loss, grad = run(broken, teacher, labels, backend=backend, **options)
        assert loss.isnan() and grad[1].isnan().all() and not grad[[0, 2, 3]].any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_maxima_that_rise_past_what_a_float_holds(backend, dtype, temperature):
    # e^-60 is a float where the sums begin; next to the last classes' maximum, e^-130, it is none.
    # The rise is where blocks of columns that a kernel may take at once begin.
    student, teacher = (torch.rand(2, 2, 2049) * -60).unbind()
    student[:, 1536:] += torch.tensor([[70.0], [35.0]])
    teacher[:, 1024:] += torch.tensor([[20.0], [70.0]])
    student, teacher = student.to(dtype), teacher.to(dtype)
    labels = torch.tensor([3, 2000])
    options = dict(temperature=temperature, reduction="none")
    loss, grad = run(student, teacher, labels, backend=backend, **options)
    assert_right(backend, loss, grad, student, teacher, labels, check_blind=False, **options)
