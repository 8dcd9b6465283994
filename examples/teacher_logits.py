"""The teacher is a model beside the student: both have their logits in memory, (B, L, V)."""

import tiny
import torch

import kdkernels as kdk

text, student, teacher = tiny.load_text(), tiny.make_student(), tiny.make_teacher()
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)


def step(rows):
    tokens = text[rows]  # (B, L)
    prediction = student(tokens)  # (B, L, V)
    target = teacher(tokens)  # (B, L, V)
    loss = kdk.kd_loss(prediction, target, tokens, shift=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


tiny.train(step)
