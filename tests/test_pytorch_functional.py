"""docs/pytorch.md: `torch.func` and mixed precision. Each cell is run."""

import functools

import pytest
import torch
from conftest import assert_same_bits
from feature_table import SOURCES, Case, assert_near, assert_sum, check_rows, claimed, row

from kdkernels import LinearHead, kd_loss

FUNCTIONAL, PRECISION = {}, {}


# --- torch.func ----------------------------------------------------------------------------------


@row(FUNCTIONAL, "`grad`, `grad_and_value`, `has_aux`")
def functional_grad(case):
    def terms(hidden, weight):
        found = case.loss(hidden, weight, return_terms=True, inplace=True)
        return found.loss, found

    leaves = case.hidden, case.weight
    loss, *expected = case.plain()
    grads, (value, found) = torch.func.grad_and_value(terms, (0, 1), has_aux=True)(*leaves)
    assert_near((value, *grads), (loss, *expected))
    assert_same_bits(*zip(found, case.loss(return_terms=True), strict=True))
    assert_near(torch.func.grad(case.loss, (0, 1))(*leaves), expected)


@row(FUNCTIONAL, "`vjp`, more than once")
def functional_vjp(case):
    loss, pull = torch.func.vjp(case.loss, case.hidden, case.weight)
    expected, *grads = case.plain()
    assert_near([loss], [expected])
    for scale in (2.0, -1.0):
        assert_near(pull(torch.tensor(scale)), [scale * x for x in grads])


@row(FUNCTIONAL, "`jacrev`")
def functional_jacrev(case):
    rows = functools.partial(case.loss, reduction="none")
    found = torch.func.jacrev(rows, (0, 1))(case.hidden, case.weight)
    _, *grads = case.plain(reduction="none")
    assert_near([x.sum(0) for x in found], grads)
    assert not found[0][1].any()  # of the row that is ignored
    assert not found[0][0, 2].any() and found[0][2, 2].any()  # each row has a gradient of its own


@row(FUNCTIONAL, "`vmap`, and of `grad`")
def functional_vmap(case):
    """Students by examples: each reduction is of its own rows."""
    hidden = torch.stack([case.hidden, -case.hidden, 2 * case.hidden], 1)
    weight = torch.stack([case.weight, 3 * case.weight, case.weight])
    losses = torch.func.vmap(case.loss, (1, 0))(hidden, weight)
    grads = torch.func.vmap(torch.func.grad(case.loss, (0, 1)), (1, 0))(hidden, weight)
    for k in range(3):
        case.hidden, case.weight = hidden[:, k], weight[k]
        assert_near((losses[k], grads[0][k], grads[1][k]), case.plain())


@row(FUNCTIONAL, "`functional_call` within `grad`")
def functional_call(case):
    module = torch.nn.Linear(5, 5)
    parameters = {name: x.detach() for name, x in module.named_parameters()}

    def loss(parameters):
        return case.loss(torch.func.functional_call(module, parameters, (case.hidden,)))

    found = torch.func.grad(loss)(parameters)
    case.loss(module(case.hidden)).backward()
    named = dict(module.named_parameters())
    assert_near(found.values(), [named[name].grad for name in found])


@row(FUNCTIONAL, "`backward` through the value of `grad_and_value`")
def functional_outer(case):
    leaves = case.leaves()
    _, value = torch.func.grad_and_value(lambda x: case.loss(x, leaves[1]))(case.hidden)
    value.backward()
    assert_near([leaves[1].grad], case.plain()[2:])


@row(FUNCTIONAL, "`backward` through the gradient of `grad`")
def functional_second(case):
    leaves = case.leaves()
    grad = torch.func.grad(case.loss)(*leaves)
    assert_near([grad.detach()], case.plain()[1:2])
    grad.square().sum().backward()
    assert all(x.grad.any() for x in leaves)


@row(FUNCTIONAL, "`grad` of `grad`, `hessian` by reverse mode")
def functional_hessian(case):
    found = torch.func.jacrev(torch.func.jacrev(case.loss))(case.hidden).flatten(2).flatten(0, 1)
    assert found.any()
    assert_near([found], [found.T])


@row(FUNCTIONAL, "`jvp`, `jacfwd`, `hessian`")
def functional_jvp(case):
    tangent = torch.ones_like(case.hidden)
    _, found = torch.func.jvp(case.loss, (case.hidden,), (tangent,))
    assert_sum(found, case.plain()[1])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional(backend, name, source):
    with claimed("`torch.func`", name, backend):
        FUNCTIONAL[name](Case(source, backend))


# --- mixed precision -----------------------------------------------------------------------------


@row(PRECISION, "autocast: nothing the loss takes is cast")
def autocast(case):
    leaves = case.leaves()
    logits = (case.hidden @ case.weight.T).requires_grad_()
    plain = case.plain()
    loss = kd_loss(logits, case.teacher, case.labels, backend=case.backend)
    expected = [loss.detach(), *torch.autograd.grad(loss, logits)]
    with torch.autocast("cpu", torch.bfloat16):
        found = kd_loss(logits, case.teacher, case.labels, backend=case.backend)
        headed = case.loss(*leaves) if case.source in ("head", "sampled") else None
    found = [found.detach(), *torch.autograd.grad(found, logits)]
    assert_same_bits(*zip(found, expected, strict=True))
    if headed is not None:
        headed = [headed.detach(), *torch.autograd.grad(headed, leaves)]
        assert_same_bits(*zip(headed, plain, strict=True))


@row(PRECISION, "autocast: logits that it made bfloat16, a float32 loss")
def autocast_model(case):
    model = torch.nn.Linear(5, 13, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(case.hidden)
        loss = kd_loss(logits, case.teacher, case.labels, backend=case.backend)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    logits.retain_grad()
    loss.backward()
    same = logits.detach().requires_grad_()
    expected = kd_loss(same, case.teacher, case.labels, backend=case.backend)
    expected.backward()
    assert_same_bits((loss, expected), (logits.grad, same.grad))
    assert model.weight.grad.dtype == torch.float32


@row(PRECISION, "autocast: `LinearHead(hidden, weight.to(hidden.dtype))`")
def autocast_head(case):
    leaves = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.mm(leaves[0], torch.eye(5))
        head = LinearHead(hidden, leaves[1].to(hidden.dtype))
        loss = kd_loss(head, case.teacher, case.labels, backend=case.backend)
    loss.backward()
    assert loss.dtype == torch.float32
    logits = torch.mm(case.hidden.bfloat16(), case.weight.bfloat16().T)
    expected = kd_loss(logits, case.teacher, case.labels, backend=case.backend)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert all(x.grad.dtype == torch.float32 and x.grad.any() for x in leaves)


@row(PRECISION, "autocast: a head whose weight is float32 beside hidden states of bfloat16")
def autocast_mixed(case):
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.mm(case.hidden, torch.eye(5))
        head = LinearHead(hidden, case.weight)
        kd_loss(head, case.teacher, case.labels, backend=case.backend)


def scaled_step(case, scaler, poison=False):
    """-> the gradient after `unscale_`, the weight after the step; float16 logits."""
    weight = case.weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    logits = (case.hidden @ weight.T).half()
    teacher = case.teacher * float("nan") if poison else case.teacher
    loss = kd_loss(logits, teacher, case.labels, num_items=2.0**20, backend=case.backend)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad = weight.grad.clone()
    scaler.step(optimizer)
    scaler.update()
    return grad, weight.detach()


@row(PRECISION, "`GradScaler`, float16: gradients that would be 0 without")
def scaler(case):
    grad, weight = scaled_step(case, torch.amp.GradScaler("cpu", init_scale=2.0**16))
    logits = (case.hidden @ case.weight.T).half()
    same = logits.float().requires_grad_()
    loss = kd_loss(same, case.teacher, case.labels, num_items=2.0**20, backend=case.backend)
    loss.backward()
    expected = same.grad.T @ case.hidden
    assert (same.grad.half() == 0).float().mean() > 0.5
    torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    assert_same_bits((weight, case.weight - grad))


@row(PRECISION, "`GradScaler`: a loss that is not finite skips the step")
def scaler_skips(case):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    grad, weight = scaled_step(case, scaler, poison=True)
    assert grad.isnan().any() and scaler.get_scale() == 4.0
    assert_same_bits((weight, case.weight))


@pytest.mark.parametrize("source", ["logits", "head"])
@pytest.mark.parametrize("name", PRECISION)
def test_precision(backend, name, source):
    with claimed("Mixed precision", name, backend):
        PRECISION[name](Case(source, backend))


# --- the tables ----------------------------------------------------------------------------------


def test_every_row_of_the_page_has_a_test():
    check_rows("`torch.func`", FUNCTIONAL)
    check_rows("Mixed precision", PRECISION)
