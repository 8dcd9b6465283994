"""The tables of docs/pytorch.md, cell by cell: what a cell claims is what its test asserts.

A test file has a function for each row of its section, which uses the feature and compares what
comes out. Cells say "yes", or name an error of the list at the end of the page.
"""

import contextlib
import re
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, UNAVAILABLE, assert_same_bits

from kdkernels import Ensemble, LinearHead, Sampled, TopK, kd_loss

PAGE = (ROOT / "docs" / "pytorch.md").read_text()
COLUMNS = {"cuda_on_cpu": "native", "cuda": "native", "cuda_triton": "triton"}
IGNORE = -100
SOURCES = "logits", "head", "top-k", "sampled", "ensemble"


def rows_of(section):
    """{row: {column: cell}} of a section's table."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = text.split("\n| ", 1)[1].split("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] != "|-"]
    names, *rows = [[cell.strip() for cell in line] for line in lines]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in rows}


def errors():
    """{number: (name of its type, text)} of the page's list."""
    listed = re.findall(r"^(\d+)\. `(\w+)`: (.*)$", PAGE, re.MULTILINE)
    return {number: (kind, text) for number, kind, text in listed}


def usable():
    """The compiled backends that there are here."""
    return [name for name, reason in UNAVAILABLE.items() if name != "eager" and not reason]


def one_of_each(checks):
    """(backend, row, source) with eager and one compiled backend for each row, all in turn."""
    for number, name in enumerate(checks):
        compiled = usable()[number % len(usable()) :][:1]
        for shift, backend in enumerate(["eager", *compiled]):
            yield backend, name, SOURCES[(number + 2 * shift) % len(SOURCES)]


@contextlib.contextmanager
def claimed(section, row, backend):
    """What the cell says of this body."""
    cells = rows_of(section)[row]
    cell = cells.get(COLUMNS.get(backend, backend)) or cells["compiled"]
    if cell == "yes":
        yield
        return
    kind, text = errors()[re.fullmatch(r"no \[(\d+)\]", cell)[1]]
    with pytest.raises(Exception, match=re.escape(text)) as found:
        yield
    assert kind in [parent.__name__ for parent in found.type.__mro__]


def row(section, name):
    """Registers the test of a row."""
    return lambda check: section.setdefault(name, check)


def check_rows(section, checks):
    """Every row has a test, and every test a row."""
    assert set(rows_of(section)) == set(checks)


@dataclass
class Case:
    """A loss with two leaves: hidden states (N, H) and the student's weight (V, H)."""

    source: str
    backend: str
    rows: int = 4
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        n, h, v = self.rows, 5, 13
        self.hidden, self.weight = random(n, h), random(v, h)
        self.teacher_hidden, self.teacher_weight = random(n, h), random(v, h)
        self.teacher = 2 * random(n, v)
        self.ids = torch.rand(n, v, generator=generator).argsort(-1)[:, :3]
        self.counts = torch.ones(n, 3)
        self.labels = torch.randint(v, (n,), generator=generator)
        if n > 1:
            self.labels[1] = IGNORE

    def tensors(self):
        """What differs from batch to batch."""
        return [self.hidden, self.teacher_hidden, self.teacher, self.ids, self.counts, self.labels]

    def loss(self, hidden=None, weight=None, **options):
        hidden = self.hidden if hidden is None else hidden
        weight = self.weight if weight is None else weight
        return self.of(hidden, *self.tensors()[1:], weight=weight, **options)

    def of(self, hidden, teacher_hidden, teacher, ids, counts, labels, *, weight, **options):
        teacher = {
            "logits": lambda: teacher,
            "head": lambda: LinearHead(teacher_hidden, self.teacher_weight),
            "top-k": lambda: TopK(ids, teacher.log_softmax(-1).gather(-1, ids)),
            "sampled": lambda: Sampled(ids, counts),
            "ensemble": lambda: Ensemble(
                [teacher, LinearHead(teacher_hidden, self.teacher_weight)], weights=[0.3, 0.7]
            ),
        }[self.source]()
        head = self.source in ("head", "sampled")
        student = LinearHead(hidden, weight, chunk_rows=2) if head else hidden @ weight.T
        return kd_loss(student, teacher, labels, alpha=0.6, backend=self.backend, **options)

    def leaves(self):
        return [x.clone().requires_grad_() for x in (self.hidden, self.weight)]

    def plain(self, **options):
        """[loss, gradient of the hidden states, of the weight], of Σ row losses."""
        leaves = self.leaves()
        loss = self.loss(*leaves, **options)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def assert_near(actual, expected):
    """By roundings of a chunk's order: no element is off by more than that of the largest."""
    for x, y in zip(actual, expected, strict=True):
        bound = 2e-6 * y.abs().max().item()
        torch.testing.assert_close(x, y, rtol=2e-6, atol=bound)


def assert_sum(found, grad):
    """A derivative along ones is the sum of a gradient, by roundings of what is added up."""
    bound = 5e-7 * grad.abs().sum().item()
    torch.testing.assert_close(found, grad.sum(), rtol=0.0, atol=bound)


def assert_backward(case, call, **options):
    """Loss and gradients of `call(hidden, weight)` are those of the plain loss, bit by bit."""
    leaves = case.leaves()
    loss = call(*leaves)
    loss.sum().backward()
    found = [loss.detach(), *(x.grad for x in leaves)]
    assert_same_bits(*zip(found, case.plain(**options), strict=True))
