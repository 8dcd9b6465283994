"""Lightning: the teacher stays out of the module, and a step is one batch however it is taken."""

import logging
import warnings

import tiny
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import kdkernels as kdk
from kdkernels.integrations.lightning import KDModule

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.simplefilter("ignore")  # Lightning, that the loader has no workers
losses = []


class Student(KDModule):
    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=1e-2)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        losses.append(self.trainer.callback_metrics["train_loss"].item())


model = Student(tiny.make_student(), tiny.make_teacher(), kdk.KDLoss(shift=True))
text = tiny.load_text()  # (N, L)
loader = DataLoader(TensorDataset(text, text), batch_size=tiny.BATCH // 2)  # inputs, labels
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
quiet |= dict(enable_model_summary=False)
Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, **quiet).fit(model, loader)
print(f"loss: {losses[0]:.3f} of batch 1, {losses[-1]:.3f} of batch {len(losses)}")
