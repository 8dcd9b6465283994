"""TRL 1.16.0: the divergences that its GKD and distillation trainers call, on every device.

Forward KL, reverse KL and generalized JSD, at any temperature. No T² and no cross-entropy: PyTorch
adds them, but no cross-entropy to hidden states, whose logits would have to exist for it.
"""

import torch.nn.functional as F

from . import base
from .base import GENERALIZED, Variant, imported
from .pytorch import mixed


def dense(case):
    """Its labels would only mask rows, at the price of a copy: it gets none."""
    base.distils(case, *GENERALIZED)
    (trainer,) = imported("trl.experimental.gkd", "GKDTrainer")
    options = dict(beta=base.generalized_beta(case), temperature=case.temperature)

    def loss(x):
        return mixed(
            case,
            lambda: trainer.generalized_jsd_loss(x.student, x.teacher, **options),
            lambda: F.cross_entropy(x.student, x.labels),
        )

    return loss


def linear(case):
    """On a CPU it projects in float32, whatever the dtype. It returns an entropy as well."""
    base.distils(case, *GENERALIZED, cross_entropy=False)
    (function,) = imported("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    options = base.generalized_beta(case), case.temperature

    def loss(x):
        heads = x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None
        return mixed(case, lambda: function.apply(*heads, *options)[0].mean(), None)

    return loss


VARIANTS = {
    "dense": {"trl": Variant("TRL GKD (T², CE by PyTorch)", dense, "own")},
    "linear": {"trl": Variant("TRL chunked divergence (T² by PyTorch)", linear, "float32")},
}
