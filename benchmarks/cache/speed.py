"""What a cache takes on disk, and how fast a core writes it and reads it from a warm file.

Of a core: tokens for each second of the process's own time, of one thread; other processes take
nothing of it, and waiting for the disk is not in it.

Predictions are drawn, like those of a language model: all rows favour the same classes, and four of
each row's own stand out, by how much says the teacher's name. A few thousand rows are drawn, and
every sample is some of them in an order of its own, none twice.
"""

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kdkernels import LinearHead, Sampled, TopK, cache
from kdkernels.cache.kinds import SampledKind, most_probable
from kdkernels.cache.sections import COMPRESSED
from kdkernels.source_rows import map_rows

from ..measure import say

VOCAB, FEW, HIDDEN = 151_936, 1_000, 1_024  # classes; of "dense" and the head of "hidden"; H
K, DRAWS = 64, 50
LENGTHS = 64, 512, 2_048  # tokens of a sample
BATCH = 4_096  # tokens that are read at a time
CHUNK = 64  # rows of logits that exist at a time
# How far above the others its classes stand, at most. "even" has none: all classes are alike.
TEACHERS = {"peaked": 19.5, "normal": 16.0, "even": None}
REALISTIC = "peaked"  # as large models are: about 12 different classes in 50 draws
KINDS = f"topk:{K}", f"sampled:{DRAWS}", "hidden:bf16", "hidden:fp8", "dense:fp16"
PARTS = "ids values tokens index".split()
PART_OF = {"counts": "ids", "gaps": "ids", "tokens": "tokens"}  # columns; the others are values
TARGETS = (  # kind, field, limit
    ("topk:64", "again", "≥", 1e6),
    ("topk:64", "bytes", "≤", 200.0),
    ("sampled:50", "bytes", "≤", 40.0),
)


@dataclass(frozen=True)
class Settings:
    """tokens: of a cache; drawn: rows of predictions; rounds: of which the medians are."""

    tokens: int = 2**16
    drawn: int = 2**12
    vocab: int = VOCAB
    hidden: int = HIDDEN
    lengths: tuple[int, ...] = LENGTHS
    rounds: int = 5

    @property
    def usual(self):
        """The length of samples that all is measured at."""
        return self.lengths[len(self.lengths) // 2]

    def small(self):
        return Settings(2**10, 2**7, 5_000, 32, (64, 128), 2)


def run(settings):
    """-> {"rows": records, one for each kind, teacher and length of samples}"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        records = sorted(measured(settings), key=lambda x: KINDS.index(x["kind"]))
    finally:
        torch.set_num_threads(threads)
    return {"rows": records}


def measured(settings):
    for teacher in TEACHERS:
        say(f"{teacher} teacher: {settings.drawn} rows of predictions")
        pools, tokens, distinct = draw(teacher, settings)
        for kind, length in itertools.product(KINDS, settings.lengths):
            # What of a row is kept is the teacher's choice in the first two kinds only.
            if teacher == REALISTIC or (kind in KINDS[:2] and length == settings.usual):
                say(f"{kind}, samples of {length} tokens")
                facts = dict(teacher=teacher, kind=kind, length=length, distinct=distinct)
                yield {**facts, **measure(kind, pools[kind], tokens, length, settings)}


def draw(teacher, settings):
    """-> {kind: predictions of the rows}, token ids, different classes in a row's draws"""
    g = torch.Generator().manual_seed(0)
    v, boost = settings.vocab, TEACHERS[teacher]
    zipf = -1.1 * (torch.randperm(v, generator=g) + 1.0).log()
    top, drawn = [], []
    for number in range(settings.drawn // CHUNK):
        logits = torch.zeros(CHUNK, v)
        if boost is not None:
            logits = zipf + 0.8 * torch.randn(CHUNK, v, generator=g)
            own = torch.randint(v, (CHUNK, 4), generator=g)
            logits.scatter_add_(-1, own, boost * torch.rand(CHUNK, 4, generator=g))
        else:
            logits += 1e-3 * torch.randn(CHUNK, v, generator=g)
        top.append(most_probable(logits, K))
        drawn.append(SampledKind(v, DRAWS).draw(logits, number).ids)
    ids = torch.cat(drawn)
    distinct = statistics.fmean(len(row.unique()) for row in ids)
    rows = len(ids)
    hidden = torch.randn(rows, settings.hidden, generator=g).bfloat16()
    head = LinearHead(hidden, torch.randn(FEW, settings.hidden, generator=g).bfloat16())
    pools = [
        TopK(*(torch.cat([x[name] for x in top]) for name in ("ids", "logprobs"))),
        Sampled(ids, torch.ones_like(ids)),
        head,
        head,
        3 * torch.randn(rows, FEW, generator=g),
    ]
    pools = dict(zip(KINDS, pools, strict=True))
    tokens = torch.multinomial(zipf.softmax(-1), settings.tokens, True, generator=g)
    return pools, tokens, distinct


def measure(kind, pool, tokens, length, settings):
    """-> bytes a token and tokens a second"""
    g = torch.Generator().manual_seed(1)
    samples = tokens.view(-1, length)
    chosen = [torch.randperm(settings.drawn, generator=g)[:length] for _ in samples]
    predictions = [map_rows(pool, lambda x, rows=rows: x[rows]) for rows in chosen]
    batches = samples.view(-1, min(BATCH // length, len(samples)), length)
    head = pool if kind.startswith("hidden") else None
    vocab = settings.vocab if kind in KINDS[:2] else FEW
    times = {"write": [], "first": [], "again": []}

    def timed(name, function):
        start = time.process_time()
        function()
        times[name].append(tokens.numel() / (time.process_time() - start))

    def write(path):
        with cache.Writer(path, kind, vocab_size=vocab, teacher="drawn", head=head) as writer:
            for ids, prediction in zip(samples, predictions, strict=True):
                writer.add(ids, prediction)

    def read(stored):
        for ids in batches:
            stored[ids]

    with tempfile.TemporaryDirectory(prefix="kdkernels-bench-") as folder:
        for number in range(settings.rounds):
            path = Path(folder, str(number % 2))
            for file in path.glob("*"):
                file.unlink()
            timed("write", lambda path=path: write(path))
            stored = cache.open(path)
            timed("first", lambda stored=stored: read(stored))
            timed("again", lambda stored=stored: read(stored))
        speeds = {}
        for name, found in times.items():
            ends = {"": statistics.median, "_min": min, "_max": max}
            speeds.update((f"{name}{end}", f(found)) for end, f in ends.items())
        for workers in (1, 2):
            name = f"workers_{workers}"
            speeds[name] = None
            if length == settings.usual and kind in KINDS[:2]:
                speeds[name] = by_workers(path, batches, workers)
        return {"vocab": vocab, **sizes(stored, path), **speeds}


def sizes(stored, path):
    """Bytes a token on disk, without a head, and what they are for."""
    found = dict.fromkeys(PARTS, 0)
    columns = stored.codec.columns
    names = [column.name for column in columns for _ in range(column.sections)]
    for shard in stored.shards:
        for place in range(len(shard)):
            begin = np.frombuffer(shard.block(place), "<u4", len(names))
            for name, size in zip(names, begin, strict=True):
                found[PART_OF.get(name, "values")] += int(size) & ~COMPRESSED
    files = (x.stat().st_size for x in path.iterdir() if x.name != "head.safetensors")
    total = sum(files)
    found["index"] = total - sum(found.values())  # of blocks and sections, checksums, header
    return {"bytes": total / stored.tokens} | {
        f"bytes_{name}": found[name] / stored.tokens for name in PARTS
    }


class Batches(Dataset):
    """What a worker of a `DataLoader` reads: the tensors of `TopK` or `Sampled`."""

    def __init__(self, path, batches, times):
        self.stored, self.batches, self.times = cache.open(path), batches, times

    def __len__(self):
        return self.times * len(self.batches)

    def __getitem__(self, number):
        found = self.stored[self.batches[number % len(self.batches)]]
        return found.ids, found.counts if isinstance(found, Sampled) else found.logprobs


def by_workers(path, batches, workers):
    """Tokens a second that worker processes hand over, from the second epoch on."""
    dataset = Batches(path, batches, 4)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, persistent_workers=True, prefetch_factor=4
    )
    for _ in loader:
        pass
    start = time.perf_counter()
    for _ in loader:
        pass
    return dataset.times * batches.numel() / (time.perf_counter() - start)
