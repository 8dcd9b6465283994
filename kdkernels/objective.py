"""What a row of the loss computes: the options of `kd_loss`, checked once and frozen."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
Reduction = Literal["mean", "sum", "none"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

DEFAULT_BETA: dict[Divergence, float] = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}

# At these beta the mixture is one of the two distributions and the divergence has another name.
# (The generalised JSD tends to 0 there; GKD, TRL and Liger define its ends as the KLs instead.)
LIMITS: dict[tuple[Divergence, float], Divergence] = {
    ("jsd", 0.0): "forward_kl",
    ("jsd", 1.0): "reverse_kl",
    ("skew_forward_kl", 0.0): "forward_kl",
    ("skew_reverse_kl", 0.0): "reverse_kl",
}

MIN_BETA = 2.0**-100  # smaller ones count as this: float32 has to hold the mixture
MIN_TEMPERATURE, MAX_TEMPERATURE = 2.0**-20, 2.0**20


@dataclass(frozen=True)
class Objective:
    """row loss = distill_weight · D + hard_weight · CE, for the rows whose label counts.

    `distill_weight` is alpha · T² (T² alone without labels), `hard_weight` is 1 − alpha (0 without
    labels). A term of weight 0 is not computed, unless its value is asked for.
    """

    divergence: Divergence  # the limits in beta resolved
    beta: float  # 0 for a divergence without beta
    temperature: float
    distill_weight: float
    hard_weight: float
    distill_scale: float  # T², or 1: the factor that `KDTerms.distill` shares with the loss
    label_smoothing: float
    student_scale: float  # of logits that come as projections: see LinearHead
    student_cap: float  # 0: none
    teacher_scale: float
    teacher_cap: float
    ignore_index: int
    vocab_size: int  # columns from here on are padding
    reduction: Reduction

    def options(self) -> tuple[Any, ...]:
        """The fields in order, as the row operators take them (`ops.OPTIONS`)."""
        return tuple(getattr(self, field) for field in self.__dataclass_fields__)


def number(name: str, value: object, low: float, high: float) -> float:
    """The float that an option is, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:  # also catches NaN
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    return float(value)


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def resolve_divergence(divergence: Divergence, beta: float | None) -> tuple[Divergence, float]:
    """The divergence and beta to compute, for those asked for (`beta=None`: the default)."""
    check_choice("divergence", divergence, DIVERGENCES)
    if divergence not in DEFAULT_BETA:
        if beta is not None:
            raise ValueError(f"beta={beta} was given, but divergence {divergence!r} has no beta")
        return divergence, 0.0
    beta = DEFAULT_BETA[divergence] if beta is None else number("beta", beta, 0, 1)
    limit = LIMITS.get((divergence, beta))
    return (limit, 0.0) if limit else (divergence, max(beta, MIN_BETA))


def make_objective(
    *,
    divergence: Divergence,
    beta: float | None,
    temperature: float,
    alpha: float,
    t_squared: bool,
    label_smoothing: float,
    ignore_index: int,
    vocab_size: int,
    reduction: Reduction,
    has_labels: bool,
) -> Objective:
    """Check every option that is not a tensor. `vocab_size` is the resolved width."""
    check_choice("reduction", reduction, REDUCTIONS)
    divergence, beta = resolve_divergence(divergence, beta)
    temperature = number("temperature", temperature, MIN_TEMPERATURE, MAX_TEMPERATURE)
    alpha = number("alpha", alpha, 0, 1)
    label_smoothing = number("label_smoothing", label_smoothing, 0, 1)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into int64, got {ignore_index}")
    if label_smoothing and not has_labels:
        raise ValueError(f"label_smoothing={label_smoothing} needs labels, but labels is None")
    distill_scale = temperature * temperature if t_squared else 1.0
    return Objective(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        distill_weight=alpha * distill_scale if has_labels else distill_scale,
        hard_weight=1.0 - alpha if has_labels else 0.0,
        distill_scale=distill_scale,
        label_smoothing=label_smoothing,
        student_scale=1.0,
        student_cap=0.0,
        teacher_scale=1.0,
        teacher_cap=0.0,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        reduction=reduction,
    )
