"""The `autograd.Function`s above the row operators: the gradient is made in the forward pass."""

from dataclasses import replace

import torch

from . import chunked, ops
from .parallel import rows as shard_rows
from .sources import LinearHead, tensors_of

SECOND_DERIVATIVE = (
    "kd_loss has no second derivative on a compiled backend, nor over a group; without one, "
    "backend='eager' is differentiable twice"
)


def distill(
    student,
    teacher,
    labels,
    weights,
    num_items,
    objective,
    want_terms,
    *,
    backend,
    inplace,
    group=None,
):
    """The loss on a backend of row operators; as `eager.distill`.

    With `inplace` the gradient is written over `student`. group: None, or the `Group` whose ranks
    share the columns, of which everything here is this rank's.
    """
    head = isinstance(student, LinearHead)
    chunks = head or chunked.in_chunks(teacher)
    if chunks and group is None and labels is not None and labels.device.type == "cpu":
        ops.check_labels(labels, objective.ignore_index, objective.vocab_size)  # by their own rows
    if (chunks or group is not None) and objective.reduction == "mean":
        leading = student.hidden if head else student
        inputs = labels, weights, num_items, leading, objective.ignore_index
        weights, num_items = chunked.settle_mean(*inputs)
    call = teacher, labels, weights, num_items, want_terms, objective, backend, group
    tensors = (student.hidden, student.weight, student.bias) if head else (student,)
    # A forward-mode derivative has to meet the Function too, and its error, instead of being lost.
    derived = torch.autograd.forward_ad._current_level >= 0
    if not derived and torch.is_grad_enabled():
        derived = any(x is not None and x.requires_grad for x in tensors)
    if head and derived:
        loss, rows, _ = HeadFunction.apply(*tensors, student, *call)
    elif head:
        loss, rows, _ = head_losses(student, (False,) * 3, *call)
    elif derived:
        loss, rows, _ = DistillFunction.apply(student, *call, inplace)
    else:
        loss, _, rows, _ = dense_losses(student, False, False, *call)
    return loss, rows


def dense_losses(
    student,
    want_grad,
    inplace,
    teacher,
    labels,
    weights,
    num_items,
    want_terms,
    objective,
    backend,
    group,
):
    """loss, unscale, rows and gradient of dense student logits: see ops.py."""
    if group is not None:
        inputs = student, want_grad, inplace, teacher, labels, weights, num_items, want_terms
        return shard_rows.dense_losses(*inputs, objective, backend, group)
    inputs = student, teacher, labels, weights, num_items
    chunks = chunked.in_chunks(teacher)
    if not chunks and not inplace:
        operator = ops.get("distill_rows", backend)
        inputs = student, ops.as_list(teacher, student), labels, weights, num_items
        losses = operator(*inputs, want_terms, want_grad, *objective.options())
    else:
        grad = student.detach() if inplace else ops.new_grad(student, want_grad)
        distill_rows_ = chunked.distill_rows_ if chunks else ops.distill_rows_
        written = grad if want_grad else None
        losses = *distill_rows_(*inputs, written, want_terms, objective, backend), grad
    loss, unscale, rows, grad = losses
    return rows[0].clone() if objective.reduction == "none" else loss, unscale, rows, grad


class DistillFunction(torch.autograd.Function):
    """(student, …) -> (loss, rows, anchor). The gradient waits in the forward pass's own buffer."""

    @staticmethod
    def forward(
        ctx,
        student,  # (L, V_s) or (B, L, V_s)
        teacher,  # any
        labels,  # (L) or (B, L), int64, or None
        weights,  # (L) or (B, L), float32, or None
        num_items,  # () float64 or None
        want_terms,
        objective,
        backend,
        group,
        inplace,
    ):
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
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 10
        grad, labels, weights, unscale = ctx.saved_tensors
        # An alias, so that a leaf's .grad can take the buffer over instead of copying it.
        grad = grad.clone() if _graph_is_kept() else grad.detach()
        ops.get("scale_rows_", ctx.backend)(
            grad,
            upstream.contiguous(),
            unscale.detach(),
            labels,
            weights,
            ctx.objective.ignore_index,
            ctx.objective.vocab_size,
        )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad = NotTwice.apply(grad, unscale, upstream)
        return (grad,) + (None,) * 9


def head_losses(
    head, wanted, teacher, labels, weights, num_items, want_terms, objective, backend, group
):
    """loss, rows, and `HeadGradients` of Σ weights · row losses."""
    if group is not None:
        inputs = head, wanted, teacher, labels, weights, num_items, want_terms
        return shard_rows.head_losses(*inputs, objective, backend, group)
    inputs = head, teacher, labels, weights, wanted, want_terms
    rows, gradients = chunked.head_rows(*inputs, objective, backend)
    if objective.reduction == "none":
        return rows[0].clone(), rows, gradients
    return chunked.reduced(rows[0], num_items, objective.reduction), rows, gradients


class HeadFunction(torch.autograd.Function):
    """(hidden, weight, bias, …) -> (loss, rows, anchor). The gradients are made in the forward pass
    too, but for reduction "none": what a row weighs in the weight's, the backward pass knows."""

    @staticmethod
    def forward(
        ctx,
        hidden,  # (L, H) or (B, L, H)
        weight,  # (V_s, H)
        bias,  # (V_s) or None
        head,  # the LinearHead of these
        *call,  # as in DistillFunction
    ):
        teacher, labels, weights, num_items, _, objective, *_ = call
        head = replace(head, hidden=hidden, weight=weight, bias=bias)
        per_row = objective.reduction == "none"
        wanted = (False,) * 3 if per_row else ctx.needs_input_grad[:3]
        loss, rows, gradients = head_losses(head, wanted, *call)
        anchor = rows.new_ones(())
        tensors = (hidden, weight, bias, None) if per_row else gradients
        ctx.save_for_backward(*tensors, labels, weights, num_items, anchor)
        ctx.head, ctx.call = replace(head, hidden=None, weight=None, bias=None), call
        ctx.like = hidden.shape, weight.shape, hidden.dtype
        watched = []
        if per_row and teacher is not None and not torch.compiler.is_compiling():
            watched = tensors_of(teacher)
        ctx.versions = [(x, x._version) for _, x in watched]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rows)
        return loss, rows, anchor

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 12
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
        grads = gradients.times(factor, counts, objective.vocab_size, ctx.like, inplace)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = [x if x is None else NotTwice.apply(x, anchor, upstream) for x in grads]
        return (*grads, *(None,) * 9)


def _graph_is_kept():
    """Whether this backward pass may run again, so that its buffers must outlive it."""
    if torch.compiler.is_compiling():
        return True  # the compiler decides itself which copies it needs
    return torch._C._autograd._get_current_graph_task_keep_graph()


class NotTwice(torch.autograd.Function):
    """Identity on a gradient whose own derivative is an error and not silently zero.

    `anchor` is an output of the node that made the gradient, so that every path from the gradient
    to the student, and to the upstream gradient, leads through here.
    """

    @staticmethod
    def forward(ctx, grad, anchor, upstream):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(SECOND_DERIVATIVE)


class GiveUp(torch.autograd.Function):
    """Alias of logits that takes over their history, before they are overwritten."""

    @staticmethod
    def forward(ctx, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, upstream):
        return upstream


class Overwrite(torch.autograd.Function):
    """Marks logits as overwritten: a derivative through any later use of them is an error."""

    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "these logits were overwritten by kd_loss(inplace=True) and used again afterwards; "
            "use them before the loss, or call it with inplace=False"
        )


def give_up(logits):
    """The logits to compute an in-place loss from; `logits` themselves are dead from here on.

    Raises PyTorch's error for a leaf that requires grad. What autograd saved from the logits
    raises at its own backward, because their version counter moves.
    """
    alias = GiveUp.apply(logits)
    Overwrite.apply(logits)
    return alias
