"""What the examples share: a text, language models of two sizes, and the loop around a step."""

import re
from collections import Counter
from pydoc_data.topics import topics  # what help("for") prints: a text that comes with Python

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, SEQUENCES, LENGTH, BATCH = 2048, 256, 32, 8


class LanguageModel(nn.Module):
    """Tokens (B, L) -> logits (B, L, V) of the next token, from the present one alone."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        embedding = nn.Embedding(VOCAB, width)
        self.body = nn.Sequential(embedding, nn.Linear(width, width), nn.GELU())  # -> (B, L, H)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.body(tokens))


def load_text():
    """The words and signs of Python's own reference -> (N, L), 0 the most frequent one."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()))
    rank = {word: k for k, (word, _) in enumerate(Counter(words).most_common())}
    tokens = [min(rank[word], VOCAB - 1) for word in words[: SEQUENCES * LENGTH]]
    return torch.tensor(tokens).view(SEQUENCES, LENGTH)


def batches(steps):
    """The sequences that each step takes, (B,): the same ones in every run."""
    return (torch.arange(steps * BATCH) % SEQUENCES).split(BATCH)


def make_student():
    return LanguageModel(width=64, seed=0)


def make_teacher(seed=1):
    """A wider model that has read the text once.

    It is frozen: `kd_loss` refuses a teacher that requires grad, be it its logits or its head.
    """
    text, teacher = load_text(), LanguageModel(width=128, seed=seed)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for rows in batches(SEQUENCES // BATCH):
        tokens = text[rows]  # (B, L)
        logits = teacher(tokens[:, :-1])
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return teacher.requires_grad_(False)


def train(step, steps=32):
    """Calls step(rows) -> loss, and prints the first loss and the last."""
    losses = [step(rows).item() for rows in batches(steps)]
    print(f"loss: {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {steps}")
