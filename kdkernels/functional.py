"""`kd_loss`: checks everything once, chooses the backend, and hands rows to it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import autograd, checks, ops
from .backends import eager, registry
from .backends.registry import Name as Backend
from .kept import Kept, keep
from .objective import Divergence, Objective, Reduction, make_objective
from .source_checks import check_sources, check_sparse_objective
from .sources import Dense, Ensemble, LinearHead, Prediction, Sampled, TopK

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """The keywords of `KDLoss` for type checkers, without `return_terms`: see `kd_loss`."""

    divergence: Divergence
    temperature: float
    alpha: float
    beta: float | None
    t_squared: bool
    label_smoothing: float
    ignore_index: int
    vocab_size: int | None
    shift: bool
    reduction: Reduction
    group: dist.ProcessGroup | None
    inplace: bool
    backend: Backend | None


class CallOptions(Options, total=False):
    """Those of `kd_loss`."""

    token_weights: Tensor | None
    num_items: float | Tensor | None


class KDTerms(NamedTuple):
    """What `kd_loss(..., return_terms=True)` returns; all but `loss` are detached."""

    loss: Tensor  # as without return_terms
    distill: Tensor  # (), unweighted mean over valid rows of T² · D (D where t_squared=False)
    hard: Tensor  # (), unweighted mean over valid rows of the cross-entropy, 0 without labels
    num_items: Tensor  # (), int64: the number of valid rows


@overload
def kd_loss(
    student: Dense,
    teacher: Prediction,
    labels: Tensor | None = None,
    *,
    return_terms: Literal[False] = False,
    **options: Unpack[CallOptions],
) -> Tensor: ...


@overload
def kd_loss(
    student: Dense,
    teacher: Prediction,
    labels: Tensor | None = None,
    *,
    return_terms: Literal[True],
    **options: Unpack[CallOptions],
) -> KDTerms: ...


@overload
def kd_loss(
    student: Dense,
    teacher: Prediction,
    labels: Tensor | None = None,
    *,
    return_terms: bool,
    **options: Unpack[CallOptions],
) -> Tensor | KDTerms: ...


def kd_loss(
    student: Dense,
    teacher: Prediction,
    labels: Tensor | None = None,
    *,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.5,
    beta: float | None = None,
    t_squared: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    shift: bool = False,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    inplace: bool = False,
    backend: Backend | None = None,
    return_terms: bool = False,
) -> Tensor | KDTerms:
    """The knowledge-distillation loss of a student against a teacher and true labels.

    With q = softmax(student / T) and p = softmax(teacher / T), a row's loss is

        alpha · T² · D(p, q) + (1 − alpha) · CE(student, label)

    (Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2), the
    cross-entropy at T = 1. Without labels it is T² · D. Rows whose label is `ignore_index` count in
    neither term, whatever they contain. Every argument must have the shape given: nothing
    broadcasts.

    Args:
        student: logits (..., V_s), at least 2-D; float32, bfloat16, float16, or float64 (eager).
            Any view with unit stride along V is read where it lies. Or `LinearHead`.
        teacher: logits (..., V_t), any of the dtypes (float64 only with a float64 student), or
            `LinearHead`, `TopK`, `Sampled`, `Ensemble`. Its tensors must not require grad, and are
            not read where alpha = 0.
        labels: class ids (...), int64 or int32, or None.
        divergence: D, one of

            - "forward_kl": KL(p‖q) = Σ p (log p − log q);
            - "reverse_kl": KL(q‖p);
            - "jsd": beta KL(p‖m) + (1 − beta) KL(q‖m), m = beta p + (1 − beta) q, at 0 and 1 the
              forward and reverse KL (Agarwal et al. 2024, GKD, section 3; beta 0.5 by default);
            - "skew_forward_kl": KL(p ‖ beta p + (1 − beta) q), "skew_reverse_kl":
              KL(q ‖ beta q + (1 − beta) p) (Ko et al. 2024, DistiLLM, section 3.1; beta 0.1);
            - "tvd": ½ Σ |p − q|.
        temperature: T, a number in [2⁻²⁰, 2²⁰].
        alpha: weight of the divergence against the cross-entropy, in [0, 1]. A term of weight 0 is
            not computed.
        beta: the mixture weight of the divergences that have one, in [0, 1]; all of (0, 2⁻¹⁰⁰)
            count as 2⁻¹⁰⁰, so that float32 can hold the mixture.
        t_squared: multiply the divergence by T², which keeps the size of its gradient independent
            of T.
        label_smoothing: ε in [0, 1]: the label's target probability is 1 − ε + ε/V, every other
            class's ε/V.
        ignore_index: the label of rows that do not count.
        token_weights: (...), a weight for every row, real, not requiring grad.
        vocab_size: number of real classes; columns from there on are padding on either side (no
            probability, gradient 0), and student and teacher may be padded to different widths.
        shift: position i predicts label i + 1: logits (B, L, V) or (L, V), labels (and
            token_weights) (B, L) or (L,) as they are, the last position of a sequence ignored.
        reduction: "mean" (Σ w · row / Σ w over the rows that count), "sum" (Σ w · row) or "none"
            (w · row, of shape (...)).
        num_items: with "mean", divide by this instead of Σ w: a number or a one-element tensor.
            With the number of tokens of the whole batch, gradient accumulation and data parallel
            training give the gradient of one big batch.
        group: the `torch.distributed.ProcessGroup` whose ranks share the vocabulary. Logits are
            this rank's columns, in the order of the ranks, any number on each; of a `LinearHead`
            its rows of weight and bias, with all of the hidden states, whose gradient comes back
            complete. Labels, ids and `vocab_size` are of the whole vocabulary; they and all else,
            the number of rows first, are the same on every rank, as is what is returned. All
            ranks make the same calls, and of a head under "none" the same backward passes.
            Logits that are `DTensor`s sharded on the vocabulary need no group.
        inplace: write the gradient over the student's logits, which may not be used afterwards.
            (Under `torch.compile`, whose graphs own their memory, `torch.func` and selective
            checkpoints they are left as they are. A `LinearHead` has none.)
        backend: "native", "triton", "eager", or None: the environment variable `KDKERNELS_BACKEND`,
            read at each call (by `torch.compile`: when it traces), else the fastest usable one.
        return_terms: return `KDTerms(loss, distill, hard, num_items)`.

    Returns:
        The loss, float32 (float64 for float64 logits); the gradient has the student's dtype. With
        no row that counts the loss is 0 and so is its gradient.

    Raises:
        TypeError: an argument that is no tensor, has a dtype not listed, or is not a number.
        ValueError: shapes that do not match, names or numbers outside what is listed, a teacher
            that requires grad, a divergence or temperature that a sparse teacher has no answer for;
            what `TopK` or `Sampled` hold and is no distribution (on a GPU the row is NaN); ranks of
            a group that do not agree, or have replicas instead of shards.
        IndexError: labels outside [0, vocab_size) that are not `ignore_index` (on a GPU the row is
            NaN and the error follows); ids of `TopK` or `Sampled` outside it that are not −1 (on a
            GPU the row is NaN).
        RuntimeError: a backend asked for that cannot be used; `inplace` on a leaf that requires
            grad; another rank of `group` that could not go on; a call that is traced by
            `torch.jit.trace`, or exported with its gradient on a compiled backend.
        NotImplementedError: a forward-mode derivative, on a compiled backend.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace would keep the sizes of its example and no gradient of kd_loss; "
            "use torch.compile or torch.export"
        )
    sharding = None
    if group is not None or any(map(_holds_dtensor, (student, teacher, labels, token_weights))):
        from .parallel import call as parallel  # together a fifth of this package's import

        arguments = student, teacher, labels, token_weights, group, vocab_size
        sharding, student, teacher, labels, token_weights = parallel.opened(*arguments)
    vocab_size = check_sources(student, teacher, vocab_size, sharded=sharding is not None)
    leading = student.hidden if isinstance(student, LinearHead) else student
    shape, device = leading.shape[:-1], leading.device
    if sharding is not None and not shape.numel():
        sharding = None  # without rows there is nothing to tell
    checks.row_tensor("labels", labels, shape, device, checks.LABELS)
    checks.row_tensor("token_weights", token_weights, shape, device, checks.REALS)
    checks.num_items(num_items, reduction)
    objective = make_objective(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        alpha=alpha,
        t_squared=t_squared,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        reduction=reduction,
        has_labels=labels is not None,
    )
    check_sparse_objective(teacher, objective, divergence)
    backend = registry.resolve(device.type, leading.dtype, backend)

    if labels is not None:
        labels = labels.to(torch.int64)  # before shift, so that any ignore_index fits
    if shift:
        labels, token_weights = _shift(leading, labels, token_weights, ignore_index)
    overwritten = inplace and torch.is_grad_enabled()
    overwritten = overwritten and not (ops.transformed() or ops.recorded())
    if overwritten and isinstance(student, torch.Tensor) and student.requires_grad:
        checks.overwritable(student, teacher)
        inplace = not torch.compiler.is_compiling()
        if inplace:
            if labels is not None and device.type == "cpu" and sharding is None:
                ops.check_labels(labels, ignore_index, vocab_size)  # while the logits still live
            student = autograd.give_up(student)
    else:
        inplace = False
    lead = shape if len(shape) <= 2 else (math.prod(shape[:-1]), shape[-1])
    if labels is not None:
        labels = labels.reshape(lead).contiguous()
    if token_weights is not None:
        dtype = torch.promote_types(leading.dtype, torch.float32)
        token_weights = token_weights.to(dtype).reshape(lead).contiguous()
    if num_items is not None:
        num_items = _as_float64(num_items, device)
    student = _rows(student)
    known: Any = _rows(teacher)
    if not (objective.distill_weight or return_terms):
        if not isinstance(known, torch.Tensor):
            known = None  # a term of weight 0 is not computed, nor what it would take
    elif sharding is None:
        known = _kept(known, labels, objective)

    inputs = student, known, labels, token_weights, num_items, objective, return_terms
    if sharding is not None:
        loss, rows = parallel.distill(sharding, *inputs, backend=backend, inplace=inplace)
    elif backend == "eager":
        loss, rows = eager.distill(*inputs)
    else:
        loss, rows = autograd.distill(*inputs, backend=backend, inplace=inplace)
    if reduction == "none":
        loss = loss.reshape(shape)
    return _terms(loss, rows.detach(), labels, ignore_index) if return_terms else loss


def _terms(loss: Tensor, rows: Tensor, labels: Tensor | None, ignore_index: int) -> KDTerms:
    """rows (3, L) or (3, B, L), labels (L) or (B, L) or None -> KDTerms."""
    if labels is None:
        num_items = torch.full((), rows[0].numel(), dtype=torch.int64, device=rows.device)
    else:
        num_items = (labels != ignore_index).sum()
    sums = rows[1:].flatten(1).sum(1, dtype=torch.float64)
    distill, hard = (sums / num_items.clamp(min=1)).to(rows.dtype).unbind()
    return KDTerms(loss, distill, hard, num_items)


def _as_float64(num_items: float | Tensor, device: torch.device) -> Tensor:
    """A number or one-element tensor -> (), copied nowhere that it is not already."""
    if isinstance(num_items, torch.Tensor):
        return num_items.detach().reshape(()).to(device, torch.float64)
    return torch.full((), num_items, dtype=torch.float64, device=device)


def _rows(x: Prediction) -> Any:
    """A source (..., ·) -> (L, ·) or (B, L, ·): views where they exist, unit vocabulary stride."""
    if isinstance(x, torch.Tensor):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            x = x.contiguous()
        return x if x.dim() <= 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    if isinstance(x, Ensemble):
        return Ensemble([_rows(member) for member in x.teachers], x.weights, x.mean)
    if isinstance(x, LinearHead):
        weight = x.weight
        return replace(x, hidden=_rows(x.hidden), weight=_whole(weight), bias=_whole(x.bias))
    if isinstance(x, TopK):
        return TopK(_rows(x.ids), _rows(x.logprobs), x.tail)
    return Sampled(_rows(x.ids), _rows(x.counts))


def _holds_dtensor(x: object) -> bool:
    """Of an argument, whatever it is."""
    if isinstance(x, Ensemble) and isinstance(x.teachers, (list, tuple)):
        return any(map(_holds_dtensor, x.teachers))
    if isinstance(x, LinearHead):
        return _holds_dtensor(x.hidden)  # FSDP2 shards weights alone
    if isinstance(x, TopK):
        return _holds_dtensor(x.ids) or _holds_dtensor(x.logprobs)
    if isinstance(x, Sampled):
        return _holds_dtensor(x.ids) or _holds_dtensor(x.counts)
    return hasattr(x, "device_mesh")


def _whole(x: Any) -> Any:
    """A parameter that is sharded over ranks (DTensor, as FSDP2 makes them), gathered once.

    Its gradient is the mean of the ranks' gradients, as FSDP2 leaves in every other parameter.
    """
    if not hasattr(x, "full_tensor"):
        return x
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.full_tensor()
    from torch.distributed.tensor import Partial

    ranks = x.device_mesh.size()
    whole = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    whole.register_hook(lambda grad: grad / ranks)
    return whole


def _kept(
    teacher: Prediction, labels: Tensor | None, objective: Objective
) -> Tensor | LinearHead | Kept | Ensemble:
    """The teacher (L, ·) or (B, L, ·), what is sparse in it as `Kept`."""
    if isinstance(teacher, Ensemble):
        members: list[Any] = [_kept(x, labels, objective) for x in teacher.teachers]
        return Ensemble(members, teacher.weights, teacher.mean)
    return keep(teacher, labels, objective) if isinstance(teacher, (TopK, Sampled)) else teacher


def _shift(
    student: Tensor, labels: Tensor | None, token_weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """The labels and weights that positions predict: one later, none for the last position."""
    if labels is None:
        raise ValueError("shift=True needs labels, but labels is None")
    if student.dim() > 3:
        raise ValueError(
            f"shift=True needs student logits (B, L, V) or (L, V), got {tuple(student.shape)}"
        )
    if not labels.shape[-1]:
        return labels, token_weights
    labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if token_weights is not None:
        token_weights = F.pad(token_weights[..., 1:], (0, 1), value=0)
    return labels, token_weights
