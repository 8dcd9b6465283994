"""TRL's distillation losses by `kd_loss`: functions with TRL's signatures, and `patch`, which has
TRL's trainers call them.

TRL's conventions hold in all of them: beta 0 is the forward KL, 1 the reverse KL, what lies between
the generalised JSD with m = beta p + (1 − beta) q (Agarwal et al. 2024, GKD, section 3), and no T².
"""

from .chunked import ChunkedDivergenceFunction, chunked_divergence_loss
from .jsd import generalized_jsd_loss, gold_jsd_loss
from .patching import Patch, Replacement, patch

__all__ = [
    "ChunkedDivergenceFunction",
    "Patch",
    "Replacement",
    "chunked_divergence_loss",
    "generalized_jsd_loss",
    "gold_jsd_loss",
    "patch",
]
