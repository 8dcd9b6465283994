"""Labels of losses that only ask which rows count."""

import torch

IGNORED = -100


def counting(labels: torch.Tensor, ignore_index: int, logits: torch.Tensor) -> torch.Tensor:
    """0 for rows that count and `IGNORED` for others, (...) for logits (..., V).

    Labels may be of any dtype and value, and of any shape with as many elements: recipes make one
    side flat, models of packed sequences add a dimension.
    """
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    rows = logits.shape[:-1]
    if labels.numel() == rows.numel():
        labels = labels.reshape(rows)
    return torch.where(labels != ignore_index, 0, IGNORED)
