"""Lightning: a module with the gradient of the whole batch, which its teacher is no part of."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from ..cache import TeacherCache
from ..distill.batches import Batch
from ..distill.predictions import SeveralTeachers, as_teacher, predict_with
from ..functional import kd_loss
from ..modules import KDLoss


class KDModule(LightningModule):
    """A student that learns from a teacher; a subclass adds `configure_optimizers`.

    The teacher is asked in evaluation mode, without gradients, on the student's device, and nothing
    of it is among the parameters, in the checkpoint, or in another mode afterwards. (Leave it out
    of the hyperparameters too: `save_hyperparameters(ignore=["student", "teacher"])`.)

    Lightning divides the loss of every batch by `accumulate_grad_batches`, at the end of an epoch
    also where fewer are left, and takes the mean over the ranks: a mean of means, in which a row of
    a short batch weighs more. Here the gradient of a step is Σ of all rows / their number, over all
    of its batches on all ranks, whatever they hold: `on_before_optimizer_step` scales it, so that
    clipping and the optimizer see it. (An override of that hook must call this one; callbacks are
    called before it.)

    Args:
        student: returns logits, a source as `HiddenStates` does, or an object that has `logits`.
        teacher: a module that does, a `TeacherCache`, or `SeveralTeachers`.
        loss: a `KDLoss` with the reduction "mean".

    Raises:
        TypeError, ValueError: arguments other than listed.

    Example:
        class Student(KDModule):
            def configure_optimizers(self):
                return torch.optim.AdamW(self.student.parameters())

        model = Student(student, teacher, KDLoss(temperature=2.0, shift=True))
        Trainer(accumulate_grad_batches=4).fit(model, batches)
    """

    def __init__(self, student: nn.Module, teacher: Any, loss: KDLoss) -> None:
        super().__init__()
        if not isinstance(teacher, (nn.Module, TeacherCache, SeveralTeachers)):
            raise TypeError(
                "teacher must be a torch.nn.Module, a TeacherCache or SeveralTeachers, got "
                f"{type(teacher).__name__}"
            )
        if not isinstance(loss, KDLoss):
            raise TypeError(f"loss must be a KDLoss, got {type(loss).__name__}")
        if loss.options["reduction"] != "mean":
            raise ValueError(f"loss must have reduction='mean', got {loss.options['reduction']!r}")
        self.student = student
        self.loss = loss
        self._teacher = (teacher,)  # a tuple is not registered
        self._counts: list[torch.Tensor] = []  # rows of every batch since the last step, ()

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """(inputs, labels), or a dict of the models' arguments and perhaps "labels"; logs the
        batch's own mean as "train_loss"."""
        if isinstance(batch, Mapping):
            inputs: Any = {name: x for name, x in batch.items() if name != "labels"}
            labels = batch.get("labels")
        else:
            inputs, labels = batch
        prediction = predict_with(self.student, inputs)
        none = torch.empty(0, dtype=torch.int64)  # it is a batch of no data set
        target = as_teacher(self.teacher, self)(Batch(none, inputs, labels))
        options = {**self.loss.options, "reduction": "sum", "return_terms": True}
        terms = kd_loss(prediction, target, labels, **options)
        self.log("train_loss", terms.loss.detach() / terms.num_items.clamp(min=1))
        return self.share(terms.loss, terms.num_items)

    def share(self, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """A batch's loss, summed over its rows, and how many of them count -> what a
        `training_step` has to return.

        Raises:
            RuntimeError: a strategy that accumulates gradients by itself (DeepSpeed), or several
                optimizers.
        """
        if self.trainer.strategy.handles_gradient_accumulation:
            name = type(self.trainer.strategy).__name__
            raise RuntimeError(f"{name} accumulates gradients by itself, which cannot be weighted")
        if len(self.trainer.optimizers) > 1:
            raise RuntimeError(f"KDModule needs one optimizer, got {len(self.trainer.optimizers)}")
        if not self._counts:
            self._first = self._mean_over_ranks(count)
        self._counts.append(count)
        return total / self._first * self.trainer.accumulate_grad_batches

    def on_train_start(self) -> None:
        self._counts = []  # of a run that was interrupted

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Gradients of a sum, divided by the first batch's rows -> divided by all of them."""
        counts, self._counts = self._counts, []
        if len(counts) < 2:
            return
        factor = self._first / self._mean_over_ranks(torch.stack(counts).sum())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def _mean_over_ranks(self, count: torch.Tensor) -> torch.Tensor:
        mean = self.trainer.strategy.reduce(count.float(), reduce_op="mean")
        return mean.clamp(min=1)
