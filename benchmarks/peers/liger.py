"""Liger-Kernel 0.8.5: Triton kernels, and a chunked loss in PyTorch, which runs on a CPU too.

Dense: forward KL and generalized JSD of log-probabilities, TVD of probabilities, which PyTorch
makes, and a cross-entropy that overwrites the logits; TVD and cross-entropy in one pass, at T = 1.
Linear: generalized JSD, forward KL to a teacher's probabilities, cross-entropy. No skew KL, no T².
Where `cutlass` can be imported, it uses CuTe for some of this, from Hopper on.
"""

from functools import partial

import torch
import torch.nn.functional as F

from . import base
from .base import GENERALIZED, Lacks, Variant, imported
from .pytorch import mixed, tempered


def triton(case, name):
    base.on_gpu(case)
    return imported("liger_kernel.transformers", name)[0]


def cross_entropy(case):
    loss = triton(case, "LigerCrossEntropyLoss")()

    def hard(x):
        # Logits that require grad are overwritten by it, under no_grad too.
        return loss(x.student if torch.is_grad_enabled() else x.student.detach(), x.labels)

    return hard


def linear_cross_entropy(case):
    loss = triton(case, "LigerFusedLinearCrossEntropyLoss")()
    return lambda x: loss(x.weight, x.hidden, x.labels)


def alone(hard, case):
    base.cross_entropy_alone(case)
    return hard(case)


def of_normalized(case, normalize, distill):
    """The cross-entropy comes last: then the logits are gone."""
    hard = cross_entropy(case)

    def loss(x):
        both = [normalize(tempered(logits, case), -1) for logits in (x.student, x.teacher)]
        return mixed(case, lambda: distill(*both), lambda: hard(x))

    return loss


def kl(case, dtype=None):
    base.distils(case, "forward_kl")  # the reverse needs a gradient of the target, which is none
    distill = triton(case, "LigerKLDIVLoss")(reduction="batchmean", log_target=True)
    return of_normalized(case, partial(F.log_softmax, dtype=dtype), distill)


def jsd(case, dtype=None):
    base.distils(case, *GENERALIZED)
    distill = triton(case, "LigerJSD")(beta=base.generalized_beta(case))
    return of_normalized(case, partial(F.log_softmax, dtype=dtype), distill)


def tvd(case):
    base.distils(case, "tvd")
    return of_normalized(case, F.softmax, triton(case, "LigerTVDLoss")())


def ce_tvd(case):
    base.distils(case, "tvd")
    if case.alpha == 1:
        raise Lacks("TVD alone")
    if case.temperature != 1:
        raise Lacks("a temperature")
    both = triton(case, "LigerFusedCETVDLoss")()

    def loss(x):
        hard, distill = both(x.student, x.teacher, x.labels)  # (N,) each
        return mixed(case, lambda: distill, lambda: hard).mean()

    return loss


def linear_jsd(case):
    base.distils(case, *GENERALIZED)
    options = dict(jsd_beta=base.generalized_beta(case), temperature=case.temperature)
    distill, hard = triton(case, "LigerFusedLinearJSD")(**options), linear_cross_entropy(case)

    def loss(x):
        heads = x.hidden, x.weight, x.teacher_hidden, x.teacher_weight
        return mixed(case, lambda: distill(*heads, None), lambda: hard(x))

    return loss


def linear_kl(case):
    base.distils(case, "forward_kl")
    distill = triton(case, "LigerFusedLinearKLDivLoss")(temperature=case.temperature)
    hard = linear_cross_entropy(case)

    def loss(x):
        with torch.no_grad():
            logits = F.linear(x.teacher_hidden, x.teacher_weight)
            p = F.softmax(tempered(logits, case), -1)
            del logits
        return mixed(case, lambda: distill(x.hidden, x.weight, p), lambda: hard(x))

    return loss


def chunked(case, compiled=False):
    """The labels it asks for only mask rows where the cross-entropy weighs nothing."""
    base.distils(case, *GENERALIZED)
    (found,) = imported("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    weights = 1 - case.alpha, case.alpha * case.temperature**2  # hard, soft
    both = found(
        *weights, base.generalized_beta(case), temperature=case.temperature, compiled=compiled
    )
    return lambda x: both(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)


def dense(title, make):
    return Variant(f"Liger {title}", make, "own", overwrites=True)


def linear(title, make, **more):
    return Variant(f"Liger {title}", make, "own", **more)


FLOAT32 = dict(dtype=torch.float32)  # but for the cross-entropy
VARIANTS = {
    "dense": {
        "liger-kl": dense("KL (log_softmax, T² by PyTorch)", kl),
        "liger-kl-float32": dense(
            "KL (log_softmax in float32, T² by PyTorch)", partial(kl, **FLOAT32)
        ),
        "liger-jsd": dense("JSD (log_softmax, T² by PyTorch)", jsd),
        "liger-jsd-float32": dense(
            "JSD (log_softmax in float32, T² by PyTorch)", partial(jsd, **FLOAT32)
        ),
        "liger-tvd": dense("TVD (softmax, T² by PyTorch)", tvd),
        "liger-ce-tvd": Variant("Liger CE and TVD in one pass", ce_tvd, "float32"),
        "liger-ce": dense("CE", partial(alone, cross_entropy)),
    },
    "linear": {
        "liger-jsd": linear("fused linear JSD (T² by PyTorch)", linear_jsd),
        "liger-kl": linear("fused linear KL (teacher's softmax, T² by PyTorch)", linear_kl),
        "liger-ce": linear("fused linear CE", partial(alone, linear_cross_entropy)),
        "liger-chunked": linear("chunked JSD", chunked),
        "liger-chunked-compiled": linear(
            "chunked JSD, torch.compile", partial(chunked, compiled=True), compiled=True
        ),
    },
}
