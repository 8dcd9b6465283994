"""Specialists for the digits that a generalist confuses: Hinton, Vinyals, Dean 2015, section 5.

Each starts as the generalist, learns its classes and one dustbin for all others, and what all of
them say together is the teacher of a student that needs none of them.
"""

import copy

import small
import torch
from torch import nn

from kdkernels import KDLoss
from kdkernels.distill import Distiller, predict, specialists

images, own = small.train.images, torch.arange(200)
labels = small.train.labels[own]  # (200,): all labels that there are


def train(model, teacher, images, labels=None, **options):
    loss = KDLoss(**options)
    Distiller(model, teacher, images, labels, loss=loss, batch_size=50).train(600)
    return model


def make_specialist(classes):
    model, last = copy.deepcopy(generalist), nn.Linear(100, len(classes) + 1)
    with torch.no_grad():  # the dustbin starts as the mean of all
        for new, old in zip(last.parameters(), generalist[-1].parameters(), strict=True):
            new.copy_(torch.cat([old[classes], old.mean(0, keepdim=True)]))
    model[-1] = last
    rows, correction = specialists.specialist_rows(labels, classes, torch.Generator())
    targets = specialists.specialist_labels(labels[rows], classes)
    train(model, None, images[own][rows], targets, alpha=0.0)
    with torch.no_grad():  # it has seen more of its classes than there are
        last.bias[-1] += correction
    return model


def together(images):
    """What all of them say, (N, 10)."""
    answers = [(classes, predict(model, images)) for classes, model in trained]
    return specialists.combine(predict(generalist, images), answers)


generalist = small.learn_labels(small.network(100, 100), own)
clusters = specialists.confusable_classes(predict(generalist, images), 4)
trained = [(classes, make_specialist(classes)) for classes in clusters]
student = train(small.network(100, 100), together(images), images, temperature=8.0)
wrong = (together(small.test.images).argmax(-1) != small.test.labels).sum().item()
print(
    f"errors on 797 images: {small.errors(generalist)} of the generalist, {wrong} with specialists "
    f"for {'; '.join(', '.join(map(str, each.tolist())) for each in clusters)}, "
    f"{small.errors(student)} of a student of all"
)
