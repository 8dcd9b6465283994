"""The teacher answers once, into a cache; students learn from it, as often as one likes."""

import tempfile

import small

from kdkernels import KDLoss
from kdkernels.distill import Distiller, write_cache

images = small.train.images[:100]
with_labels = small.learn_labels(small.network(100, 100), slice(0, 100))
student = small.network(100, 100)

with tempfile.TemporaryDirectory() as folder:
    teacher = write_cache(folder, small.make_teacher(), images, "dense:fp32")  # logits, (10,) each
    # Rows are found by the images, and read as they are needed.
    Distiller(student, teacher, images, loss=KDLoss(temperature=8.0), batch_size=50).train(600)
print(
    f"errors on 797 images: {small.errors(with_labels)} of a student of 100 labels, "
    f"{small.errors(student)} of a student of the cache"
)
