"""torchtune: logits as a list of chunks, which never are in one piece.

In a recipe's configuration it is one line, and the recipe calls `set_num_output_chunks` itself:

    kd_loss:
      _component_: kdkernels.integrations.torchtune.ForwardKLWithChunkedOutputLoss
"""

import tiny
import torch
import torch.nn.functional as F

from kdkernels.integrations.torchtune import ForwardKLWithChunkedOutputLoss

text, student, teacher = tiny.load_text(), tiny.make_student(), tiny.make_teacher()
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
kd_loss = ForwardKLWithChunkedOutputLoss(num_output_chunks=4)


def chunked(model, tokens):
    """What torchtune's decoders return: chunks of logits (B, L / 4, V)."""
    hidden = model.body(tokens)  # (B, L, H)
    return [model.lm_head(chunk) for chunk in hidden.chunk(kd_loss.num_output_chunks, dim=1)]


def step(rows):
    tokens = text[rows]  # (B, L)
    labels = F.pad(tokens[:, 1:], (0, 1), value=kd_loss.ignore_index)
    loss = kd_loss(chunked(student, tokens), chunked(teacher, tokens), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


tiny.train(step)
