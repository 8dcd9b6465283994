"""A run that was killed continues as if nothing had been: run it again, that is all."""

import tempfile

import small

from kdkernels import KDLoss
from kdkernels.distill import Checkpoints, Distiller

teacher, images = small.make_teacher(), small.train.images[:100]


def run(folder, until):
    """Takes up what is in the folder, if anything, and trains to a step."""
    student, loss = small.network(100, 100), KDLoss(temperature=8.0)
    distiller = Distiller(student, teacher, images, loss=loss, batch_size=50)
    checkpoints = Checkpoints(folder)
    done = distiller.resume(checkpoints)
    distiller.train(until - done, checkpoints=checkpoints, checkpoint_every=100)
    return student


with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
    killed = run(one, until=60)
    resumed, straight = run(one, until=600), run(other, until=600)
same = all((a == b).all() for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))
print(
    f"errors on 797 images: {small.errors(killed)} after 60 steps, {small.errors(resumed)} resumed "
    f"to 600, {'bit for bit' if same else 'not'} as without the interruption"
)
