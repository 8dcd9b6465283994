"""The Trainer of transformers with a teacher: what else it does, it does as ever."""

import tempfile

import tiny
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kdkernels import KDLoss
from kdkernels.integrations.transformers import KDTrainer

rows = [dict(input_ids=tokens, labels=tokens) for tokens in tiny.load_text()]
read, unread = rows[:-32], rows[-32:]


def model(width, seed):
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def trainer(kind, student, steps, **options):
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    made = kind(student, arguments, train_dataset=read, eval_dataset=unread, **options)
    made.remove_callback(PrinterCallback)
    return made


with tempfile.TemporaryDirectory() as folder:
    teacher = model(width=128, seed=1)
    trainer(Trainer, teacher, steps=40).train()
    loss = KDLoss(temperature=2.0)  # position i predicts token i + 1, as it is a language model
    distilling = trainer(KDTrainer, model(width=32, seed=0), steps=40, teacher=teacher, loss=loss)
    first = distilling.evaluate()["eval_loss"]
    distilling.train()
    last = distilling.evaluate()["eval_loss"]
print(f"loss on text nobody has read: {first:.3f} before, {last:.3f} after 40 steps")
