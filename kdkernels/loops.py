"""The loops over chunks as operators, for `torch.compile` and selective checkpoints.

Traced through, a loop is as many copies of its body as there are chunks, for one number of rows;
and what an operator of it writes in place is not there when a checkpoint skips it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import chunked, ops
from .kept import Kept
from .objective import Objective
from .sources import Ensemble, LinearHead

# ---- Sources as an operator takes them -----------------------------------------------------------

SOURCE = (
    "Tensor[] {0}, str {0}_kinds, float[] {0}_scales, float[] {0}_caps, int[] {0}_chunk_rows, "
    "float[] {0}_weights, str {0}_mean"
)
COUNTS = {"logits": 1, "head": 2, "biased": 3, "kept": 3}  # tensors of each kind


class Packed(NamedTuple):
    """The fields of `SOURCE`: of each member of an ensemble, or of the one source that it is."""

    tensors: list[Tensor]
    kinds: str
    scales: list[float]
    caps: list[float]
    chunk_rows: list[int]
    weights: list[float]
    mean: str


def pack(source: Any) -> Packed:
    """Logits, `LinearHead`, `Kept`, an `Ensemble` of those, or None -> `Packed`."""
    members, weights, mean = [] if source is None else [source], [], ""
    if isinstance(source, Ensemble):
        members, mean = list(source.teachers), source.mean
        weights = [float(weight) for weight in source.weights or ()]
    packed = Packed([], "", [], [], [], weights, mean)
    kinds = []
    for x in members:
        scale, cap, rows = 1.0, 0.0, 0
        if isinstance(x, torch.Tensor):
            kind, fields = "logits", [x]
        elif isinstance(x, Kept):
            kind, fields = "kept", x.fields()
        else:
            kind = "head" if x.bias is None else "biased"
            fields = [y for y in (x.hidden, x.weight, x.bias) if y is not None]
            scale, cap, rows = x.logit_scale, x.softcap or 0.0, x.chunk_rows or 0
        kinds.append(kind)
        packed.tensors.extend(fields)
        packed.scales.append(float(scale))
        packed.caps.append(float(cap))
        packed.chunk_rows.append(rows)
    return packed._replace(kinds=" ".join(kinds))


def unpack(
    tensors: Sequence[Tensor],
    kinds: str,
    scales: Sequence[float],
    caps: Sequence[float],
    chunk_rows: Sequence[int],
    weights: Sequence[float],
    mean: str,
) -> Any:
    """The source that was packed."""
    remaining = iter(tensors)
    members: list[Any] = []
    for kind, scale, cap, rows in zip(kinds.split(), scales, caps, chunk_rows, strict=True):
        fields = [next(remaining) for _ in range(COUNTS[kind])]
        if kind == "logits":
            members += fields
        elif kind == "kept":
            members.append(Kept(*fields))
        else:
            bias = fields[2] if kind == "biased" else None
            options = scale, cap or None, rows or None
            members.append(LinearHead(fields[0], fields[1], bias, *options))
    if mean:
        return Ensemble(members, list(weights) or None, cast(Any, mean))
    return members[0] if members else None


# ---- The operators -------------------------------------------------------------------------------

ROWS = "Tensor? labels, Tensor? weights"
CALL = f"bool want_terms, str backend, {ops.OPTIONS}"
TEACHER, HEAD = SOURCE.format("teacher"), SOURCE.format("head")
# As `chunked.distill_rows_` and `chunked.head_rows`; what is not wanted is (0,).
SCHEMAS = {
    "distill_in_chunks": f"(Tensor student, {TEACHER}, {ROWS}, Tensor? num_items, bool want_grad, "
    f"{CALL}) -> (Tensor loss, Tensor unscale, Tensor rows, Tensor grad)",
    "head_in_chunks": f"({HEAD}, ScalarType grad_dtype, {TEACHER}, {ROWS}, bool[] wanted, {CALL}) "
    "-> (Tensor rows, Tensor hidden, Tensor weight, Tensor rest, Tensor bias)",
}
FIELDS = len(Packed._fields)


def _distill(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    teacher, args = unpack(*args[:FIELDS]), args[FIELDS:]
    labels, weights, num_items, want_grad, want_terms, backend, *options = args
    grad = ops.new_grad(student, want_grad)
    inputs = student, teacher, labels, weights, num_items, grad if want_grad else None, want_terms
    return *chunked.distill_rows_(*inputs, Objective(*options), backend), grad


def _fake_distill(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return *ops.new_losses(student), ops.new_grad(student, args[FIELDS + 3])


def _head(*args: Any) -> tuple[Tensor, ...]:
    head, teacher = _head_of(args), unpack(*args[FIELDS + 1 : 2 * FIELDS + 1])
    labels, weights, wanted, want_terms, backend, *options = args[2 * FIELDS + 1 :]
    inputs = head, teacher, labels, weights, wanted, want_terms, Objective(*options), backend
    rows, gradients = chunked.head_rows(*inputs)
    return rows, *_tensors(rows, gradients)


def _fake_head(*args: Any) -> tuple[Tensor, ...]:
    head, (_, _, wanted, _, _, *options) = _head_of(args), args[2 * FIELDS + 1 :]
    columns = Objective(*options).vocab_size
    rows = chunked.new_rows(head)
    return rows, *_tensors(rows, chunked.HeadGradients.empty(head, columns, wanted, 0))


def _head_of(args: Sequence[Any]) -> LinearHead:
    head: LinearHead = unpack(*args[:FIELDS])
    return replace(head, grad_dtype=args[FIELDS])


def _tensors(rows: Tensor, gradients: chunked.HeadGradients) -> list[Tensor]:
    return [rows.new_empty(0) if x is None else x for x in gradients]


for name, kernel, fake in (
    ("distill_in_chunks", _distill, _fake_distill),
    ("head_in_chunks", _head, _fake_head),
):
    ops.LIBRARY.define(name + SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    ops.LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kdkernels::{name}", fake, lib=ops.LIBRARY)


def distill_rows(
    student: Tensor,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    want_terms: bool,
    want_grad: bool,
    objective: Objective,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, unscale, rows and gradient, for a teacher whose logits come in chunks."""
    inputs = *pack(teacher), labels, weights, num_items, want_grad, want_terms, backend
    operator = torch.ops.kdkernels.distill_in_chunks
    loss, unscale, rows, grad = operator(student, *inputs, *objective.options())
    return loss, unscale, rows, grad


def head_rows(
    head: LinearHead,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    wanted: Sequence[bool],
    want_terms: bool,
    objective: Objective,
    backend: str,
) -> tuple[Tensor, chunked.HeadGradients]:
    """As `chunked.head_rows`. What the weight's gradient is added up in does not depend on the
    number of chunks."""
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    inputs = *pack(head), head.grad_dtype or wide, *pack(teacher), labels, weights
    call = list(wanted), want_terms, backend, *objective.options()
    rows, *gradients = torch.ops.kdkernels.head_in_chunks(*inputs, *call)
    hidden, weight, bias = wanted
    rest = weight and gradients[2].numel() > 0
    kept = zip((hidden, weight, rest, bias), gradients, strict=True)
    return rows, chunked.HeadGradients(*(x if wanted else None for wanted, x in kept))
