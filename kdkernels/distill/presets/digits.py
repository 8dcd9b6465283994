"""The `digits` preset: what soft targets do for a student that sees few labelled images.

A teacher learns 1,000 real handwritten digits. Students see 50, 100 or 200 of them, once with the
hard labels and once with the teacher's soft targets at several temperatures, and are judged on 797
images that nobody trained on: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural
Network", sections 3 (MNIST) and 6 (soft targets with 3 % of the data), at a size that two cores
train in about a minute.
"""

import contextlib
import functools
import gzip
import math
import statistics
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
import torch
from torch import nn

from ...modules import KDLoss
from ..distiller import Distiller
from ..evaluation import predict

CLASSES = 10
SIDE = 8  # pixels; an image is a row of SIDE · SIDE
TRAINING = 1000  # images; the other 797 are the test images

MEMBERS = 3
TEACHER_WIDTHS = (SIDE * SIDE, 400, 400, CLASSES)
STUDENT_WIDTHS = (SIDE * SIDE, 100, 100, CLASSES)
TEACHER_BATCH, STUDENT_BATCH = 100, 50

SIZES = (50, 100, 200)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 20.0)
STEPS = 600
SEEDS = 5

# fused: one call for all parameters, which are small.
ADAM = functools.partial(torch.optim.Adam, lr=1e-3, fused=True)


@dataclass(frozen=True)
class Split:
    """Images (N, 64) float32 in [0, 1] and labels (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass
class Run:
    """The students of one table cell: the same labelled images and loss, one student a seed."""

    size: int  # labelled images each student saw
    temperature: float | None  # None: hard labels only
    errors: list[int]  # on the test images, one entry a seed
    agreement: list[float] | None  # share of test images answered as the teacher does, one a seed
    steps: list[int] = field(repr=False)
    curve: list[float] = field(repr=False)  # mean test errors after `steps`

    @property
    def mean_errors(self):
        return statistics.fmean(self.errors)

    @property
    def standard_error(self):
        """Of the mean over seeds; None for a single seed."""
        if len(self.errors) < 2:
            return None
        return statistics.stdev(self.errors) / math.sqrt(len(self.errors))


@dataclass
class Teacher:
    """A teacher's logits; None for what only the model itself could tell."""

    logits: torch.Tensor  # (1000, 10) float32, of the training images
    test_logits: torch.Tensor | None = None  # (797, 10) float32
    errors: int | None = None  # on the test images
    parameters: int | None = None
    latency_us: float | None = None  # of one image, in microseconds


class MLPStack(nn.Module):
    """Independent ReLU networks of the same widths, evaluated together.

    Networks this small cost more in calls than in arithmetic, so those that differ by their seed
    are trained as one batched product. Nothing is shared: under a mean loss each receives its own
    gradient divided by their number, a factor that Adam's step does not depend on.

    Args:
        seeds: one int a member, from which its weights are drawn (He et al. 2015, section 2.2).
        widths: of input, hidden layers and output.
    """

    def __init__(self, seeds, widths):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for fan_in, fan_out in zip(widths, widths[1:], strict=False):
            draws = [torch.randn(fan_in, fan_out, generator=each) for each in generators]
            self.weights.append(torch.stack(draws) * math.sqrt(2 / fan_in))  # (M, in, out)
            self.biases.append(torch.zeros(len(generators), 1, fan_out))

    def forward(self, inputs):
        """inputs (B, M, in), a row for each member -> logits (B, M, out)."""
        hidden = inputs.transpose(0, 1)  # (M, B, in), a view
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden if layer == 0 else hidden.relu(), weight)
        return hidden.transpose(0, 1)


class MeanProbability(nn.Module):
    """An ensemble of an `MLPStack`: the mean of its members' probabilities.

    Its logits are the logarithm of that mean, whose softmax is the mean itself.
    """

    def __init__(self, stack, members):
        super().__init__()
        self.stack = stack
        self.members = members

    def forward(self, inputs):
        """inputs (B, in) -> logits (B, out)."""
        log_probabilities = self.stack(for_members(inputs, self.members)).log_softmax(-1)
        return log_probabilities.logsumexp(1) - math.log(self.members)


def load():
    """The embedded digits -> `Split` of 1,000 training images, `Split` of 797 test images."""
    packed = resources.files(__package__).joinpath("data/digits.csv.gz").read_bytes()
    rows = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.int64)
    # The file lists writer after writer. NumPy promises the numbers of RandomState for good.
    rows = torch.from_numpy(rows[np.random.RandomState(0).permutation(len(rows))])
    images, labels = rows[:, :-1].float() / 16, rows[:, -1]
    return (
        Split(images[:TRAINING], labels[:TRAINING]),
        Split(images[TRAINING:], labels[TRAINING:]),
    )


def for_members(rows, members):
    """rows (N, ...) -> (N, members, ...), a view: the same row for every member of a stack."""
    return rows.unsqueeze(1).expand(-1, members, *rows.shape[1:])


@contextlib.contextmanager
def one_thread():
    """One torch thread, inside: for products this small a second one saves little, and on a busy
    machine the two mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_teacher(train, *, steps, backend=None, on_step=None):
    """Trains the ensemble on hard labels -> `MeanProbability`.

    train: a `Split`; steps: optimiser steps; backend: of the loss; on_step: as in `Distiller`.
    """
    stack = MLPStack(range(MEMBERS), TEACHER_WIDTHS)
    Distiller(
        stack,
        None,
        for_members(train.images, MEMBERS),
        for_members(train.labels, MEMBERS),
        loss=KDLoss(alpha=0.0, backend=backend),
        optimizer=ADAM,
        batch_size=TEACHER_BATCH,
    ).train(steps, on_step=on_step)
    return MeanProbability(stack, MEMBERS)


def train_students(
    train, test, teacher, size, temperature, *, seeds, steps, backend=None, on_step=None
):
    """Trains one student a seed, each on its own `size` random training images -> `Run`.

    train, test: `Split`s. teacher: a `Teacher`. temperature: None for hard labels only. Seed s has
    the same images and initial weights at every temperature, and its 50 are among its 100.
    """
    alpha = 0.0 if temperature is None else 1.0
    rows = torch.stack([chosen(seed, size) for seed in range(seeds)], 1)  # (size, seeds)
    stack = MLPStack(range(seeds), STUDENT_WIDTHS)
    test_images = for_members(test.images, seeds)
    distiller = Distiller(
        stack,
        teacher.logits[rows],
        train.images[rows],
        train.labels[rows],
        loss=KDLoss(temperature=temperature or 1.0, alpha=alpha, backend=backend),
        optimizer=ADAM,
        batch_size=STUDENT_BATCH,
    )
    history = distiller.train(
        steps, test=(test_images, for_members(test.labels, seeds)), on_step=on_step
    )
    agreement = None
    if teacher.test_logits is not None:
        answers = predict(stack, test_images).argmax(-1)  # (797, seeds)
        same = answers == teacher.test_logits.argmax(-1)[:, None]
        agreement = same.double().mean(0).tolist()
    return Run(
        size=size,
        temperature=temperature,
        errors=history.evaluations[-1].errors.tolist(),
        agreement=agreement,
        steps=history.steps,
        curve=[each.errors.double().mean().item() for each in history.evaluations],
    )


def chosen(seed, size):
    """The rows (size,) of the training images that the student of this seed sees."""
    return torch.randperm(TRAINING, generator=torch.Generator().manual_seed(seed))[:size]
