"""What techniques on the digits share: data, networks, trainings, and a row of results for each."""

import functools
import math
import statistics
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from ...modules import KDLoss
from ..distiller import Distiller
from ..evaluation import predict
from . import digits

TEMPERATURE = 8.0  # fixed beforehand: the best of a run would be chosen on the test images


class Study:
    """The data and options of a run, and what came out: a row of results for each kind of model.

    Args:
        out: the run's directory (a `Path`), where a technique may leave files.
        seeds, steps, backend: as in `Demo`.
        bar: None, or a `rich.progress.Progress` to show steps on.
    """

    def __init__(self, out, *, seeds, steps, backend=None, bar=None):
        self.out, self.seeds, self.steps, self.backend, self.bar = out, seeds, steps, backend, bar
        self.train, self.test = digits.load()
        self.comparison, self.curves, self.notes = [], [], []

    def drawn(self, size):
        """Training images at random -> rows (size,) of each seed."""
        return [digits.chosen(seed, size) for seed in range(self.seeds)]

    def same(self, rows):
        """The same training images for every seed, which then differs by its initial weights."""
        return [rows] * self.seeds

    def teacher(self, rows=None):
        """Trains the preset's ensemble on labels of all or some training images -> module."""
        rows = torch.arange(digits.TRAINING) if rows is None else rows
        model = digits.train_teacher(
            digits.Split(self.train.images[rows], self.train.labels[rows]),
            steps=self.steps,
            backend=self.backend,
            on_step=self.progress("teacher", self.steps),
        )
        self.row(f"teacher, {len(rows)} labels", [model])
        return model

    def outputs(self, model):
        """All that is seen of a teacher: a function of rows (N,) -> logits (N, 10)."""
        return predict(model, self.train.images).__getitem__

    def students(self, name, rows, told=None, labels=None, *, make=None, like=None, **options):
        """Trains a student a seed and adds their row and their learning curve -> modules.

        Args:
            rows: of the training images that each seed has, (N,) each.
            told: None, or called with rows, returns the teacher as `Distiller` takes it.
            labels: None, or of all training images (1000,).
            make: called with the seed, returns a new module; default: the preset's student.
            like: None, or the teacher whose answers are to be those of the students.
            options: of `fit`.
        """
        advance = self.progress(name, self.seeds * self.steps)
        models, histories = [], []
        for seed, mine in enumerate(rows):
            model = (make or small)(seed)
            teacher = None if told is None else told(mine)
            given = None if labels is None else labels[mine]
            images = self.train.images[mine]
            histories.append(self.fit(model, teacher, images, given, on_step=advance, **options))
            models.append(model)
        self.row(name, models, like)
        self.curve(name, histories)
        return models

    def fit(
        self,
        model,
        teacher,
        images,
        labels=None,
        *,
        temperature=TEMPERATURE,
        alpha=None,
        hints=tuple,
        on_step=None,
        patience=None,
        test=None,
        **options,
    ):
        """Trains one module -> `History`.

        alpha: of the loss, by default 0 without a teacher and 1 with one; hints: called without
        arguments, returns new ones; test: the test images by default; options: of `Distiller`.
        """
        if alpha is None:
            alpha = 0.0 if teacher is None else 1.0
        distiller = Distiller(
            model,
            teacher,
            images,
            labels,
            loss=KDLoss(temperature=temperature, alpha=alpha, backend=self.backend),
            optimizer=digits.ADAM,
            batch_size=digits.STUDENT_BATCH,
            hints=hints(),
            **options,
        )
        test = test or (self.test.images, self.test.labels)
        return distiller.train(
            self.steps, test=test, record_every=20, on_step=on_step, patience=patience
        )

    def answers(self, models):
        """Logits (797, M, 10) of M models for the test images."""
        return torch.stack([predict(model, self.test.images) for model in models], 1)

    def row(self, name, models, like=None, logits=None):
        """Adds test results: means over models, and the standard error of that of the errors.

        models: of one architecture; like: as in `students`; logits: (797, M, 10) in the place of
        the models' own.
        """
        logits = self.answers(models) if logits is None else logits
        labels = digits.for_members(self.test.labels, logits.shape[1])  # (797, M)
        answers = logits.argmax(-1)
        errors = (answers != labels).sum(0).tolist()  # M
        agreement = None
        if like is not None:
            agreement = (answers == self.answers([like]).argmax(-1)).double().mean().item()
        self.comparison.append(
            {
                "name": name,
                "errors": statistics.fmean(errors),
                "standard_error": standard_error(errors),
                "accuracy": 1 - statistics.fmean(errors) / len(labels),
                "cross_entropy": F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(),
                "agreement": agreement,
                "parameters": sum(x.numel() for x in models[0].parameters()),
            }
        )

    def curve(self, name, histories):
        """Adds the mean number of errors while training."""
        values = [
            statistics.fmean(each.errors.item() for each in evaluations)
            for evaluations in zip(*(each.evaluations for each in histories), strict=True)
        ]
        ylabel = "errors on the test images"
        curve = dict(name=name, steps=histories[0].steps, values=values, ylabel=ylabel)
        self.curves.append(curve)

    def errors(self, name):
        """'60.2 ± 1.3', of the row of that name."""
        (row,) = [row for row in self.comparison if row["name"] == name]
        return errors_of(row)

    def progress(self, name, total):
        """A new line of the progress bar -> what each of its `total` steps calls, or None."""
        if self.bar is None:
            return None
        return functools.partial(self.bar.advance, self.bar.add_task(name, total=total))


def mlp(seed, *widths):
    """A ReLU network; its hidden layers are relu1, relu2, ... to hints."""
    torch.manual_seed(seed)
    layers = OrderedDict()
    for k, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False), 1):
        layers[f"linear{k}"] = nn.Linear(fan_in, fan_out)
        layers[f"relu{k}"] = nn.ReLU()
    layers.popitem()
    return nn.Sequential(layers)


def small(seed):
    """The preset's student."""
    return mlp(seed, *digits.STUDENT_WIDTHS)


def convolutions(seed, channels):
    """A convolutional network of two layers, conv1 and conv2 to hints."""
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            image=nn.Unflatten(-1, (1, digits.SIDE, digits.SIDE)),
            conv1=nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU()),
            conv2=nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU()),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear=nn.Linear(8 * channels, digits.CLASSES),
        )
    )


def errors_of(row):
    text = f"{row['errors']:.1f}"
    return text if row["standard_error"] is None else f"{text} ± {row['standard_error']:.1f}"


def standard_error(values):
    """Of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
