"""The loop on top of the loss: a teacher, a student and data go in, a trained student comes out."""

from .distiller import Distiller, Evaluation, History, evaluate, predict

__all__ = ["Distiller", "Evaluation", "History", "evaluate", "predict"]
