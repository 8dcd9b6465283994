"""The one `autograd.Function` above the row operators: the gradient is made in the forward pass."""

import torch

from . import ops

SECOND_DERIVATIVE = (
    "kd_loss has no second derivative on a compiled backend; use backend='eager', "
    "which is differentiable twice"
)


def distill(
    student, teacher, labels, weights, num_items, objective, want_terms, *, backend, inplace
):
    """The loss of dense logits on a backend of row operators; as `eager.distill`.

    With `inplace` the gradient is written over `student`.
    """
    inputs = student, teacher, labels, weights, num_items, want_terms
    # A forward-mode derivative has to meet the Function too, and its error, instead of being lost.
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if forward_mode or (student.requires_grad and torch.is_grad_enabled()):
        loss, rows, _ = DistillFunction.apply(*inputs, objective, backend, inplace)
        return loss, rows
    options = objective.options()
    loss, _, rows, _ = ops.get("distill_rows", backend)(*inputs, False, *options)
    return rows[0].clone() if objective.reduction == "none" else loss, rows


class DistillFunction(torch.autograd.Function):
    """(student, …) -> (loss, rows, anchor). The gradient waits in the forward pass's own buffer."""

    @staticmethod
    def forward(
        ctx,
        student,  # (L, V_s) or (B, L, V_s)
        teacher,  # (L, V_t) or (B, L, V_t)
        labels,  # (L) or (B, L), int64, or None
        weights,  # (L) or (B, L), float32, or None
        num_items,  # () float64 or None
        want_terms,
        objective,
        backend,
        inplace,
    ):
        inputs = student, teacher, labels, weights, num_items, want_terms
        if inplace:
            loss, unscale, rows = ops.get("distill_rows_", backend)(*inputs, *objective.options())
            grad = student.detach()
        else:
            loss, unscale, rows, grad = ops.get("distill_rows", backend)(
                *inputs, True, *objective.options()
            )
        if objective.reduction == "none":
            loss = rows[0].clone()
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
            return (None,) * 9
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
        return (grad,) + (None,) * 8


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
