"""NeMo AutoModel: another `_target_` in the recipe's `kd_loss_fn`, and its step as it was."""

import tiny
import torch
import torch.nn.functional as F
from nemo_automodel.components.config.loader import ConfigNode

text, student, teacher = tiny.load_text(), tiny.make_student(), tiny.make_teacher()
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
config = {"_target_": "kdkernels.integrations.nemo.KDLoss", "temperature": 2.0}
kd_loss_fn = ConfigNode(config).instantiate()
kd_ratio = 0.5


def step(rows):
    tokens = text[rows]  # (B, L)
    labels = F.pad(tokens[:, 1:], (0, 1), value=kd_loss_fn.ignore_index)
    count = int((labels != kd_loss_fn.ignore_index).sum())
    logits = student(tokens)  # (B, L, V)
    kd_loss = kd_loss_fn(logits, teacher(tokens), labels, num_batch_labels=count)
    ce_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
    loss = (1 - kd_ratio) * ce_loss + kd_ratio * kd_loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


tiny.train(step)
