"""The teacher is a model beside the student: neither one's logits exist in full.

A head holds the hidden states and the weight that projects them; rows of logits come and go.
"""

import tiny
import torch

import kdkernels as kdk

text, student, teacher = tiny.load_text(), tiny.make_student(), tiny.make_teacher()
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)


def step(rows):
    tokens = text[rows]  # (B, L)
    prediction = kdk.LinearHead(student.body(tokens), student.lm_head.weight)  # (B, L, H), (V, H)
    target = kdk.LinearHead(teacher.body(tokens), teacher.lm_head.weight)  # the same, another H
    loss = kdk.kd_loss(prediction, target, tokens, shift=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


tiny.train(step)
