"""A step of training, all of it: how much of it is the loss?

A small transformer of H dimensions learns from a frozen one of twice as many: both models, the
loss, its gradient back to all parameters, AdamW. A loss of `linear` gets both heads, one of `dense`
the logits they make. The optimiser's rate is 0, so that every call computes the same.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from kdkernels import kd_loss

from ..case import Case, Definition, Inputs, Yardstick
from ..peers import variants_of
from .dense import Logits
from .linear import Heads

LENGTH = 128  # tokens of a sequence
LAYERS = {"student": 2, "teacher": 4}


class Model(nn.Module):
    """A decoder of a language model and its head."""

    def __init__(self, vocab, width, layers):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, max(width // 64, 1), 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), False)
        self.head = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=2 / width**0.5)

    def forward(self, tokens):  # (B, L) -> hidden states (B · L, H)
        mask = nn.Transformer.generate_square_subsequent_mask(
            tokens.shape[1], tokens.device, self.position.dtype
        )
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return self.body(x, mask, is_causal=True).flatten(0, 1)


@dataclass
class Training(Inputs):
    student: Model
    teacher: Model
    tokens: torch.Tensor  # (B, L) int64
    labels: torch.Tensor  # (B · L,) int64, the token that follows
    optimizer: torch.optim.Optimizer

    def leaves(self):
        return list(self.student.parameters())

    def update(self):
        self.optimizer.step()

    def heads(self):
        with torch.no_grad():
            of_teacher = self.teacher(self.tokens)
        weight = self.teacher.head.weight
        hidden = self.student(self.tokens)
        return Heads(hidden, self.student.head.weight, of_teacher, weight, self.labels)

    def logits(self):
        x = self.heads()
        with torch.no_grad():
            teacher = x.teacher_hidden @ x.teacher_weight.T
        return Logits(x.hidden @ x.weight.T, teacher, self.labels)


class Trained:
    """A loss of another suite as one of a training step."""

    def __init__(self, variant, form):
        self.make_loss, self.form = variant.make, form

    def __call__(self, case):
        loss, form = self.make_loss(case), self.form

        def step(x):
            return loss(getattr(x, form)())

        return step


class ModelsAlone(Yardstick):
    """The yardstick: both models without heads, the student's backward pass, the optimiser."""

    title = "the models without heads"

    def __init__(self, case, inputs):
        self.inputs, self.backward = inputs, case.backward
        self.upstream = torch.ones_like(inputs.student(inputs.tokens))

    def drop(self):
        for leaf in self.inputs.leaves():
            leaf.grad = None

    def run(self):
        self.drop()
        with torch.no_grad():
            self.inputs.teacher(self.inputs.tokens)
        with torch.set_grad_enabled(self.backward):
            hidden = self.inputs.student(self.inputs.tokens)
        if self.backward:
            hidden.backward(self.upstream)
            self.inputs.update()


@dataclass(frozen=True)
class Loop(Case):
    hidden: int = 256

    suite, base, formula = "loop", "native-heads", "pytorch-heads"
    variants = {
        f"{name}-{form}": replace(
            variant, title=f"{variant.title}, {form}", make=Trained(variant, form)
        )
        for suite, form in (("linear", "heads"), ("dense", "logits"))
        for name, variant in variants_of(suite).items()
        if not variant.overwrites and name != "eager"
    }

    def __post_init__(self):
        if self.rows % LENGTH:
            raise ValueError(f"rows={self.rows}: loop takes sequences of {LENGTH} tokens")

    @property
    def shape(self):
        return f"{self.rows:,} × {self.hidden:,} × {self.vocab:,}"

    def is_one_of(self, name, wanted):
        return name in wanted or name.rpartition("-")[0] in wanted

    @property
    def yardsticks(self):
        return {"models": ModelsAlone}

    def small(self):
        return replace(self, rows=LENGTH, hidden=64, vocab=512)

    def draw(self):
        with torch.random.fork_rng(), torch.device(self.device):
            torch.manual_seed(0)
            student = Model(self.vocab, self.hidden, LAYERS["student"])
            teacher = Model(self.vocab, 2 * self.hidden, LAYERS["teacher"])
            tokens = torch.randint(self.vocab, (self.rows // LENGTH, LENGTH + 1))
        student, teacher = (model.to(self.torch_dtype) for model in (student, teacher))
        teacher.requires_grad_(False).eval()
        # An eps that float16 has. A first step makes the optimiser's state, which is no call's.
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, eps=1e-6)
        for leaf in student.parameters():
            leaf.grad = torch.zeros_like(leaf)
        optimizer.step()
        optimizer.zero_grad()
        labels = tokens[:, 1:].flatten()
        return Training(student, teacher, tokens[:, :-1], labels, optimizer)

    def definitions(self, x):
        """An entry's size: the largest of its parameter's, of whose sums it is one."""
        student, teacher = (copy.deepcopy(model).double() for model in (x.student, x.teacher))
        for leaf in student.parameters():
            leaf.grad = None
        heads = replace(x, student=student, teacher=teacher).heads()
        options = self.options(num_items=self.rows, backend="eager")
        total, of_hidden = 0.0, []
        for part in self.chunks():
            hidden = heads.hidden.detach()[part].requires_grad_(self.backward)
            of_teacher = heads.teacher_hidden[part] @ heads.teacher_weight.T
            loss = kd_loss(hidden @ heads.weight.T, of_teacher, x.labels[part], **options)
            total += loss.detach()
            if self.backward:
                loss.backward()
                of_hidden.append(hidden.grad)
        if not self.backward:
            return [Definition(total)]
        heads.hidden.backward(torch.cat(of_hidden))
        gradients = [leaf.grad for leaf in student.parameters()]
        sizes = [grad.abs().max() for grad in gradients]
        rows = [torch.arange(len(grad)) for grad in gradients]
        return [Definition(total, gradients, sizes, rows)]


def published(device, threads):
    """What a run without options measures -> (cases, {case: names of variants} where not all)."""
    if device == "cuda":
        return [Loop(device, "bfloat16", 8192, 128256, "jsd", 1.0, 1.0, hidden=1024)], {}
    return [Loop(device, "float32", 1024, 32000, "jsd", 1.0, 1.0, threads=threads, hidden=256)], {}
