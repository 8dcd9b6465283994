"""The teacher answers once, into a file; students learn from the file, as often as one likes."""

import tempfile
from pathlib import Path

import small

from kdkernels import KDLoss
from kdkernels.distill import Distiller
from kdkernels.distill.offline import open_predictions, write_predictions

images = small.train.images[:100]
with_labels = small.learn_labels(small.network(100, 100), slice(0, 100))
student = small.network(100, 100)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "teacher.safetensors"
    write_predictions(path, small.make_teacher(), images)  # logits, (100, 10)
    teacher = open_predictions(path, count=len(images))  # mapped: rows are read as they are needed
    Distiller(student, teacher, images, loss=KDLoss(temperature=8.0), batch_size=50).train(600)
print(
    f"errors on 797 images: {small.errors(with_labels)} of a student of 100 labels, "
    f"{small.errors(student)} of a student of the file"
)
