"""The teacher is two models: the mean of their distributions, seven parts to three."""

import tiny
import torch

import kdkernels as kdk

text, student = tiny.load_text(), tiny.make_student()
teachers = [tiny.make_teacher(seed=1), tiny.make_teacher(seed=2)]
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)


def step(rows):
    tokens = text[rows]  # (B, L)
    prediction = student(tokens)  # (B, L, V)
    target = kdk.Ensemble([teacher(tokens) for teacher in teachers], weights=[0.7, 0.3])
    loss = kdk.kd_loss(prediction, target, tokens, shift=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


tiny.train(step)
