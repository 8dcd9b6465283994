"""docs/pytorch.md: `torch.compile`. Each cell is run, with one kind of source."""

import functools

import pytest
import torch
from conftest import assert_same_bits
from feature_table import (
    Case,
    assert_backward,
    assert_near,
    check_rows,
    claimed,
    one_of_each,
    row,
    usable,
)

COMPILE = {}
compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def counted(function, **options):
    """(the function compiled, the list of its graphs)."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(function, fullgraph=True, backend=backend, **options), graphs


def assert_one_graph(case, batches, marked):
    """A graph of the first batch serves all others, whose marked dimensions differ."""
    call, graphs = counted(functools.partial(case.of, weight=case.weight))
    for batch in batches:
        for x, dims in zip(batch, marked, strict=True):
            torch._dynamo.mark_dynamic(x, dims)
        hidden = batch[0].requires_grad_()
        losses = call(*batch), case.of(*batch, weight=case.weight)
        assert_same_bits(losses, [torch.autograd.grad(x, hidden)[0] for x in losses])
    assert len(graphs) == 1


@row(COMPILE, "`fullgraph=True`")
def fullgraph(case):
    assert_backward(case, compiled(case.loss))
    call = compiled(functools.partial(case.loss, reduction="none"))
    assert_backward(case, call, reduction="none")


@row(COMPILE, "any number of rows N: one graph")
def any_rows(case):
    batches = (Case(case.source, case.backend, rows=n, seed=n).tensors() for n in (6, 9, 37))
    assert_one_graph(case, batches, [(0,)] * 6)


@row(COMPILE, "N = 1: a graph of its own, as PyTorch makes it for every 1")
def one_row(case):
    call, graphs = counted(functools.partial(case.of, weight=case.weight), dynamic=True)
    for rows in (6, 1, 9, 1):
        batch = Case(case.source, case.backend, rows=rows).tensors()
        assert_same_bits((call(*batch), case.of(*batch, weight=case.weight)))
    assert len(graphs) == 2


@row(COMPILE, "any B and L of logits (B, L, V): one graph")
def any_batch(case):
    def batches():
        for b, n in ((2, 6), (3, 7), (4, 9)):
            made = Case(case.source, case.backend, rows=b * n, seed=n)
            yield [x.view(b, n, *x.shape[1:]) for x in made.tensors()]

    assert_one_graph(case, batches(), [(0, 1)] * 6)


@row(COMPILE, "any K of `TopK` and `Sampled`: one graph")
def any_kept(case):
    def batches():
        for count in (3, 6, 7):
            case.ids = torch.rand(case.rows, 13).argsort(-1)[:, :count]
            case.counts = torch.ones(case.rows, count)
            yield [x.clone() for x in case.tensors()]

    assert_one_graph(case, batches(), [(), (), (), (1,), (1,), ()])


class Student(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.body, self.case = torch.nn.Linear(5, 5), case
        self.weight = torch.nn.Parameter(case.weight.clone())

    def forward(self, hidden):
        return self.case.loss(self.body(hidden).tanh(), self.weight)


def steps(model, case, call):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        call(case.hidden).backward()
        optimizer.step()
    return [x.detach() for x in model.parameters()]


@row(COMPILE, "a model that ends in the loss, steps of training")
def training(case):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Student(case))
    plain, graph = models
    expected = steps(plain, case, plain)
    assert_near(steps(graph, case, compiled(graph)), expected)


@row(COMPILE, "`checkpoint` within the graph")
def checkpointed(case):
    call = functools.partial(torch.utils.checkpoint.checkpoint, case.loss, use_reentrant=False)
    assert_backward(case, compiled(call))


@row(COMPILE, "autocast within the graph")
def autocast(case):
    def loss(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss(hidden, weight)

    leaves, same = case.leaves(), case.leaves()
    found, plain = compiled(loss)(*leaves), loss(*same)
    found.backward()
    plain.backward()
    for x, y in zip((found, leaves[1].grad), (plain, same[1].grad), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * y.abs().max().item())


@row(COMPILE, "compiled autograd")
def compiled_autograd(case):
    def call(hidden, weight):
        loss = case.loss(hidden, weight)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            loss.backward()
        return loss

    leaves = case.leaves()
    loss = call(*leaves)
    found = [loss.detach(), *(x.grad for x in leaves)]
    assert_near(found, case.plain())


@pytest.mark.parametrize("on, name, source", one_of_each(COMPILE))
def test_compile(on, name, source):
    with claimed("`torch.compile`", name, on):
        COMPILE[name](Case(source, on))


# The loops over chunks, which were once unrolled for one number of rows.
@pytest.mark.parametrize("source", ["head", "sampled", "ensemble"])
def test_any_number_of_rows(source):
    backend = usable()[0]
    with claimed("`torch.compile`", "any number of rows N: one graph", backend):
        any_rows(Case(source, backend))


def test_every_row_of_the_page_has_a_test():
    check_rows("`torch.compile`", COMPILE)
