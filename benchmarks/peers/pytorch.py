"""PyTorch: the loss as people write it, as it is and compiled, and `F.linear_cross_entropy`.

In half precision the formula is written in two ways: as it stands, where each operation rounds to
the dtype of the logits, and with both cast to float32 first, which is what makes it exact.
"""

import math

import torch
import torch.nn.functional as F

from .base import Lacks, Missing, Variant


def tempered(logits, case):
    return logits if case.temperature == 1 else logits / case.temperature


def kl(log_p, log_q):
    """KL(p‖q), mean over rows."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def mean_of(log_p, log_q, beta):
    """log(β p + (1 − β) q)."""
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def divergence(student, teacher, case):
    """D of tempered distributions, mean over rows."""
    log_q, beta = F.log_softmax(tempered(student, case), -1), case.beta
    if case.divergence == "forward_kl":
        p = F.softmax(tempered(teacher, case), -1)
        return F.kl_div(log_q, p, reduction="batchmean")
    log_p = F.log_softmax(tempered(teacher, case), -1)
    match case.divergence:
        case "reverse_kl":
            return kl(log_q, log_p)
        case "jsd":
            log_m = mean_of(log_p, log_q, beta)
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        case "skew_forward_kl":
            return kl(log_p, mean_of(log_p, log_q, beta))
        case "skew_reverse_kl":
            return kl(log_q, mean_of(log_q, log_p, beta))
        case "tvd":
            return (log_p.exp() - log_q.exp()).abs().sum(-1).mean() / 2
    raise Lacks(case.divergence)


def mixed(case, distill, hard):
    """alpha · T² · distill() + (1 − alpha) · hard(): what has no weight is not called."""
    if case.alpha == 0:
        return hard()
    distill = distill() * case.temperature**2
    return distill if case.alpha == 1 else case.alpha * distill + (1 - case.alpha) * hard()


def formula(case):
    """(student (N, V), teacher (N, V), labels (N,)) -> the loss, in the logits' dtype."""

    def loss(student, teacher, labels):
        return mixed(
            case,
            lambda: divergence(student, teacher, case),
            lambda: F.cross_entropy(student, labels),
        )

    return loss


def in_float32(case):
    loss = formula(case)
    return lambda student, teacher, labels: loss(student.float(), teacher.float(), labels)


def compiled(loss):
    return torch.compile(loss, dynamic=False, fullgraph=True)


def of_logits(make):
    def made(case):
        loss = make(case)
        return lambda x: loss(x.student, x.teacher, x.labels)

    return made


def cast(case):
    if case.dtype == "float32":
        raise Missing("the logits are float32")
    return in_float32(case)


# Heads


def whole_logits(case, wrap=lambda loss: loss):
    """Logits in the dtype of the model, the rest in float32."""
    loss = wrap(in_float32(case))

    def call(x):
        teacher = None
        if case.alpha > 0:
            with torch.no_grad():
                teacher = F.linear(x.teacher_hidden, x.teacher_weight)
        student = F.linear(x.hidden, x.weight)
        return loss(student, student if teacher is None else teacher, x.labels)

    return call


def linear_cross_entropy(case):
    """Torch's chunked cross-entropy. With soft labels its logits exist in full, as above."""
    if case.alpha > 0:
        raise Lacks("a divergence")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x: F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=options)


# Classes that are kept


def log_rest(log_p):
    """log(1 − Σ exp log_p) (N, 1), without cancellation: log1mexp of the log of the sum."""
    total = log_p.logsumexp(-1, keepdim=True)
    near_one = total > -math.log(2)
    # Each branch sees only what it is for, so that the other's gradient is no NaN.
    near = torch.log(-torch.expm1(torch.where(near_one, total, -1.0)))
    return torch.where(near_one, near, torch.log1p(-torch.exp(torch.where(near_one, -1.0, total))))


def gathered(case, shared):
    """A forward KL of what log_softmax and gather find; its log_softmax may serve both terms."""
    if case.divergence != "forward_kl":
        raise Lacks(f"{case.divergence}: not written here")

    def call(x):
        student, teacher, t = x.student.float(), x.teacher, case.temperature
        log_q = F.log_softmax(tempered(student, case), -1)
        kept = log_q.gather(-1, teacher.ids.clamp(min=0))  # −1 pads
        if case.tail == "sampled":
            p = teacher.counts / teacher.counts.sum(-1, keepdim=True)  # 0 where it pads
            distill = F.kl_div(kept, p.to(kept.dtype), reduction="batchmean")
        elif case.tail == "renormalize":
            distill = kl((teacher.logprobs / t).log_softmax(-1), kept)
        else:
            log_p = torch.cat([teacher.logprobs, log_rest(teacher.logprobs)], -1)
            distill = kl(log_p, torch.cat([kept, log_rest(kept)], -1))
        if shared and t == 1:
            return mixed(case, lambda: distill, lambda: F.nll_loss(log_q, x.labels))
        return mixed(case, lambda: distill, lambda: F.cross_entropy(student, x.labels))

    return call


VARIANTS = {
    "dense": {
        "pytorch": Variant("PyTorch", of_logits(formula), "own"),
        "pytorch-float32": Variant("PyTorch, cast to float32", of_logits(cast), "float32"),
        "compiled": Variant(
            "PyTorch, torch.compile",
            of_logits(lambda case: compiled(formula(case))),
            "own",
            compiled=True,
        ),
    },
    "linear": {
        "pytorch": Variant("PyTorch, whole logits", whole_logits, "logits"),
        "compiled": Variant(
            "PyTorch, whole logits, torch.compile",
            lambda case: whole_logits(case, compiled),
            "logits",
            compiled=True,
        ),
        "linear-ce": Variant("PyTorch, F.linear_cross_entropy", linear_cross_entropy, "own"),
    },
    "sparse": {
        "pytorch": Variant(
            "PyTorch, log_softmax and gather, cross_entropy",
            lambda case: gathered(case, shared=False),
            "float32",
        ),
        "pytorch-shared": Variant(
            "PyTorch, one log_softmax for both",
            lambda case: gathered(case, shared=True),
            "float32",
        ),
        "compiled": Variant(
            "PyTorch, torch.compile",
            lambda case: compiled(gathered(case, shared=False)),
            "float32",
            compiled=True,
        ),
    },
}
