"""`KDLoss`: `kd_loss` with its options kept, as an `nn.Module`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch.distributed as dist
from torch import Tensor, nn

from . import checks
from .backends import registry
from .backends.registry import Name as Backend
from .functional import KDTerms, Options, kd_loss
from .objective import Divergence, Reduction, make_objective
from .sources import Dense, Prediction

if TYPE_CHECKING:
    from typing_extensions import TypeVar as Defaulted
    from typing_extensions import Unpack

    Result = Defaulted("Result", Tensor, KDTerms, Tensor | KDTerms, default=Tensor)
else:
    Result = TypeVar("Result")


class KDLoss(nn.Module, Generic[Result]):
    """The knowledge-distillation loss as a criterion: the keywords of `kd_loss`, kept.

    Raises:
        TypeError, ValueError: as `kd_loss`, when constructed.

    Example:
        criterion = KDLoss(temperature=2.0, alpha=0.5)
        loss = criterion(student_logits, teacher_logits, labels)
    """

    @overload
    def __init__(
        self: KDLoss[Tensor],
        *,
        return_terms: Literal[False] = False,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self: KDLoss[KDTerms], *, return_terms: Literal[True], **options: Unpack[Options]
    ) -> None: ...

    @overload
    def __init__(
        self: KDLoss[Tensor | KDTerms], *, return_terms: bool, **options: Unpack[Options]
    ) -> None: ...

    def __init__(
        self,
        *,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        alpha: float = 0.5,
        beta: float | None = None,
        t_squared: bool = True,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        shift: bool = False,
        reduction: Reduction = "mean",
        group: dist.ProcessGroup | None = None,
        inplace: bool = False,
        backend: Backend | None = None,
        return_terms: bool = False,
    ) -> None:
        super().__init__()
        objective: dict[str, Any] = dict(
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
        self.options: dict[str, Any] = dict(
            **objective,
            shift=shift,
            group=group,
            inplace=inplace,
            backend=backend,
            return_terms=return_terms,
        )

    def forward(
        self,
        student: Dense,
        teacher: Prediction,
        labels: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Result:
        """Predictions: logits (..., V) or sources; labels (...) -> what `kd_loss` returns."""
        loss: Any = kd_loss(
            student,
            teacher,
            labels,
            token_weights=token_weights,
            num_items=num_items,
            **self.options,
        )
        result: Result = loss
        return result

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
