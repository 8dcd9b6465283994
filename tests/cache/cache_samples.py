"""Caches that tests write and read: a teacher made of numbers, sample after sample."""

import torch

from kdkernels import LinearHead, cache

CLASSES, WIDTH = 1000, 16
LENGTHS = 5, 12, 1, 12, 30
KINDS = (
    "topk:7",
    "sampled:20",
    "hidden:fp32",
    "hidden:bf16",
    "hidden:fp8",
    "dense:fp32",
    "dense:bf16",
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def token_ids(lengths=LENGTHS, seed=0):
    """[(n,), ...]"""
    return [
        torch.randint(CLASSES, (n,), generator=generator(seed + k)) for k, n in enumerate(lengths)
    ]


def head_of(kind, seed=1):
    """The teacher's `LinearHead` without hidden states, or None."""
    if not kind.startswith("hidden"):
        return None
    weight = torch.randn(CLASSES, WIDTH, generator=generator(seed))
    return LinearHead(
        torch.zeros(0, WIDTH), weight, torch.randn(CLASSES, generator=generator(seed))
    )


def prediction(kind, n, seed):
    """What a teacher of that kind says of n tokens: logits (n, V), hidden states (n, H), draws."""
    size = WIDTH if kind.startswith("hidden") else CLASSES
    values = 4 * torch.randn(n, size, generator=generator(100 + seed))
    if kind.startswith("sampled"):
        return cache.kinds.SampledKind(CLASSES, int(kind.split(":")[1])).draw(values, seed)
    return values


def write(path, kind, samples=None, **options):
    """A cache of the samples -> their predictions, as they were given."""
    samples = token_ids() if samples is None else samples
    given = [prediction(kind, len(ids), k) for k, ids in enumerate(samples)]
    options = {"vocab_size": CLASSES, "teacher": "numbers", "head": head_of(kind), **options}
    with cache.Writer(path, kind, **options) as writer:
        for ids, each in zip(samples, given, strict=True):
            writer.add(ids, each)
    return given


def rows_of(source):
    """{name: tensor} of what belongs to rows."""
    if isinstance(source, torch.Tensor):
        return {"logits": source}
    names = ("ids", "logprobs", "counts", "hidden")
    return {name: getattr(source, name) for name in names if hasattr(source, name)}
