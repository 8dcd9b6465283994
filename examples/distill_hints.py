"""A thinner student learns a hidden layer of its teacher, too: Romero et al. 2015, "FitNets".

The paths of layers are those of `named_modules`; the widths differ, so that a projection is
learned, which the student does not keep.
"""

import small

from kdkernels import KDLoss
from kdkernels.distill import Distiller, FeatureHint

images = small.train.images[:100]
with_labels = small.learn_labels(small.network(50, 50, 50), slice(0, 100))
teacher, student = small.make_teacher(), small.network(50, 50, 50)

hint = FeatureHint("3", "3", weight=100.0)  # (B, 50) of the student, (B, 200) of the teacher
loss = KDLoss(temperature=8.0)
distiller = Distiller(student, teacher, images, loss=loss, hints=[hint], batch_size=50)
history = distiller.train(600)
first, last = history.terms[0]["hints"], history.terms[-1]["hints"]
print(
    f"errors on 797 images: {small.errors(with_labels)} of a student of 100 labels, "
    f"{small.errors(student)} of a student of soft targets and the hint, whose loss went "
    f"from {first:.2f} to {last:.2f}"
)
