"""Training ends where images that are not trained on say so, and the best weights are put back."""

import small

from kdkernels import KDLoss
from kdkernels.distill import Distiller, evaluate

images, labels = small.train.images[:100], small.train.labels[:100]
others = small.train.images[100:200], small.train.labels[100:200]


def train(**options):
    student = small.network(100, 100)
    distiller = Distiller(student, None, images, labels, loss=KDLoss(alpha=0.0), batch_size=50)
    return student, distiller.train(1500, test=others, record_every=20, **options)


def cross_entropy(student):
    return evaluate(student, small.test.images, small.test.labels).cross_entropy.item()


to_the_end, _ = train()
stopped, history = train(patience=3)
print(
    f"cross-entropy on 797 images: {cross_entropy(to_the_end):.3f} after 1500 steps, "
    f"{cross_entropy(stopped):.3f} stopped after {history.steps[-1]}"
)
