"""A loss for `keras.distillation.Distiller`, on Keras' torch backend (`KERAS_BACKEND=torch`).

Example:
    from kdkernels.integrations.keras import LogitsDistillation

    distiller = keras.distillation.Distiller(
        teacher=teacher, student=student, distillation_losses=LogitsDistillation(temperature=3.0)
    )
"""

from typing import Any

import keras
import torch

from ..modules import KDLoss

if keras.backend.backend() != "torch":
    raise ImportError(
        "kdkernels.integrations.keras needs Keras on torch: set KERAS_BACKEND=torch before Keras "
        f"is imported, it is on {keras.backend.backend()}"
    )


@keras.saving.register_keras_serializable(package="kdkernels")
class LogitsDistillation(keras.distillation.DistillationLoss):
    """T² · D(p, q) of the final outputs, which are logits, a mean over their rows.

    Keras' own `LogitsDistillation()` takes logits for probabilities: only given
    `loss=keras.losses.KLDivergence()` instead of that loss' name does it apply a softmax. Then it
    is the forward KL here, but for probabilities that it clips to [1e-7, 1], whose gradient is 0:
    most of a large vocabulary's. A saved distiller is loaded after this module is imported.

    Args:
        temperature: T.
        divergence, beta: D, as in `kd_loss`.

    Raises:
        TypeError, ValueError: as `KDLoss`; outputs of two structures.
    """

    def __init__(
        self,
        temperature: float = 3.0,
        divergence: str = "forward_kl",
        beta: float | None = None,
    ) -> None:
        self.temperature = temperature
        self.divergence = divergence
        self.beta = beta
        KDLoss(**self.get_config())  # checks them

    def compute_loss(
        self, teacher_outputs: Any, student_outputs: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Logits (..., V), or lists or dicts of them, whose losses add up -> ()."""
        self.validate_outputs(teacher_outputs, student_outputs)
        outputs = (keras.tree.flatten(x) for x in (student_outputs, teacher_outputs))
        loss = KDLoss(**self.get_config())  # anew: attributes may be set
        losses = [loss(s, t.detach()) for s, t in zip(*outputs, strict=True)]
        return torch.stack(losses).sum()

    def get_config(self) -> dict[str, Any]:
        return dict(temperature=self.temperature, divergence=self.divergence, beta=self.beta)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LogitsDistillation":
        return cls(**config)
