"""A mystery teacher: a service that answers, about which nothing else is known, and no labels.

The student learns from what it says about images that are not those it was trained on.
"""

import small

from kdkernels import KDLoss
from kdkernels.distill import Distiller, predict

teacher = small.make_teacher(slice(0, 500))
images = small.train.images[500:]  # the transfer set, (500, 64)
logits = predict(teacher, images)  # (500, 10), or the logarithm of the probabilities it gives


def disagreements(student):
    answers = [predict(each, small.test.images).argmax(-1) for each in (student, teacher)]
    return (answers[0] != answers[1]).sum().item()


probabilities = small.network(100, 100)
Distiller(probabilities, logits, images, loss=KDLoss(temperature=8.0), batch_size=50).train(600)
# Where it gives its answer alone, that is the label.
answers, loss = small.network(100, 100), KDLoss(alpha=0.0)
Distiller(answers, None, images, logits.argmax(-1), loss=loss, batch_size=50).train(600)
print(
    f"other answers than the teacher's to 797 images: {disagreements(answers)} of a student of its "
    f"answers, {disagreements(probabilities)} of a student of its probabilities"
)
