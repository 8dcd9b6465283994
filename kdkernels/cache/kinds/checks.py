"""What a prediction must be to be stored."""

from torch import Tensor

from ...sources import LinearHead


def one_of(prediction: object, *kinds: type) -> None:
    if not isinstance(prediction, kinds):
        wanted = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"prediction must be one of {wanted}, got {type(prediction).__name__}")


def logits(prediction: Tensor | LinearHead, vocab_size: int) -> None:
    """Logits or a `LinearHead` of n rows: of that many classes at least."""
    if isinstance(prediction, LinearHead):
        rows, classes = prediction.hidden, len(prediction.weight)
    else:
        rows, classes = prediction, prediction.shape[-1]
    if not rows.is_floating_point() or rows.dim() != 2 or classes < vocab_size:
        raise ValueError(
            f"prediction must be floating point of n rows and {vocab_size} classes or more, got "
            f"{rows.dtype} of shape {tuple(rows.shape)} and {classes} classes"
        )
