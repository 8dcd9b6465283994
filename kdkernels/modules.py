"""`KDLoss`: `kd_loss` with its options kept, as an `nn.Module`."""

from torch import nn

from . import checks
from .backends import registry
from .functional import kd_loss
from .objective import make_objective


class KDLoss(nn.Module):
    """The knowledge-distillation loss as a criterion: the keywords of `kd_loss`, kept.

    Raises:
        TypeError, ValueError: as `kd_loss`, when constructed.

    Example:
        criterion = KDLoss(temperature=2.0, alpha=0.5)
        loss = criterion(student_logits, teacher_logits, labels)
    """

    def __init__(
        self,
        *,
        divergence="forward_kl",
        temperature=1.0,
        alpha=0.5,
        beta=None,
        t_squared=True,
        label_smoothing=0.0,
        ignore_index=-100,
        vocab_size=None,
        shift=False,
        reduction="mean",
        group=None,
        inplace=False,
        backend=None,
        return_terms=False,
    ):
        super().__init__()
        objective = dict(
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            alpha=alpha,
            t_squared=t_squared,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            reduction=reduction,
        )
        make_objective(**objective, has_labels=True)
        checks.positive_int("vocab_size", vocab_size)
        registry.check_name("backend", backend)
        self.options = dict(
            **objective,
            shift=shift,
            group=group,
            inplace=inplace,
            backend=backend,
            return_terms=return_terms,
        )

    def forward(self, student, teacher, labels=None, *, token_weights=None, num_items=None):
        """Predictions: logits (..., V) or sources; labels (...) -> what `kd_loss` returns."""
        return kd_loss(
            student,
            teacher,
            labels,
            token_weights=token_weights,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
