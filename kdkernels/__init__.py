"""kdkernels: the knowledge-distillation loss in one pass over the logits."""

from typing import TYPE_CHECKING, Any

from .functional import KDTerms, kd_loss
from .modules import KDLoss
from .sources import Ensemble, LinearHead, Sampled, TopK

if TYPE_CHECKING:
    from . import cache

__version__ = "0.1.0"

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


def __getattr__(name: str) -> Any:
    if name != "cache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # As long to import as all the rest, and not for everyone.
    import importlib

    return importlib.import_module(".cache", __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
