"""The `text` preset: what soft targets do for a language model that sees little text.

The text is the Python documentation that every Python carries for `help()`, in the 131,072 tokens
of a real tokenizer. A teacher learns all of the training text. Students of half its width see a
third of it: with the hard labels alone, with the teacher's soft targets, and with soft targets of
which a cache kept the K most probable tokens only. All are judged on documents that nobody trained
on. It is "soft targets with 3 % of the data" (Hinton, Vinyals, Dean 2015, "Distilling the Knowledge
in a Neural Network", section 6) for a language model that two cores train in minutes.

Nothing is downloaded. Models have the architecture of Llama and are trained from scratch; with so
many tokens nearly all of the time goes into the output embedding and the loss, so that models are
narrow and steps short: two blocks of 64 tokens.

What was tried, with classes for only those tokens that occur: docstrings or sources of the
standard library as text, which models of this size hardly learn in the time; larger batches and
tied embeddings, which learn less in it; rates for the hard labels from 2e-3 to 8e-3, of which 4e-3
was the best; and, for 100 and for 200 blocks of 128 tokens, alpha = 0.5 and T = 2 besides
alpha = 0.9 and T = 1: soft targets at T = 1 won in all, at T = 2 they lost once to hard labels.
"""

import dataclasses

import torch
from torch.utils.data import Dataset

from ...modules import KDLoss
from ..distiller import Distiller
from ..validation import validate

VOCABULARY = 131_072  # tokens of the tokenizer
BLOCK = 64  # tokens
BATCH = 2  # blocks of a step
HELD_OUT = 10  # one document in so many

TEACHER_HIDDEN, STUDENT_HIDDEN = 64, 32
TEACHER_RATE, STUDENT_RATE = 2e-3, 4e-3
TEACHER_STEPS, STUDENT_STEPS = 1000, 300
STUDENT_BLOCKS = 400
TOPK = 32
TEMPERATURE = 1.0
ALPHA = 0.9


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Text as pieces of equal length, as `Distiller` reads it: {"input_ids", "labels"}, (L,) each.

    ids: (N, L) int64, tokens; a label is the token itself, which `shift=True` turns into the next.
    """

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to train on and text to judge by, with no document and no paragraph in common."""

    train: Blocks
    test: Blocks
    train_documents: list[str]  # names
    test_documents: list[str]


def load_tokenizer():
    """The tokenizer "tekken" of Mistral AI, from the wheel of mistral-common (Apache 2.0).

    Returns:
        An object with `n_words` = 131,072, `encode(text, bos=, eos=)` -> list of ids, `decode(ids)`
        -> text. It is there within a second.

    Raises:
        ImportError: mistral-common is missing.
    """
    try:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'kdkernels[train]'") from error
    return MistralTokenizer.v3(is_tekken=True).instruct_tokenizer.tokenizer


def documents():
    """The topics of the language reference in `pydoc_data` -> {name: text}, by name.

    Topics include others: a paragraph is kept where it comes first, so that no two documents share
    one. The text is that of the Python which runs this.
    """
    from pydoc_data.topics import topics

    seen, found = set(), {}
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
        if kept:
            found[name] = "\n\n".join(kept)
    return found


def load(tokenizer, length=BLOCK):
    """The text, divided into training and held-out documents -> `Corpus`.

    Of the documents by length one in ten is held out: as many short as long ones. Documents follow
    each other, each after a token that begins it; what does not fill a block at the end is dropped.

    Args:
        tokenizer: of `load_tokenizer`.
        length: tokens of a block.
    """
    texts = documents()
    by_length = sorted(texts, key=lambda name: (-len(texts[name]), name))
    held_out = set(by_length[HELD_OUT // 2 :: HELD_OUT])
    names = [name for name in texts if name not in held_out], sorted(held_out)
    train, test = (_blocks((texts[name] for name in some), tokenizer, length) for some in names)
    return Corpus(train, test, *names)


def _blocks(texts, tokenizer, length):
    ids = [i for text in texts for i in tokenizer.encode(text, bos=True, eos=False)]
    return Blocks(torch.tensor(ids[: len(ids) // length * length]).view(-1, length))


def some_of(blocks, count, seed):
    """`count` of the blocks, chosen by the seed; fewer are among more -> `Blocks`."""
    chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count]
    return Blocks(blocks.ids[chosen])


def language_model(hidden, seed, length=BLOCK):
    """A Llama of two layers with weights drawn from the seed -> `HiddenStates` of it.

    Args:
        hidden: its width, a multiple of 8.
        seed: an int.
        length: the longest text it is for, in tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from ...integrations.transformers import HiddenStates

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HiddenStates(LlamaForCausalLM(config))


def train(
    model,
    blocks,
    teacher=None,
    *,
    steps,
    rate,
    alpha=0.0,
    temperature=1.0,
    seed=0,
    test=None,
    records=5,
    backend=None,
    on_step=None,
):
    """Trains a language model in place, on hard labels or on a teacher's soft targets -> `History`.

    Args:
        model: of `language_model`.
        blocks: `Blocks` to train on.
        teacher: None (alpha = 0), or as in `Distiller`.
        steps: of two blocks each; the learning rate rises to `rate` in a tenth of them and falls to
            0 in the others.
        alpha, temperature, backend: of the loss, as in `kdkernels.kd_loss`.
        seed: an int, of the order of the blocks.
        test: None, or `Blocks` to judge the model by, `records` times.
        on_step: as in `Distiller.train`.
    """
    warm = max(1, steps // 10)

    def share_of_rate(step):
        return min((step + 1) / warm, (steps - step) / max(1, steps - warm))

    distiller = Distiller(
        model,
        teacher,
        blocks,
        loss=KDLoss(temperature=temperature, alpha=alpha, shift=True, backend=backend),
        # fused: one call for all parameters. A rare token's gradient is remembered for long.
        optimizer=lambda x: torch.optim.Adam(x, lr=rate, betas=(0.9, 0.98), fused=True),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate),
        batch_size=BATCH,
        clip_norm=1.0,
        seed=seed,
    )
    return distiller.train(
        steps,
        test=None if test is None else lambda student: validate(student, test, shift=True),
        record_every=max(1, steps // records),
        on_step=on_step,
    )
