"""What `kd_loss` must return, in float64 from closed formulas, and how close a backend has to be.

    ref = reference(student, teacher, labels, divergence="jsd", temperature=2.0, ...)
    ref = reference(..., upstream=tensor)       # gradient of (loss * upstream).sum(), default 1
    assert_loss_close(loss, ref, rel=1e-5)      # against ref.loss
    assert_gradient_close(student.grad, ref)    # bars N4 (float32, float64) and N5 (halves)

`reference` takes the keywords of `kd_loss` (those that do not change the result are accepted and
ignored) and the logits as the kernel sees them, already rounded to their dtype. It shares no code
with kdkernels and uses no autograd: every KL is a sum of terms a (e^x − 1 − x) >= 0, so that
near-equal rows keep their digits, and every gradient is q (h − Σ q h) with h = dD/dq.

The gradient comparator has no absolute tolerance. It bounds every entry by what rounding the
exponents' arguments can cause, and refuses data on which more than 0.01 % of the entries could be
replaced by 0 unnoticed (`blind_share`); `check_blind=False` is for data where that cannot be had,
such as a student that nearly equals its teacher.
"""

import math
from typing import NamedTuple

import torch

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
DEFAULT_BETA = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}

# h where p = q, of the divergences for which it is not 0. A constant in h changes no gradient, so
# what can be lost in Σ q h is a rounding of h less this.
AT_EQUALITY = {
    "skew_forward_kl": lambda beta: beta - 1,
    "skew_reverse_kl": lambda beta: 1 - beta,
}

MAX_BLIND = 1e-4  # hazards.md, "Blindness"
CORRECTLY_ROUNDED = 0.999  # N5
LABEL_COLUMN = 1e-6  # N6
HALVES = (torch.bfloat16, torch.float16)


class Arithmetic(NamedTuple):
    """What a backend computes in."""

    unit: float  # the u of the bars
    smallest: float  # probabilities below it may be flushed to 0 (H42)
    through_logs: bool  # its gradient is autograd's, through log-probabilities


FLOAT32 = Arithmetic(2.0**-24, 2.0**-126, through_logs=False)
# Eager's. The unit leaves 9 bits for the oracle's own float64.
FLOAT64 = Arithmetic(2.0**-44, 2.0**-1022, through_logs=True)


class Reference(NamedTuple):
    """Everything float64; (...) are the student's leading dimensions."""

    loss: torch.Tensor  # () or (...), as `kd_loss` returns it
    rows: torch.Tensor  # (...), w · row loss
    distill: torch.Tensor  # (...), T² · D of the rows that count, else 0 (D with t_squared=False)
    hard: torch.Tensor  # (...), cross-entropy of the rows that count, else 0
    grad: torch.Tensor  # (..., V_s)
    bound: torch.Tensor  # (..., V_s), N4 and N6, without the rounding to `dtype`
    flush: torch.Tensor  # (..., V_s), what flushing subnormal probabilities may change
    scale: torch.Tensor  # (...), bound on the size of the row's gradient factors (N7)
    dtype: torch.dtype  # of the gradient
    rounded_twice: bool  # the upstream gradient is no power of 2 and is applied to rounded entries


def reference(
    student,
    teacher,
    labels=None,
    *,
    divergence="forward_kl",
    temperature=1.0,
    alpha=0.5,
    beta=None,
    t_squared=True,
    label_smoothing=0.0,
    ignore_index=-100,
    token_weights=None,
    vocab_size=None,
    shift=False,
    reduction="mean",
    num_items=None,
    inplace=False,
    backend=None,
    return_terms=False,
    upstream=None,
):
    """Loss and gradient of `kd_loss` with these arguments: logits (..., V) -> `Reference`."""
    width = vocab_size or student.shape[-1]
    s = student.detach()[..., :width].double()
    t = teacher.detach()[..., :width].double()
    rows = s.shape[:-1]
    weights = torch.ones(rows, dtype=torch.float64)
    if token_weights is not None:
        weights = token_weights.to(torch.promote_types(student.dtype, torch.float32)).double()
    if shift:
        labels, weights = _next(labels, ignore_index), _next(weights, 0.0)
    valid = torch.ones(rows, dtype=torch.bool) if labels is None else labels != ignore_index
    weights = torch.where(valid, weights, 0.0)
    factor = _factor(weights, reduction, num_items)
    upstream = torch.ones((), dtype=torch.float64) if upstream is None else upstream.double()

    s, t = (torch.where(valid[..., None], x, 0.0) for x in (s, t))
    t_scale = temperature**2 if t_squared else 1.0
    distill_weight = t_scale * (alpha if labels is not None else 1.0)
    hard_weight = 1.0 - alpha if labels is not None else 0.0
    arithmetic = FLOAT64 if student.dtype == torch.float64 else FLOAT32
    zero = torch.zeros_like(s)

    value, *parts = _divergence(s, t, temperature, arithmetic, *_resolve(divergence, beta))
    distill = torch.where(valid, t_scale * value, 0.0)
    loss, hard = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    grad, bound, flush = zero, zero, zero
    if distill_weight:
        loss = distill_weight * value
        grad, bound, flush = (distill_weight / temperature * x for x in parts)
    if labels is not None:
        safe = torch.where(valid, labels, 0).long()
        hard, *parts = _cross_entropy(s, safe, label_smoothing, arithmetic)
        hard = torch.where(valid, hard, 0.0)
        if hard_weight:
            loss = loss + hard_weight * hard
            grad, bound, flush = (
                x + hard_weight * y for x, y in zip((grad, bound, flush), parts, strict=True)
            )

    counts = valid & (weights != 0)
    loss = torch.where(counts, weights * loss, 0.0)
    multiplier = torch.where(counts, weights * factor * upstream, 0.0)[..., None]
    grad, bound, flush = (
        _pad(torch.where(counts[..., None], x, 0.0), student) for x in (grad, bound, flush)
    )
    return Reference(
        loss=loss if reduction == "none" else loss.sum() * factor,
        rows=loss,
        distill=distill,
        hard=hard,
        grad=_pad_product(grad, multiplier),
        bound=bound * multiplier.abs(),
        flush=flush * multiplier.abs(),
        scale=multiplier[..., 0].abs() * (distill_weight / temperature + hard_weight),
        dtype=student.dtype,
        rounded_twice=not _powers_of_two(upstream),
    )


def ulp(x, dtype):
    """The spacing of `dtype` around float64 values x."""
    info = torch.finfo(dtype)
    size = x.abs().clamp(min=info.tiny)
    return info.eps * torch.exp2(torch.frexp(size).exponent.double() - 1)


def gradient_bound(ref):
    """(..., V_s): how far every gradient entry may be off (N4, N5, N6)."""
    rounding = 0.5 * ulp(ref.grad, ref.dtype)
    # float16 gradients are kept at a power of 2 (DESIGN section 3): an entry that is subnormal at
    # its own size has been rounded at full precision before. So has any entry whose upstream
    # gradient, known in the backward pass only, is no power of 2.
    before = 0.5 * torch.finfo(ref.dtype).eps * ref.grad.abs()
    if ref.dtype == torch.float16 and not ref.rounded_twice:
        before = torch.where(ref.grad.abs() < torch.finfo(ref.dtype).tiny, before, 0.0)
    elif not ref.rounded_twice:
        before = torch.zeros_like(before)
    return ref.bound + ref.flush + rounding + before


def blind_share(grad, bound, must_see=None):
    """Share of the entries that may be replaced by 0 unnoticed, though 0 is not right there.

    grad, bound: (..., V) float64. must_see: (..., V) bool, entries that count; by default those
    whose exact gradient is not 0.
    """
    must_see = grad != 0 if must_see is None else must_see
    blind = must_see & (grad.abs() <= bound)
    return blind.sum().item() / max(1, must_see.sum().item())


def visible(ref):
    """(..., V_s) bool: entries for which 0 is a wrong answer: not below `dtype`, not flushed."""
    info = torch.finfo(ref.dtype)
    return (ref.grad.abs() >= info.tiny * info.eps) & (ref.flush == 0)


def gradient_ratio(actual, ref):
    """The largest |error| / bound over all entries, at most 1 where N4/N5/N6 hold."""
    error = (actual.detach().double() - ref.grad).abs()
    bound = gradient_bound(ref)
    ratio = torch.where(error == 0, 0.0, error / bound)[~ref.grad.isnan()]
    return ratio.max().item() if ratio.numel() else 0.0


def correctly_rounded(actual, ref):
    """How many normal entries are the exact gradient rounded once, and how many there are."""
    normal = ref.grad.abs() >= torch.finfo(ref.dtype).tiny
    right = (actual.detach() == ref.grad.to(ref.dtype)) & normal
    return right.sum().item(), normal.sum().item()


def assert_gradient_close(actual, ref, *, check_blind=True):
    """Every entry within N4/N6 plus its rounding; halves also correctly rounded (N5)."""
    assert actual.dtype == ref.dtype and actual.shape == ref.grad.shape
    nan = ref.grad.isnan()
    assert torch.equal(actual.isnan(), nan), "NaN entries differ from the reference's"
    error = torch.where(nan, 0.0, (actual.detach().double() - ref.grad).abs())
    bound = gradient_bound(ref)
    outside = ~nan & ~(error <= bound)
    if outside.any():
        ratio = torch.where(outside, error / bound, 0.0).flatten()
        at = int(ratio.argmax())
        raise AssertionError(
            f"{int(outside.sum())} of {outside.numel()} gradient entries are off; the worst, "
            f"flat index {at}: {actual.flatten()[at].item():.9g}, exact "
            f"{ref.grad.flatten()[at].item():.9g}, error {error.flatten()[at].item():.3g}, "
            f"bound {bound.flatten()[at].item():.3g}, ratio {ratio[at].item():.3g}"
        )
    if check_blind:
        share = blind_share(ref.grad, bound, visible(ref))
        assert share <= MAX_BLIND, f"the data hide {share:.4%} of the gradient from this comparison"
    if ref.dtype in HALVES and check_blind and not ref.rounded_twice:
        right, normal = correctly_rounded(actual, ref)
        wrong, allowed = normal - right, math.ceil((1 - CORRECTLY_ROUNDED) * normal)
        assert wrong <= allowed, f"{wrong} of {normal} entries are not correctly rounded"


def relative_error(actual, exact):
    """|actual − exact| / |exact| per element, 0 where both are equal (infinities and NaN too)."""
    actual, exact = actual.detach().double(), exact.double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    return torch.where(same, 0.0, (actual - exact).abs() / exact.abs()).nan_to_num(nan=math.inf)


def assert_loss_close(actual, ref, rel):
    """The loss, or a tensor of losses, relatively; `ref` is a `Reference` or a tensor."""
    exact = ref.loss if isinstance(ref, Reference) else ref
    assert actual.shape == exact.shape
    error = relative_error(actual, exact).flatten()
    if error.numel() and not error.max() <= rel:
        at = int(error.argmax())
        raise AssertionError(
            f"loss {actual.flatten()[at].item():.9g}, exact {exact.flatten()[at].item():.9g}: "
            f"relative error {error[at].item():.3g} > {rel:g}"
        )


def _next(x, last):
    """(..., L) -> the same one position later, the last one filled."""
    return torch.cat((x[..., 1:], torch.full_like(x[..., :1], last)), -1)


def _factor(weights, reduction, num_items):
    if reduction != "mean":
        return 1.0
    total = weights.sum().item() if num_items is None else float(num_items)
    return 1.0 / total if total else 0.0


def _powers_of_two(x):
    return bool(((torch.frexp(x).mantissa.abs() == 0.5) | (x == 0) | ~x.isfinite()).all())


def _pad(x, student):
    missing = student.shape[-1] - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing))


def _pad_product(grad, multiplier):
    """Rows with multiplier 0 are 0, whatever else they hold."""
    return torch.where(multiplier == 0, 0.0, grad * multiplier)


def _resolve(divergence, beta):
    """GKD's ends of the JSD are the KLs; the skewed ones have a plain KL at beta = 0."""
    beta = DEFAULT_BETA.get(divergence, 0.0) if beta is None else beta
    if divergence == "jsd" and beta in (0, 1):
        return ("reverse_kl" if beta else "forward_kl"), 0.0
    return divergence, beta


def _softmax(x, temperature):
    """x − max, softmax(x / T) and its normaliser relative to the maximum."""
    x = x - x.amax(-1, keepdim=True)
    e = (x / temperature).exp()
    total = e.sum(-1, keepdim=True)
    return x, e / total, total


def _kl_terms(a, b, log_b_over_a):
    """a log(a / b) − a + b >= 0, elementwise; their sum is KL(a‖b)."""
    x = log_b_over_a
    near = a * (torch.expm1(x) - x)
    far = (b - a) - torch.where(a == 0, 0.0, a * x)
    return torch.where(x.abs() < 1, near, far)


def _log_share(log_ratio, weight):
    """log(a / (w a + (1 − w) b)) from log_ratio = log(a / b), any of them infinite."""
    above = -torch.log1p((1 - weight) * torch.expm1(-log_ratio.clamp(min=0)))
    below = log_ratio - torch.log1p(weight * torch.expm1(log_ratio.clamp(max=0)))
    return torch.where(log_ratio >= 0, above, below)


def _divergence(s, t, temperature, arithmetic, divergence, beta):
    """D, and of q (h − Σ q h) the value, the rounding bound and the flush allowance."""
    xs, q, zs = _softmax(s, temperature)
    xt, p, zt = _softmax(t, temperature)
    d = (xs - xt) / temperature - torch.log(zs / zt)  # log q − log p
    d = torch.where((xs == -math.inf) & (xt == -math.inf), 0.0, d)
    # qh = q · dD/dq, and slope = q · d(dD/dq)/dd: how a change of log q or log p moves qh.
    if divergence == "forward_kl":
        terms = _kl_terms(p, q, d)
        qh, slope = -p, p
    elif divergence == "reverse_kl":
        terms = _kl_terms(q, p, -d)
        qh, slope = q * d, q
    elif divergence == "jsd":
        log_p_m, log_q_m = _log_share(-d, beta), _log_share(d, 1 - beta)
        m = beta * p + (1 - beta) * q
        terms = beta * _kl_terms(p, m, -log_p_m) + (1 - beta) * _kl_terms(q, m, -log_q_m)
        qh = (1 - beta) * q * log_q_m
        slope = (1 - beta) * beta * q * log_p_m.exp()
    elif divergence == "skew_forward_kl":
        log_p_m = _log_share(-d, beta)
        m = beta * p + (1 - beta) * q
        terms = _kl_terms(p, m, -log_p_m)
        share = (1 - beta) * log_p_m.exp()
        qh = -q * share
        slope = q * share * (1 - beta * log_p_m.exp())
    elif divergence == "skew_reverse_kl":
        log_q_m = _log_share(d, beta)
        m = beta * q + (1 - beta) * p
        terms = _kl_terms(q, m, -log_q_m)
        share = beta * log_q_m.exp()
        qh = q * (log_q_m + 1 - share)
        slope = q * (1 - share) ** 2
    else:
        terms = 0.5 * (p - q).abs()
        qh, slope = 0.5 * q * torch.sign(q - p), torch.zeros_like(q)
    value = terms.sum(-1)

    # The limits where a class is absent: 0 · log 0 = 0, and nothing moves log 0.
    if divergence != "forward_kl":
        qh, slope = (torch.where(q == 0, 0.0, x) for x in (qh, slope))
    slope = torch.where(p == 0, 0.0, slope)
    mean = qh.sum(-1, keepdim=True)
    if divergence == "forward_kl":
        mean = torch.full_like(mean, -1.0)
    grad = qh - q * mean
    if divergence == "reverse_kl":
        grad = torch.where(value[..., None].isinf(), math.nan, grad)
    bad = ~(zs.isfinite() & zt.isfinite())
    grad = torch.where(bad, math.nan, grad)
    value = torch.where(bad[..., 0], math.nan, value)

    # N4: a relative error of 8 u (1 + |x| / T) in either probability. The same through the mean.
    unit = arithmetic.unit
    error_q, error_p = (8 * unit * (1 + x.abs() / temperature) for x in (xs, xt))
    bound = _product(error_q, (slope + qh - q * mean).abs()) + _product(error_p, slope.abs())
    if divergence != "forward_kl":
        centred = (qh - q * AT_EQUALITY.get(divergence, lambda beta: 0.0)(beta)).abs()
        through_mean = _product(error_q, centred + slope.abs()) + _product(error_p, slope.abs())
        bound = bound + q * through_mean.sum(-1, keepdim=True)
        if arithmetic.through_logs:  # adds up terms of the size of p and q
            bound = bound + _product(error_q, q) + _product(error_p, p)
    if divergence == "tvd":  # the sign of q − p is open where they are this close
        open_sign = torch.where(d.abs() <= error_q + error_p, q, 0.0)
        bound = bound + open_sign + q * open_sign.sum(-1, keepdim=True)
    smallest = arithmetic.smallest
    flush = torch.where(q < smallest, smallest + qh.abs() + q * mean.abs(), 0.0)
    flush = flush + torch.where(p < smallest, smallest + slope.abs(), 0.0)
    flush = torch.where((xs == -math.inf) & (xt == -math.inf), 0.0, flush)
    return value, grad, bound, flush


def _cross_entropy(s, labels, smoothing, arithmetic):
    """The smoothed cross-entropy, and of its gradient the value, bound and flush allowance."""
    x, q, total = _softmax(s, 1.0)
    column = labels[..., None]
    x_label = x.gather(-1, column)
    others = x.exp().scatter(-1, column, 0.0).sum(-1, keepdim=True)
    loss = torch.where(x_label == 0, torch.log1p(others), total.log() - x_label)
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (total.log() - x.mean(-1, keepdim=True))
    uniform = smoothing / s.shape[-1]
    grad = (q - uniform).scatter(-1, column, smoothing - uniform - others / total)
    bad = ~total.isfinite()
    grad = torch.where(bad, math.nan, grad)

    unit = arithmetic.unit
    bound = _product(8 * unit * (1 + x.abs()), q) + 8 * unit * uniform
    label_bound = LABEL_COLUMN * others / total + 8 * unit * smoothing
    if arithmetic.through_logs:  # forms 1 − q
        label_bound = 8 * unit * torch.ones_like(label_bound)
    bound = bound.scatter(-1, column, label_bound)
    flush = torch.where((q < arithmetic.smallest) & (x > -math.inf), arithmetic.smallest, 0.0)
    return torch.where(bad, math.nan, loss)[..., 0], grad, bound, flush


def _product(error, size):
    """error · size, 0 where size is 0: the argument of a class that is absent is infinite."""
    return torch.where(size == 0, 0.0, error * size)
