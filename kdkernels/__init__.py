"""kdkernels: the knowledge-distillation loss in one pass over the logits."""

from .functional import KDTerms, kd_loss
from .modules import KDLoss
from .sources import Ensemble, LinearHead, Sampled, TopK

__version__ = "0.1.0"

from . import cache  # noqa: E402 - its files name the version

__all__ = [
    "Ensemble",
    "KDLoss",
    "KDTerms",
    "LinearHead",
    "Sampled",
    "TopK",
    "cache",
    "kd_loss",
]
