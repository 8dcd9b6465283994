"""`KDTrainer`: the Trainer of `transformers` with a teacher."""

from transformers import Trainer

from .mixin import KDTrainerMixin


class KDTrainer(KDTrainerMixin, Trainer):
    """A `transformers.Trainer` whose student learns from a teacher, and from the labels.

    All arguments are the Trainer's, and two more, `teacher` and `loss`: see `KDTrainerMixin`.

    Example:
        trainer = KDTrainer(student, args, train_dataset=data, teacher=teacher, loss=KDLoss())
        trainer.train()
    """
