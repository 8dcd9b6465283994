"""What is measured: one problem of one suite, and one call of a loss on it."""

import math
from dataclasses import dataclass, field, fields, replace

import torch

from .peers.base import spelled

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BETAS = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}
# A mean over tokens has gradients that float16 does not hold: a GradScaler's factor comes with it.
UPSTREAM = {"float16": 2.0**15}
WORK = 2**20  # logits: below, a call is what is measured
CHECKED_ROWS = 64  # whose gradients are checked where all of them would be too many
CHECKED_ENTRIES = 2**27
CHECKED_AT_ONCE = 2**23  # logits that a definition has in float64 at a time


@dataclass(frozen=True)
class Case:
    """alpha · T² · D + (1 − alpha) · CE of N rows and V classes: `suites/` has one class for each.

    A suite's class has
        suite: its name;
        variants: {name: peers.base.Variant};
        draw(): the inputs, which have `leaves()`, the tensors whose gradients are the result;
        definitions(inputs): what is right, in float64: each `Definition` a variant may meet;
        yardsticks: {name: class with `title`, made of (case, inputs), with `prepare` and `run`};
        small(): a case of the same kind in no time and next to no memory;
        bytes, flops, exponentials: what has to move and to be computed, or None.
    """

    device: str  # "cpu" or "cuda"
    dtype: str  # of DTYPES
    rows: int
    vocab: int
    divergence: str = "forward_kl"
    temperature: float = 1.0
    alpha: float = 0.5
    backward: bool = True
    threads: int = 1

    base, formula = "native", "pytorch"  # the variant that others are compared with, and PyTorch's
    bytes = flops = exponentials = None

    @property
    def beta(self):
        return BETAS.get(self.divergence)

    @property
    def torch_dtype(self):
        return DTYPES[self.dtype]

    @property
    def upstream(self):
        return UPSTREAM.get(self.dtype, 1.0)

    @property
    def matrix(self):
        """Bytes of a matrix of logits."""
        return self.rows * self.vocab * self.torch_dtype.itemsize

    @property
    def special(self):
        """Exponentials and logarithms that a class of a row of logits needs, computed once each.

        e^{s/T} and e^{t/T}; e^s where that is no small power of e^{s/T}; the logarithm of a mean.
        """
        if self.alpha == 0:
            return 1
        power = self.alpha == 1 or self.temperature in (1, 2, 3, 4)
        return 2 + (not power) + (self.divergence in BETAS)

    @property
    def objective(self):
        """The loss in words."""
        terms = [spelled(self.divergence)] if self.alpha > 0 else []
        if self.alpha < 1:
            terms.append("cross-entropy")
        temper = f", T = {self.temperature:g}" if self.alpha > 0 else ""
        mixed = f", α = {self.alpha:g}" if len(terms) > 1 else ""
        return " and ".join(terms) + temper + mixed + ("" if self.backward else ", loss only")

    @property
    def shape(self):
        return f"{self.rows:,} × {self.vocab:,}"

    @property
    def title(self):
        return f"{self.suite}: {self.shape}, {self.dtype}, {self.objective}, {self.where}"

    @property
    def where(self):
        if self.device == "cuda":
            return "GPU"
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"

    def options(self, **more):
        """For `kd_loss`."""
        return dict(
            divergence=self.divergence,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            **more,
        )

    def is_one_of(self, name, wanted):
        """Whether a variant was asked for."""
        return name in wanted

    def loss_only(self):
        return replace(self, backward=False)

    def with_gradient(self):
        return replace(self, backward=True)

    def checked(self):
        """(R,) int64: the rows whose gradients are checked, all of them where that is few."""
        return rows_of(self.rows, self.rows * self.vocab)

    def chunks(self):
        """Slices of the rows, of which a float64 definition takes one at a time."""
        size = max(CHECKED_AT_ONCE // self.vocab, 1)
        return [slice(start, start + size) for start in range(0, self.rows, size)]

    def record(self):
        """What tells a case from others, and its names."""
        found = {"suite": self.suite, **{name: getattr(self, name) for name in FIELDS}}
        return {**found, "case": self.title, "shape": self.shape, "objective": self.objective}


FIELDS = tuple(each.name for each in fields(Case)) + ("hidden", "k", "tail")
Case.hidden = Case.k = Case.tail = None  # of the suites that have them


def rows_of(count, entries):
    """(R,) int64: all rows of a gradient, or of a large one the first, the last and some others."""
    if entries <= CHECKED_ENTRIES:
        return torch.arange(count)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS]
    return torch.cat([chosen, torch.tensor([0, count - 1])]).unique()


class Inputs:
    """What a loss is called with; `leaves()` are the tensors whose gradients are the result."""

    def update(self):
        """What a step does after the backward pass."""


@dataclass
class Definition:
    """Loss and gradients in float64, and what the errors of the gradients are relative to."""

    loss: torch.Tensor  # ()
    gradients: list = field(default_factory=list)  # of each leaf, at `rows`
    sizes: list = field(default_factory=list)  # as large as a gradient, or broadcast to it
    rows: list = field(default_factory=list)  # of each leaf: (R,) int64, where it is checked


class Produced(torch.autograd.Function):
    """The student's logits as a model would produce them: no leaf, and free to be overwritten."""

    @staticmethod
    def forward(ctx, anchor, logits, received):
        ctx.received = received
        return logits.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.received.append(grad)
        return torch.zeros(()), None, None


class Step:
    """One call of a loss, with its backward pass or without. `prepare` is not part of the time.

    Gradients are allocated anew in every call, as they are in training: the last ones are dropped
    by `prepare`, and between repeated runs by `run` itself. A variant that overwrites the
    student's logits gets a copy of them, renewed by `prepare`.
    """

    def __init__(self, loss, case, inputs, overwrites=False):
        self.loss, self.case, self.inputs = loss, case, inputs
        self.value, self.received, self.given = None, [], inputs
        self.overwrites = overwrites and case.backward
        if self.overwrites:
            self.buffer = torch.empty_like(inputs.student)
            self.anchor = torch.zeros((), requires_grad=True)

    def drop(self):
        """Hold no result any more."""
        self.value = None
        self.received.clear()
        for leaf in self.inputs.leaves():
            leaf.grad = None

    def prepare(self):
        self.drop()
        if self.overwrites:
            self.buffer.copy_(self.inputs.student.detach())
            logits = Produced.apply(self.anchor, self.buffer, self.received)
            self.given = replace(self.inputs, student=logits)

    def run(self):
        for leaf in self.inputs.leaves():
            leaf.grad = None
        with torch.set_grad_enabled(self.case.backward):
            self.value = self.loss(self.given)
            if self.case.backward:
                upstream = self.case.upstream
                self.value.backward(
                    None if upstream == 1 else torch.full_like(self.value, upstream)
                )
                self.inputs.update()

    def gradients(self):
        """Of each leaf; none without a backward pass."""
        if not self.case.backward:
            return []
        return self.received or [leaf.grad for leaf in self.inputs.leaves()]

    def gradient_bytes(self):
        """Of the gradients that have memory of their own."""
        given = self.given.student.data_ptr() if self.overwrites else None
        return sum(x.nbytes for x in self.gradients() if x.data_ptr() != given)


class Yardstick:
    """Timed as a `Step` is."""

    def prepare(self):
        pass

    def drop(self):
        pass


class Copy(Yardstick):
    """The yardstick of what is bound by memory: as many bytes as have to move, half of them read.

    Of tensors that are there, into memory that is there.
    """

    title = "copy of as many bytes"

    def __init__(self, case, inputs):
        source, left, self.pairs = inputs.student.detach().flatten(), case.bytes // 2, []
        while left > 0:
            part = source[: math.ceil(left / source.itemsize)]
            self.pairs.append((torch.zeros_like(part), part))
            left -= part.nbytes

    def run(self):
        for target, part in self.pairs:
            target.copy_(part)


class Exponentials(Yardstick):
    """The other yardstick: the multiply-adds of as many exponentials as are needed.

    An exponential that is exact to float32 takes ten: three that reduce its argument, seven of a
    polynomial (csrc/common/math.h). The most that a processor does are those of a matrix product.
    """

    title = "multiply-adds of as many exponentials"
    SIZE, EACH = 256, 10

    def __init__(self, case, inputs):
        self.factors = [torch.full((self.SIZE, self.SIZE), 1 / self.SIZE) for _ in range(2)]
        self.product = torch.empty(self.SIZE, self.SIZE)
        self.count = max(round(self.EACH * case.exponentials / self.SIZE**3), 1)

    def run(self):
        for _ in range(self.count):
            torch.mm(*self.factors, out=self.product)
