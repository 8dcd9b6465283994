"""The teacher is a file: its K most probable tokens at every position, and no model any more."""

import tempfile
from pathlib import Path

import tiny
import torch

import kdkernels as kdk

K = 64
text, student = tiny.load_text(), tiny.make_student()
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)


def ask_teacher(path):
    """Writes what is kept of the teacher: at T = 1, as K ids and log-probabilities a position."""
    logits = tiny.make_teacher()(text)  # (N, L, V)
    logprobs, ids = logits.log_softmax(-1).topk(K)
    torch.save({"ids": ids.int(), "logprobs": logprobs}, path)


def step(rows):
    tokens = text[rows]  # (B, L)
    prediction = kdk.LinearHead(student.body(tokens), student.lm_head.weight)  # (B, L, H), (V, H)
    target = kdk.TopK(kept["ids"][rows], kept["logprobs"][rows])  # (B, L, K) both
    loss = kdk.kd_loss(prediction, target, tokens, shift=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "teacher.pt"
    ask_teacher(path)
    kept = torch.load(path)
tiny.train(step)
