"""`torch.func` over the row operators: Functions of tensors alone, all that a derivative takes.

A transform unwraps the inputs of a Function and wraps its outputs, at each of its levels; `vmap`
calls it for one example after the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import autograd, chunked, loops
from .objective import Objective
from .sources import Dense, LinearHead


def distill(
    student: Dense,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    want_terms: bool,
    objective: Objective,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `autograd.distill`."""
    call = loops.pack(teacher), labels, weights, num_items, want_terms, objective, backend
    if isinstance(student, LinearHead):
        tensors = student.hidden, student.weight, student.bias
        nothing: Any = dict(hidden=None, weight=None, bias=None)
        empty = replace(student, **nothing)
        loss, rows = HeadLoss.apply(*tensors, empty, *call)
        return loss, rows
    loss, _, rows, _ = DenseLoss.apply(student, *call)
    return loss, rows


class Function(torch.autograd.Function):
    """One that has a first derivative, backward."""

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        examples = []
        for number in range(info.batch_size):

            def take(dim: int | None, x: Any, number: int = number) -> Any:
                return x if dim is None else x.select(dim, number).contiguous()

            examples.append(cls.apply(*tree_map(take, in_dims, args)))
        outputs = tuple(torch.stack(x) for x in zip(*examples, strict=True))
        return outputs, (0,) * len(outputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(autograd.FORWARD_MODE)


class DenseLoss(Function):
    """(student, …) -> (loss, unscale, rows, gradient), as the row operators."""

    @staticmethod
    def forward(student: Tensor, teacher: loops.Packed, *call: Any) -> tuple[Tensor, ...]:
        inputs: Any = student, True, False, loops.unpack(*teacher), *call, None
        return autograd.dense_losses(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        _, _, labels, weights, *_, ctx.objective, ctx.backend = inputs
        _, unscale, rows, grad = outputs
        ctx.save_for_backward(grad, unscale, labels, weights)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(unscale, rows)

    @staticmethod
    def backward(ctx: Any, upstream: Any, _: Any, __: Any, of_gradient: Any) -> tuple[Any, ...]:
        if of_gradient is not None:
            raise RuntimeError(autograd.SECOND_DERIVATIVE)
        if upstream is None:
            return (None,) * 8
        (grad,) = Scaled.apply(*ctx.saved_tensors, upstream, ctx.objective, ctx.backend)
        return grad, *(None,) * 7


class HeadLoss(Function):
    """(hidden, weight, bias, …) -> (loss, rows): the backward pass projects the rows again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: LinearHead,
        teacher: loops.Packed,
        *call: Any,
    ) -> tuple[Tensor, ...]:
        head = replace(head, hidden=hidden, weight=weight, bias=bias)
        inputs: Any = head, (False,) * 3, loops.unpack(*teacher), *call, None
        return autograd.head_losses(*inputs)[:2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        hidden, weight, bias, ctx.head, teacher, labels, weights, num_items, *_ = inputs
        *_, ctx.objective, ctx.backend = inputs
        given = hidden, weight, bias, labels, weights, num_items
        ctx.save_for_backward(*given, *teacher.tensors)
        ctx.teacher = teacher[1:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[1])

    @staticmethod
    def backward(ctx: Any, upstream: Any, _: Any) -> tuple[Any, ...]:
        if upstream is None:
            return (None,) * 11
        hidden, weight, bias, labels, weights, num_items, *teacher = ctx.saved_tensors
        if num_items is not None:
            upstream = upstream / num_items
        factors = chunked.row_factors(labels, weights, upstream, ctx.objective.ignore_index)
        wanted = ctx.needs_input_grad[:3]
        teacher = loops.Packed(list(teacher), *ctx.teacher)
        inputs = hidden, weight, bias, ctx.head, teacher, labels, factors, wanted
        grads = HeadGradient.apply(*inputs, ctx.objective, ctx.backend)
        return *(x if wants else None for x, wants in zip(grads, wanted, strict=True)), *(None,) * 8


class Once(Function):
    """A gradient, which has no derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(autograd.SECOND_DERIVATIVE)


class Scaled(Once):
    """(gradient of the forward pass, …, upstream) -> their product."""

    @staticmethod
    def forward(grad: Tensor, *factors_and_call: Any) -> tuple[Tensor]:
        unscale, labels, weights, upstream, objective, backend = factors_and_call
        grad = grad.clone()
        autograd.scale_rows_(grad, upstream, unscale, labels, weights, objective, backend)
        return (grad,)


class HeadGradient(Once):
    """(hidden, weight, bias, …, factors of the rows) -> their gradients, (0,) if not wanted."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        bias, head, teacher, labels, factors, wanted, objective, backend = rest
        head = replace(head, hidden=hidden, weight=weight, bias=bias)
        inputs = head, loops.unpack(*teacher), labels, factors, wanted, False, objective, backend
        _, gradients = chunked.head_rows(*inputs)
        counts = chunked.counting(labels, factors, objective.ignore_index)
        like = hidden.shape, weight.shape, hidden.dtype
        one = hidden.new_ones((), dtype=torch.float32)
        grads = gradients.times(one, counts, objective.vocab_size, like, inplace=True)
        return tuple(hidden.new_empty(0) if x is None else x for x in grads)
