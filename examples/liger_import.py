"""Liger's loss by another import: hidden states and heads of both models, nothing else changes.

Hidden states stay (B, L, H): they are cut into rows, `chunk_size` at a time, where Liger cuts B.
"""

import tiny
import torch

from kdkernels.integrations.liger import LigerFusedLinearJSDLoss  # was liger_kernel.chunked_loss

text, student, teacher = tiny.load_text(), tiny.make_student(), tiny.make_teacher()
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, chunk_size=128)


def step(rows):
    tokens, labels = text[rows, :-1], text[rows, 1:]  # (B, L)
    with torch.no_grad():
        target = teacher.body(tokens)  # (B, L, H_t)
    prediction = student.body(tokens)  # (B, L, H_s)
    loss = jsd(prediction, student.lm_head.weight, target, teacher.lm_head.weight, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


tiny.train(step)
