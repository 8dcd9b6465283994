"""speculators 0.9.0, of vLLM: losses of logits for draft models, one number a token, in Triton.

Forward KL, reverse KL, TVD, and the JSD of β = 0.5. No temperature, no T² and no cross-entropy with
labels: PyTorch adds them.
"""

import importlib.util
import sys

import torch.nn.functional as F

from . import base
from .base import Lacks, Variant, imported
from .pytorch import mixed, tempered

LOSSES = {
    "forward_kl": "fused_kl_div_loss",
    "reverse_kl": "fused_reverse_kl_div_loss",
    "jsd": "fused_js_div_loss",
    "tvd": "fused_tv_loss",
}


def bare(*packages):
    """Lets modules of packages be imported without their __init__, which loads draft models."""
    for package in packages:
        try:
            spec = None if package in sys.modules else importlib.util.find_spec(package)
        except ImportError:
            return  # as the import of the module will say
        if spec:
            sys.modules[package] = importlib.util.module_from_spec(spec)


def dense(case):
    base.distils(case, *LOSSES)
    if case.divergence == "jsd" and case.beta != 0.5:
        raise Lacks(f"the JSD of β = {case.beta:g}")
    base.on_gpu(case)
    bare("speculators", "speculators.utils")
    (distill,) = imported("speculators.losses.fused", LOSSES[case.divergence])

    def loss(x):
        both = (tempered(logits, case)[None] for logits in (x.student, x.teacher))  # (1, N, V)
        return mixed(
            case, lambda: distill(*both).mean(), lambda: F.cross_entropy(x.student, x.labels)
        )

    return loss


VARIANTS = {
    "dense": {  # tuned for each V and loss
        "speculators": Variant("speculators (T, T², CE by PyTorch)", dense, "own", compiled=True)
    }
}
