"""The teacher is a cache: its K most probable tokens at every position, and no model any more."""

import tempfile

import tiny
import torch

import kdkernels as kdk
from kdkernels.distill import write_cache

K = 64
text, student = tiny.load_text(), tiny.make_student()
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)


def step(rows):
    tokens = text[rows]  # (B, L)
    prediction = kdk.LinearHead(student.body(tokens), student.lm_head.weight)  # (B, L, H), (V, H)
    target = teacher[tokens]  # `TopK` (B, L, K) of these tokens, wherever in the cache they are
    loss = kdk.kd_loss(prediction, target, tokens, shift=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


with tempfile.TemporaryDirectory() as folder:
    write_cache(folder, tiny.make_teacher(), text, f"topk:{K}")
    teacher = kdk.cache.open(folder)
    tiny.train(step)
