"""The `autograd.Function`s above the row operators: the gradient is made in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import chunked, loops, ops
from .objective import Objective
from .sources import Dense, LinearHead, tensors_of

if TYPE_CHECKING:
    from .parallel.groups import Group

SECOND_DERIVATIVE = (
    "kd_loss has no second derivative on a compiled backend, nor over a group; without one, "
    "backend='eager' is differentiable twice"
)
FORWARD_MODE = (
    "kd_loss has no forward-mode derivative on a compiled backend, nor over a group; without one, "
    "backend='eager' has it"
)
COMPILED_TRANSFORM = (
    "torch.compile does not know the derivatives of kd_loss within torch.func transforms on a "
    "compiled backend: compile with fullgraph=False, or use backend='eager'"
)
EXPORT = (
    "torch.export keeps no backward pass of kd_loss on a compiled backend: export it under "
    "torch.no_grad(), or with backend='eager'"
)
BATCHED = (
    "kd_loss takes one upstream gradient at a time on a compiled backend, not those that "
    "is_grads_batched=True, vectorize=True or torch.func.vmap over a backward pass hand it; "
    "use torch.func.vjp or jacrev, or backend='eager'"
)


def distill(
    student: Dense,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    objective: Objective,
    want_terms: bool,
    *,
    backend: str,
    inplace: bool,
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss on a backend of row operators; as `eager.distill`.

    With `inplace` the gradient is written over `student`. group: None, or the `Group` whose ranks
    share the columns, of which everything here is this rank's.
    """
    head = isinstance(student, LinearHead)
    chunks = head or chunked.in_chunks(teacher)
    if chunks and group is None and labels is not None and labels.device.type == "cpu":
        ops.check_labels(labels, objective.ignore_index, objective.vocab_size)  # by their own rows
    if (chunks or group is not None) and objective.reduction == "mean":
        leading = student.hidden if isinstance(student, LinearHead) else student
        inputs = labels, weights, num_items, leading, objective.ignore_index
        weights, num_items = chunked.settle_mean(*inputs)
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            raise NotImplementedError(COMPILED_TRANSFORM)  # it would lose the gradient of a leaf
        from . import transforms

        operands = student, teacher, labels, weights, num_items
        return transforms.distill(*operands, want_terms, objective, backend)
    call = teacher, labels, weights, num_items, want_terms, objective, backend, group
    tensors: tuple[Any, ...] = (student,)
    if isinstance(student, LinearHead):
        tensors = student.hidden, student.weight, student.bias
    if forward_ad._current_level >= 0:
        compiling = torch.compiler.is_compiling()  # to which a tangent is None
        duals = (forward_ad.unpack_dual(x) for x in tensors if x is not None)
        if compiling or any(dual.tangent is not None for dual in duals):
            raise NotImplementedError(FORWARD_MODE)  # instead of losing it
    derived = torch.is_grad_enabled()
    derived = derived and any(x is not None and x.requires_grad for x in tensors)
    if derived and torch.compiler._is_exporting_flag:  # whose getter is True to Dynamo of torch 2.9
        raise RuntimeError(EXPORT)
    if head and derived:
        loss, rows, _ = HeadFunction.apply(*tensors, student, *call)
    elif isinstance(student, LinearHead):
        loss, rows, _ = head_losses(student, (False,) * 3, *call)
    elif derived:
        loss, rows, _ = DistillFunction.apply(student, *call, inplace)
    else:
        loss, _, rows, _ = dense_losses(student, False, False, *call)
    return loss, rows


def dense_losses(
    student: Tensor,
    want_grad: bool,
    inplace: bool,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    want_terms: bool,
    objective: Objective,
    backend: str,
    group: Group | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, unscale, rows and gradient of dense student logits: see ops.py."""
    if group is not None:
        from .parallel import rows as shard_rows

        call = student, want_grad, inplace, teacher, labels, weights, num_items, want_terms
        return shard_rows.dense_losses(*call, objective, backend, group)
    inputs = student, teacher, labels, weights, num_items
    chunks = chunked.in_chunks(teacher)
    if chunks and _in_one_operator():
        wanted = want_terms, want_grad, objective, backend
        loss, unscale, rows, grad = loops.distill_rows(*inputs, *wanted)
    elif not chunks and not inplace:
        operator = ops.get("distill_rows", backend)
        tensors = student, ops.as_list(teacher, student), labels, weights, num_items
        losses = operator(*tensors, want_terms, want_grad, *objective.options())
        loss, unscale, rows, grad = losses
    else:
        grad = student.detach() if inplace else ops.new_grad(student, want_grad)
        distill_rows_ = chunked.distill_rows_ if chunks else ops.distill_rows_
        written = grad if want_grad else None
        options = want_terms, objective, backend
        loss, unscale, rows = distill_rows_(*inputs, written, *options)
    return rows[0].clone() if objective.reduction == "none" else loss, unscale, rows, grad


class DistillFunction(torch.autograd.Function):
    """(student, …) -> (loss, rows, anchor). The gradient waits in the forward pass's own buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (L, V_s) or (B, L, V_s)
        teacher: Any,  # any
        labels: Tensor | None,  # (L) or (B, L), int64, or None
        weights: Tensor | None,  # (L) or (B, L), float32, or None
        num_items: Tensor | None,  # () float64 or None
        want_terms: bool,
        objective: Objective,
        backend: str,
        group: Group | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = teacher, labels, weights, num_items, want_terms, objective, backend, group
        loss, unscale, rows, grad = dense_losses(student, True, inplace, *call)
        # `unscale` is an output, which nobody sees, so that it ties the gradient to this node: see
        # NotTwice.
        ctx.save_for_backward(grad, labels, weights, unscale)
        ctx.objective, ctx.backend = objective, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rows)
        return loss, rows, unscale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 10
        grad, labels, weights, unscale = ctx.saved_tensors
        _refuse_batched(upstream)
        # An alias, so that a leaf's .grad can take the buffer over instead of copying it.
        grad = grad.clone() if _graph_is_kept() else grad.detach()
        factors = upstream, unscale.detach(), labels, weights
        scale_rows_(grad, *factors, ctx.objective, ctx.backend)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad = NotTwice.apply(grad, unscale, upstream)
        return (grad,) + (None,) * 9


def scale_rows_(
    grad: Tensor,
    upstream: Tensor,
    unscale: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    objective: Objective,
    backend: str,
) -> None:
    """grad (L, V_s) or (B, L, V_s), in place, times an upstream gradient and `unscale`."""
    inputs = upstream.contiguous(), unscale, labels, weights
    operator = ops.get("scale_rows_", backend)
    operator(grad, *inputs, objective.ignore_index, objective.vocab_size)


def _in_one_operator() -> bool:
    """Whether a loop over chunks has to be an operator that writes to nothing but its results."""
    return torch.compiler.is_compiling() or ops.recorded()


def head_losses(
    head: LinearHead,
    wanted: Sequence[bool],
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    want_terms: bool,
    objective: Objective,
    backend: str,
    group: Group | None,
) -> tuple[Tensor, Tensor, chunked.HeadGradients]:
    """loss, rows, and `HeadGradients` of Σ weights · row losses."""
    if group is not None:
        from .parallel import rows as shard_rows

        call = head, wanted, teacher, labels, weights, num_items, want_terms
        return shard_rows.head_losses(*call, objective, backend, group)
    inputs = head, teacher, labels, weights, wanted, want_terms
    head_rows = loops.head_rows if _in_one_operator() else chunked.head_rows
    rows, gradients = head_rows(*inputs, objective, backend)
    if objective.reduction == "none":
        return rows[0].clone(), rows, gradients
    return chunked.reduced(rows[0], num_items, objective.reduction), rows, gradients


class HeadFunction(torch.autograd.Function):
    """(hidden, weight, bias, …) -> (loss, rows, anchor). The gradients are made in the forward pass
    too, but for reduction "none": what a row weighs in the weight's, the backward pass knows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (L, H) or (B, L, H)
        weight: Tensor,  # (V_s, H)
        bias: Tensor | None,  # (V_s) or None
        head: LinearHead,  # the LinearHead of these
        *call: Any,  # as in DistillFunction
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher, labels, weights, num_items, _, objective, *_ = call
        head = replace(head, hidden=hidden, weight=weight, bias=bias)
        per_row = objective.reduction == "none"
        wanted = (False,) * 3 if per_row else ctx.needs_input_grad[:3]
        loss, rows, gradients = head_losses(head, wanted, *call)
        anchor = rows.new_ones(())
        tensors = (hidden, weight, bias, None) if per_row else gradients
        ctx.save_for_backward(*tensors, labels, weights, num_items, anchor)
        nothing: Any = dict(hidden=None, weight=None, bias=None)
        ctx.head, ctx.call = replace(head, **nothing), call
        ctx.like = hidden.shape, weight.shape, hidden.dtype
        watched = []
        if per_row and teacher is not None and not torch.compiler.is_compiling():
            watched = tensors_of(teacher)
        ctx.versions = [(x, x._version) for _, x in watched]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rows)
        return loss, rows, anchor

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 12
        _refuse_batched(upstream)
        *tensors, labels, weights, num_items, anchor = ctx.saved_tensors
        teacher, *_, objective, backend, group = ctx.call
        if objective.reduction == "none":
            if any(x._version != version for x, version in ctx.versions):
                raise RuntimeError(
                    "the teacher was modified in place between the forward and the backward pass "
                    "of kd_loss(reduction='none'), whose gradient needs it as it was"
                )
            weights = chunked.row_factors(labels, weights, upstream, objective.ignore_index)
            hidden, weight, bias, _ = tensors
            head = replace(ctx.head, hidden=hidden, weight=weight, bias=bias)
            inputs = head, ctx.needs_input_grad[:3], teacher, labels, weights, None, False
            gradients = head_losses(*inputs, objective, backend, group)[2]
            factor = upstream.new_ones(())
        else:
            gradients = chunked.HeadGradients(*tensors)
            factor = upstream if num_items is None else upstream / num_items
        counts = chunked.counting(labels, weights, objective.ignore_index)
        inplace = objective.reduction == "none" or not _graph_is_kept()
        grads: Sequence[Tensor | None] = gradients.times(
            factor, counts, objective.vocab_size, ctx.like, inplace
        )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = [x if x is None else NotTwice.apply(x, anchor, upstream) for x in grads]
        return (*grads, *(None,) * 9)


def _refuse_batched(upstream: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(upstream) or functorch.is_legacy_batchedtensor(upstream):
        raise RuntimeError(BATCHED)


def _graph_is_kept() -> bool:
    """Whether this backward pass may run again, so that its buffers must outlive it."""
    if torch.compiler.is_compiling():
        return True  # the compiler decides itself which copies it needs
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


class NotTwice(torch.autograd.Function):
    """Identity on a gradient whose own derivative is an error and not silently zero.

    `anchor` is an output of the node that made the gradient, so that every path from the gradient
    to the student, and to the upstream gradient, leads through here.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor, upstream: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Any) -> None:
        raise RuntimeError(SECOND_DERIVATIVE)


class GiveUp(torch.autograd.Function):
    """Alias of logits that takes over their history, before they are overwritten."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


class Overwrite(torch.autograd.Function):
    """Marks logits as overwritten: a derivative through any later use of them is an error."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "these logits were overwritten by kd_loss(inplace=True) and used again afterwards; "
            "use them before the loss, or call it with inplace=False"
        )


def give_up(logits: Tensor) -> Tensor:
    """The logits to compute an in-place loss from; `logits` themselves are dead from here on.

    Raises PyTorch's error for a leaf that requires grad. What autograd saved from the logits
    raises at its own backward, because their version counter moves.
    """
    alias: Tensor = GiveUp.apply(logits)
    Overwrite.apply(logits)
    return alias
