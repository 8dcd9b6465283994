"""ModelOpt: another criterion for the model that it makes of student and teacher."""

import logging
import warnings

logging.disable()  # what else is installed, that ModelOpt was not tested with
warnings.simplefilter("ignore")

import modelopt.torch.distill as mtd  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

from kdkernels.integrations.modelopt import LogitsDistillationLoss  # noqa: E402

text, teacher = tiny.load_text(), tiny.make_teacher()
config = dict(teacher_model=teacher, criterion=LogitsDistillationLoss(temperature=2.0))
model = mtd.convert(tiny.make_student(), mode=[("kd_loss", config)])
optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def step(rows):
    model(text[rows])  # (B, L) -> the student's logits; the teacher's are kept inside
    loss = model.compute_kd_loss()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


tiny.train(step)
