"""The loop on top of the loss: a teacher, a student and data go in, a trained student comes out."""

from .checkpoints import CheckpointError, Checkpoints
from .distiller import Distiller, TrainingError
from .evaluation import Evaluation, evaluate, predict
from .hints import AttentionTransfer, FeatureHint
from .history import History
from .offline import open_predictions, write_predictions
from .predictions import SeveralTeachers
from .validation import Scores, validate

__all__ = [
    "AttentionTransfer",
    "CheckpointError",
    "Checkpoints",
    "Distiller",
    "Evaluation",
    "FeatureHint",
    "History",
    "Scores",
    "SeveralTeachers",
    "TrainingError",
    "evaluate",
    "open_predictions",
    "predict",
    "validate",
    "write_predictions",
]
