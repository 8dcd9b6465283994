"""Hidden states and the weights that project them on both sides: logits need not exist in full.

Forward and backward to the gradients of the student's hidden states and weight, the teacher frozen.
The gradient takes four matrix products: the student's logits, the teacher's, dX and dW. How long
those take alone is the yardstick.
"""

from dataclasses import dataclass, replace

import torch

from kdkernels import kd_loss

from ..case import Case, Definition, Inputs, Yardstick, rows_of
from ..peers import variants_of
from .dense import without_eager


@dataclass
class Heads(Inputs):
    hidden: torch.Tensor  # (N, H), a leaf that requires grad, as is
    weight: torch.Tensor  # (V, H)
    teacher_hidden: torch.Tensor  # (N, H)
    teacher_weight: torch.Tensor  # (V, H)
    labels: torch.Tensor  # (N,) int64

    def leaves(self):
        return [self.hidden, self.weight]


class Products(Yardstick):
    """The products alone, of whole matrices, into memory that is there."""

    title = "the matrix products alone"

    def __init__(self, case, inputs):
        self.inputs, self.teacher_counts = inputs, case.alpha > 0
        n, v = len(inputs.hidden), len(inputs.weight)
        # Written once: on a CPU memory is there only then.
        self.logits, self.teacher = (inputs.hidden.new_empty((n, v)).fill_(0) for _ in range(2))
        self.grads = [torch.empty_like(x).fill_(0) for x in inputs.leaves()]

    @torch.no_grad()
    def run(self):
        x, grads = self.inputs, self.grads
        torch.mm(x.hidden, x.weight.T, out=self.logits)
        if self.teacher_counts:
            torch.mm(x.teacher_hidden, x.teacher_weight.T, out=self.teacher)
        torch.mm(self.logits, x.weight, out=grads[0])
        torch.mm(self.logits.T, x.hidden, out=grads[1])


@dataclass(frozen=True)
class Linear(Case):
    hidden: int = 1024

    suite, variants = "linear", variants_of("linear")

    @property
    def shape(self):
        return f"{self.rows:,} × {self.hidden:,} × {self.vocab:,}"

    @property
    def flops(self):
        products = 1 + (self.alpha > 0) + 2 * self.backward
        return 2 * self.rows * self.hidden * self.vocab * products

    @property
    def yardsticks(self):
        return {"products": Products} if self.backward else {}

    def small(self):
        return replace(self, rows=4, hidden=64, vocab=4096)

    def draw(self):
        """A first coordinate that is 1 carries the Zipfian bulk of the logits, the others what
        differs between tokens. Drawn on the device: a weight has up to half a billion numbers."""
        n, h, v = self.rows, self.hidden, self.vocab
        g = torch.Generator(self.device).manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=g, device=self.device)

        teacher_hidden, teacher_weight = normal(n, h), normal(v, h) * 2 / h**0.5
        ranks = torch.randperm(v, generator=g, device=self.device) + 1.0
        teacher_weight[:, 0] = -ranks.log()
        hidden = 0.9 * teacher_hidden + 0.4 * normal(n, h)
        weight = teacher_weight + normal(v, h) * 0.5 / h**0.5
        hidden[:, 0] = teacher_hidden[:, 0] = 1
        labels = torch.randint(v, (n,), generator=g, device=self.device)
        tensors = (x.to(self.torch_dtype) for x in (hidden, weight, teacher_hidden))
        hidden, weight, teacher_hidden = tensors
        for leaf in hidden, weight:
            leaf.requires_grad_(self.backward)
        return Heads(hidden, weight, teacher_hidden, teacher_weight.to(hidden.dtype), labels)

    def definitions(self, x):
        """Of the logits as they are and, in half precision, of logits rounded to it.

        Rounding moves the probability of a logit of 16 by 6 %. It is what a matrix product in that
        dtype does: a variant has to be right for the one or for the other.

        An entry's size: the terms it sums, with the mean probability of student and teacher in
        place of their difference, absolute weights, and hidden states of 1.
        """
        dtype = self.torch_dtype
        found = [self.definition(x, lambda logits: logits)]
        if dtype != torch.float32:
            found.append(self.definition(x, lambda logits: logits.to(dtype).double()))
        return found

    def definition(self, x, rounding):
        n, v = self.rows, self.vocab
        tokens = classes = torch.arange(0)
        if self.backward:
            tokens, classes = rows_of(n, (n + v) * self.hidden), rows_of(v, (n + v) * self.hidden)
        hidden, weight, *teacher = (
            x.detach().double() for x in (x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)
        )
        magnitude = weight.abs()
        total, of_hidden, hidden_sizes = 0.0, [], []
        of_weight = weight.new_zeros(len(classes), weight.shape[1])
        weight_sizes = weight.new_zeros(len(classes), 1)
        options = self.options(num_items=n, backend="eager")
        for part in self.chunks():
            inside = tokens[(tokens >= part.start) & (tokens < part.stop)] - part.start
            inside = inside.to(weight.device)
            logits = rounding(hidden[part] @ weight.T).requires_grad_(self.backward)
            of_teacher = rounding(teacher[0][part] @ teacher[1].T)
            labels = x.labels[part]
            loss = kd_loss(logits, of_teacher, labels, **options)
            total += loss.detach()
            if not self.backward:
                continue
            loss.backward()
            with torch.no_grad():
                gradient, p = logits.grad, self.probabilities(logits.detach(), of_teacher, labels)
                of_hidden.append(gradient[inside] @ weight)
                hidden_sizes.append(p[inside] @ magnitude)
                of_weight += gradient[:, classes].T @ hidden[part]
                weight_sizes += p[:, classes].sum(0)[:, None]
        if not self.backward:
            return Definition(total)
        gradients = [torch.cat(of_hidden), of_weight]
        sizes = [torch.cat(hidden_sizes), weight_sizes]
        return Definition(total, gradients, sizes, [tokens, classes])

    def probabilities(self, student, teacher, labels):
        """(R, V): what a logit's gradient is made of, the mean of what is subtracted."""
        t, alpha = self.temperature, self.alpha
        p = (student / t).softmax(-1) + (teacher / t).softmax(-1)
        p *= alpha * t / (2 * self.rows)
        if alpha < 1:
            hard = student.softmax(-1)
            hard.scatter_add_(-1, labels[:, None], torch.ones_like(hard[:, :1]))
            p += (1 - alpha) / (2 * self.rows) * hard
        return p


def published(device, threads):
    """What a run without options measures -> (cases, {case: names of variants} where not all).

    The JSD at T = 1 without labels is the one formula that all of them have.
    """
    if device == "cuda":
        case = Linear(device, "bfloat16", 8192, 128256, "jsd", 1.0, 1.0, hidden=4096)
        return [case, replace(case, divergence="forward_kl")], {}
    sizes = (2048, 1024, 65536), (1024, 512, 32000)
    cases = [
        Linear(device, dtype, n, v, "jsd", 1.0, 1.0, threads=threads, hidden=h)
        for n, h, v in sizes
        for dtype in ("float32", "bfloat16")
    ]
    small = cases[2]
    cases.append(replace(small, divergence="forward_kl", temperature=2.0, alpha=0.5))
    cases.append(replace(small, divergence="forward_kl", alpha=0.0))
    return cases, without_eager(cases, {})
