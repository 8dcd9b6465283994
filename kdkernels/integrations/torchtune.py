"""torchtune's distillation losses: a recipe's `kd_loss._component_` under another name.

The classes have torchtune's names, constructors and arguments, at T = 1, and its gradients:

    kd_loss:
      _component_: kdkernels.integrations.torchtune.ForwardKLWithChunkedOutputLoss

What is different:

- The forward KL is KL(p‖q). torchtune reports −Σ p log q, larger by the teacher's entropy, and its
  symmetric loss adds that to a reverse KL, which has none missing.
- Labels are cut where the chunks of logits are, whatever `num_output_chunks` says. torchtune leaves
  out what is too much where the model was told another number.
- Without any label that counts the loss is 0, with a gradient. torchtune has a 0 that cannot be
  differentiated, or, chunked, NaN from the reverse and the symmetric loss.
- A class that the student rules out (−inf) and the teacher does not is an infinite forward KL;
  torchtune leaves it out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..functional import kd_loss
from ._labels import IGNORED, counting


class _KLLoss(nn.Module):
    """ratio · KL(p‖q) + (1 − ratio) · KL(q‖p), a mean over the rows that count."""

    def __init__(self, ratio: float, ignore_index: int) -> None:
        super().__init__()
        if not 0 <= ratio <= 1:
            raise ValueError(f"sym_kd_ratio must be in [0, 1], got {ratio}")
        self.ignore_index = ignore_index
        self.shares: dict[Any, float] = {"forward_kl": ratio, "reverse_kl": 1 - ratio}

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        normalize: bool = True,
    ) -> torch.Tensor:
        """Logits (..., V) and a label for every row, in any shape -> (); without `normalize` the
        sum over the rows."""
        return self._loss(student_logits, teacher_logits, labels, None if normalize else 1)

    def _loss(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,
        num_items: torch.Tensor | int | None,
    ) -> torch.Tensor:
        labels = counting(labels, self.ignore_index, student)
        options: dict[str, Any] = dict(alpha=1.0, ignore_index=IGNORED, num_items=num_items)
        terms = [
            share * kd_loss(student, teacher, labels, divergence=name, **options)
            for name, share in self.shares.items()
            if share
        ]
        return torch.stack(terms).sum()


class ForwardKLLoss(_KLLoss):
    """KL(p‖q) of logits in one piece.

    Args:
        ignore_index: the label of rows that do not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(1.0, ignore_index)


class ReverseKLLoss(_KLLoss):
    """KL(q‖p) of logits in one piece.

    Args:
        ignore_index: the label of rows that do not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(0.0, ignore_index)


class SymmetricKLLoss(_KLLoss):
    """sym_kd_ratio · KL(p‖q) + (1 − sym_kd_ratio) · KL(q‖p) of logits in one piece.

    Args:
        sym_kd_ratio: in [0, 1].
        ignore_index: the label of rows that do not count.

    Raises:
        ValueError: a ratio outside [0, 1].
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(sym_kd_ratio, ignore_index)
        self.sym_kd_ratio = sym_kd_ratio


class _ChunkedKLLoss(nn.Module):
    """The same of logits in chunks along the sequence, which never are in one piece."""

    def __init__(self, num_output_chunks: int, loss: _KLLoss) -> None:
        super().__init__()
        self.num_output_chunks = num_output_chunks  # recipes tell it the models
        self.ignore_index = loss.ignore_index
        self.loss = loss

    def forward(
        self,
        student_logits: Sequence[torch.Tensor],
        teacher_logits: Sequence[torch.Tensor],
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Chunks of logits (B, L / chunks, V) and labels (B, L) -> ().

        Raises:
            TypeError: logits in one piece.
            ValueError: chunks that are not of the same lengths, or not as long as the labels.
        """
        chunks = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        for name, x in chunks.items():
            if isinstance(x, torch.Tensor):
                raise TypeError(
                    f"{name} must be a list of chunks, got a tensor; call the model's "
                    f"set_num_output_chunks({self.num_output_chunks})"
                )
        lengths, theirs = ([chunk.shape[1] for chunk in x] for x in chunks.values())
        if lengths != theirs or sum(lengths) != labels.shape[1]:
            raise ValueError(
                f"student_logits and teacher_logits must be chunks of {labels.shape[1]} positions, "
                f"as labels have, got {lengths} and {theirs}"
            )
        count = (labels != self.ignore_index).sum()
        pieces = zip(
            student_logits, teacher_logits, torch.split(labels, lengths, dim=1), strict=True
        )
        return torch.stack([self.loss._loss(*piece, count) for piece in pieces]).sum()


class ForwardKLWithChunkedOutputLoss(_ChunkedKLLoss):
    """KL(p‖q) of logits in chunks.

    Args:
        num_output_chunks: for the recipe, which tells it the models.
        ignore_index: the label of rows that do not count.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ForwardKLLoss(ignore_index))


class ReverseKLWithChunkedOutputLoss(_ChunkedKLLoss):
    """KL(q‖p) of logits in chunks.

    Args:
        num_output_chunks: for the recipe, which tells it the models.
        ignore_index: the label of rows that do not count.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ReverseKLLoss(ignore_index))


class SymmetricKLWithChunkedOutputLoss(_ChunkedKLLoss):
    """sym_kd_ratio · KL(p‖q) + (1 − sym_kd_ratio) · KL(q‖p) of logits in chunks.

    Args:
        num_output_chunks: for the recipe, which tells it the models.
        sym_kd_ratio: in [0, 1].
        ignore_index: the label of rows that do not count.

    Raises:
        ValueError: a ratio outside [0, 1].
    """

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        super().__init__(num_output_chunks, SymmetricKLLoss(sym_kd_ratio, ignore_index))
        self.sym_kd_ratio = sym_kd_ratio
