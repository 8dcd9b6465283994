"""docs/pytorch.md: what of PyTorch goes with a `group`, whose ranks are threads here."""

import functools

import pytest
import torch
from conftest import assert_same_bits, problem
from feature_table import check_rows, claimed, row
from rank_threads import over_ranks
from torch.utils import checkpoint as checkpoints

from kdkernels import kd_loss

GROUP = {}


def halves(group, student, teacher):
    return (x[:, 6 * group.rank :][:, :6] for x in (student, teacher))


def losses(backend):
    """[(loss of a rank's columns, those, the gradient of a plain call)]"""
    student, teacher, labels = problem(4, 12)

    def on_rank(group, call):
        s, t = halves(group, student, teacher)
        leaf = s.clone().requires_grad_()
        loss = functools.partial(kd_loss, teacher=t, labels=labels, group=group, backend=backend)
        plain = leaf.detach().clone().requires_grad_()
        loss(plain).backward()
        return call(loss, leaf), leaf, plain.grad

    return lambda call: over_ranks(2, functools.partial(on_rank, call=call))


def assert_gradients(ranks):
    for _, leaf, grad in ranks:
        assert_same_bits((leaf.grad, grad))


@row(GROUP, "backward twice, `retain_graph=True`")
def twice(over):
    def call(loss, leaf):
        value = loss(leaf)
        value.backward(retain_graph=True)
        value.backward()
        leaf.grad /= 2

    assert_gradients(over(call))


@row(GROUP, "`torch.utils.checkpoint`")
def checkpoint(over):
    def call(loss, leaf, use_reentrant):
        checkpoints.checkpoint(loss, leaf, use_reentrant=use_reentrant).backward()

    for use_reentrant in (True, False):
        assert_gradients(over(functools.partial(call, use_reentrant=use_reentrant)))


@row(GROUP, "saved-tensor hooks, `save_on_cpu`")
def hooks(over):
    def call(loss, leaf):
        with torch.autograd.graph.save_on_cpu():
            value = loss(leaf)
        value.backward()

    assert_gradients(over(call))


@row(GROUP, "selective checkpoints")
def selective(over):
    contexts = functools.partial(
        checkpoints.create_selective_checkpoint_contexts,
        lambda *args, **kwargs: checkpoints.CheckpointPolicy.MUST_SAVE,
    )

    def call(loss, leaf):
        checkpoints.checkpoint(loss, leaf, use_reentrant=False, context_fn=contexts).backward()

    assert_gradients(over(call))


@row(GROUP, "a second derivative, `create_graph=True`")
def second(over):
    def call(loss, leaf):
        (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        grad.square().sum().backward()

    over(call)


@row(GROUP, "forward-mode derivatives")
def dual(over):
    def call(loss, leaf):
        with torch.autograd.forward_ad.dual_level():
            loss(torch.autograd.forward_ad.make_dual(leaf.detach(), torch.ones_like(leaf)))

    over(call)


@row(GROUP, "`torch.func`")
def transformed(over):
    over(lambda loss, leaf: torch.func.grad(loss)(leaf.detach()))


@row(GROUP, "`torch.compile`")
def compiled(over):
    over(lambda loss, leaf: torch.compile(loss, fullgraph=True, backend="eager")(leaf))


@pytest.mark.parametrize("name", GROUP)
def test_group(backend, name, monkeypatch):
    if name == "`torch.compile`":  # these ranks are no process group that a compiler knows
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with claimed("Many processes", name, backend):
        GROUP[name](losses(backend))


def test_every_row_of_the_page_has_a_test():
    check_rows("Many processes", GROUP)
