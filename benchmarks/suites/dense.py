"""Logits on both sides: how fast is the loss, and how much memory does it take?"""

from dataclasses import dataclass, replace

import torch

from kdkernels import kd_loss
from kdkernels.objective import DIVERGENCES

from ..case import WORK, Case, Copy, Definition, Exponentials, Inputs
from ..peers import variants_of

TINY = 4, 16  # logits that are no work: what is left is the call
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
                sizes.append((alpha * t * distill + (1 - alpha) * hard) / n)
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
    if device == "cuda":
        sizes = [("bfloat16", 8192, vocab) for vocab in (32000, 128256, 151936, 262144)]
        objectives = [("forward_kl", 2.0, 0.5), ("forward_kl", 1.0, 0.5), ("forward_kl", 2.0, 1.0)]
        objectives.append(("jsd", 1.0, 0.5))
    else:
        sizes = [(dtype, 256, 128256) for dtype in ("float32", "bfloat16")]
        objectives = [("forward_kl", 2.0, 0.5), ("jsd", 1.0, 0.5), ("jsd", 1.0, 1.0)]
    cases, only = [], {}
    for dtype, rows, vocab in sizes:
        common = device, dtype, rows, vocab
        first, *others = (Dense(*common, *objective, threads=threads) for objective in objectives)
        cases += [first, first.loss_only(), *others]
        if device == "cpu":
            for divergence in DIVERGENCES:
                case = replace(first, divergence=divergence)
                if case not in cases:
                    cases.append(case)
                    only[case] = ["native", "pytorch"]
    if device == "cpu":
        for count in sorted({1, threads}):
            case = Dense("cpu", "float32", *TINY, temperature=2.0, threads=count)
            cases.append(case)
            only[case] = ["native", "pytorch"]
    return cases, without_eager(cases, only)


def without_eager(cases, only):
    """The definition's own backend is measured once: in the first case."""
    for case in cases[1:]:
        only.setdefault(case, [name for name in case.variants if not name.startswith("eager")])
    return only
