"""kdkernels: the knowledge-distillation loss in one pass over the logits."""

from .functional import KDTerms, kd_loss
from .modules import KDLoss

__version__ = "0.1.0"

__all__ = ["KDLoss", "KDTerms", "kd_loss"]
