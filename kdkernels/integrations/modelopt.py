"""ModelOpt's criterion for logits: what `kd_loss` mode of `modelopt.torch.distill` trains on.

Example:
    import modelopt.torch.distill
    from kdkernels.integrations.modelopt import LogitsDistillationLoss

    config = {"teacher_model": teacher, "criterion": LogitsDistillationLoss(temperature=2.0)}
    model = modelopt.torch.distill.convert(student, mode=[("kd_loss", config)])
"""

from typing import Any

import torch
from torch.nn.modules.loss import _Loss  # ModelOpt takes no other class for a criterion

from ..modules import KDLoss

REDUCTIONS = ("mean", "batchmean", "sum", "none")


class LogitsDistillationLoss(_Loss):
    """T² · KL(p‖q), as `modelopt.torch.distill.LogitsDistillationLoss`, but for its mean.

    ModelOpt's "mean" is that of `F.kl_div`: it divides by the rows and by V too, so that the loss
    of a large vocabulary all but vanishes. Here it is the mean over the rows.

    Args:
        temperature: T.
        reduction: "mean" over the rows; "batchmean", the sum divided by the size of the first
            dimension; "sum"; or "none", (...).

    Raises:
        TypeError, ValueError: as `KDLoss`; another reduction.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        self.by_batch = reduction == "batchmean"
        ours: Any = "mean" if self.by_batch else reduction
        self.loss = KDLoss(alpha=1.0, temperature=temperature, reduction=ours)

    def forward(
        self, logits_s: torch.Tensor, logits_t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (..., V) of student and teacher -> (), or (...) by "none".

        `labels` (...), of which those that are −100 do not count, come by
        `model.compute_kd_loss(labels=labels)`. ModelOpt's own criterion takes none.
        """
        num_items = len(logits_s) if self.by_batch else None
        loss: torch.Tensor = self.loss(logits_s, logits_t.detach(), labels, num_items=num_items)
        return loss
