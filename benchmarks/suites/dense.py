"""Logits on both sides: how fast is the loss, and how much memory does it take?"""

import math
from dataclasses import dataclass, replace

import torch

from kdkernels import kd_loss
from kdkernels.objective import DIVERGENCES

from ..case import WORK, Case, Copy, Definition, Exponentials, Inputs
from ..peers import variants_of

TINY = 4, 16  # logits that are no work: what is left is the call
UNDECIDED = {"float32": 1e-5, "bfloat16": 2.0**-5, "float16": 2.0**-8}
DISTINCT = 16  # rows that are drawn, which takes long, and then repeated


@dataclass
class Logits(Inputs):
    student: torch.Tensor  # (N, V), a leaf that requires grad, or what is to be overwritten
    teacher: torch.Tensor  # (N, V)
    labels: torch.Tensor  # (N,) int64

    def leaves(self):
        return [self.student]


@dataclass(frozen=True)
class Dense(Case):
    suite, variants = "dense", variants_of("dense")

    @property
    def bytes(self):
        """Student and, where it counts, teacher are read, and the gradient is written."""
        return self.matrix * (1 + (self.alpha > 0) + self.backward)

    @property
    def exponentials(self):
        return self.special * self.rows * self.vocab

    @property
    def yardsticks(self):
        """A GPU's special functions cannot be timed through PyTorch."""
        found = {} if (self.rows, self.vocab) == TINY else {"copy": Copy}
        if self.device == "cpu" and self.rows * self.vocab >= WORK:
            found["exp"] = Exponentials
        return found

    def small(self):
        return replace(self, rows=4, vocab=4096)

    def draw(self):
        return draw_logits(self)

    def definitions(self, x):
        """An entry's size: the probabilities of student and teacher whose difference it is."""
        n, t, alpha = self.rows, self.temperature, self.alpha
        rows = self.checked() if self.backward else torch.arange(0)
        inside = torch.zeros(n, dtype=torch.bool).index_fill_(0, rows, True)
        total, grads, sizes = 0.0, [], []
        options = self.options(num_items=n, backend="eager")
        for part in self.chunks():
            here = inside[part].to(x.labels.device)
            s, teacher = x.student.detach()[part].double(), x.teacher[part].double()
            labels = x.labels[part]
            s.requires_grad_(bool(here.any()))
            loss = kd_loss(s, teacher, labels, **options)
            total += loss.detach()
            if not s.requires_grad:
                continue
            loss.backward()
            with torch.no_grad():
                s, grad, labels = s.detach()[here], s.grad[here], labels[here]
                one = torch.ones_like(s[:, :1])
                hard = s.softmax(-1).scatter_add_(-1, labels[:, None], one)
                distill = (s / t).softmax(-1) + (teacher[here] / t).softmax(-1)
                grads.append(grad)
                size = (alpha * t * distill + (1 - alpha) * hard) / n
                if self.divergence == "tvd" and alpha > 0:
                    # Where the two are as good as equal, the gradient jumps from one sign to the
                    # other: rounding decides.
                    q, p = (s / t).softmax(-1), (teacher[here] / t).softmax(-1)
                    size[(p - q).abs() < UNDECIDED[self.dtype] * (p + q)] = math.inf
                sizes.append(size)
        if not grads:
            return [Definition(total)]
        return [Definition(total, [torch.cat(grads)], [torch.cat(sizes)], [rows])]


def draw_logits(case):
    """Logits shaped like a language model's: a Zipfian bulk, peaks, a student near its teacher.

    All rows favour the same classes, as words do. Half of the labels are the teacher's choice.
    """
    g = torch.Generator().manual_seed(0)
    rows, vocab, drawn = case.rows, case.vocab, min(case.rows, DISTINCT)
    teacher = 0.8 * torch.randn(drawn, vocab, generator=g)
    teacher -= 1.1 * (torch.randperm(vocab, generator=g) + 1.0).log()
    peaks = torch.randint(vocab, (drawn, 4), generator=g)
    teacher.scatter_add_(-1, peaks, torch.rand(drawn, 4, generator=g) * 8)
    student = 0.8 * teacher + 1.2 * torch.randn(drawn, vocab, generator=g)
    labels = torch.randint(vocab, (rows,), generator=g)
    source = torch.arange(rows) % drawn
    labels[::2] = teacher.argmax(-1)[source[::2]]
    source = source.to(case.device)
    student, teacher = (x.to(case.device, case.torch_dtype)[source] for x in (student, teacher))
    return Logits(student.requires_grad_(case.backward), teacher, labels.to(case.device))


def published(device, threads):
    """What a run without options measures -> (cases, {case: names of variants} where not all)."""
    kl, jsd = ("forward_kl", 2.0, 0.5), ("jsd", 1.0, 0.5)
    few = ["native", "triton", "pytorch"]
    if device == "cuda":
        # What is first is measured even if the time is short: everybody at every V.
        at = {v: Dense(device, "bfloat16", 8192, v, *kl) for v in (128256, 32000, 262144, 151936)}
        others = [("forward_kl", 1.0, 0.5), ("forward_kl", 2.0, 1.0), jsd]
        everybody = [*at.values(), *(objective(at[128256], *each) for each in [jsd, *others])]
        everybody.append(at[128256].loss_only())
        rest = [objective(case, *each) for case in at.values() for each in others]
        rest += [case.loss_only() for case in at.values()]
        cases = list(dict.fromkeys(everybody + rest))
        only = {case: few for case in cases if case not in everybody}
        return cases, without_eager(cases, only)
    cases, only = [], {}
    for dtype in ("float32", "bfloat16"):
        first = Dense(device, dtype, 256, 128256, *kl, threads=threads)
        alone = objective(first, "jsd", 1.0, 1.0)
        cases += [first, first.loss_only(), objective(first, *jsd), alone]
        for divergence in DIVERGENCES:
            case = replace(first, divergence=divergence)
            if case not in cases:
                cases.append(case)
                only[case] = few
    for count in sorted({1, threads}):
        case = Dense("cpu", "float32", *TINY, temperature=2.0, threads=count)
        cases.append(case)
        only[case] = few
    return cases, without_eager(cases, only)


def objective(case, divergence, temperature, alpha):
    return replace(case, divergence=divergence, temperature=temperature, alpha=alpha)


def without_eager(cases, only):
    """The definition's own backend is measured once: in the first case."""
    for case in cases[1:]:
        only.setdefault(case, [name for name in case.variants if not name.startswith("eager")])
    return only
