"""Schemas and fakes of the row operators; `backends/` registers what computes them.

Every backend registers the same operators under its own overload name, so that a backend is
chosen by name and not by device: `torch.ops.kdkernels.distill_rows.native(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import pages
from .objective import Objective

if TYPE_CHECKING:
    from .kept import Kept

LIBRARY = torch.library.Library("kdkernels", "DEF")

# The fields of `objective.Objective`, in its order.
OPTIONS = (
    "str divergence, float beta, float temperature, float distill_weight, float hard_weight, "
    "float distill_scale, float label_smoothing, float student_scale, float student_cap, "
    "float teacher_scale, float teacher_cap, int ignore_index, int vocab_size, str reduction"
)

# student (L, V_s) or (B, L, V_s): unit vocabulary stride. teacher: [logits], likewise with V_t, or
# the fields of `kept.Kept`, contiguous. labels int64 and weights float32, (L) or (B, L):
# contiguous. num_items () float64: the denominator of a mean, by default Σ weights over the rows
# that count.
# loss () float32; for reduction "none" it is rows[0] that holds it. unscale float32: what the
# gradient still has to be multiplied by, (L) or (B, L) for float16, else () and 1; 0 where no row
# counts.
# rows (3, L) or (3, B, L) float32: weight · loss, distillation term, cross-entropy of every row.
# grad: as student, contiguous ((0,) when not wanted); `distill_rows_` writes it to any memory of
# that shape, the student's too. upstream () or a value for every row, float32, contiguous:
# `scale_rows_` multiplies grad by upstream · unscale.
#
# The same rows where a device has some of their columns only, see parallel/rows.py: statistics of
# these, float64 (F, L) or (F, B, L) with the fields of csrc/common/args.h; merged over all devices,
# with one field more, they are what the two other operators take. Labels are columns here, −1
# elsewhere, −2 out of range; vocab_size counts the columns here, `classes` those of all devices.
SCHEMAS = {
    "distill_rows": "(Tensor student, Tensor[] teacher, Tensor? labels, Tensor? weights, "
    f"Tensor? num_items, bool want_terms, bool want_grad, {OPTIONS}) "
    "-> (Tensor loss, Tensor unscale, Tensor rows, Tensor grad)",
    "distill_rows_": "(Tensor student, Tensor[] teacher, Tensor? labels, Tensor? weights, "
    f"Tensor? num_items, Tensor(a!) grad, bool want_terms, {OPTIONS}) "
    "-> (Tensor loss, Tensor unscale, Tensor rows)",
    "scale_rows_": "(Tensor(a!) grad, Tensor upstream, Tensor unscale, Tensor? labels, "
    "Tensor? weights, int ignore_index, int vocab_size) -> ()",
    "shard_statistics": "(Tensor student, Tensor[] teacher, Tensor? labels, Tensor? weights, "
    f"bool want_terms, {OPTIONS}) -> Tensor",
    "shard_terms": "(Tensor student, Tensor[] teacher, Tensor? labels, Tensor? weights, "
    f"Tensor merged, bool want_terms, bool leads, {OPTIONS}) -> Tensor",
    "shard_gradient_": "(Tensor student, Tensor[] teacher, Tensor? labels, Tensor? weights, "
    f"Tensor? num_items, Tensor merged, Tensor(a!) grad, int classes, {OPTIONS}) -> Tensor unscale",
}
SHARD_FIELDS = (
    "max_s",
    "z_s",
    "z_rest",
    "label",
    "offset",
    "max_t",
    "z_t",
    "log_ratio",
    "kl",
)
KEPT_SHARD_FIELDS = (
    "others",
    "z",
    "z_hard",
    "label",
    "offset",
    "highest",
    "kept_z",
    "kept_z_hard",
    "share",
    "cross",
    "apart",
)
TERM_FIELDS = ("value", "mass", "slope")

Losses = tuple[Tensor, Tensor, Tensor]  # loss, unscale and rows
Kernel = Callable[..., Any]
Kernels = dict[str, Kernel]  # by the name of their operator


def sizes(x: Tensor) -> tuple[int, int, int]:
    """B, L, V of x (L, V) or (B, L, V)."""
    *batch, length, width = x.shape
    return batch[0] if batch else 1, length, width


def strides(x: Tensor) -> tuple[int, int]:
    """Of B and L, in elements; the vocabulary's is 1."""
    *batch, stride = x.stride()[:-1]
    return batch[0] if batch else 0, stride


def new_losses(student: Tensor) -> Losses:
    """Empty loss, unscale and rows for student (L, V) or (B, L, V)."""
    lead = student.shape[:-1]
    shapes = (), lead if student.dtype == torch.float16 else (), (3, *lead)
    loss, unscale, rows = (student.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return loss, unscale, rows


def new_grad(student: Tensor, wanted: bool) -> Tensor:
    return pages.advise_huge(student.new_empty(student.shape if wanted else (0,)))


def new_statistics(student: Tensor, fields: Sequence[str]) -> Tensor:
    """Empty statistics, (F, L) or (F, B, L), of student (L, V) or (B, L, V)."""
    return student.new_empty((len(fields), *student.shape[:-1]), dtype=torch.float64)


def new_unscale(student: Tensor) -> Tensor:
    return new_losses(student)[1]


def shard_fields(teacher: list[Tensor]) -> tuple[str, ...]:
    """Those of statistics with a teacher as the operators take it."""
    return SHARD_FIELDS if len(teacher) == 1 else KEPT_SHARD_FIELDS


def _fake_distill_rows(
    student: Tensor,
    teacher: list[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    terms: bool,
    want_grad: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *new_losses(student), new_grad(student, want_grad)


def _fake_distill_rows_(student: Tensor, *rest: Any) -> Losses:
    return new_losses(student)


def _fake_scale_rows_(*args: Any) -> None:
    return None


def _fake_shard_statistics(student: Tensor, teacher: list[Tensor], *rest: Any) -> Tensor:
    return new_statistics(student, shard_fields(teacher))


def _fake_shard_terms(student: Tensor, *rest: Any) -> Tensor:
    return new_statistics(student, TERM_FIELDS)


def _fake_shard_gradient_(student: Tensor, *rest: Any) -> Tensor:
    return new_unscale(student)


FAKES: Kernels = {
    "distill_rows": _fake_distill_rows,
    "distill_rows_": _fake_distill_rows_,
    "scale_rows_": _fake_scale_rows_,
    "shard_statistics": _fake_shard_statistics,
    "shard_terms": _fake_shard_terms,
    "shard_gradient_": _fake_shard_gradient_,
}


def register(backend: str, kernels: dict[str, Kernels]) -> None:
    """Register a backend's kernels: dispatch key ("CPU", "CUDA") -> operator name -> function."""
    for name in dict.fromkeys(name for functions in kernels.values() for name in functions):
        overload = f"{name}.{backend}"
        LIBRARY.define(overload + SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"kdkernels::{overload}", FAKES[name], lib=LIBRARY)
        for dispatch_key, functions in kernels.items():
            LIBRARY.impl(overload, functions[name], dispatch_key)


def operators(compute: Callable[..., Losses], scale_rows_: Kernel, shards: Kernels) -> Kernels:
    """Operator name -> function, of a backend that has one function for both ways to distil.

    `compute(student, teacher, labels, weights, num_items, grad, want_terms, options)` returns
    loss, unscale and rows and writes the gradient to `grad`, which may be the student, or None.
    `shards`: the operators for shards.
    """

    def distill_rows(
        student: Tensor,
        teacher: list[Tensor],
        labels: Tensor | None,
        weights: Tensor | None,
        num_items: Tensor | None,
        terms: bool,
        want_grad: bool,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad = new_grad(student, want_grad)
        inputs = student, teacher, labels, weights, num_items
        return *compute(*inputs, grad if want_grad else None, terms, options), grad

    def distill_rows_(
        student: Tensor,
        teacher: list[Tensor],
        labels: Tensor | None,
        weights: Tensor | None,
        num_items: Tensor | None,
        grad: Tensor | None,
        terms: bool,
        *options: Any,
    ) -> Losses:
        inputs = student, teacher, labels, weights, num_items
        return compute(*inputs, grad, terms, options)

    whole: Kernels = dict(
        distill_rows=distill_rows, distill_rows_=distill_rows_, scale_rows_=scale_rows_
    )
    return whole | shards


def transformed() -> bool:
    """Whether `torch.func` transforms this call; torch.compile sees to that by itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def recorded() -> bool:
    """Whether selective checkpoints record operators, and later skip those that they have results
    of: what these write elsewhere is lost then."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)


def as_list(teacher: Tensor | Kept | None, student: Tensor) -> list[Tensor]:
    """Logits, `Kept`, or None for what is not read, as the operators take them."""
    if teacher is None:
        return [student]
    return [teacher] if isinstance(teacher, torch.Tensor) else teacher.fields()


def get(name: str, backend: str) -> Kernel:
    """The operator `name` of a backend."""
    kernel: Kernel = getattr(getattr(torch.ops.kdkernels, name), backend)
    return kernel


def distill_rows_(
    student: Tensor,
    teacher: Tensor | Kept | None,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    grad: Tensor | None,
    want_terms: bool,
    objective: Objective,
    backend: str,
) -> Losses:
    """loss, unscale and rows; the gradient into `grad`, which may be the student, or None."""
    inputs = student, as_list(teacher, student), labels, weights, num_items
    losses: Losses
    if grad is None:
        operator, options = get("distill_rows", backend), objective.options()
        losses = operator(*inputs, want_terms, False, *options)[:3]
    else:
        operator = get("distill_rows_", backend)
        losses = operator(*inputs, grad, want_terms, *objective.options())
    return losses


# Labels are checked where they are used: by the compiled kernels themselves, and by this operator
# for the eager backend, so that the check survives `torch.compile` without a graph break.
LIBRARY.define(
    "check_labels(Tensor labels, int ignore_index, int vocab_size) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def out_of_range(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    return (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))


def bad_label_message(labels: Tensor, row: int, ignore_index: int, vocab_size: int) -> str:
    return (
        f"labels must be in [0, {vocab_size}) or ignore_index={ignore_index}, "
        f"got {labels.flatten()[row].item()} at row {row}"
    )


@torch.library.impl(LIBRARY, "check_labels", "CPU")
def _check_labels_cpu(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    bad = out_of_range(labels, ignore_index, vocab_size).flatten()
    if bad.any():
        row = int(bad.to(torch.uint8).argmax())
        raise IndexError(bad_label_message(labels, row, ignore_index, vocab_size))
    return labels.clone()


@torch.library.impl(LIBRARY, "check_labels", "CompositeExplicitAutograd")
def _check_labels_async(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    ok = ~out_of_range(labels, ignore_index, vocab_size).any()
    torch._assert_async(ok, f"labels must be in [0, {vocab_size}) or {ignore_index}")
    return labels.clone()


@torch.library.register_fake("kdkernels::check_labels", lib=LIBRARY)
def _fake_check_labels(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    return torch.empty_like(labels)


check_labels = torch.ops.kdkernels.check_labels.default
