"""A small convolutional network learns where to look: Zagoruyko, Komodakis 2017, section 3.1."""

import small
import torch
from torch import nn

from kdkernels import KDLoss
from kdkernels.distill import AttentionTransfer, Distiller


def network(channels):
    torch.manual_seed(0)
    layers = {
        "image": nn.Unflatten(-1, (1, 8, 8)),
        "conv1": nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()),
        "pool": nn.MaxPool2d(2),
        "conv2": nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU()),
        "flat": nn.Flatten(),
        "linear": nn.Linear(32 * channels, 10),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


images = small.train.images[:100]
teacher = small.learn_labels(network(8), slice(None))
with_labels, student = small.learn_labels(network(4), slice(0, 100)), network(4)
maps = [AttentionTransfer(name, name) for name in ("conv1", "conv2")]
Distiller(student, teacher, images, loss=KDLoss(temperature=8.0), hints=maps, batch_size=50).train(
    600
)
print(
    f"errors on 797 images: {small.errors(with_labels)} of a student of 100 labels, "
    f"{small.errors(student)} of a student of soft targets and attention"
)
