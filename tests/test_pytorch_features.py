"""docs/pytorch.md: autograd and its modes. Each cell is run."""

import copy
import functools
import pickle

import pytest
import torch
from conftest import assert_same_bits
from feature_table import (
    SOURCES,
    Case,
    assert_backward,
    assert_near,
    assert_sum,
    check_rows,
    claimed,
    row,
)
from torch.autograd import forward_ad
from torch.utils import checkpoint as checkpoints

from kdkernels import KDLoss

AUTOGRAD = {}


# --- autograd ------------------------------------------------------------------------------------


@row(AUTOGRAD, "backward twice, `retain_graph=True`")
def twice(case):
    leaves = case.leaves()
    loss = case.loss(*leaves)
    loss.backward(retain_graph=True)
    leaves[0].grad.mul_(1.0)  # in place, on what was handed out
    loss.backward()
    _, *grads = case.plain()
    assert_same_bits(*((x.grad, 2 * grad) for x, grad in zip(leaves, grads, strict=True)))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@row(AUTOGRAD, "a second derivative, `create_graph=True`")
def second(case):
    leaves = case.leaves()
    grads = torch.autograd.grad(case.loss(*leaves), leaves, create_graph=True)
    sum(x.square().sum() for x in grads).backward()
    assert all(x.grad.any() for x in leaves)


@row(AUTOGRAD, "`gradcheck`, `gradgradcheck`, in float64")
def gradcheck(case):
    names = "hidden", "weight", "teacher_hidden", "teacher_weight", "teacher"
    for name in names:
        setattr(case, name, getattr(case, name)[:3].double())
    case.teacher, case.teacher_weight = case.teacher[:, :3], case.teacher_weight[:3]
    case.ids = torch.tensor([[2, 0]] * 3)
    case.counts, case.labels = case.counts[:3, :2], torch.tensor([0, -100, 2])
    leaves = case.leaves()
    assert torch.autograd.gradcheck(case.loss, leaves)
    assert torch.autograd.gradgradcheck(case.loss, leaves)


@row(AUTOGRAD, "forward-mode derivatives, `torch.autograd.forward_ad`")
def dual(case):
    _, *grads = case.plain()
    with forward_ad.dual_level():
        tangent = torch.ones_like(case.hidden)
        loss = case.loss(forward_ad.make_dual(case.hidden, tangent))
        found = forward_ad.unpack_dual(loss).tangent
    assert_sum(found, grads[0])


@row(AUTOGRAD, "`is_grads_batched=True`")
def batched(case):
    leaves = case.leaves()
    rows = case.loss(*leaves, reduction="none")
    found = torch.autograd.grad(rows, leaves, torch.eye(case.rows), is_grads_batched=True)
    _, *grads = case.plain(reduction="none")
    assert_near([x.sum(0) for x in found], grads)


@row(AUTOGRAD, "`torch.utils.checkpoint`, `use_reentrant=True`")
def reentrant(case):
    call = functools.partial(checkpoints.checkpoint, case.loss, use_reentrant=True)
    assert_backward(case, call)
    inner = functools.partial(case.loss, inplace=True)
    assert_backward(case, functools.partial(checkpoints.checkpoint, inner, use_reentrant=True))


@row(AUTOGRAD, "`torch.utils.checkpoint`, `use_reentrant=False`")
def not_reentrant(case):
    for early in (True, False):
        for options in (dict(), dict(reduction="none"), dict(inplace=True)):
            inner = functools.partial(case.loss, **options)
            call = functools.partial(checkpoints.checkpoint, inner, use_reentrant=False)
            with checkpoints.set_checkpoint_early_stop(early):
                assert_backward(case, call, **options)


@row(AUTOGRAD, "selective checkpoints")
def selective(case):
    def keep_losses(context, operator, *args, **kwargs):
        keep = "kdkernels" in str(operator)
        policy = checkpoints.CheckpointPolicy
        return policy.MUST_SAVE if keep else policy.PREFER_RECOMPUTE

    contexts = functools.partial(checkpoints.create_selective_checkpoint_contexts, keep_losses)
    inner = functools.partial(checkpoints.checkpoint, use_reentrant=False, context_fn=contexts)
    for options in (dict(), dict(inplace=True)):
        loss = functools.partial(case.loss, **options)
        assert_backward(case, functools.partial(inner, loss), **options)


@row(AUTOGRAD, "saved-tensor hooks, `save_on_cpu`")
def hooks(case):
    copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
    for hooks in (torch.autograd.graph.save_on_cpu(), copies):
        leaves = case.leaves()
        with hooks:
            loss = case.loss(*leaves)
        loss.backward(retain_graph=True)
        loss.backward()
        _, *grads = case.plain()
        assert_same_bits(*((x.grad, 2 * grad) for x, grad in zip(leaves, grads, strict=True)))


@row(AUTOGRAD, "anomaly mode")
def anomaly(case):
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        assert_backward(case, case.loss)


@row(AUTOGRAD, "`use_deterministic_algorithms(True)`")
def deterministic(case):
    torch.use_deterministic_algorithms(True)
    try:
        assert_backward(case, case.loss)
    finally:
        torch.use_deterministic_algorithms(False)


@row(AUTOGRAD, "`no_grad`, `inference_mode`")
def without(case):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = case.loss(*case.leaves())
        assert not loss.requires_grad
        assert_same_bits((loss.clone(), case.plain()[0]))


@row(AUTOGRAD, "`set_default_dtype`, `set_default_device`")
def defaults(case):
    expected = case.plain()
    torch.set_default_dtype(torch.float64)
    try:
        found = case.plain()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        again = case.plain()
    finally:
        torch.set_default_device(None)
    for other in (found, again):
        assert_same_bits(*zip(other, expected, strict=True))


@row(AUTOGRAD, "`FakeTensorMode`")
def fake(case):
    with torch._subclasses.FakeTensorMode() as mode:
        case.teacher_weight = mode.from_tensor(case.teacher_weight)
        leaves = [mode.from_tensor(x).requires_grad_() for x in (case.hidden, case.weight)]
        rest = [mode.from_tensor(x) for x in case.tensors()[1:]]
        loss = case.of(leaves[0], *rest, weight=leaves[1])
        loss.backward()
    for x in leaves:
        assert x.grad.shape == x.shape and x.grad.dtype == x.dtype


@row(AUTOGRAD, "tensors on the device meta")
def meta(case):
    for name, x in vars(case).items():
        setattr(case, name, x.to("meta") if isinstance(x, torch.Tensor) else x)
    loss, *grads = case.plain()
    assert loss.shape == () and [x.shape for x in grads] == [case.hidden.shape, case.weight.shape]


@row(AUTOGRAD, "`pickle`, `copy.deepcopy` of `KDLoss`")
def copied(case):
    criterion = KDLoss(temperature=2.0, backend=case.backend)
    inputs = case.hidden @ case.weight.T, case.teacher, case.labels
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert_same_bits((other(*inputs), criterion(*inputs)))


@row(AUTOGRAD, "`torch.jit.trace`")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def traced(case):
    torch.jit.trace(case.loss, (case.hidden,))


@row(AUTOGRAD, "`torch.jit.script`")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def scripted(case):
    torch.jit.script(KDLoss(backend=case.backend))


@pytest.mark.filterwarnings("ignore:`?torch.jit")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", AUTOGRAD)
def test_autograd(backend, name, source):
    with claimed("Autograd", name, backend):
        AUTOGRAD[name](Case(source, backend))


def test_every_row_of_the_page_has_a_test():
    check_rows("Autograd", AUTOGRAD)
