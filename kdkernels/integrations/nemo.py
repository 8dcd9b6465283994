"""NeMo AutoModel's `KDLoss`: another `_target_` in a recipe's `kd_loss_fn`.

    kd_loss_fn:
      _target_: kdkernels.integrations.nemo.KDLoss
      temperature: 2.0

Values, gradients and the T² in them are NeMo AutoModel's, and so is what tensor parallel ranks do:
each has its columns of the vocabulary.
"""

from typing import Any

import torch
from torch import nn

from ..functional import kd_loss
from ._labels import IGNORED, counting


class KDLoss(nn.Module):
    """T² · KL(p‖q) over the rows that count; the recipe adds the cross-entropy by its `kd_ratio`.

    Arguments and attributes are those of `nemo_automodel.components.loss.kd_loss.KDLoss`, and so is
    the name, by which `build_loss_module` finds a class of its own: wrap this one as
    `LossFromFactoryConfig(factory=KDLoss)` there. A recipe's `_target_` is taken as it is.

    Args:
        ignore_index: the label of rows that do not count.
        temperature: T.
        fp32_upcast: without effect: logits are read in their own dtype, never copied, and
            everything is computed in float32 at least.
        tp_group: the ranks that share the vocabulary; None: those of `DTensor`s that are sharded
            on it, or none.
        chunk_size: without effect: nothing of the logits' size is kept but the gradient.

    Raises:
        TypeError, ValueError: as `kd_loss`, also for a teacher that requires grad.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: torch.distributed.ProcessGroup | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.fp32_upcast = fp32_upcast
        self.tp_group = tp_group
        self.chunk_size = chunk_size

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        num_batch_labels: int | None = None,
    ) -> torch.Tensor:
        """Logits (..., V), or this rank's columns; a label for every row, in any shape -> ().

        `num_batch_labels` is what the sum is divided by, None for the rows that count here.
        """
        if self.tp_group is None and not _shares_vocabulary(student_logits):
            student_logits, teacher_logits = _whole(student_logits), _whole(teacher_logits)
        loss: torch.Tensor = kd_loss(
            student_logits,
            teacher_logits,
            counting(_whole(labels), self.ignore_index, student_logits),
            alpha=1.0,
            temperature=self.temperature,
            ignore_index=IGNORED,
            num_items=num_batch_labels,
            group=self.tp_group,
        )
        return loss


def _shares_vocabulary(logits: Any) -> bool:
    return any(p.is_shard(logits.dim() - 1) for p in getattr(logits, "placements", ()))


def _whole(x: Any) -> Any:
    """A `DTensor` that is sharded on anything else, gathered, as NeMo AutoModel does."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
