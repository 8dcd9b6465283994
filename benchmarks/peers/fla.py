"""flash-linear-attention (fla-core 0.6.0): forward KL of hidden states and weights, in Triton.

No temperature, but hidden states divided by T make logits divided by T; no T², no cross-entropy.
"""

from functools import partial

from . import base
from .base import Variant, imported
from .pytorch import mixed, tempered


def linear(case, in_float32):
    """`in_float32`, its default, is how it makes the weight's gradient, products included."""
    base.distils(case, "forward_kl", cross_entropy=False)
    base.on_gpu(case)
    (found,) = imported("fla.modules.fused_kl_div", "FusedKLDivLoss")
    distill = found(accumulate_grad_in_fp32=in_float32)

    def loss(x):
        hidden = tempered(x.hidden, case), tempered(x.teacher_hidden, case)
        return mixed(case, lambda: distill(*hidden, x.weight, x.teacher_weight), None)

    return loss


def variant(what, in_float32):
    title = f"FLA fused KL{what} (T, T² by PyTorch)"
    return Variant(title, partial(linear, in_float32=in_float32), "own", compiled=True)


VARIANTS = {
    "linear": {
        "fla": variant("", True),
        "fla-own": variant(", dW in the weight's dtype", False),
    }
}
