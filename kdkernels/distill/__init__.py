"""The loop on top of the loss: a teacher, a student and data go in, a trained student comes out."""

from .capture import write_cache
from .checkpoints import CheckpointError, Checkpoints
from .distiller import Distiller, TrainingError
from .evaluation import Evaluation, evaluate, predict
from .failures import ProcessError
from .hints import AttentionTransfer, FeatureHint
from .history import History
from .offline import open_predictions, write_predictions
from .predictions import CachedTeacher, SeveralTeachers
from .validation import Scores, validate

__all__ = [
    "AttentionTransfer",
    "CachedTeacher",
    "CheckpointError",
    "Checkpoints",
    "Distiller",
    "Evaluation",
    "FeatureHint",
    "History",
    "ProcessError",
    "Scores",
    "SeveralTeachers",
    "TrainingError",
    "evaluate",
    "open_predictions",
    "predict",
    "validate",
    "write_cache",
    "write_predictions",
]
