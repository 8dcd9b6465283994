"""Which temperature, which alpha? A grid, judged by labelled images that nobody trains on."""

import small

from kdkernels import KDLoss
from kdkernels.distill import Distiller, evaluate, sweep

images, labels = small.train.images[:100], small.train.labels[:100]
others = small.train.images[600:], small.train.labels[600:]  # not the test images
teacher = small.make_teacher(slice(0, 600))


def student_of(temperature, alpha):
    student, loss = small.network(100, 100), KDLoss(temperature=temperature, alpha=alpha)
    Distiller(student, teacher, images, labels, loss=loss, batch_size=50).train(300)
    return student


def score(**options):
    return evaluate(student_of(**options), *others).cross_entropy


best = sweep.grid(score, temperature=[1.0, 4.0, 16.0], alpha=[0.5, 1.0])[0]
with_labels = small.learn_labels(small.network(100, 100), slice(0, 100))
print(
    f"errors on 797 images: {small.errors(with_labels)} of a student of 100 labels, "
    f"{small.errors(student_of(**best.options))} with the best of the grid, {best.options}"
)
