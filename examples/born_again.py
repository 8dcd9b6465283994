"""Each student teaches the next one of its kind, and all together are an ensemble.

Furlanello et al. 2018, "Born-Again Neural Networks". On these few digits no generation is much
better than the first; together they know better how sure to be.
"""

import small
import torch

from kdkernels import KDLoss, kd_loss
from kdkernels.distill import Distiller, predict
from kdkernels.distill.generations import born_again

images, labels = small.train.images[:100], small.train.labels[:100]


def make_student(generation):
    return small.network(100, 100, seed=generation)


def train(student, teacher):
    loss = KDLoss(alpha=0.0 if teacher is None else 0.5)
    Distiller(student, teacher, images, labels, loss=loss, batch_size=50).train(600)


def cross_entropy(logits):
    return kd_loss(logits, logits, small.test.labels, alpha=0.0).item()


students = born_again(make_student, train, 4)
logits = torch.stack([predict(each, small.test.images) for each in students])  # (4, 797, 10)
together = logits.softmax(-1).mean(0).log()
print(
    f"cross-entropy on 797 images: {cross_entropy(logits[0]):.3f} of the first generation, "
    f"{cross_entropy(together):.3f} of all four; errors of each: "
    f"{', '.join(str(small.errors(each)) for each in students)}"
)
