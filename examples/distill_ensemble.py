"""Three teachers, who have seen different images, and how many of them: one student of all."""

import small

from kdkernels import KDLoss
from kdkernels.distill import Distiller, SeveralTeachers

parts = slice(0, 50), slice(50, 200), slice(200, 650)
teachers = [small.make_teacher(part, seed) for seed, part in enumerate(parts, 7)]
together = SeveralTeachers(teachers, weights=[50, 150, 450])

images = small.train.images[650:]
with_labels = small.learn_labels(small.network(100, 100), slice(0, 200))
student = small.network(100, 100)
Distiller(student, together, images, loss=KDLoss(temperature=8.0), batch_size=50).train(600)
print(
    f"errors on 797 images: {small.errors(with_labels)} of a student of 200 labels, "
    f"{small.errors(student)} of a student of the teachers, who have "
    f"{', '.join(str(small.errors(each)) for each in teachers)}"
)
