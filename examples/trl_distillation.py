"""TRL's trainer by the loss of kdkernels: the student writes, the teacher corrects every token.

`patch` is all there is of kdkernels in it; at the end of the `with` TRL has its own loss again.
"""
# ruff: noqa: E402

import logging
import tempfile
import warnings

logging.disable(logging.WARNING)  # what these libraries have to say of each other
warnings.simplefilter("ignore")

import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import DistillationConfig, DistillationTrainer

from kdkernels.integrations.trl import patch

END, UNKNOWN = tiny.VOCAB, tiny.VOCAB + 1


def language_model(width, seed):
    torch.manual_seed(seed)
    options = dict(hidden_size=width, intermediate_size=2 * width, num_attention_heads=4)
    options.update(num_key_value_heads=4, num_hidden_layers=1, vocab_size=tiny.VOCAB + 2)
    return LlamaForCausalLM(LlamaConfig(**options, bos_token_id=None, eos_token_id=END))


text = tiny.load_text()  # (N, L)
teacher = language_model(128, seed=1)
optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
for rows in tiny.batches(32):
    optimizer.zero_grad()
    teacher(input_ids=text[rows], labels=text[rows]).loss.backward()
    optimizer.step()

# The words of the text are numbers here.
words = {str(k): k for k in range(tiny.VOCAB)} | {"<end>": END, "<unknown>": UNKNOWN}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = dict(eos_token="<end>", pad_token="<end>", unk_token="<unknown>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
prompts = [dict(prompt=" ".join(map(str, row.tolist()))) for row in text[:, :8]]

with patch(), tempfile.TemporaryDirectory() as directory:
    options = dict(max_steps=30, per_device_train_batch_size=8, learning_rate=3e-3)
    options.update(max_completion_length=16, beta=0.5, logging_steps=1, save_strategy="no")
    options.update(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    trainer = DistillationTrainer(
        model=language_model(64, seed=0),
        teacher_model=teacher,
        args=DistillationConfig(directory, **options),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"divergence: {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}")
