"""Hugging Face models, and the Trainer that trains them: `transformers` 5, and PEFT and TRL on it.

    HiddenStates     a causal language model whose logits need not exist
    KDTrainer        `transformers.Trainer` with a teacher
    KDTrainerMixin   the same for classes derived from it
    TeacherColumns   a teacher whose predictions come with the data

Only `KDTrainer` imports `transformers`, when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from .columns import TeacherColumns
from .hidden_states import HiddenStates
from .mixin import KDTrainerMixin

if TYPE_CHECKING:
    from .trainer import KDTrainer as KDTrainer

__all__ = ["HiddenStates", "KDTrainer", "KDTrainerMixin", "TeacherColumns"]


def __getattr__(name: str) -> Any:
    if name != "KDTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trainer import KDTrainer

    return KDTrainer
