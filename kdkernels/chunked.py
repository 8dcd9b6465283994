"""Rows in chunks, where predictions are no logits yet: project → the row operator → products.

Of a student that is a `LinearHead` a chunk of logits (n, V) exists at a time, whose gradient
replaces them in place; within it the teacher comes in smaller steps, because nothing is left of its
logits. The gradient takes four matrix products in all, one each for the student's logits, the
teacher's, and the gradients of hidden states and weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, pages
from .backends import eager
from .kept import Kept
from .objective import Objective
from .sources import Dense, Ensemble, LinearHead

# The rule for rows that exist at a time: as many times ROWS as fit these bytes, which are whole
# tiles of a product. Each product reads all of the weight, which has to be rare: from LEAST_ROWS
# upward it is, and fewer are only taken where those are more than a quarter of all rows. Every
# chunk of the student's also reads and writes all of the weight's gradient: on a GPU, whose
# products are fast, that has to be rarer still. A teacher's logits are read as soon as they are
# written: from a cache, where it is large enough.
CHUNK_BYTES = {"cpu": 2**26}
DEFAULT_CHUNK_BYTES = 2**29
STEP_BYTES = {"cpu": 2**25}
DEFAULT_STEP_BYTES = 2**27
ROWS = 128
LEAST_ROWS = 512
BLOCK = 1024  # rows of a weight or of its gradient at a time, where they have to be converted
FIRST_ROWS = 64  # of a gradient that is rounded in place


def in_chunks(teacher: Any) -> bool:
    """Whether its logits come a chunk of rows at a time."""
    return isinstance(teacher, (LinearHead, Ensemble))


class Step(NamedTuple):
    """Consecutive rows, as many as there are logits of the teacher at a time."""

    index: Any  # of the leading dimensions: slices
    shape: tuple[int, ...]  # what these become
    begin: int  # the same of the flattened rows
    end: int


def chunk_rows(head: LinearHead, columns: int) -> int:
    """Rows of a student's logits that exist at a time."""
    if head.chunk_rows is not None:
        return head.chunk_rows
    budget = CHUNK_BYTES.get(head.hidden.device.type, DEFAULT_CHUNK_BYTES)
    row_bytes = columns * logits_dtype(head.hidden).itemsize
    return _rows(budget, row_bytes, head.hidden.shape[:-1].numel())


def step_rows(student: Dense, teacher: Any, columns: int) -> int:
    """Rows of a teacher's logits that exist at a time, all of an ensemble's together."""
    members = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    heads = [x for x in members if isinstance(x, LinearHead)]
    if chosen := [head.chunk_rows for head in heads if head.chunk_rows is not None]:
        return min(chosen)
    row_bytes = sum(columns * logits_dtype(head.hidden).itemsize for head in heads)
    if isinstance(teacher, Ensemble):
        row_bytes += 3 * columns * 4  # a member's logits and log-probabilities, and the mean
    rows = student.hidden if isinstance(student, LinearHead) else student
    budget = STEP_BYTES.get(rows.device.type, DEFAULT_STEP_BYTES)
    return _rows(budget, row_bytes, rows.shape[:-1].numel() if heads else 0)


def _rows(budget: int, row_bytes: int, count: int) -> int:
    """count: all rows of the products, 0 where there is none."""
    least = min(LEAST_ROWS, count // 4 // ROWS * ROWS)
    return max(budget // (ROWS * max(row_bytes, 1)) * ROWS, least, ROWS)


def steps(shape: Sequence[int], rows: int) -> Iterator[Step]:
    """Cuts leading dimensions (L) or (B, L) into steps of up to `rows` rows."""
    *batch, length = shape
    if not batch:
        for begin in range(0, length, rows):
            end = min(begin + rows, length)
            yield Step((slice(begin, end),), (end - begin,), begin, end)
    elif length <= rows:
        count = rows // max(length, 1)
        for begin in range(0, batch[0], count):
            end = min(begin + count, batch[0])
            shape = end - begin, length
            yield Step((slice(begin, end),), shape, begin * length, end * length)
    else:
        for b in range(batch[0]):
            for begin in range(0, length, rows):
                end = min(begin + rows, length)
                index, shape = (slice(b, b + 1), slice(begin, end)), (1, end - begin)
                yield Step(index, shape, b * length + begin, b * length + end)


def chunks(shape: Sequence[int], rows: int, rows_of_step: int) -> Iterator[list[Step]]:
    """Steps of up to `rows_of_step` <= `rows` rows, in lists of up to `rows` rows."""
    chunk: list[Step] = []
    for step in steps(shape, rows_of_step):
        if chunk and step.end - chunk[0].begin > rows:
            yield chunk
            chunk = []
        chunk.append(step)
    if chunk:
        yield chunk


def with_heads(objective: Objective, student: Any, teacher: Any) -> Objective:
    """The objective of row operators that read the projections of heads."""
    for name, x in (("student", student), ("teacher", teacher)):
        if isinstance(x, LinearHead):
            cap: Any = {f"{name}_scale": x.logit_scale, f"{name}_cap": x.softcap or 0.0}
            objective = replace(objective, **cap)
    return objective


# ---- Products -----------------------------------------------------------------------------------


# A CPU without instructions for bfloat16 multiplies floats tens of times as fast.
CPU_HAS_BFLOAT16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()


def _converts(x: Tensor) -> bool:
    """Whether halves are made floats before a product: they have to be for what float16 cannot
    hold, the sums of a gradient, and on most CPUs it is faster."""
    if x.device.type != "cpu":
        return x.dtype == torch.float16 and not _widens(x.device)
    return x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not CPU_HAS_BFLOAT16)


def _widens(device: torch.device) -> bool:
    """Whether a product of halves can be had in the float32 it is added up in."""
    return device.type == "cuda" and not torch.version.hip


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """What a head's logits come in."""
    wide = hidden.dtype == torch.float16 or _converts(hidden)
    return torch.float32 if wide else hidden.dtype


class Projection:
    """The products of a head, a chunk of rows at a time."""

    def __init__(self, head: LinearHead, columns: int, rows: int, buffers: int = 1) -> None:
        self.hidden = head.hidden.reshape(-1, head.hidden.shape[-1])  # (N, H)
        self.weight = head.weight[:columns]  # (V, H)
        self.bias = None if head.bias is None else head.bias[:columns]
        dtype = logits_dtype(self.hidden)
        self.block = None
        if _converts(self.hidden):
            self.block = torch.empty_like(self.weight[:BLOCK], dtype=dtype)
            self.hidden = self.hidden.to(dtype)
            self.bias = None if self.bias is None else self.bias.to(dtype)
        self.wide = self.hidden.dtype != dtype  # the product's own: see _widens
        rows = min(rows, self.hidden.shape[0])
        self.buffers = [
            pages.advise_huge(self.hidden.new_empty((rows, columns), dtype=dtype))
            for _ in range(buffers)
        ]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, rows of the weight for a product), one after the other."""
        if self.block is None:
            yield slice(None), self.weight
            return
        for begin in range(0, len(self.weight), BLOCK):
            part = self.weight[begin : begin + BLOCK]
            yield slice(begin, begin + len(part)), self.block[: len(part)].copy_(part)

    def logits(self, begin: int, end: int) -> Tensor:
        """(n, V) of these rows, before scale and cap, in a buffer that others take over in turn."""
        self.buffers.append(self.buffers.pop(0))
        logits = self.buffers[-1][: end - begin]
        hidden = self.hidden[begin:end]
        for columns, weight in self.blocks():
            out = logits[:, columns]
            if self.wide:
                torch.ops.aten.mm.dtype_out(hidden, weight.T, out.dtype, out=out)
                out += 0 if self.bias is None else self.bias
            elif self.bias is None:
                torch.mm(hidden, weight.T, out=out)
            else:
                torch.addmm(self.bias[columns], hidden, weight.T, out=out)
        return logits

    def of_gradient(self, grad: Tensor, out: Tensor) -> None:
        """out (n, H) = grad (n, V) · weight."""
        if not len(self.weight):
            out.zero_()
        for columns, weight in self.blocks():
            add_product(out, grad[:, columns], weight, 1.0, first=columns.start in (None, 0))


class WeightGradient:
    """A gradient (V_s, H) that is added up over chunks, for the V rows of the weight that are used.

    The float32 sums of a gradient in halves lie in its own memory, half of them, and in as much
    again; they become the gradient there a block of rows at a time.
    """

    def __init__(self, gradient: Tensor, rest: Tensor | None, columns: int) -> None:
        self.gradient = gradient  # (V_s, H)
        self.rest = rest  # (V − V / 2, H) float32, or None: the sums are the gradient
        self.columns = columns

    @classmethod
    def empty(cls, weight: Tensor, columns: int, dtype: torch.dtype) -> WeightGradient:
        rest = None
        if dtype != weight.dtype:
            shape = columns - columns // 2, weight.shape[1]
            rest = pages.advise_huge(weight.new_empty(shape, dtype=dtype))
        return cls(pages.advise_huge(weight.new_empty(weight.shape)), rest, columns)

    def sums(self) -> list[Tensor]:
        """Blocks of rows of the sums, in order."""
        if self.rest is None:
            return [self.gradient[: self.columns]]
        rows, width = self.columns // 2, self.gradient.shape[1]
        within = self.gradient.view(-1)[: 2 * rows * width].view(self.rest.dtype)
        return [within.view(rows, width), self.rest]

    def add(self, a: Tensor, b: Tensor, factor: float, first: bool) -> None:
        """sums += factor · a b, or the `first` time, =: a (V, n), b (n, H)."""
        begin = 0
        for sums in self.sums():
            add_product(sums, a[begin : begin + len(sums)], b, factor, first)
            begin += len(sums)

    def times(self, factor: Tensor, inplace: bool) -> Tensor:
        """The gradient, times a factor (); in place nothing is left of the sums."""
        gradient = self.gradient if inplace else torch.empty_like(self.gradient)
        *within, rest = self.sums()
        begin = 0
        for sums in within:
            # The first rows by a copy; then every row goes where sums were that are done with.
            end = min(len(sums), FIRST_ROWS)
            gradient[:end] = sums[:end] * factor
            while end < len(sums):
                begin, end = end, min(2 * end, len(sums))
                scale_into(gradient[begin:end], sums[begin:end], factor)
            begin = len(sums)
        scale_into(gradient[begin : self.columns], rest, factor)
        gradient[self.columns :].zero_()
        return gradient


class HeadGradients(NamedTuple):
    """∂/∂ hidden, weight, bias of Σ rows, added up over chunks: what is not wanted is None."""

    hidden: Tensor | None  # (N, H) float32 or float64
    weight: Tensor | None  # (V_s, H) and
    rest: Tensor | None  # its rest: see WeightGradient
    bias: Tensor | None  # (V) float32 or float64

    @classmethod
    def empty(
        cls, head: LinearHead, columns: int, wanted: Sequence[bool], chunk_count: int
    ) -> HeadGradients:
        """To be added to from the first rows on, which don't read what is there."""
        hidden, weight, bias = wanted
        wide = torch.promote_types(head.hidden.dtype, torch.float32)
        dtype = head.grad_dtype or wide
        if head.grad_dtype is None and chunk_count <= 1:
            if logits_dtype(head.hidden) == head.weight.dtype:
                dtype = head.weight.dtype  # there is nothing to add
        shape = math.prod(head.hidden.shape[:-1]), head.hidden.shape[-1]  # of any number in a graph
        of_weight = WeightGradient.empty(head.weight, columns, dtype) if weight else None
        return cls(
            head.hidden.new_empty(shape, dtype=wide) if hidden else None,
            None if of_weight is None else of_weight.gradient,
            None if of_weight is None else of_weight.rest,
            head.hidden.new_zeros(columns, dtype=wide) if bias else None,
        )

    def add(
        self, projection: Projection, begin: int, end: int, grad: Tensor, counts: Tensor | None
    ) -> None:
        """grad (n, V) by these rows' logits; counts (n): rows that have one, or None for all."""
        if self.bias is not None:
            self.bias.add_(grad.sum(0, dtype=self.bias.dtype))
        factor = 1.0
        if projection.wide:
            factor = 2.0**-8  # of what float16 would flush to 0
            grad = grad.mul_(2.0**8).half()
        if self.hidden is not None:
            out = self.hidden[begin:end]
            projection.of_gradient(grad, out)
            if projection.wide:
                out *= factor
        if self.weight is not None:
            hidden = projection.hidden[begin:end]
            if counts is not None:  # 0 times what rows hold that do not count could be NaN
                hidden = torch.where(counts[:, None], hidden, 0)
            of_weight = WeightGradient(self.weight, self.rest, grad.shape[-1])
            of_weight.add(grad.T, hidden, factor, first=begin == 0)

    def zero(self) -> None:
        """Those of no rows."""
        for x in self:
            if x is not None:
                x.zero_()

    def times(
        self, factor: Tensor, counts: Tensor | None, columns: int, like: Any, inplace: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of hidden (L, H) or (B, L, H), weight (V_s, H) and bias (V_s), times a factor ().

        counts: bool (L) or (B, L), or None: the rows that have a gradient; the others' is 0
        whatever the factor is. like: the shapes and the dtype. With `inplace` nothing is left of
        these.
        """
        if counts is not None:
            factor = torch.where(counts.any(), factor, 0.0)
        shape, (rows, _), dtype = like
        hidden = weight = bias = None
        if self.hidden is not None:
            hidden = (self.hidden * factor).to(dtype).view(shape)
            if counts is not None:
                hidden.masked_fill_(~counts[..., None], 0.0)
        if self.weight is not None:
            weight = WeightGradient(self.weight, self.rest, columns).times(factor, inplace)
        if self.bias is not None:
            bias = F.pad((self.bias * factor).to(dtype), (0, rows - columns))
        return hidden, weight, bias


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float, first: bool) -> None:
    """total += factor · a b, or the `first` time, =, in the dtype of `total`."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, alpha=factor, out=total)
    elif _widens(a.device):
        dtype = total.dtype
        torch.ops.aten.addmm.dtype_out(total, a, b, dtype, beta=beta, alpha=factor, out=total)
    else:
        for begin in range(0, total.shape[0], BLOCK):
            part = a[begin : begin + BLOCK] @ b
            block = total[begin : begin + BLOCK]
            block.copy_(part) if first else block.add_(part)


def scale_into(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """out = x · factor. Where that is rounded, a CPU makes a copy of all it is given at a time."""
    rows = BLOCK if x.device.type == "cpu" else max(len(x), 1)
    for begin in range(0, len(x), rows):
        torch.mul(x[begin : begin + rows], factor, out=out[begin : begin + rows])


# ---- Teachers -----------------------------------------------------------------------------------


class Teacher:
    """What the row operators take of a teacher, a step at a time."""

    def __init__(self, teacher: Any, objective: Objective, rows: int, buffers: int = 1) -> None:
        self.teacher, self.objective = teacher, objective
        self.projection = None
        if isinstance(teacher, LinearHead):
            self.projection = Projection(teacher, objective.vocab_size, rows, buffers)

    def rows(self, step: Step) -> Any:
        if self.teacher is None:
            return None
        if self.projection is not None:
            logits = self.projection.logits(step.begin, step.end)
            return logits.view(*step.shape, logits.shape[-1])
        if not isinstance(self.teacher, Ensemble):
            return _take(self.teacher, step.index)
        members = [_take(x, step.index) for x in self.teacher.teachers]
        ensemble = Ensemble(members, self.teacher.weights, self.teacher.mean)
        # Logits whose softmax at T is the mean.
        return self.log_mean(ensemble).mul_(self.objective.temperature)

    def log_mean(self, ensemble: Ensemble) -> Tensor:
        """log p (…, V) of an ensemble's mean."""
        return eager.log_probabilities(ensemble, None, self.objective, torch.float32)


def _take(source: Any, index: Any) -> Any:
    if isinstance(source, torch.Tensor):
        return source[index]
    if isinstance(source, Kept):
        return source.at(index)
    return replace(source, hidden=source.hidden[index])


# ---- The loops ----------------------------------------------------------------------------------


def counting(labels: Tensor | None, weights: Tensor | None, ignore_index: int) -> Tensor | None:
    """Which rows have a share in the loss: bool (L) or (B, L), or None for all."""
    counts = None if labels is None else labels != ignore_index
    if weights is None:
        return counts
    return weights != 0 if counts is None else counts & (weights != 0)


def settle_mean(
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    rows: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """weights and num_items of a mean, neither None, for every chunk alike.

    rows: any tensor (L, …) or (B, L, …). Divided by 0, no row counts.
    """
    if weights is None:
        weights = rows.new_ones(rows.shape[:-1], dtype=torch.float32)
    if num_items is None:
        counted = weights if labels is None else torch.where(labels != ignore_index, weights, 0.0)
        num_items = counted.sum(dtype=torch.float64)
    return weights.masked_fill(num_items == 0, 0), num_items


def reduced(
    losses: Tensor, num_items: Tensor | None, reduction: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """losses (L) or (B, L) -> () of a dtype."""
    total = losses.sum(dtype=torch.float64)
    if reduction == "mean" and num_items is not None:
        total = torch.where(num_items == 0, 0.0, total / num_items)
    return total.to(dtype)


def row_factors(
    labels: Tensor | None, weights: Tensor | None, upstream: Tensor, ignore_index: int
) -> Tensor:
    """weights · upstream (L) or (B, L), 0 for rows that do not count whatever it is there."""
    counts = counting(labels, weights, ignore_index)
    factors = upstream.float() if weights is None else weights * upstream
    factors = factors.contiguous()
    return factors if counts is None else torch.where(counts, factors, 0.0)


def distill_rows_(
    student: Tensor,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    grad: Tensor | None,
    want_terms: bool,
    objective: Objective,
    backend: str,
) -> ops.Losses:
    """`ops.distill_rows_` for a teacher whose logits come in chunks."""
    shape = student.shape[:-1]
    objective = with_heads(objective, student, teacher)
    loss, unscale, rows = ops.new_losses(student)
    unscale.fill_(1)
    count = step_rows(student, teacher, objective.vocab_size)
    source = Teacher(teacher, objective, count)
    for step in steps(shape, count):
        index = step.index
        inputs = (
            student[index],
            source.rows(step),
            None if labels is None else labels[index],
            None if weights is None else weights[index],
            num_items,
        )
        part_grad = None if grad is None else grad[index]
        _, part_unscale, part = ops.distill_rows_(
            *inputs, part_grad, want_terms, objective, backend
        )
        rows[(slice(None), *index)] = part
        if unscale.dim():
            unscale[index] = part_unscale
        else:
            unscale = part_unscale
    return reduced(rows[0], num_items, objective.reduction), unscale, rows


def new_rows(head: LinearHead) -> Tensor:
    return head.hidden.new_empty((3, *head.hidden.shape[:-1]), dtype=torch.float32)


def head_rows(
    head: LinearHead,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    wanted: Sequence[bool],
    want_terms: bool,
    objective: Objective,
    backend: str,
) -> tuple[Tensor, HeadGradients]:
    """Rows (3, L) or (3, B, L), as the row operators', and `HeadGradients` of Σ rows[0].

    wanted: of hidden, weight and bias, which gradients.
    """
    shape, columns = head.hidden.shape[:-1], objective.vocab_size
    objective = replace(with_heads(objective, head, teacher), reduction="sum")
    rows = new_rows(head)
    rows_of_chunk = chunk_rows(head, columns)
    rows_of_step = min(step_rows(head, teacher, columns), rows_of_chunk)
    parts = list(chunks(shape, rows_of_chunk, rows_of_step))
    teacher = Teacher(teacher, objective, rows_of_step)
    student = Projection(head, columns, rows_of_chunk)
    gradients = HeadGradients.empty(head, columns, wanted, len(parts))
    counts = counting(labels, weights, objective.ignore_index)
    counts = None if counts is None else counts.flatten()
    for chunk in parts:
        begin, end = chunk[0].begin, chunk[-1].end
        logits = student.logits(begin, end)
        for step in chunk:
            index = step.index
            part = logits[step.begin - begin : step.end - begin].view(*step.shape, -1)
            inputs = (
                part,
                teacher.rows(step),
                None if labels is None else labels[index],
                None if weights is None else weights[index],
                None,
            )
            grad = part if any(wanted) else None
            losses = ops.distill_rows_(*inputs, grad, want_terms, objective, backend)
            rows[(slice(None), *index)] = losses[-1]
        if any(wanted):
            counted = None if counts is None else counts[begin:end]
            gradients.add(student, begin, end, logits, counted)
    if not parts:
        gradients.zero()
    return rows, gradients
