"""The vocabulary on two processes: each has half of the rows of both heads, and sees no more."""

import contextlib
import sys
import tempfile

import tiny
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

import kdkernels as kdk

RANKS = 2


def main(rank, store):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    text, student, teacher = tiny.load_text(), tiny.make_student(), tiny.make_teacher()
    own = slice(rank * tiny.VOCAB // RANKS, (rank + 1) * tiny.VOCAB // RANKS)
    weight = nn.Parameter(student.lm_head.weight[own].detach().clone())  # (V / 2, H)
    optimizer = torch.optim.Adam([*student.body.parameters(), weight], lr=1e-2)

    def step(rows):
        tokens = text[rows]  # (B, L), of all V classes
        prediction = kdk.LinearHead(student.body(tokens), weight)
        target = kdk.LinearHead(teacher.body(tokens), teacher.lm_head.weight[own])
        loss = kdk.kd_loss(prediction, target, tokens, shift=True, group=dist.group.WORLD)
        optimizer.zero_grad()
        loss.backward()  # the body's gradient is the same on both
        optimizer.step()
        return loss.detach()

    with contextlib.redirect_stdout(None if rank else sys.stdout):
        tiny.train(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(main, (f"file://{folder}/store",), nprocs=RANKS)
