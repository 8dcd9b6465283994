"""docs/pytorch.md: derivatives of graphs, `torch.export`, and what a CUDA graph asks of a call."""

import dataclasses
import functools

import pytest
import torch
from conftest import assert_same_bits
from feature_table import SOURCES, Case, assert_near, check_rows, claimed, one_of_each, row

from kdkernels.backends.registry import BACKENDS

DERIVED = {}
compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@row(DERIVED, "`torch.func.grad` of a compiled function")
def grad_of_compiled(case):
    call = torch.compile(case.loss, backend="aot_eager")
    call(case.hidden)
    assert_near([torch.func.grad(call)(case.hidden)], case.plain()[1:2])
    pair = torch.stack([case.hidden, -case.hidden])
    assert_near([torch.func.vmap(call)(pair)], [torch.stack([case.loss(x) for x in pair])])


@row(DERIVED, "compiled `torch.func.grad`, `fullgraph=False`")
def compiled_grad(case):
    call = torch.compile(torch.func.grad(case.loss), backend="aot_eager")
    assert_near([call(case.hidden)], case.plain()[1:2])


@row(DERIVED, "compiled `torch.func.grad`, `fullgraph=True`")
def compiled_grad_in_one(case):
    call = compiled(torch.func.grad(case.loss))
    assert_near([call(case.hidden)], case.plain()[1:2])


@row(DERIVED, "forward-mode derivatives of a compiled function")
def dual(case):
    forward_ad = torch.autograd.forward_ad
    call = torch.compile(case.loss, backend="aot_eager")
    with forward_ad.dual_level():
        loss = call(forward_ad.make_dual(case.hidden, torch.ones_like(case.hidden)))
        assert forward_ad.unpack_dual(loss).tangent is not None


@row(DERIVED, "a second derivative of a compiled function")
def second(case):
    leaves = case.leaves()
    (grad,) = torch.autograd.grad(compiled(case.loss)(*leaves), leaves[0], create_graph=True)
    grad.square().sum().backward()


class Exported(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case

    def forward(self, *batch):
        return self.case.of(*batch, weight=self.case.weight)


@row(DERIVED, "`torch.export` under `no_grad`, any N")
def exported(case):
    case.rows = 6
    case.__post_init__()
    batch = case.tensors()
    rows = torch.export.Dim("rows", min=2)
    shapes = tuple({0: rows} for _ in batch)
    with torch.no_grad():
        program = torch.export.export(Exported(case), tuple(batch), dynamic_shapes=(shapes,))
    for count in (6, 9):
        batch = Case(case.source, case.backend, rows=count).tensors()
        assert_same_bits((program.module()(*batch), case.of(*batch, weight=case.weight)))


@row(DERIVED, "`torch.export` with a gradient")
def exported_gradient(case):
    hidden = case.hidden.clone().requires_grad_()
    torch.export.export(Exported(case), (hidden, *case.tensors()[1:]))


@pytest.mark.parametrize("on, name, source", one_of_each(DERIVED))
def test_derivatives_and_export(on, name, source):
    if torch.__version__ < "2.13" and "second derivative of a compiled" in name:
        pytest.skip("PyTorch's own error has another text")
    if torch.__version__ < "2.10" and "under `no_grad`" in name:
        pytest.skip("programs check guards of no name")
    with claimed("Derivatives of graphs, `torch.export`", name, on):
        DERIVED[name](Case(source, on))


def test_every_row_of_the_page_has_a_test():
    check_rows("Derivatives of graphs, `torch.export`", DERIVED)


# --- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(reduction="none"),
        dict(num_items=7),
        dict(return_terms=True),
        dict(inplace=True),
        dict(token_weights=torch.ones(4, device="meta")),
        dict(num_items=torch.ones((), device="meta")),
    ],
    ids=lambda options: "-".join(options),
)
def test_nothing_is_read_back(backend, source, options, monkeypatch):
    """Forward and backward on a device that has no values: an `.item()`, a comparison that Python
    branches on, a copy to the host raise there. It is no CPU, so the calls are those for a GPU."""
    there = dataclasses.replace(BACKENDS[backend], unavailable=lambda device_type: None)
    monkeypatch.setitem(BACKENDS, backend, there)
    case = Case(source, backend)
    for name, x in vars(case).items():
        setattr(case, name, x.to("meta") if isinstance(x, torch.Tensor) else x)
    leaves = case.leaves()
    found = case.loss(*leaves, **options)
    loss = found.loss if options.get("return_terms") else found
    loss.sum().backward()
    assert all(x.grad.device.type == "meta" for x in leaves)
