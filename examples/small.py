"""What the examples of distillation share: 1,797 handwritten digits and networks for them."""

import torch
from torch import nn

from kdkernels import KDLoss
from kdkernels.distill import Distiller, predict
from kdkernels.distill.presets import digits

torch.set_num_threads(1)  # networks this small gain nothing from a second one
train, test = digits.load()  # images (1000, 64) and (797, 64), labels (1000,) and (797,)
STEPS, BATCH = 600, 50


def network(*widths, seed=0):
    """Layers of these widths between 64 pixels and 10 classes."""
    torch.manual_seed(seed)
    layers = []
    for fan_in, fan_out in zip((64, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def learn_labels(model, rows):
    """Trains on the labels of some training images: what distillation is compared with."""
    images, labels = train.images[rows], train.labels[rows]
    Distiller(model, None, images, labels, loss=KDLoss(alpha=0.0), batch_size=BATCH).train(STEPS)
    return model


def make_teacher(rows=slice(None), seed=9):
    """A wide network that has seen the labels of all training images, or of some."""
    return learn_labels(network(200, 200, seed=seed), rows)


def errors(model, rows=slice(None)):
    """Of the answers to the test images, or to some of them."""
    answers = predict(model, test.images[rows]).argmax(-1)
    return (answers != test.labels[rows]).sum().item()
